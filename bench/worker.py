"""A process that holds one variant and decodes when it is told to.

Requests come as lines of JSON on the standard input, answers go as lines of JSON to the standard
output; whatever else a library prints goes to the standard error. One process a variant: its peak
memory is its own, and nothing another variant compiled can be reused by accident.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO

import numpy as np
import torch

from .energy import NoEnergy, joules, nvml_counter
from .memory import Meter
from .variants import Loaded, Spec


class Session:
    """What one worker does for each request."""

    def __init__(self) -> None:
        self.loaded: Loaded | None = None
        self.meter: Meter | None = None

    def load(self, **spec: Any) -> dict[str, Any]:
        spec["backends"] = tuple(spec["backends"])
        chosen = Spec(**spec)
        if chosen.threads:
            torch.set_num_threads(chosen.threads)
        device = torch.device(chosen.device)
        if device.type == "cuda":
            torch.cuda.init()
        self.meter = Meter(device)
        base, start = self.meter.now(), time.perf_counter()
        self.loaded = Loaded(chosen)
        self.loaded.synchronize()
        return {
            "load_ms": 1e3 * (time.perf_counter() - start),
            "steps": self.loaded.steps,
            "parameters": self.loaded.parameters,
            "weight_bytes": self.loaded.weight_bytes,
            "base_bytes": base,
            "loaded_bytes": self.meter.now(),
            "memory_source": self.meter.source,
        }

    def image(self, side: int, save: str | None = None) -> dict[str, Any]:
        self.meter.reset()
        ms, spans, image = self.loaded.image(side)
        peak = self.meter.peak()
        if save is not None:
            np.save(save, image.float().cpu().numpy())
        return {
            "ms": ms,
            "prepare_ms": sum(spans.get("prepare", [])),
            "step_ms": spans["step"],
            "peak_bytes": peak,
        }

    def energy(self, side: int) -> dict[str, Any]:
        try:
            counter = nvml_counter(self.loaded.device)
        except NoEnergy as e:
            return {"joules": None, "watts": None, "note": f"no energy: {e}"}
        each, watts = joules(lambda: self.loaded.image(side), counter)
        return {"joules": each, "watts": watts, "note": None}


def serve(requests: TextIO, answers: TextIO) -> None:
    session = Session()
    for line in requests:
        request = json.loads(line)
        name = request.pop("do")
        try:
            answer = getattr(session, name)(**request)
        except Exception as e:  # every failure of the variant is an answer
            text = (str(e).strip() or type(e).__name__).splitlines()[0]
            answer = {"failed": f"{type(e).__name__}: {text}"[:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
