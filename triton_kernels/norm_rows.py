"""Tile shape and refusals that the row-normalising kernels share."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from . import e4m3, launching

MAX_D = 16384  # a whole row is held in registers: 64 values a thread at 8 warps


@dataclass(frozen=True)
class Config:
    rows: int  # rows of a tile
    num_warps: int


@triton.jit
def load(ptrs, mask, PIECES: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tuple of the pieces of rows, `ptrs` and `mask` those of the first. All are asked for before
    any is used."""
    loaded = (tl.load(ptrs, mask=mask, other=0.0),)
    for i in tl.static_range(1, PIECES):
        loaded += (tl.load(ptrs + i * BLOCK_D, mask=mask, other=0.0),)
    return loaded


@triton.jit
def modulate(
    x,  # tuples of pieces: rows (ROWS, BLOCK_D), in any dtype
    weight, scale,
    shift,  # anything when HAS_SHIFT is False
    y_ptrs,  # of the first piece; e4m3 when QUANTIZE
    row_scale_ptrs,  # (ROWS,), used when QUANTIZE
    inside,  # of each piece
    row_inside,  # (ROWS,)
    D,
    eps,
    HAS_SHIFT: tl.constexpr,
    QUANTIZE: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store x / root(mean square) * weight * (1 + scale) + shift, or its e4m3 and their scales."""
    first = x[0].to(tl.float32)
    squares = first * first
    for i in tl.static_range(1, PIECES):
        more = x[i].to(tl.float32)
        squares += more * more
    mean = tl.sum(squares, axis=1) / D
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None]
    y = ()
    for i in tl.static_range(PIECES):
        gain = weight[i].to(tl.float32) * (1.0 + scale[i].to(tl.float32))
        piece = x[i].to(tl.float32) * inverse * gain
        if HAS_SHIFT:
            piece += shift[i].to(tl.float32)
        y += (piece,)
    if QUANTIZE:
        row_scale = e4m3.row_scale(e4m3.largest_in_pieces(y, PIECES))
        tl.store(row_scale_ptrs, row_scale, mask=row_inside)
    for i in tl.static_range(PIECES):
        out = y[i]
        if QUANTIZE:
            out = e4m3.quantized(out, row_scale)
        tl.store(y_ptrs + i * BLOCK_D, out.to(y_ptrs.dtype.element_ty), mask=inside)


def columns(d: int) -> int:
    """Columns of a tile: the power of two that covers a row of `d` channels."""
    return max(16, triton.next_power_of_2(d))


def pieces(d: int) -> tuple[int, int]:
    """(PIECES, BLOCK_D) of a row of `d` channels: three powers of two, as 1536 is, have no idle
    lanes, where one would have a quarter of them; else one piece, perhaps wider than the row."""
    third = d // 3
    if d % 3 == 0 and third & (third - 1) == 0 and third >= 256:
        return 3, third
    return 1, columns(d)


def heuristic(d: int) -> Config:
    """About 2048 values a tile, so that short rows share a program and every thread has several
    16-byte loads in flight."""
    return Config(max(1, 2048 // columns(d)), 8 if columns(d) > 4096 else 4)


def heuristic_in_pieces(d: int) -> Config:
    """As above; of three pieces two warps hold a row, 24 values a thread in three 16-byte loads:
    what every warp does for a row, its sum and root, is done half as often."""
    return Config(1, 2) if pieces(d)[0] == 3 and pieces(d)[1] <= 512 else heuristic(d)


def key(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} D{x.shape[-1]}"


def candidates(d: int) -> list[Config]:
    rows = {1, heuristic(d).rows, 2 * heuristic(d).rows, 4 * heuristic(d).rows}
    return [Config(r, w) for r in sorted(rows) for w in (2, 4, 8) if r * columns(d) <= 16384]


def why_not(x: Tensor, *others: Tensor | None) -> str | None:
    if x.shape[-1] > MAX_D:
        return f"takes at most {MAX_D} channels, got {x.shape[-1]}"
    return launching.why_not(x, *others)
