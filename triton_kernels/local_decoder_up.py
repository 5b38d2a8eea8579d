"""silu(conv3x3([u, skip]) + bias), u = conv3x3(x doubled) + up_bias, in Triton.

Bytes: H*W*(B*Ci/4 + S*Cs + B*Co)*sizeof(x). L2P at 4096 in bf16, level 0 (16 channels everywhere):
1.21 GB, 0.40 ms at 3.0 TB/s; unfused u and the doubled x alone are 1.6 GB more. Level 1 (32):
0.07 + 0.27 + 0.13 GB, 0.16 ms. Times are floors; nothing has been measured yet.

Few channels (up to 32, of the result 16): squares of the result (convolution.py), without u.
Between the two convolutions is no activation, so that as far as u goes they are one: each of the
four pixels of a square is a 3x3 convolution of the x around it, 9*Ci*4*Co multiply-adds a square,
where the four phases and the second convolution would take 16*Ci*Cu + 36*Cu*Co; with Ci = Cu that
is the phases for nothing, and u is never made, in memory or anywhere. At the image's edge u is zero
outside and not what the composed kernel would find there, so that the first and last rows and
columns have compositions of their own, 9 kinds of squares in all. compose_kernel makes them at
every call, in fp32 with one rounding, which replaces eager's rounding of u: 0.02 GFLOP at level 0.
A program makes the squares of one kind in one tile; the edges cost 2 % more programs at 4096.

Level 0, per pixel: 72 + 128 bytes into shared memory, 2304 multiply-adds of the composition (64
columns a product) and 2304 of the skip (16 columns, whose operand is read in twice the time the
product takes): 0.20 ms of the tensor cores, 1361 instructions for two pixels a thread 0.39 ms of
issue. Shared memory is the longest: 0.70 ms, two fifths of it operands of products, the rest their
way there from global memory through registers. Estimated 0.8 to 0.9 ms, 45 to 50 % of the floor:
docs/kernels/estimates.md.

An infinity of x reaches the same results as in the reference, but where that finds NaN (u's
infinities have both signs) the composition may find an infinity.

More channels, other dtypes (fp16 could not hold the composition of small weights): the four phases
(sum_taps_kernel, raise_kernel), u in memory, and join_kernel over both sources without a
concatenation. Level 4, 256 channels at 256 x 256: 34 + 77 GFLOP, 0.14 ms at 798 TFLOP/s against
0.05 for its bytes. cuDNN should multiply faster than these (as it does in matrix products, by a
quarter), but takes 72 in place of 32 GFLOP for the first convolution, and three passes over the
result for the sum and SiLU: the kernels are expected to win at every level.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arithmetic, configs, convolution, launching
from .convolution import Config

OP = "local_decoder_up"
# Channels of x and u, of skip and of the result, of the form of squares.
MAX_SQUARES = (32, 32, 16)
COMPOSED_ROWS = 256 if launching.INTERPRETED else 32  # of a program that composes


@triton.jit
def kind_of(row, rows):
    """0 of the image's first row of squares, 2 of its last, 1 between; of a single row 0."""
    return tl.where(row <= 0, 0, tl.where(row >= rows - 1, 2, 1))


@triton.jit
def exists(kind, rows):
    """Whether an image of so many rows of squares has one of this kind."""
    return (kind == 0) | (rows > 2) | ((kind == 2) & (rows == 2))


