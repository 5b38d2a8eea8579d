"""Tile shape and refusals that the row-normalising kernels share."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor

from . import launching

MAX_D = 16384  # a whole row is held in registers: 64 values a thread at 8 warps


@dataclass(frozen=True)
class Config:
    rows: int  # rows of a tile
    num_warps: int


def columns(d: int) -> int:
    """Columns of a tile: the power of two that covers a row of `d` channels."""
    return max(16, triton.next_power_of_2(d))


def heuristic(d: int) -> Config:
    """About 2048 values a tile, so that short rows share a program and every thread has several
    16-byte loads in flight."""
    return Config(max(1, 2048 // columns(d)), 8 if columns(d) > 4096 else 4)


def key(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} D{x.shape[-1]}"


def candidates(d: int) -> list[Config]:
    rows = {1, heuristic(d).rows, 2 * heuristic(d).rows, 4 * heuristic(d).rows}
    return [Config(r, w) for r in sorted(rows) for w in (2, 4, 8) if r * columns(d) <= 16384]


def why_not(x: Tensor, *others: Tensor | None) -> str | None:
    if x.shape[-1] > MAX_D:
        return f"takes at most {MAX_D} channels, got {x.shape[-1]}"
    return launching.why_not(x, *others)
