"""Rows of (..., D) tensors as the elementwise kernels take them: three axes, and tiles of rows."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor


@dataclass(frozen=True)
class Config:
    rows: int  # rows of a tile
    columns: int  # channels of a tile, a power of two
    num_warps: int


def heuristic(x: Tensor) -> Config:
    """Two 16-byte vectors of each input a thread: enough bytes in flight to cover the latency of
    memory, and half the programs of one vector."""
    return _tile(x, vectors=2, num_warps=4)


def key(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} D{x.shape[-1]}"


def candidates(x: Tensor) -> list[Config]:
    return [_tile(x, vectors, warps) for warps in (2, 4, 8) for vectors in (1, 2, 4)]


def _tile(x: Tensor, vectors: int, num_warps: int) -> Config:
    values = vectors * 32 * num_warps * 16 // x.element_size()
    D = x.shape[-1]
    even = D & -D  # the largest power of two in D: no idle lanes, if it is worth a tile
    columns = min(values, even if even >= 128 else triton.next_power_of_2(D))
    return Config(values // columns, columns, num_warps)


def programs(config: Config, N: int, D: int) -> int:
    """Tiles of one (N, D) image."""
    return triton.cdiv(N, config.rows) * triton.cdiv(D, config.columns)


def three_axes(t: Tensor) -> Tensor:
    """(..., D) as (B, N, D); a view, unless four or more axes lie in memory in another order."""
    while t.dim() < 3:
        t = t[None]
    return t if t.dim() == 3 else t.flatten(0, -3)
