"""What this machine can do at best: a copy and a matrix product, measured in the same run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .machine import last_level_cache, machine
from .schema import Rates, Row, Timing
from .timing import Candidate, Rotation, clock_for, first_call, interleave


@dataclass(frozen=True)
class Ceilings:
    """GB/s of a copy (bytes read and bytes written) and TFLOP/s of a square matrix product, each
    of the fastest sample."""

    gb_s: float
    tflop_s: float

    def rates(
        self, work_bytes: int, work_flops: int, median_ms: float, *, speed: float = 1.0
    ) -> Rates:
        """The rates of a call, and how much of its floor's time it needed.

        The floor is the longer of bytes at the copy's rate and FLOPs at the product's; `percent`
        is floor over measured time. `speed` multiplies the product's rate: 2 for e4m3 in bf16.
        """
        product = self.tflop_s * speed
        memory_ms = work_bytes / self.gb_s / 1e6
        compute_ms = work_flops / product / 1e9
        return Rates(
            bytes=work_bytes,
            flops=work_flops,
            gb_s=gb_s(work_bytes, median_ms),
            tflop_s=tflop_s(work_flops, median_ms),
            ceiling_gb_s=self.gb_s,
            ceiling_tflop_s=product,
            bound="memory" if memory_ms >= compute_ms else "compute",
            percent=100 * max(memory_ms, compute_ms) / median_ms,
        )


def gb_s(count: int, ms: float) -> float:
    return count / ms / 1e6


def tflop_s(count: int, ms: float) -> float:
    return count / ms / 1e9


def measure(
    device: torch.device, dtype_name: str, dtype: torch.dtype, *, rounds: int, side: int | None
) -> tuple[Ceilings, list[Row]]:
    """Both ceilings in one dtype, and their rows.

    Args:
        side: of the square matrices; None is 8192 on a GPU and 1024 on a CPU.
    """
    cuda = device.type == "cuda"
    cache = last_level_cache(device)
    side = side or (8192 if cuda else 1024)
    count = max(2**29 if cuda else 0, 2 * cache) // dtype.itemsize
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    source = draw(count)
    copied = _time(
        Candidate("copy", lambda to, source: to.copy_(source)),
        (torch.empty_like(source), source),
        device,
        rounds,
        cache,
    )
    del source
    product = _time(
        Candidate("matmul", torch.mm), (draw(side, side), draw(side, side)), device, rounds, cache
    )
    moved, flops = 2 * count * dtype.itemsize, 2 * side**3
    ceilings = Ceilings(gb_s(moved, copied.min_ms), tflop_s(flops, product.min_ms))
    operands = 3 * side * side * dtype.itemsize
    rows = [
        _row("copy", {"elements": count}, copied, (moved, 0), device, dtype_name),
        _row("matmul", {"side": side}, product, (operands, flops), device, dtype_name),
    ]
    return ceilings, rows


def _time(candidate: Candidate, args, device: torch.device, rounds: int, cache: int) -> Timing:
    clock, rotation = clock_for(device), Rotation(args, cache)
    first = first_call(candidate, rotation, clock)
    timing = interleave([candidate], rotation, clock, rounds=rounds, seconds=5)[candidate.name]
    timing.first_ms = first
    return timing


def _row(
    name: str,
    shape: dict[str, int],
    timing: Timing,
    work: tuple[int, int],
    device: torch.device,
    dtype: str,
) -> Row:
    rates = Rates(*work, gb_s(work[0], timing.median_ms), tflop_s(work[1], timing.median_ms))
    return Row(
        kind="ceiling",
        name=name,
        site="",
        shape=shape,
        dtype=dtype,
        backend="torch",
        status="measured",
        machine=machine(device),
        timing=timing,
        rates=rates,
    )
