"""What the two pixel_adaln kernels share: the modulation's product, its norm, and their tiles.

A tile is `rows` patches by `columns` channels, that is columns/p pixels, of every chunk it needs.
The weight rows of its chunks are gathered in the order (chunk, pixel, channel), so that one product
makes them all and the chunk is the high bits of its columns. Those bits lie in a thread's own
registers on sm_80, 90 and 120: splitting the accumulator into chunks moves nothing. (On sm_100 the
two halves of 8 warps share the columns, and four chunks pass through shared memory.) Rows stay
contiguous along D, so that the gather costs no width of loads.

What else the epilogue reads is loaded before the product. That hides its latency, and it decides a
layout: Triton then converts those 16-bit values to the accumulator's layout once. Loaded after,
they pull the fp32 chunks through shared memory to their own layout instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arithmetic, launching

CHANNELS = (8, 16, 32)  # of a pixel

# Tiles run through the patches of such a group before they go on to the next pixels. The u of 2048
# patches (6 MB at D = 1536) and the weights that the blocks of one GPU then share are about the
# same size, and both stay in any second-level cache; the weights pass 8 times at 2048 x 2048.
GROUP_PATCHES = 2048


@dataclass(frozen=True)
class Config:
    rows: int  # patches of a tile
    columns: int  # channels of a chunk of a tile: columns/p pixels
    block_k: int  # of D at a time
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # per thread; None leaves it to the compiler


def why_not(q: Tensor, *others: Tensor) -> str | None:
    for t in others:
        if t.dtype != q.dtype:
            return f"needs every tensor in the dtype of q, {q.dtype}, got {t.dtype}"
    if q.shape[2] not in CHANNELS:
        return f"takes 8, 16 or 32 channels of a pixel, got {q.shape[2]}"
    return launching.why_not(q, *others)


def key(q: Tensor, u: Tensor) -> str:
    return f"{str(q.dtype).removeprefix('torch.')} p{q.shape[2]} D{u.shape[1]}"


def grid(config: Config, rows: int, pixels: int, p: int) -> tuple[int]:
    return (triton.cdiv(rows, config.rows) * triton.cdiv(pixels * p, config.columns),)


def options(config: Config) -> dict[str, int | None]:
    """What a launch passes to the compiler besides its tile."""
    return {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": config.max_registers,
    }


def constants(config: Config, p: int, D: int) -> dict[str, int | bool]:
    """The constexpr arguments that the two kernels share."""
    return {
        "P": p,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "BLOCK_K": config.block_k,
        "EVEN_K": D % config.block_k == 0,
        "GROUP": max(1, GROUP_PATCHES // config.rows),
    }


def is_fp32(q: Tensor) -> bool:
    return q.dtype == torch.float32


def candidates(q: Tensor, columns: int) -> list[Config]:
    """`columns` makes 128 of all chunks together; twice as many fetch a quarter less from the
    cache for each product, but leave room for one block a processor."""
    if is_fp32(q):
        return [Config(32, 32, 16, 8, 2), Config(64, 32, 16, 8, 2), Config(64, 32, 32, 8, 2)]
    return [
        Config(128, columns, 64, 8, 3, 128),
        Config(128, columns, 64, 8, 3),
        Config(128, columns, 64, 4, 3),
        Config(128, columns, 32, 8, 4),
        Config(128, columns, 32, 4, 4),
        Config(64, columns, 64, 4, 3),
        Config(64, columns, 32, 4, 4),
        Config(128, 2 * columns, 64, 8, 3),
        Config(128, 2 * columns, 64, 8, 4),
        Config(128, 2 * columns, 32, 8, 4),
    ]


@triton.jit
def tile(rows, pixels, ROWS: tl.constexpr, PIXELS: tl.constexpr, GROUP: tl.constexpr):
    """(first patch, first pixel) of this program's tile; patches of a group are the inner loop."""
    row_tiles = tl.cdiv(rows, ROWS)
    pixel_tiles = tl.cdiv(pixels, PIXELS)
    program = tl.program_id(0)
    first = program // (GROUP * pixel_tiles) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    inside = program % (GROUP * pixel_tiles)
    return (first + inside % size) * ROWS, inside // size * PIXELS


@triton.jit
def modulation(
    u_ptr,  # (rows, D)
    weight_ptr,  # (6*P*pixels, D)
    row,  # (ROWS,) patches; those past the last one get the last one's values
    first_pixel,
    rows,
    pixels,
    D,
    u_stride,
    weight_stride,
    FIRST: tl.constexpr,  # of the CHUNKS wanted
    CHUNKS: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """The projection without its bias, fp32 (ROWS, CHUNKS * COLUMNS), chunks side by side."""
    column = tl.arange(0, CHUNKS * COLUMNS)
    pixel = tl.minimum(first_pixel + column % COLUMNS // P, pixels - 1)
    weight_row = pixel * (6 * P) + (FIRST + column // COLUMNS) * P + column % P
    k = tl.arange(0, BLOCK_K)
    u_row = tl.minimum(row, rows - 1)
    u_ptrs = u_ptr + (u_row.to(tl.int64) * u_stride)[:, None] + k[None, :]
    weight_ptrs = weight_ptr + (weight_row.to(tl.int64) * weight_stride)[None, :] + k[:, None]
    m = tl.zeros((ROWS, CHUNKS * COLUMNS), tl.float32)
    for start in range(0, D, BLOCK_K):
        if EVEN_K:
            u = tl.load(u_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            u = tl.load(u_ptrs, mask=(k < D - start)[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=(k < D - start)[:, None], other=0.0)
        m = arithmetic.dot(u, weight, m)
        u_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    return m


@triton.jit
def row_of(ptr, index):
    """A vector, fp32, to add to every row of a tile."""
    return tl.load(ptr + index).to(tl.float32)[None, :]


@triton.jit
def norm_modulate(
    q,  # fp32 (ROWS, COLUMNS)
    gain,  # norm_weight * (1 + scale)
    shift,
    eps,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """rms_norm over the P channels of each pixel, times gain, plus shift."""
    # q meets the gain before it is normalised, so that q is in the gain's layout from the start.
    pixels = q.reshape(ROWS, COLUMNS // P, P)
    inverse = tl.rsqrt(tl.sum(pixels * pixels, 2) / P + eps)
    h = (q * gain).reshape(ROWS, COLUMNS // P, P) * inverse[:, :, None]
    return h.reshape(ROWS, COLUMNS) + shift
