"""Kills a job again and again: `killed.py SAMPLING FOLDER SEED TIMES`, prints what came of it.

A process is forked for every run, so that the imports are paid once. A run dies by SIGKILL in the
middle of a line of the code that keeps work, chosen at random among all it would execute.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from samplings import SAMPLINGS, Calls

import pixeldiff.jobs
import pixeldiff.out_files

KEEPING = (str(Path(pixeldiff.jobs.__file__).parent), pixeldiff.out_files.__file__)


class Lines:
    """Counts lines of the code that keeps work; the last one kills."""

    def __init__(self, last: int | None = None) -> None:
        self.count, self.last = 0, last

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(KEEPING):
            return None
        return self.line

    def line(self, frame, event, arg):
        self.count += event == "line"
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.line


def forked(work: Callable[[], dict]) -> dict | None:
    """What `work` returned in a process of its own, or None where that was killed."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.write(writer, json.dumps(work()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as file:
        told = file.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return None
    assert status == 0
    return json.loads(told)


def run(name: str, folder: Path | None, last: int | None = None) -> dict:
    lines = Lines(last)
    torch.set_num_threads(1)
    with Calls() as calls:
        sys.settrace(lines)
        image = SAMPLINGS[name](resume=folder)
        sys.settrace(None)
    digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()
    return {"pixels": digest, "calls": calls.count, "lines": lines.count}


def main(name: str, folder: Path, seed: int, times: int) -> dict:
    dice = random.Random(seed)
    plain = forked(lambda: run(name, None))
    kept = forked(lambda: run(name, folder))
    rows = []
    for _ in range(times):
        points = [dice.randrange(1, kept["lines"]) for _ in range(2)]
        killed = [forked(lambda p=p: run(name, folder, p)) is None for p in points]
        rows.append({"points": points, "killed": killed, **forked(lambda: run(name, folder))})
        rows[-1]["left"] = os.path.exists(folder)
    return {"plain": plain, "kept": kept, "rows": rows}


if __name__ == "__main__":
    name, folder, seed, times = sys.argv[1:]
    print(json.dumps(main(name, Path(folder), int(seed), int(times))))
