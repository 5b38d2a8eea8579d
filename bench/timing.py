"""Timing of calls against each other: interleaved, warmed up, on data that no cache still holds."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .schema import Timing

LEAST_ROUNDS = 3
CACHE_MULTIPLE = 3  # data touched between two uses of the same bytes, in last-level caches


@dataclass(frozen=True)
class Candidate:
    """One implementation. `context` is entered around every sample, outside the timed span."""

    name: str
    call: Callable[..., Any]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def tensor_bytes(args: Sequence[Any]) -> int:
    return sum(a.numel() * a.element_size() for a in args if isinstance(a, Tensor))


class Rotation:
    """Copies of one call's arguments, enough that all of them exceed the cache several times.

    Each copy keeps its last result too, so that an allocator cannot hand the same, still cached
    bytes to every call as output.

    Args:
        args: of one call; tensors are cloned, other values shared.
        cache: bytes of the last-level cache; 0 makes a single copy.
    """

    def __init__(self, args: Sequence[Any], cache: int) -> None:
        one = max(1, tensor_bytes(args))
        count = max(1 if cache == 0 else 2, -(-CACHE_MULTIPLE * cache // one))
        self.copies = [
            tuple(a.clone() if isinstance(a, Tensor) else a for a in args) for _ in range(count)
        ]
        self._results: list[Any] = [None] * count
        self._next = 0

    def __call__(self, call: Callable[..., Any]) -> None:
        """Call it on the next copy."""
        i = self._next
        self._next = (i + 1) % len(self.copies)
        self._results[i] = call(*self.copies[i])

    def release(self) -> None:
        """Drop the results that are kept."""
        self._results = [None] * len(self.copies)


class CpuClock:
    """Wall clock. Short calls are timed several at a time."""

    span_ms = 0.5

    def synchronize(self) -> None:
        pass

    def sample(self, run: Callable[[], None], calls: int) -> tuple[float, float | None]:
        """(ms of one call, ms the host was busy with it or None)."""
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return 1e3 * (time.perf_counter() - start) / calls, None


class CudaClock:
    """CUDA events around several calls, queued behind a spinning kernel.

    The spin lets the host run ahead, so that the events bound the GPU's own time even where a
    launch takes longer than the kernel. The host's time is returned beside it.
    """

    span_ms = 2.0

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host_ms = 0.05
        # Cycles of `torch.cuda._sleep` per millisecond; its clock is at most 2 GHz.
        self.cycles = 2_000_000

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def sample(self, run: Callable[[], None], calls: int) -> tuple[float, float | None]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronize()
        spin_ms = min(20.0, 0.2 + 2 * self.host_ms * calls)
        torch.cuda._sleep(int(spin_ms * self.cycles))
        start.record()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        host = 1e3 * (time.perf_counter() - begin) / calls
        end.record()
        end.synchronize()
        self.host_ms = max(self.host_ms, host)  # of the slowest to launch: long enough for all
        return start.elapsed_time(end) / calls, host


Clock = CpuClock | CudaClock


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def first_call(candidate: Candidate, rotation: Rotation, clock: Clock) -> float:
    """Milliseconds of the first call, compilation included; raises what the call raises."""
    with candidate.context():
        clock.synchronize()
        start = time.perf_counter()
        rotation(candidate.call)
        clock.synchronize()
        return 1e3 * (time.perf_counter() - start)


def interleave(
    candidates: Sequence[Candidate],
    rotation: Rotation,
    clock: Clock,
    *,
    rounds: int,
    seconds: float,
) -> dict[str, Timing]:
    """Time the candidates in turn, A B C A B C, on the same rotating data.

    Each must have been called once (`first_call`); two more calls warm it up and say how many
    calls a sample takes. Whatever drifts (clocks, temperature, other processes) hits all alike.

    Args:
        rounds: samples of each candidate.
        seconds: after which no further round starts, once there are `LEAST_ROUNDS`.
    """
    calls: dict[str, int] = {}
    for c in candidates:
        with c.context():
            clock.sample(lambda c=c: rotation(c.call), 1)
            ms, _ = clock.sample(lambda c=c: rotation(c.call), 1)
        calls[c.name] = max(1, min(50, round(clock.span_ms / max(ms, 1e-4))))
    samples: dict[str, list[float]] = {c.name: [] for c in candidates}
    host: dict[str, list[float]] = {c.name: [] for c in candidates}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        for c in candidates:
            with c.context():
                ms, busy = clock.sample(lambda c=c: rotation(c.call), calls[c.name])
            samples[c.name].append(ms)
            if busy is not None:
                host[c.name].append(busy)
    rotation.release()
    return {
        c.name: summarise(
            samples[c.name], host_ms=statistics.median(host[c.name]) if host[c.name] else None
        )
        for c in candidates
    }


def summarise(
    samples: Sequence[float], *, first_ms: float | None = None, host_ms: float | None = None
) -> Timing:
    """Median and spread of samples in ms."""
    middle = statistics.median(samples)
    return Timing(
        median_ms=middle,
        min_ms=min(samples),
        max_ms=max(samples),
        mad_ms=statistics.median(abs(s - middle) for s in samples),
        samples_ms=list(samples),
        first_ms=first_ms,
        host_ms=host_ms,
    )
