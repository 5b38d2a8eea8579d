"""skip = silu(conv3x3(x) + bias) and its 2x2 maximum, each written once, in Triton.

Bytes: B*H*W*(Ci*sizeof(x) + 1.25*Co*sizeof(weight)). L2P at 4096 in bf16: level 0, an fp32 image
to 16 channels, 0.20 + 0.67 GB, 0.29 ms at 3.0 TB/s; level 1, 16 to 32, 0.47 GB, 0.16 ms; from level
2 on (32 to 64) 38.7 GFLOP each, 0.05 ms at 798 TFLOP/s, with 0.08 ms of bytes at level 2 and half
of that at each further one. Times are floors; nothing has been measured yet.

Up to 16 channels: squares (convolution.py). Three channels or fewer are packed: the nine taps of
all are one product of 27 values and 5 zeros, whose operand is joined from 48 loads a square, 12 a
pixel, each of which neighbouring threads do side by side: from an image with its channels first as
well as last, without a copy. One product over 16 padded channels a tap would do 144. Level 0 is
1368 instructions a thread for 4 pixels, 0.20 ms of issue.

Three channels of three, before level 0 at 8192 and 10240: a product would be 16 columns wide for
three, and the SiLU and the maximum with it. 81 multiply-adds a pixel instead, an output channel
after the other. At 8192 0.81 + 0.50 GB, 0.44 ms; 0.18 ms of multiply-adds.

More channels: pixels, in an order that leaves the pool's maximum to a thread's own registers or its
warp. cuDNN should multiply faster, but its result is written, read and written by SiLU and read by
the pool: 2.4 times the bytes. The kernel is expected to win at every level.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arithmetic, configs, convolution, launching
from .convolution import Config

OP = "local_decoder_down"
# Channels read and made, in the form of squares: the sixteen pixels of a square and the sums of its
# four fit a thread's registers.
MAX_SQUARES = (16, 64)
MAX_THIN = 4  # channels made by multiply-adds


@triton.jit(do_not_specialize=["rows", "columns"])
def down_squares_kernel(
    x_ptr,  # (B, 2*rows, 2*columns, CI)
    weight_ptr,  # (CO, 3, 3, CI) contiguous
    bias_ptr,  # (CO,)
    skip_ptr,  # (B, 2*rows, 2*columns, CO) contiguous
    pooled_ptr,  # (B, rows, columns, CO) contiguous
    rows,
    columns,
    x_stride_b,
    x_stride_h,
    x_stride_w,
    x_stride_c,
    CI: tl.constexpr,
    CO: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,  # squares of a tile
    COLUMNS: tl.constexpr,
):
    dtype = weight_ptr.dtype.element_ty
    image, first_row, first_column = convolution.tile(
        tl.program_id(0), rows, columns, ROWS, COLUMNS
    )
    square = tl.arange(0, ROWS * COLUMNS)
    row = first_row + square // COLUMNS
    column = first_column + square % COLUMNS
    inside = (row < rows) & (column < columns)
    sums = tl.zeros((ROWS * COLUMNS, BLOCK_CO), tl.float32)
    x_ptr += image * x_stride_b
    n = tl.arange(0, BLOCK_CO)
    bias = convolution.vector(bias_ptr, n, CO)
    if PACKED:  # a pixel of the squares after the other: only one has sums at a time
        values = convolution.around(
            x_ptr, row, column, inside, 2 * rows, 2 * columns,
            x_stride_h, x_stride_w, x_stride_c, dtype, CI,
        )  # fmt: skip
        weight = convolution.packed_weight(weight_ptr, 9 * CI, CI, CI, CO, BLOCK_CI, BLOCK_CO)
        y00 = arithmetic.dot(convolution.packed_taps(values, 0, 0, CI, BLOCK_CI), weight, sums)
        y01 = arithmetic.dot(convolution.packed_taps(values, 0, 1, CI, BLOCK_CI), weight, sums)
    else:
        values = convolution.neighbours(
            x_ptr, 2 * row - 1, 2 * column - 1, inside, 2 * rows, 2 * columns,
            x_stride_h, x_stride_w, x_stride_c, dtype, 4, CI, BLOCK_CI,
        )  # fmt: skip
        y00, y01, y10, y11 = convolution.add_squares(
            sums, sums, sums, sums, values, weight_ptr, 9 * CI, CI, CI, CO, BLOCK_CI, BLOCK_CO
        )
    pixels = image * rows * columns
    skip_ptr += pixels * (4 * CO)
    y00 = arithmetic.rounded(convolution.silu(y00 + bias, dtype), dtype)
    y01 = arithmetic.rounded(convolution.silu(y01 + bias, dtype), dtype)
    convolution.store_row(skip_ptr, y00, y01, row, column, inside, columns, 0, CO, BLOCK_CO)
    pooled = convolution.larger(y00, y01)
    if PACKED:
        y10 = arithmetic.dot(convolution.packed_taps(values, 1, 0, CI, BLOCK_CI), weight, sums)
        y11 = arithmetic.dot(convolution.packed_taps(values, 1, 1, CI, BLOCK_CI), weight, sums)
    y10 = arithmetic.rounded(convolution.silu(y10 + bias, dtype), dtype)
    y11 = arithmetic.rounded(convolution.silu(y11 + bias, dtype), dtype)
    convolution.store_row(skip_ptr, y10, y11, row, column, inside, columns, 1, CO, BLOCK_CO)
    pooled = convolution.larger(pooled, convolution.larger(y10, y11))
    at = (row * columns.to(tl.int64) + column)[:, None] * CO + n[None, :]
    tl.store(pooled_ptr + pixels * CO + at, pooled, mask=inside[:, None] & (n < CO)[None, :])


@triton.jit(do_not_specialize=["rows", "columns"])
def down_thin_kernel(
    x_ptr,  # (B, 2*rows, 2*columns, CI)
    weight_ptr,  # (CO, 3, 3, CI) contiguous, 16-bit
    bias_ptr,  # (CO,)
    skip_ptr,  # (B, 2*rows, columns, CO) contiguous words: two neighbours' values in 4 bytes each
    pooled_ptr,  # (B, rows, columns, CO) contiguous
    rows,
    columns,
    x_stride_b,
    x_stride_h,
    x_stride_w,
    x_stride_c,
    CI: tl.constexpr,
    CO: tl.constexpr,
    ROWS: tl.constexpr,  # squares of a tile
    COLUMNS: tl.constexpr,
):
    dtype = weight_ptr.dtype.element_ty
    image, first_row, first_column = convolution.tile(
        tl.program_id(0), rows, columns, ROWS, COLUMNS
    )
    square = tl.arange(0, ROWS * COLUMNS)
    row = first_row + square // COLUMNS
    column = first_column + square % COLUMNS
    inside = (row < rows) & (column < columns)
    values = convolution.around(
        x_ptr + image * x_stride_b, row, column, inside, 2 * rows, 2 * columns,
        x_stride_h, x_stride_w, x_stride_c, dtype, CI,
    )  # fmt: skip
    at = (row * columns.to(tl.int64) + column) * CO
    pooled_ptr += image * rows * columns * CO
    upper = ()  # of the square's upper pixels: the left one's, the right one's, channel by channel
    lower = ()
    for n in tl.static_range(CO):
        y00, y01, y10, y11 = convolution.thin_sums(values, weight_ptr + n * (9 * CI), CI)
        bias = tl.load(bias_ptr + n).to(tl.float32)
        y00 = arithmetic.rounded(convolution.silu(y00 + bias, dtype), dtype)
        y01 = arithmetic.rounded(convolution.silu(y01 + bias, dtype), dtype)
        y10 = arithmetic.rounded(convolution.silu(y10 + bias, dtype), dtype)
        y11 = arithmetic.rounded(convolution.silu(y11 + bias, dtype), dtype)
        pooled = convolution.larger(convolution.larger(y00, y01), convolution.larger(y10, y11))
        tl.store(pooled_ptr + at + n, pooled, mask=inside)
        upper += (y00, y01)
        lower += (y10, y11)
    skip_ptr += image * rows * columns * (2 * CO)
    at = (2 * row * columns.to(tl.int64) + column) * CO
    convolution.store_words(skip_ptr + at, upper, inside, CO)
    convolution.store_words(skip_ptr + at + columns * CO, lower, inside, CO)


@triton.jit(do_not_specialize=["rows", "columns"])
def down_pixels_kernel(
    x_ptr,  # (B, 2*rows, 2*columns, CI)
    weight_ptr,  # (CO, 3, 3, CI) contiguous
    bias_ptr,  # (CO,)
    skip_ptr,  # (B, 2*rows, 2*columns, CO) contiguous
    pooled_ptr,  # (B, rows, columns, CO) contiguous
    rows,
    columns,
    x_stride_b,
    x_stride_h,
    x_stride_w,
    x_stride_c,
    CI: tl.constexpr,
    CO: tl.constexpr,
    ROWS: tl.constexpr,  # squares of a tile
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    SQUARES: tl.constexpr = ROWS * COLUMNS
    GROUPS: tl.constexpr = SQUARES // 8
    BLOCKS: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N
    dtype = weight_ptr.dtype.element_ty
    image, first_row, first_column = convolution.tile(
        tl.program_id(0) // BLOCKS, rows, columns, ROWS, COLUMNS
    )
    n = tl.program_id(0) % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    # The order of the pixels puts a square's four where the tensor cores leave them to one thread
    # or at least to one warp: bit 3 of an accumulator's row is in a thread's registers, and so is
    # the highest when a warp has more than 16 rows.
    m = tl.arange(0, 4 * SQUARES)
    square = m // 16 % GROUPS * 8 + m % 8
    row = first_row + square // COLUMNS
    column = first_column + square % COLUMNS
    y = 2 * row + m // (2 * SQUARES)
    x = 2 * column + m // 8 % 2
    sums = tl.zeros((4 * SQUARES, BLOCK_N), tl.float32)
    sums = convolution.add_pixels(
        sums, x_ptr + image * x_stride_b, y - 1, x - 1, 2 * rows, 2 * columns,
        x_stride_h, x_stride_w, x_stride_c, weight_ptr, n, 9 * CI, CI,
        dtype, 3, CI, CO, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    skip = convolution.silu(sums + convolution.vector(bias_ptr, n, CO), dtype)
    pixels = image * rows * columns
    at = (y * (2 * columns.to(tl.int64)) + x)[:, None] * CO + n[None, :]
    inside = ((row < rows) & (column < columns))[:, None] & (n < CO)[None, :]
    tl.store(skip_ptr + pixels * (4 * CO) + at, arithmetic.rounded(skip, dtype), mask=inside)

    pooled = skip.reshape(2, GROUPS, 2, 8, BLOCK_N).permute(1, 3, 4, 0, 2)
    left, right = pooled.split()
    upper, lower = convolution.larger(left, right).split()
    pooled = convolution.larger(upper, lower).reshape(SQUARES, BLOCK_N)
    square = tl.arange(0, SQUARES)
    row = first_row + square // COLUMNS
    column = first_column + square % COLUMNS
    at = (row * columns.to(tl.int64) + column)[:, None] * CO + n[None, :]
    inside = ((row < rows) & (column < columns))[:, None] & (n < CO)[None, :]
    tl.store(pooled_ptr + pixels * CO + at, arithmetic.rounded(pooled, dtype), mask=inside)


def why_not(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    return convolution.why_not(x, weight, bias)


def thin(weight: Tensor) -> bool:
    """Whether so few channels are read and made that a product would mostly be of zeros."""
    after, before = weight.shape[:2]
    return weight.dtype != torch.float32 and convolution.packed(before) and after <= MAX_THIN


def heuristic(capability: tuple[int, int], x: Tensor, weight: Tensor, bias: Tensor) -> Config:
    after, before = weight.shape[:2]
    if weight.dtype == torch.float32 or before > MAX_SQUARES[0] or after > MAX_SQUARES[1]:
        return convolution.wide(capability, weight.dtype, after)
    if thin(weight):
        return Config(True, 2, 512, 0, 0, 4, 1)
    if not convolution.joins(capability, before):
        return _image(after)[0]
    # 64 squares for 4 warps: four warps' worth of rows for the tensor cores, and few enough sums a
    # thread for several blocks a processor. Of packed channels, whose loads give a thread a square
    # and which have the sums of one pixel at a time, 128.
    if convolution.packed(before):
        return Config(True, 16, 32, 0, 0, 4 if after <= 32 else 8, 1)
    return Config(True, 8, 32, 0, 0, 4, 1)


def _image(channels: int) -> list[Config]:
    """Pixels for an image of three channels: blocks of 16 waste the least of a product."""
    n = min(convolution.block(channels), 128)
    few = [Config(False, 8, 16, n, 16, warps, 3) for warps in (4, 8)]
    return [*few, Config(False, 16, 16, n, 16, 8, 3)]


def key(x: Tensor, weight: Tensor, bias: Tensor) -> str:
    after, before = weight.shape[:2]
    return f"{str(weight.dtype).removeprefix('torch.')} {before}-{after}"


def candidates(x: Tensor, weight: Tensor, bias: Tensor) -> list[Config]:
    after, before = weight.shape[:2]
    wide = convolution.wide_candidates(weight.dtype, after)
    if weight.dtype == torch.float32 or before > MAX_SQUARES[0] or after > MAX_SQUARES[1]:
        return wide
    if thin(weight):
        return [
            Config(True, 2, columns, 0, 0, warps, 1) for columns in (256, 512) for warps in (2, 4)
        ]
    if convolution.packed(before):
        if not convolution.joins(launching.capability(x), before):
            return _image(after)
        warps = 4 if after <= 32 else 8
        squares = [Config(True, 16, 32, 0, 0, warps, 1), Config(True, 8, 64, 0, 0, warps, 1)]
        return [*squares, *_image(after)[:2]]
    squares = [Config(True, 8, 32, 0, 0, 4, 1), Config(True, 4, 64, 0, 0, 4, 1)]
    return [*squares, Config(True, 16, 32, 0, 0, 8, 1), *wide[:2]]


def launch(
    x: Tensor,  # (B, H, W, Ci)
    weight: Tensor,  # (Co, Ci, 3, 3)
    bias: Tensor,  # (Co,)
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    images, height, width, before = x.shape
    rows, columns, after = height // 2, width // 2, weight.shape[0]
    to = {"dtype": weight.dtype, "device": x.device}
    skip = torch.empty((images, height, width, after), **to)
    pooled = torch.empty((images, rows, columns, after), **to)
    if skip.numel() == 0:
        return skip, pooled
    chosen = config or configs.choose(OP, Config, heuristic, key, (x, weight, bias))
    tile = chosen.rows // 2, chosen.columns // 2
    programs = convolution.tiles(images, rows, columns, *tile)
    given = (x, convolution.taps_last(weight), bias.contiguous())
    args = (*given, skip, pooled, rows, columns)
    shape = {"CI": before, "CO": after, "ROWS": tile[0], "COLUMNS": tile[1]}
    with torch.cuda.device_of(x):
        if chosen.squares and thin(weight):
            down_thin_kernel[(programs,)](
                *(*given, skip.view(-1).view(torch.int32), pooled, rows, columns),
                *x.stride(),
                **shape,
                **convolution.options(chosen),
            )
        elif chosen.squares:
            down_squares_kernel[(programs,)](
                *args,
                *x.stride(),
                **shape,
                BLOCK_CI=convolution.block_of(before),
                BLOCK_CO=convolution.block(after),
                PACKED=convolution.packed(before),
                **convolution.options(chosen),
            )
        else:
            down_pixels_kernel[(programs * triton.cdiv(after, chosen.block_n),)](
                *args,
                *x.stride(),
                **shape,
                BLOCK_N=chosen.block_n,
                BLOCK_K=chosen.block_k,
                **convolution.options(chosen),
            )
    return skip, pooled