@triton.jit
def part_of_tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(image, int64; kind; first row; first column) of a program: the squares of one kind in one
    tile. First all tiles of an image for the kind between, then those at its edges for the others.
    """
    down = tl.cdiv(rows, ROWS)
    across = tl.cdiv(columns, COLUMNS)
    programs = down * across + 2 * (down + across) + 4
    image = tl.program_id(0) // programs
    i = tl.program_id(0) % programs
    kind_y = 1
    kind_x = 1
    y = i // across
    x = i % across
    i -= down * across
    if i >= 0:
        if i < 2 * across:
            kind_y = i // across * 2
            y = kind_y // 2 * (down - 1)
            x = i % across
        elif i < 2 * (across + down):
            i -= 2 * across
            kind_x = i // down * 2
            x = kind_x // 2 * (across - 1)
            y = i % down
        else:
            i -= 2 * (across + down)
            kind_y = i // 2 * 2
            kind_x = i % 2 * 2
            y = kind_y // 2 * (down - 1)
            x = kind_x // 2 * (across - 1)
    return image.to(tl.int64), kind_y * 3 + kind_x, y * ROWS, x * COLUMNS


@triton.jit(do_not_specialize=["rows", "columns"])
def compose_kernel(
    up_weight_ptr,  # (CU, CI, 3, 3)
    up_bias_ptr,  # (CU,)
    weight_ptr,  # (CO, CU + Cs, 3, 3)
    bias_ptr,  # (CO,)
    composed_ptr,  # (9, 9, BLOCK_CI, 4*BLOCK_CO) contiguous
    shift_ptr,  # (9, 4*BLOCK_CO) fp32, contiguous
    rows,
    columns,
    up_stride_n,
    up_stride_c,
    up_stride_r,
    up_stride_s,
    stride_n,
    stride_c,
    stride_r,
    stride_s,
    CI: tl.constexpr,
    CU: tl.constexpr,
    CO: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    BLOCK_CU: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A row of the result is one of the 9 squares of x around a square, and a channel of x; a column
    # a pixel (a, b) of the square and its channel.
    kind = tl.program_id(1)
    if not (exists(kind // 3, rows) & exists(kind % 3, columns)):
        return
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ci = i % BLOCK_CI
    ey = i // BLOCK_CI // 3 - 1
    ex = i // BLOCK_CI % 3 - 1
    j = tl.arange(0, 4 * BLOCK_CO)
    a = j // (2 * BLOCK_CO)
    b = j // BLOCK_CO % 2
    co = j % BLOCK_CO
    k = tl.arange(0, BLOCK_CU)
    up_ptrs = up_weight_ptr + (ci * up_stride_c)[:, None] + (k * up_stride_n)[None, :]
    ptrs = weight_ptr + (co.to(tl.int64) * stride_n)[None, :] + (k * stride_c)[:, None]
    real = (ci < CI) & (ey < 2)
    middle = k < CU
    up_bias = tl.load(up_bias_ptr + k, mask=middle, other=0.0).to(tl.float32)
    # Row -1 of u is above the image for its first squares, row 2 below it for its last.
    top = kind // 3 == 0
    bottom = (kind // 3 == 2) | (rows == 1)
    left = kind % 3 == 0
    right = (kind % 3 == 2) | (columns == 1)
    sums = tl.zeros((BLOCK, 4 * BLOCK_CO), tl.float32)
    shift = tl.load(bias_ptr + co, mask=co < CO, other=0.0).to(tl.float32)
    for u in range(16):
        uy = u // 4 - 1
        ux = u % 4 - 1
        r = uy - a + 1
        s = ux - b + 1
        tap = (r >= 0) & (r < 3) & (s >= 0) & (s < 3) & (co < CO)
        tap &= ((uy >= 0) | (not top)) & ((uy < 2) | (not bottom))
        tap &= ((ux >= 0) | (not left)) & ((ux < 2) | (not right))
        at = ptrs + (r * stride_r + s * stride_s)[None, :]
        weight = tl.load(at, mask=tap[None, :] & middle[:, None], other=0.0)
        shift += tl.sum(weight.to(tl.float32) * up_bias[:, None], 0)
        # Row ey of x meets row uy of u through the two taps t and t + 1, where there are such.
        t = 2 * ey - uy + 1
        v = 2 * ex - ux + 1
        row = (t * up_stride_r + v * up_stride_s)[:, None]
        for q in tl.static_range(4):
            inside = (t >= -(q // 2)) & (t < 3 - q // 2) & (v >= -(q % 2)) & (v < 3 - q % 2) & real
            at = up_ptrs + (row + (q // 2 * up_stride_r + q % 2 * up_stride_s))
            up = tl.load(at, mask=inside[:, None] & middle[None, :], other=0.0)
            sums = arithmetic.dot(up, weight, sums)
    at = (kind * (9 * BLOCK_CI) + i)[:, None] * (4 * BLOCK_CO) + j[None, :]
    sums = arithmetic.rounded(sums, composed_ptr.dtype.element_ty)
    tl.store(composed_ptr + at, sums, mask=(ey < 2)[:, None])
    if tl.program_id(0) == 0:
        tl.store(shift_ptr + kind * (4 * BLOCK_CO) + j, shift)


@triton.jit(do_not_specialize=["rows", "columns", "skips"])
def up_squares_kernel(
    x_ptr,  # (B, rows, columns, CI)
    skip_ptr,  # (skips, 2*rows, 2*columns, CS)
    composed_ptr,  # (9, 9, BLOCK_CI, 4*BLOCK_CO) contiguous
    shift_ptr,  # (9, 4*BLOCK_CO) fp32, contiguous
    weight_ptr,  # of skip, (CO, 3, 3, CS), channels contiguous
    out_ptr,  # (B, 2*rows, 2*columns, CO) contiguous
    rows,
    columns,
    skips,
    x_stride_b,
    x_stride_h,
    x_stride_w,
    x_stride_c,
    skip_stride_b,
    skip_stride_h,
    skip_stride_w,
    skip_stride_c,
    weight_stride,
    tap_stride,
    CI: tl.constexpr,
    CS: tl.constexpr,
    CO: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    BLOCK_CS: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,  # squares of a tile
    COLUMNS: tl.constexpr,
):
    SQUARES: tl.constexpr = ROWS * COLUMNS
    dtype = x_ptr.dtype.element_ty
    image, kind, first_row, first_column = part_of_tile(rows, columns, ROWS, COLUMNS)
    if not (exists(kind // 3, rows) & exists(kind % 3, columns)):
        return
    square = tl.arange(0, SQUARES)
    row = first_row + square // COLUMNS
    column = first_column + square % COLUMNS
    part = (row < rows) & (column < columns)
    part &= kind_of(row, rows) * 3 + kind_of(column, columns) == kind
    x_ptr += image * x_stride_b
    skip_ptr += image % skips * skip_stride_b
    out_ptr += image * rows * columns * (4 * CO)

    values = convolution.neighbours(
        x_ptr, row - 1, column - 1, part, rows, columns,
        x_stride_h, x_stride_w, x_stride_c, dtype, 3, CI, BLOCK_CI,
    )  # fmt: skip
    if PACKED:
        beside = convolution.around(
            skip_ptr, row, column, part, 2 * rows, 2 * columns,
            skip_stride_h, skip_stride_w, skip_stride_c, dtype, CS,
        )  # fmt: skip
    elif BLOCK_CS <= 16:  # of more channels the registers hold one half at a time
        beside = convolution.neighbours(
            skip_ptr, 2 * row - 1, 2 * column - 1, part, 2 * rows, 2 * columns,
            skip_stride_h, skip_stride_w, skip_stride_c, dtype, 4, CS, BLOCK_CS,
        )  # fmt: skip
    c = tl.arange(0, BLOCK_CI)
    j = tl.arange(0, 4 * BLOCK_CO)
    weight_ptrs = composed_ptr + kind * (9 * BLOCK_CI * 4 * BLOCK_CO)
    weight_ptrs += c[:, None] * (4 * BLOCK_CO) + j[None, :]
    sums = tl.zeros((SQUARES, 4 * BLOCK_CO), tl.float32)
    for tap in tl.static_range(9):
        weight = tl.load(weight_ptrs + tap * (BLOCK_CI * 4 * BLOCK_CO))
        sums = arithmetic.dot(values[tap], weight, sums)
    sums += tl.load(shift_ptr + kind * (4 * BLOCK_CO) + j)[None, :]
    upper, lower = sums.reshape(SQUARES, 2, 2, BLOCK_CO).permute(0, 3, 2, 1).split()
    s00, s01 = upper.split()
    s10, s11 = lower.split()

    if PACKED:  # one row of the squares after the other
        weight = convolution.packed_weight(
            weight_ptr, weight_stride, tap_stride, CS, CO, BLOCK_CS, BLOCK_CO
        )
        s00 = arithmetic.dot(convolution.packed_taps(beside, 0, 0, CS, BLOCK_CS), weight, s00)
        s01 = arithmetic.dot(convolution.packed_taps(beside, 0, 1, CS, BLOCK_CS), weight, s01)
    else:
        if BLOCK_CS > 16:
            beside = convolution.neighbours(
                skip_ptr, 2 * row - 1, 2 * column - 1, part, 2 * rows, 2 * columns,
                skip_stride_h, skip_stride_w, skip_stride_c, dtype, 4, CS, BLOCK_CS,
            )  # fmt: skip
        s00, s01, s10, s11 = convolution.add_squares(
            s00, s01, s10, s11, beside, weight_ptr, weight_stride, tap_stride,
            CS, CO, BLOCK_CS, BLOCK_CO,
        )  # fmt: skip
    s00 = arithmetic.rounded(convolution.silu(s00, dtype), dtype)
    s01 = arithmetic.rounded(convolution.silu(s01, dtype), dtype)
    convolution.store_row(out_ptr, s00, s01, row, column, part, columns, 0, CO, BLOCK_CO)
    if PACKED:
        s10 = arithmetic.dot(convolution.packed_taps(beside, 1, 0, CS, BLOCK_CS), weight, s10)
        s11 = arithmetic.dot(convolution.packed_taps(beside, 1, 1, CS, BLOCK_CS), weight, s11)
    s10 = arithmetic.rounded(convolution.silu(s10, dtype), dtype)
    s11 = arithmetic.rounded(convolution.silu(s11, dtype), dtype)
    convolution.store_row(out_ptr, s10, s11, row, column, part, columns, 1, CO, BLOCK_CO)


@triton.jit
def sum_taps_kernel(
    weight_ptr,  # (CU, CI, 3, 3)
    summed_ptr,  # (2, 2, CU, 2, 2, CI) contiguous
    stride_n,
    stride_c,
    stride_r,
    stride_s,
    CI: tl.constexpr,
    CU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of the taps for an even and an odd row or column those summed that meet the same of x."""
    phase = tl.program_id(1)
    a = phase // 2
    b = phase % 2
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = i // (4 * CI)
    y = i // (2 * CI) % 2
    x = i // CI % 2
    ptrs = weight_ptr + n.to(tl.int64) * stride_n + i % CI * stride_c
    total = tl.zeros((BLOCK,), tl.float32)
    for r in tl.static_range(3):
        for s in tl.static_range(3):
            # Tap r of doubled row a reads row (a + r - 1) // 2 of x, the first of the two is a - 1.
            meets = ((a + r + 1) // 2 - a == y) & ((b + s + 1) // 2 - b == x)
            at = ptrs + (r * stride_r + s * stride_s)
            total += tl.load(at, mask=meets & (n < CU), other=0.0).to(tl.float32)
    at = phase * (4 * CU * CI) + i
    total = arithmetic.rounded(total, summed_ptr.dtype.element_ty)
    tl.store(summed_ptr + at, total, mask=n < CU)


@triton.jit(do_not_specialize=["rows", "columns"])
def raise_kernel(
    x_ptr,  # (B, rows, columns, CI)
    weight_ptr,  # (2, 2, CU, 2, 2, CI) contiguous, of sum_taps_kernel
    bias_ptr,  # (CU,)
    u_ptr,  # (B, 2*rows, 2*columns, CU) contiguous
    rows,
    columns,
    x_stride_b,
    x_stride_h,
    x_stride_w,
    x_stride_c,
    CI: tl.constexpr,
    CU: tl.constexpr,
    ROWS: tl.constexpr,  # pixels of x of a tile
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """u = conv3x3(x doubled) + bias, at every second row and column."""
    BLOCKS: tl.constexpr = (CU + BLOCK_N - 1) // BLOCK_N
    dtype = x_ptr.dtype.element_ty
    # The four phases and the blocks of channels of a tile follow each other: they read the same x.
    phase = tl.program_id(0) // BLOCKS % 4
    a = phase // 2
    b = phase % 2
    image, first_row, first_column = convolution.tile(
        tl.program_id(0) // (4 * BLOCKS), rows, columns, ROWS, COLUMNS
    )
    n = tl.program_id(0) % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, ROWS * COLUMNS)
    row = first_row + m // COLUMNS
    column = first_column + m % COLUMNS
    sums = tl.zeros((ROWS * COLUMNS, BLOCK_N), tl.float32)
    sums = convolution.add_pixels(
        sums, x_ptr + image * x_stride_b, row + a - 1, column + b - 1, rows, columns,
        x_stride_h, x_stride_w, x_stride_c, weight_ptr + phase * (4 * CU * CI), n, 4 * CI, CI,
        dtype, 2, CI, CU, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    u = arithmetic.rounded(sums + convolution.vector(bias_ptr, n, CU), dtype)
    width = 2 * columns.to(tl.int64)
    at = ((2 * row + a) * width + 2 * column + b)[:, None] * CU + n[None, :]
    inside = ((row < rows) & (column < columns))[:, None] & (n < CU)[None, :]
    tl.store(u_ptr + image * rows * columns * (4 * CU) + at, u, mask=inside)


@triton.jit(do_not_specialize=["height", "width", "skips"])
def join_kernel(
    u_ptr,  # (B, height, width, CU) contiguous
    skip_ptr,  # (skips, height, width, CS)
    weight_ptr,  # (CO, 3, 3, CU + CS) contiguous
    bias_ptr,  # (CO,)
    out_ptr,  # (B, height, width, CO) contiguous
    height,
    width,
    skips,
    skip_stride_b,
    skip_stride_h,
    skip_stride_w,
    skip_stride_c,
    CU: tl.constexpr,
    CS: tl.constexpr,
    CO: tl.constexpr,
    ROWS: tl.constexpr,  # pixels of a tile
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """silu(conv3x3([u, skip]) + bias)."""
    BLOCKS: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N
    BOTH: tl.constexpr = CU + CS
    dtype = u_ptr.dtype.element_ty
    image, first_row, first_column = convolution.tile(
        tl.program_id(0) // BLOCKS, height, width, ROWS, COLUMNS
    )
    n = tl.program_id(0) % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, ROWS * COLUMNS)
    y = first_row + m // COLUMNS
    x = first_column + m % COLUMNS
    sums = tl.zeros((ROWS * COLUMNS, BLOCK_N), tl.float32)
    sums = convolution.add_pixels(
        sums, u_ptr + image * height * width * CU, y - 1, x - 1, height, width,
        width * CU, CU, 1, weight_ptr, n, 9 * BOTH, BOTH, dtype, 3, CU, CO, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    sums = convolution.add_pixels(
        sums, skip_ptr + image % skips * skip_stride_b, y - 1, x - 1, height, width,
        skip_stride_h, skip_stride_w, skip_stride_c, weight_ptr + CU, n, 9 * BOTH, BOTH,
        dtype, 3, CS, CO, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    out = convolution.silu(sums + convolution.vector(bias_ptr, n, CO), dtype)
    at = (y * width.to(tl.int64) + x)[:, None] * CO + n[None, :]
    inside = ((y < height) & (x < width))[:, None] & (n < CO)[None, :]
    out_ptr += image * height * width * CO
    tl.store(out_ptr + at, arithmetic.rounded(out, dtype), mask=inside)


def why_not(
    x: Tensor, skip: Tensor, up_weight: Tensor, up_bias: Tensor, weight: Tensor, bias: Tensor
) -> str | None:
    return convolution.why_not(x, skip, up_weight, up_bias, weight, bias)


def composes(x: Tensor, skip: Tensor, up_weight: Tensor, weight: Tensor) -> bool:
    """Whether the form of squares is worth considering for these channels and this dtype."""
    few, beside, out = MAX_SQUARES
    channels = max(x.shape[3], up_weight.shape[0])
    return (
        x.dtype == torch.bfloat16
        and channels <= few
        and skip.shape[3] <= beside
        and weight.shape[0] <= out
    )


def heuristic(
    capability: tuple[int, int],
    x: Tensor,
    skip: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Config:
    beside = skip.shape[3]
    if not (composes(x, skip, up_weight, weight) and convolution.joins(capability, beside)):
        return convolution.wide(capability, x.dtype, weight.shape[0])
    # 64 squares for 4 warps: one product of the tensor cores has their rows, and four blocks share
    # a processor. Of packed channels, whose loads give a thread a square, 128.
    return Config(True, 16 if convolution.packed(skip.shape[3]) else 8, 32, 0, 0, 4, 1)


def key(
    x: Tensor, skip: Tensor, up_weight: Tensor, up_bias: Tensor, weight: Tensor, bias: Tensor
) -> str:
    up, before = up_weight.shape[:2]
    channels = f"{before}-{up}+{skip.shape[3]}-{weight.shape[0]}"
    return f"{str(x.dtype).removeprefix('torch.')} {channels}"


def candidates(
    x: Tensor, skip: Tensor, up_weight: Tensor, up_bias: Tensor, weight: Tensor, bias: Tensor
) -> list[Config]:
    wide = convolution.wide_candidates(x.dtype, weight.shape[0])
    capability = launching.capability(x)
    joins = convolution.joins(capability, skip.shape[3])
    if not (composes(x, skip, up_weight, weight) and joins):
        return wide
    squares = [Config(True, 16, 32, 0, 0, 4, 1), Config(True, 8, 64, 0, 0, 4, 1)]
    if not convolution.packed(skip.shape[3]):
        squares = [Config(True, 8, 32, 0, 0, 4, 1), Config(True, 4, 64, 0, 0, 4, 1)]
        if convolution.roomy(capability):
            squares += [Config(True, 16, 32, 0, 0, 8, 1)]
    return [*squares, *wide[:2]]


def launch(
    x: Tensor,  # (B, H/2, W/2, Ci)
    skip: Tensor,  # (S, H, W, Cs)
    up_weight: Tensor,  # (Cu, Ci, 3, 3)
    up_bias: Tensor,  # (Cu,)
    weight: Tensor,  # (Co, Cu + Cs, 3, 3)
    bias: Tensor,  # (Co,)
    config: Config | None = None,
) -> Tensor:
    images, rows, columns, _ = x.shape
    to = {"dtype": x.dtype, "device": x.device}
    out = torch.empty((images, 2 * rows, 2 * columns, weight.shape[0]), **to)
    if out.numel() == 0:
        return out
    args = (x, skip, up_weight, up_bias.contiguous(), weight, bias.contiguous())
    chosen = config or configs.choose(OP, Config, heuristic, key, args)
    with torch.cuda.device_of(x):
        (_squares if chosen.squares else _pixels)(chosen, out, *args)
    return out


def _squares(
    chosen: Config,
    out: Tensor,
    x: Tensor,
    skip: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> None:
    images, rows, columns, before = x.shape
    skips, up, beside, after = len(skip), up_weight.shape[0], skip.shape[3], weight.shape[0]
    blocks = {"BLOCK_CI": convolution.block(before), "BLOCK_CO": convolution.block(after)}
    wide = 4 * blocks["BLOCK_CO"]
    composed = torch.empty((9, 9, blocks["BLOCK_CI"], wide), dtype=x.dtype, device=x.device)
    shift = torch.empty((9, wide), dtype=torch.float32, device=x.device)
    compose_kernel[(triton.cdiv(9 * blocks["BLOCK_CI"], COMPOSED_ROWS), 9)](
        up_weight,
        up_bias,
        weight,
        bias,
        composed,
        shift,
        rows,
        columns,
        *up_weight.stride(),
        *weight.stride(),
        CI=before,
        CU=up,
        CO=after,
        BLOCK_CU=convolution.block(up),
        BLOCK=COMPOSED_ROWS,
        **blocks,
        num_warps=4,
        num_stages=1,
    )
    of_skip = convolution.taps_last(weight[:, up:])
    tile = chosen.rows // 2, chosen.columns // 2
    down, across = triton.cdiv(rows, tile[0]), triton.cdiv(columns, tile[1])
    up_squares_kernel[(images * (down * across + 2 * (down + across) + 4),)](
        x,
        skip,
        composed,
        shift,
        of_skip,
        out,
        rows,
        columns,
        skips,
        *x.stride(),
        *skip.stride(),
        of_skip.stride(0),
        of_skip.stride(2),
        CI=before,
        CS=beside,
        CO=after,
        BLOCK_CS=convolution.block_of(beside),
        PACKED=convolution.packed(beside),
        ROWS=tile[0],
        COLUMNS=tile[1],
        **blocks,
        **convolution.options(chosen),
    )


def _pixels(
    chosen: Config,
    out: Tensor,
    x: Tensor,
    skip: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> None:
    images, rows, columns, before = x.shape
    up, beside, after = up_weight.shape[0], skip.shape[3], weight.shape[0]
    summed = torch.empty((2, 2, up, 2, 2, before), dtype=x.dtype, device=x.device)
    sum_taps_kernel[(triton.cdiv(4 * up * before, 256), 4)](
        up_weight, summed, *up_weight.stride(), CI=before, CU=up, BLOCK=256, num_warps=4
    )
    u = torch.empty((images, 2 * rows, 2 * columns, up), dtype=x.dtype, device=x.device)
    tile = {"ROWS": chosen.rows, "COLUMNS": chosen.columns, "BLOCK_K": chosen.block_k}
    programs = convolution.tiles(images, rows, columns, chosen.rows, chosen.columns)
    raised = min(chosen.block_n, convolution.block(up))
    raise_kernel[(4 * programs * triton.cdiv(up, raised),)](
        x,
        summed,
        up_bias,
        u,
        rows,
        columns,
        *x.stride(),
        CI=before,
        CU=up,
        BLOCK_N=raised,
        **tile,
        **convolution.options(chosen),
    )
    programs = convolution.tiles(images, 2 * rows, 2 * columns, chosen.rows, chosen.columns)
    join_kernel[(programs * triton.cdiv(after, chosen.block_n),)](
        u,
        skip,
        convolution.taps_last(weight),
        bias,
        out,
        2 * rows,
        2 * columns,
        len(skip),
        *skip.stride(),
        CU=up,
        CS=beside,
        CO=after,
        BLOCK_N=chosen.block_n,
        **tile,
        **convolution.options(chosen),
    )
