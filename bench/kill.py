"""Commands of the demo models, killed and continued: the same bytes as without.

Processes are forked from one that has imported the package, so that a trial is its work.

Each trial starts a command with `--resume`, kills it by SIGKILL at a moment drawn at random from
the time that its work takes, and runs it again until it ends by itself, killing it once more on the
way in every second trial.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import pixeldiff.models.l2p
import pixeldiff.models.pid.decoder  # noqa: F401  (imported before the forks)
from pixeldiff import cli
from pixeldiff.out_files import written_whole

from .machine import machine

VERSION = 1
CPU = torch.device("cpu")
PROMPTS = ("a red circle", "a blue star on a white background", "a green ring", "a pink heart")
_PID = ("--tile", "8x8", "--model", "demo", "--seed", "3")
_L2P = ("--model", "demo", "--steps", "6", "--seed", "3", "--guidance", "2")
COMMANDS: dict[str, tuple[str, ...]] = {
    "decode, sync tiles": ("decode", "latent.safetensors", *_PID),
    "decode, independent tiles": (
        *("decode", "latent.safetensors", "--tile-mode", "independent"),
        *_PID,
    ),
    "decode, a batch of two": ("decode", "small.safetensors", "--model", "demo", "--seed", "3"),
    "generate, tiles": (
        *("generate", PROMPTS[0], "--size", "192x192", "--tile", "128x128"),
        *_L2P,
    ),
    "generate, prompts": ("generate", "--prompts", "prompts.txt", "--size", "128x128", *_L2P),
}


@dataclass
class Trial:
    """One command, killed and continued."""

    command: str
    after: list[float]  # seconds from the start of its work to each kill
    kept: list[int]  # finished parts on the disk after each kill
    same: bool  # all its outputs have the bytes of an uninterrupted run
    clean: bool  # nothing else is left


@dataclass
class Report:
    machine: Any
    command: str
    trials: list[Trial] = field(default_factory=list)
    schema: int = VERSION


def run(times: int, seed: int, command: str, told: Callable[[Trial], object]) -> Report:
    """`times` trials, the commands in turn; `told` of each.

    Raises:
        RuntimeError: a command failed that was not killed; with what it wrote.
    """
    dice = random.Random(seed)
    report = Report(dataclasses.asdict(machine(CPU)), command)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        _inputs(home)
        plain = {name: _uninterrupted(home, name) for name in list(COMMANDS)[:times]}
        for number in range(times):
            name = list(COMMANDS)[number % len(COMMANDS)]
            report.trials.append(_trial(home, name, *plain[name], dice, 1 + number % 2))
            told(report.trials[-1])
    return report


def save(report: Report, path: Path) -> None:
    with written_whole([path]) as (partial,):
        partial.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")


def _inputs(home: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    save_file(
        {"latent": torch.randn(1, 16, 16, 20, generator=generator)}, home / "latent.safetensors"
    )
    save_file({"latent": torch.randn(2, 16, 8, 8, generator=generator)}, home / "small.safetensors")
    (home / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")


class _Command:
    """A command in a process of its own."""

    def __init__(self, home: Path, name: str, out: Path) -> None:
        self.name, self.said = name, home / "said.txt"
        self.code: int | None = None
        self._pid = os.fork()
        if self._pid == 0:
            _run_command(home, self.said, [*COMMANDS[name], "-o", str(out / "a.png")])

    def poll(self) -> bool:
        """Whether it has ended."""
        if self.code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def wait(self, seconds: float = math.inf) -> bool:
        """Whether it ended within so many seconds."""
        end = time.perf_counter() + seconds
        while not self.poll() and time.perf_counter() < end:
            time.sleep(0.002)
        return self.poll()

    def finish(self) -> None:
        self.wait()
        if self.code != 0:
            raise RuntimeError(f"{self.name}: ended with {self.code}: {self.said.read_text()}")

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        self.wait()


def _run_command(home: Path, said: Path, words: list[str]) -> None:
    """In a forked process, which does not return."""
    code = 70
    try:
        os.chdir(home)
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        cli.main([*words, "--device", "cpu", "--quiet", "--resume"], standalone_mode=False)
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    finally:
        os._exit(code)


def _work_begins(command: _Command, out: Path) -> float:
    """Waits until the command has said what its job is; the time of that."""
    while not (out / "a.png.job" / "job.json").exists() and not command.poll():
        time.sleep(0.002)
    return time.perf_counter()


def _uninterrupted(home: Path, name: str) -> tuple[dict[str, str], float]:
    """Hashes of the outputs, and the seconds of its work."""
    with tempfile.TemporaryDirectory(dir=home) as folder:
        command = _Command(home, name, Path(folder))
        begun = _work_begins(command, Path(folder))
        command.finish()
        return _hashes(Path(folder)), time.perf_counter() - begun


def _trial(
    home: Path,
    name: str,
    expected: dict[str, str],
    seconds: float,
    dice: random.Random,
    kills: int,
) -> Trial:
    trial = Trial(name, [], [], False, False)
    with tempfile.TemporaryDirectory(dir=home) as folder:
        out = Path(folder)
        for _ in range(kills):
            command = _Command(home, name, out)
            begun = _work_begins(command, out)
            if command.wait(dice.uniform(0, seconds)):  # less was left of the work
                command.finish()
                continue
            command.kill()
            trial.after.append(round(time.perf_counter() - begun, 3))
            trial.kept.append(len(list(out.rglob("*.piece"))))
        _Command(home, name, out).finish()
        trial.same = _hashes(out) == expected
        trial.clean = sorted(p.name for p in out.iterdir()) == sorted(expected)
    return trial


def _hashes(out: Path) -> dict[str, str]:
    files: Sequence[Path] = sorted(out.glob("*.png"))
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
