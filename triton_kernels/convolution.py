"""3x3 convolutions over images with the channels last, as products: what the kernels of the local
decoder share.

Two forms, both with the tile's sums in registers:

Squares, for few channels, where bandwidth is what counts. A row of the product is a 2x2 square of
pixels and each pixel of the square has its own sums, so that the 16 pixels around and in a square
are read once for its four results, not 9 a result; a 2x2 pool is then a maximum of four registers.
No product multiplies by the zeros of a banded matrix: a NaN reaches the nine pixels around it and
no other.

Pixels, for many channels, where the tensor cores are what counts: a row is a pixel, and the loop
runs through the nine taps of one block of channels before the next block, so that eight of nine
reads find their lines in the cache.

Offsets inside an image are int64: a plane of 10240 x 10240 x 32 values passes 2^31.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arithmetic, launching

PACKED_CHANNELS = 3  # with so few, the nine taps of all channels are one product


@dataclass(frozen=True)
class Config:
    squares: bool  # the form of the tile's rows
    rows: int  # pixels of a tile
    columns: int
    block_n: int  # channels of the result; of squares always all
    block_k: int  # channels read at a time; of squares always all
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # per thread; None leaves it to the compiler


def options(config: Config) -> dict[str, int | None]:
    """What a launch passes to the compiler besides its tile."""
    return {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": config.max_registers,
    }


def block(channels: int) -> int:
    """The least power of two that covers the channels and that a product can sum over."""
    return max(16, triton.next_power_of_2(channels))


def packed(channels: int) -> bool:
    return channels <= PACKED_CHANNELS


def block_of(channels: int) -> int:
    """Values that one product of the squares sums over."""
    return block(9 * channels if packed(channels) else channels)


def taps_last(weight: Tensor) -> Tensor:
    """(Co, Ci, 3, 3) -> (Co, 3, 3, Ci) contiguous: no copy if the weight is channels last."""
    return weight.permute(0, 2, 3, 1).contiguous()


def roomy(capability: tuple[int, int]) -> bool:
    """Whether a block may take 160 KB of shared memory; 8.6, 8.9 and 12.0 have 99 KB."""
    return capability in ((8, 0), (9, 0)) or capability[0] in (10, 11)


def wide(capability: tuple[int, int], dtype: torch.dtype, channels: int) -> Config:
    """Pixels for a result of so many channels. A heuristic; not yet measured."""
    if dtype == torch.float32:  # on the FMA units: a tile whose operands fit the registers
        return Config(False, 4, 8, min(block(channels), 32), 16, 4, 2)
    n = min(block(channels), 128)
    if roomy(capability):
        # 128 x 128: 32 KB a stage, so that two blocks share a processor and one multiplies while
        # the other stores.
        return Config(False, 8, 16, n, 64, 8 if n > 64 else 4, 3)
    return Config(False, 8, 16, n, 32, 8 if n > 64 else 4, 3)


def wide_candidates(dtype: torch.dtype, channels: int) -> list[Config]:
    n = min(block(channels), 128)
    if dtype == torch.float32:
        small = min(n, 32)
        return [
            Config(False, 4, 8, small, 16, 4, 2),
            Config(False, 8, 8, small, 16, 4, 2),
            Config(False, 8, 8, small, 16, 8, 2),
        ]
    few = [
        Config(False, 8, 16, n, 64, 8, 3),
        Config(False, 8, 16, n, 32, 8, 4),
        Config(False, 8, 8, n, 64, 4, 4),
    ]
    if n <= 64:  # of more, these spill
        few[:0] = [Config(False, 8, 16, n, 64, 4, 3), Config(False, 8, 16, n, 32, 4, 4)]
        few.append(Config(False, 16, 16, n, 64, 8, 3))
    if channels >= 256:
        few.append(Config(False, 8, 16, 256, 64, 8, 3))
    return few


def joins(capability: tuple[int, int], channels: int) -> bool:
    """Whether the form of squares compiles for these channels: for 10.0 Triton 3.7 cannot place an
    operand that was joined, as a packed one is."""
    return not (packed(channels) and capability[0] in (10, 11))


@triton.jit
def silu(x, dtype: tl.constexpr):
    """x / (1 + exp(-x)), for a result that is rounded to `dtype`."""
    if dtype == tl.float32 or arithmetic.INTERPRETED:
        return x / (1.0 + tl.exp(-x))
    # The special-function units' own 2^y and 1/y, wrong by a few 1e-7, without what makes exp and
    # "/" right where their results are below the normal numbers: 5 instructions in place of 14,
    # which would be half of the thin kernels.
    return tl.inline_asm_elementwise(
        """{
            .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 t, t;
            mul.f32 $0, $1, t;
        }""",
        "=f,f",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def larger(a, b):
    """The maximum, NaN if one of them is, as of max_pool2d."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tile(program, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(image, int64; first row; first column) of a program's tile of `rows` x `columns`."""
    across = tl.cdiv(columns, COLUMNS)
    down = tl.cdiv(rows, ROWS)
    image = program // (across * down)
    inside = program % (across * down)
    return image.to(tl.int64), inside // across * ROWS, inside % across * COLUMNS


