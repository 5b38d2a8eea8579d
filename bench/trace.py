"""What PyTorch's profiler saw of a step: its kernels, which call launched each, and the time left.

Read from the trace in Chrome's format, which names for every kernel the launch it came from. Steps
and calls are found by the annotations of `Calls` and `step`.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

STEP, CALL = "bench step", "bench call "
_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_LAUNCHES = {"cuda_runtime", "cuda_driver"}


class TraceError(RuntimeError):
    """The profiler returned no step, or a step without kernels; the message says which."""


@dataclass(frozen=True)
class Kernel:
    """One kernel, copy or fill on the device; on a CPU a whole call.

    Args:
        start, end: ms. call: the number of the call that launched it; None if it was outside any,
            as all are that a graph replays.
    """

    name: str
    start: float
    end: float
    call: int | None

    @property
    def ms(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Step:
    """From its first kernel's start to its last one's end; on a CPU, from call to return."""

    start: float
    end: float
    kernels: tuple[Kernel, ...]

    @property
    def ms(self) -> float:
        return self.end - self.start

    @property
    def busy_ms(self) -> float:
        """Time in which at least one kernel ran."""
        total, reached = 0.0, self.start
        for k in sorted(self.kernels, key=lambda k: k.start):
            total += max(0.0, k.end - max(k.start, reached))
            reached = max(reached, k.end)
        return total


@contextlib.contextmanager
def step() -> Iterator[None]:
    """Around what counts as one step."""
    with record_function(STEP):
        yield


def record(work: Callable[[], Any], device: torch.device) -> list[Step]:
    """The steps of `work` under the profiler.

    Raises:
        TraceError: see there.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with profile(activities=activities) as prof:
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        prof.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return read(events, on_device=device.type == "cuda")


def read(events: Sequence[dict[str, Any]], *, on_device: bool) -> list[Step]:
    """The steps of a trace, in their order.

    Raises:
        TraceError: see there.
    """
    complete = [e for e in events if e.get("ph") == "X"]
    named = [e for e in complete if e.get("cat") == "user_annotation"]
    steps = sorted((e for e in named if e["name"] == STEP), key=_start)
    calls = sorted((e for e in named if e["name"].startswith(CALL)), key=_start)
    if not steps:
        raise TraceError("the profiler's trace holds no step")
    ranges = [(_start(s), _end(s)) for s in steps]
    kernels: list[list[Kernel]] = [[] for _ in steps]
    if on_device:
        launched = {
            e["args"]["correlation"]: _start(e)
            for e in complete
            if e.get("cat") in _LAUNCHES and "correlation" in e.get("args", {})
        }
        call_ranges = [(_start(c), _end(c)) for c in calls]
        for e in complete:
            if e.get("cat") not in _ON_DEVICE:
                continue
            at = launched.get(e.get("args", {}).get("correlation"))
            # Without its launch, its own time tells: the device is waited for between steps.
            where = _inside(ranges, _start(e) if at is None else at)
            if where is not None:
                i = None if at is None else _inside(call_ranges, at)
                number = None if i is None else _number(calls[i])
                kernels[where].append(Kernel(e["name"], _start(e), _end(e), number))
    else:
        for e in calls:
            where = _inside(ranges, _start(e))
            if where is not None:
                kernels[where].append(Kernel(e["name"], _start(e), _end(e), _number(e)))
    if not all(kernels):
        raise TraceError(f"the profiler saw no kernel in {sum(not k for k in kernels)} steps")
    found = []
    for (start, end), own in zip(ranges, kernels, strict=True):
        own.sort(key=lambda k: k.start)
        if on_device:
            start, end = own[0].start, max(k.end for k in own)
        found.append(Step(start, end, tuple(own)))
    return found


def _start(event: dict[str, Any]) -> float:
    return float(event["ts"]) / 1e3


def _end(event: dict[str, Any]) -> float:
    return (float(event["ts"]) + float(event["dur"])) / 1e3


def _number(call: dict[str, Any]) -> int:
    return int(call["name"].removeprefix(CALL))


def _inside(ranges: Sequence[tuple[float, float]], at: float) -> int | None:
    """Which of the ranges, disjoint and in order, holds `at`."""
    i = bisect.bisect_right(ranges, at, key=lambda r: r[0]) - 1
    return i if i >= 0 and at <= ranges[i][1] else None