def tiles(images: int, rows: int, columns: int, tile_rows: int, tile_columns: int) -> int:
    return images * triton.cdiv(rows, tile_rows) * triton.cdiv(columns, tile_columns)


@triton.jit
def vector(ptr, index, SIZE: tl.constexpr):
    """fp32 (1, n), to add to every row; 0 past SIZE."""
    return tl.load(ptr + index, mask=index < SIZE, other=0.0).to(tl.float32)[None, :]


# --- Squares --------------------------------------------------------------------------------------


@triton.jit
def around(
    ptr,  # (height, width, C), the image
    row, column,  # (squares,); pixel 2*row, 2*column is a square's first
    wanted,  # (squares,); of others nothing is read
    height, width,
    stride_h, stride_w, stride_c,
    dtype: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """A tuple of the 4*4*C values in and around each square, zero outside the image."""
    values = ()
    corner = ptr + row.to(tl.int64) * (2 * stride_h) + column.to(tl.int64) * (2 * stride_w)
    for dy in tl.static_range(-1, 3):
        for dx in tl.static_range(-1, 3):
            y = 2 * row + dy
            x = 2 * column + dx
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & wanted
            for c in tl.static_range(C):
                at = corner + (dy * stride_h + dx * stride_w + c * stride_c)
                value = tl.load(at, mask=inside, other=0.0)
                values += (arithmetic.rounded(value.to(tl.float32), dtype),)
    return values


@triton.jit
def packed_taps(values, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr):
    """(squares, SIZE): of `around` what pixel (A, B) of a square sees, taps before channels, and
    zeros."""
    columns = (values[(4 * A + B) * C],)
    for i in tl.static_range(1, 9 * C):
        columns += (values[(4 * (A + i // (3 * C)) + B + i // C % 3) * C + i % C],)
    zero = tl.zeros_like(columns[0])
    for _ in tl.static_range(9 * C, SIZE):
        columns += (zero,)
    # The first half and the last are joined first: which half is the highest bit of the index.
    for bit in tl.static_range(1, 8):
        if SIZE >> bit:
            joined = (tl.join(columns[0], columns[SIZE >> bit]),)
            for i in tl.static_range(1, SIZE >> bit):
                joined += (tl.join(columns[i], columns[i + (SIZE >> bit)]),)
            columns = joined
    return columns[0].reshape(zero.shape[0], SIZE)


@triton.jit
def thin_sums(values, weight_ptr, C: tl.constexpr):
    """fp32 (squares,) of the four pixels of each square: one channel of the convolution of what
    `around` gave, by the 9*C weights from `weight_ptr` on, taps before channels."""
    y00 = tl.zeros_like(values[0]).to(tl.float32)
    y01, y10, y11 = y00, y00, y00
    for r in tl.static_range(3):
        for s in tl.static_range(3):
            for c in tl.static_range(C):
                w = tl.load(weight_ptr + ((3 * r + s) * C + c)).to(tl.float32)
                y00 += values[(4 * r + s) * C + c].to(tl.float32) * w
                y01 += values[(4 * r + s + 1) * C + c].to(tl.float32) * w
                y10 += values[(4 * r + s + 4) * C + c].to(tl.float32) * w
                y11 += values[(4 * r + s + 5) * C + c].to(tl.float32) * w
    return y00, y01, y10, y11


@triton.jit
def store_words(ptr, pixels, inside, N: tl.constexpr):
    """Two neighbouring pixels of N channels, as N words of two values: a value alone would be
    half a store. `pixels` has channel by channel the left one's and the right one's, 16-bit."""
    for word in tl.static_range(N):
        low = _bits(pixels[2 * (2 * word % N) + 2 * word // N])
        high = _bits(pixels[2 * ((2 * word + 1) % N) + (2 * word + 1) // N])
        tl.store(ptr + word, low | (high << 16), mask=inside)


@triton.jit
def _bits(x):
    return x.to(tl.uint16, bitcast=True).to(tl.int32)


@triton.jit
def packed_weight(ptr, stride, tap_stride, C: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr,
                  BLOCK_N: tl.constexpr):  # fmt: skip
    """(SIZE, BLOCK_N) of a weight (N, 3, 3, C) in the order of `packed_taps`."""
    k = tl.arange(0, SIZE)
    n = tl.arange(0, BLOCK_N)
    at = (k // C * tap_stride + k % C)[:, None] + (n * stride)[None, :]
    return tl.load(ptr + at, mask=(k < 9 * C)[:, None] & (n < N)[None, :], other=0.0)


@triton.jit
def _add_tap(sums, x, weights, R: tl.constexpr, S: tl.constexpr):
    """sums + x W[r, s], where the kernel has such a tap."""
    if (R >= 0 and R < 3) and (S >= 0 and S < 3):
        sums = arithmetic.dot(x, weights[3 * R + S], sums)
    return sums


@triton.jit
def neighbours(
    ptr,  # (height, width, C), the image
    row, column,  # of each tile's row; pixel row, column is the first of the SIDE x SIDE
    wanted,
    height, width,
    stride_h, stride_w, stride_c,
    dtype: tl.constexpr,  # what they are rounded to
    SIDE: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tuple of SIDE*SIDE pixels' channels, (rows, BLOCK_C) each, zero outside the image. All are
    asked for before any is used: the compiler moves no load over the barriers of a product."""
    c = tl.arange(0, BLOCK_C)
    pointers = row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
    pointers = ptr + pointers[:, None] + (c.to(tl.int64) * stride_c)[None, :]
    values = ()
    for dy in tl.static_range(SIDE):
        for dx in tl.static_range(SIDE):
            y = row + dy
            x = column + dx
            inside = ((y >= 0) & (y < height) & (x >= 0) & (x < width) & wanted)[:, None]
            if C < BLOCK_C:
                inside &= (c < C)[None, :]
            value = tl.load(pointers + (dy * stride_h + dx * stride_w), mask=inside, other=0.0)
            if value.dtype != dtype:
                value = arithmetic.rounded(value.to(tl.float32), dtype)
            values += (value,)
    return values


@triton.jit
def add_squares(
    s00, s01, s10, s11,  # sums of a square's pixels, (squares, BLOCK_N) fp32 each
    values,  # the 16 `neighbours` from a square's pixel (-1, -1) on
    weight_ptr,  # (N, 3, 3, C); channels contiguous
    weight_stride, tap_stride,
    C: tl.constexpr,
    N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sums and conv3x3."""
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_C)
    weight_ptrs = weight_ptr + k[:, None] + (n * weight_stride)[None, :]
    mask = (k < C)[:, None] & (n < N)[None, :]
    weights = ()
    for tap in tl.static_range(9):
        weights += (tl.load(weight_ptrs + tap * tap_stride, mask=mask, other=0.0),)
    for y in tl.static_range(4):
        for x in tl.static_range(4):
            value = values[4 * y + x]
            s00 = _add_tap(s00, value, weights, y, x)
            s01 = _add_tap(s01, value, weights, y, x - 1)
            s10 = _add_tap(s10, value, weights, y - 1, x)
            s11 = _add_tap(s11, value, weights, y - 1, x - 1)
    return s00, s01, s10, s11


@triton.jit
def store_row(
    ptr,  # (2*rows, 2*columns, N) contiguous, the image
    left, right,  # (squares, BLOCK_N) in its dtype: row A of each square
    row, column,
    inside,  # (squares,)
    columns,
    A: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One store for two pixels: neighbours' channels are one run of memory."""
    y = tl.join(left, right).permute(0, 2, 1).reshape(row.shape[0], 2 * BLOCK_N)
    j = tl.arange(0, 2 * BLOCK_N)
    n = j % BLOCK_N
    at = (((2 * row + A) * columns.to(tl.int64) + column) * (2 * N))[:, None]
    if N == BLOCK_N:
        at += j[None, :]
    else:
        at += (j // BLOCK_N * N + n)[None, :]
    tl.store(ptr + at, y, mask=inside[:, None] & (n < N)[None, :])


# --- Pixels ---------------------------------------------------------------------------------------


@triton.jit
def add_pixels(
    sums,  # (pixels, BLOCK_N) fp32
    ptr,  # (height, width, C), the image
    y, x,  # (pixels,) where the first tap lies, perhaps outside
    height, width,
    stride_h, stride_w, stride_c,
    weight_ptr,  # (N, TAPS, TAPS, C); channels contiguous
    n,  # (BLOCK_N,) of the result's channels
    weight_stride, tap_stride,
    dtype: tl.constexpr,  # that of the weight, which x is rounded to
    TAPS: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sums and the convolution of the image, zero outside it, at TAPS x TAPS taps."""
    k = tl.arange(0, BLOCK_K)
    pointers = ptr + (y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w)[:, None]
    pointers += (k.to(tl.int64) * stride_c)[None, :]
    weight_ptrs = weight_ptr + (n.to(tl.int64) * weight_stride)[None, :] + k[:, None]
    BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    for i in range(BLOCKS * TAPS * TAPS):
        start = i // (TAPS * TAPS) * BLOCK_K
        tap = i % (TAPS * TAPS)
        dy = tap // TAPS
        dx = tap % TAPS
        inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        inside = inside[:, None]
        if C % BLOCK_K != 0:
            inside &= (k < C - start)[None, :]
        at = pointers + (dy * stride_h + dx * stride_w + start.to(tl.int64) * stride_c)
        value = tl.load(at, mask=inside, other=0.0)
        if value.dtype != dtype:
            value = arithmetic.rounded(value.to(tl.float32), dtype)
        at = weight_ptrs + (tap * tap_stride + start)
        if C % BLOCK_K == 0 and N % BLOCK_N == 0:
            weight = tl.load(at)
        else:
            weight = tl.load(at, mask=(k < C - start)[:, None] & (n < N)[None, :], other=0.0)
        sums = arithmetic.dot(value, weight, sums)
    return sums


def why_not(*tensors: Tensor) -> str | None:
    """Of tensors with any strides."""
    for t in tensors:
        if t.dtype not in launching.DTYPES:
            names = ", ".join(str(d).removeprefix("torch.") for d in launching.DTYPES)
            return f"takes {names}, got {t.dtype}"
    return launching.why_not_device(*tensors)
