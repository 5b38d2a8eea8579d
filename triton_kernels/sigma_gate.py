"""y = x + sigmoid(x W^T + lq_logit) * feature, in Triton: one logit a channel, or one a token.

PiD at 2048, bf16: B*N = 16384, D = 1536. A step of 77 ms holds 7 gates.

Per channel (v1, W (D, D)): 77.3 GFLOP, 0.097 ms at 798 TFLOP/s, and 0.21 GB (x, feature, lq_logit,
y, W), 0.069 ms at 3.0 TB/s, behind the product. A GEMM whose epilogue is the gate: nothing is
concatenated, no logit reaches memory, and the epilogue finds x in the L2 cache, where the product
of the same rows has just read it. Expected, not measured: 0.13 to 0.15 ms (500 to 600 TFLOP/s),
1.2 to 1.4 % of a step. The vendor's product at 700 TFLOP/s (0.11 ms) and then one pass over its
output (product, x, feature, lq_logit and y, 0.25 GB that no product hides: 0.084 ms) would take
0.19 ms, so this one wins from 400 TFLOP/s on.

Per token (v1.5, W (1, D)): 0.15 GB, 0.050 ms, 0.5 % of a step; 6*B*N*D FLOPs. Bandwidth-bound: a
row of x stays in registers between the dot product and the sum.

fp32 inside, one rounding at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arithmetic, configs, launching, norm_rows
from .norm_rows import Config as RowConfig

OP = "sigma_gate"
MAX_D = 8192  # per token: rows of x and feature are held in registers, 32 values of each a thread
MAX_STRIDE = 2**23  # elements between rows: offsets inside a tile of at most 256 rows are int32


@dataclass(frozen=True)
class Config:
    """Tiles of the product with one logit a channel; `norm_rows.Config` is that of one a token."""

    block_m: int  # tokens
    block_n: int  # channels of y
    block_k: int  # channels of x that are multiplied at a time
    group: int  # row blocks that share the weight's tiles while those are in the L2 cache
    pieces: int  # of the epilogue, 1, 2 or 4
    num_warps: int
    num_stages: int


@triton.jit
def sigmoid(x):
    # exp overflows to infinity for very negative x: the gate is then exactly 0.
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def gate(x, weight, lq_logit, PIECES: tl.constexpr):
    """(ROWS, 1) fp32: sigmoid(x . weight + lq_logit) of whole rows, tuples of pieces."""
    products = x[0].to(tl.float32) * weight[0].to(tl.float32)
    for i in tl.static_range(1, PIECES):
        products += x[i].to(tl.float32) * weight[i].to(tl.float32)
    return sigmoid(tl.sum(products, axis=1) + lq_logit)[:, None]


@triton.jit
def halves(x):
    """The left and the right columns of x (M, N), each (M, N / 2)."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    return x.reshape(M, 2, N // 2).permute(0, 2, 1).split()


@triton.jit(do_not_specialize=["N"])
def sigma_gate_channel_kernel(
    x_ptr,  # (B, N, D)
    feature_ptr,  # (B, N, D)
    weight_ptr,  # (D, D), a row for each channel of y
    logit_ptr,  # (B, N, D)
    y_ptr,  # (B, N, D) contiguous
    N,
    D,
    x_stride_b,
    x_stride_n,
    feature_stride_b,
    feature_stride_n,
    weight_stride,
    logit_stride_b,
    logit_stride_n,
    EVEN_N: tl.constexpr,  # BLOCK_N divides D
    EVEN_K: tl.constexpr,  # BLOCK_K divides D
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
):
    row_tiles = tl.cdiv(N, BLOCK_M)  # of one image
    column_tiles = tl.cdiv(D, BLOCK_N)
    b = (tl.program_id(0) // (row_tiles * column_tiles)).to(tl.int64)
    tile = tl.program_id(0) % (row_tiles * column_tiles)
    first = tile // (GROUP * column_tiles) * GROUP
    group = tl.minimum(row_tiles - first, GROUP)
    tile %= GROUP * column_tiles
    row = (first + tile % group) * BLOCK_M
    column = tile // group * BLOCK_N
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)

    # int64 up to the first value of the tile, which can lie past 2^31; int32 inside of it.
    x_ptr += b * x_stride_b + row.to(tl.int64) * x_stride_n
    feature_ptr += b * feature_stride_b + row.to(tl.int64) * feature_stride_n + column
    weight_ptr += column.to(tl.int64) * weight_stride
    logit_ptr += b * logit_stride_b + row.to(tl.int64) * logit_stride_n + column
    y_ptr += (b * N + row) * D + column

    # Rows and columns beyond the end read the last one instead: no mask in the loop for them.
    x_row = tl.minimum(m, N - 1 - row) * x_stride_n
    weight_row = (n if EVEN_N else tl.minimum(n, D - 1 - column)) * weight_stride
    x_tile_ptr = x_ptr + (x_row[:, None] + k[None, :])
    weight_tile_ptr = weight_ptr + (weight_row[:, None] + k[None, :])
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_tile_ptr)
            weight = tl.load(weight_tile_ptr)
        else:
            left = (k < D - start)[None, :]
            x = tl.load(x_tile_ptr, mask=left, other=0.0)
            weight = tl.load(weight_tile_ptr, mask=left, other=0.0)
        product = arithmetic.dot(x, weight.T, product)
        x_tile_ptr += BLOCK_K
        weight_tile_ptr += BLOCK_K

    # In pieces: the three operands of a whole tile would leave no registers to a second program
    # on the same multiprocessor, whose product hides this memory traffic.
    x_ptr += column
    if PIECES == 1:
        pieces = (product,)
    elif PIECES == 2:
        pieces = halves(product)
    else:
        left, right = halves(product)
        p0, p1 = halves(left)
        p2, p3 = halves(right)
        pieces = (p0, p1, p2, p3)
    for i in tl.static_range(PIECES):
        piece = i * (BLOCK_N // PIECES) + tl.arange(0, BLOCK_N // PIECES)
        inside = (m < N - row)[:, None]
        if not EVEN_N:
            inside &= (piece < D - column)[None, :]
        x_offset = m[:, None] * x_stride_n + piece[None, :]
        feature_offset = m[:, None] * feature_stride_n + piece[None, :]
        logit_offset = m[:, None] * logit_stride_n + piece[None, :]
        y_offset = m[:, None] * D + piece[None, :]
        # feature and lq_logit are read once: they need not push x, W and y out of the L2 cache.
        x = tl.load(x_ptr + x_offset, mask=inside)
        feature = tl.load(feature_ptr + feature_offset, mask=inside, eviction_policy="evict_first")
        lq_logit = tl.load(logit_ptr + logit_offset, mask=inside, eviction_policy="evict_first")
        gate = sigmoid(pieces[i] + lq_logit.to(tl.float32))
        y = x.to(tl.float32) + gate * feature.to(tl.float32)
        tl.store(y_ptr + y_offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "logit_stride_b", "logit_stride_n"])
def sigma_gate_token_kernel(
    x_ptr,  # (B, N, D)
    feature_ptr,  # (B, N, D)
    weight_ptr,  # (D,)
    logit_ptr,  # (B, N)
    y_ptr,  # (B, N, D) contiguous
    N,
    D,
    x_stride_b,
    x_stride_n,
    feature_stride_b,
    feature_stride_n,
    logit_stride_b,
    logit_stride_n,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(N, ROWS)  # of one image
    # int64 before any multiply: a row offset can pass 2^31.
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = (row < N)[:, None] & (column < D)[None, :]

    x_offset = (b * x_stride_b + row * x_stride_n)[:, None] + column[None, :]
    feature_offset = (b * feature_stride_b + row * feature_stride_n)[:, None] + column[None, :]
    logit_offset = b * logit_stride_b + row * logit_stride_n
    x = tl.load(x_ptr + x_offset, mask=inside, other=0.0).to(tl.float32)
    feature = tl.load(feature_ptr + feature_offset, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0)[None, :]
    lq_logit = tl.load(logit_ptr + logit_offset, mask=row < N, other=0.0).to(tl.float32)
    y = x + gate((x,), (weight,), lq_logit, 1) * feature
    y_offset = ((b * N + row) * D)[:, None] + column[None, :]
    tl.store(y_ptr + y_offset, y.to(y_ptr.dtype.element_ty), mask=inside)


def why_not(x: Tensor, feature: Tensor, weight: Tensor, lq_logit: Tensor) -> str | None:
    per_token = weight.shape[0] == 1
    if per_token and x.shape[-1] > MAX_D:
        return f"takes at most {MAX_D} channels with one logit a token, got {x.shape[-1]}"
    rows = (x, feature, weight, lq_logit)
    if not per_token and max(t.stride(-2) for t in rows) >= MAX_STRIDE:
        return f"needs less than {MAX_STRIDE} elements from a row to the next"
    return launching.why_not(*rows)


def heuristic(
    capability: tuple[int, int], x: Tensor, feature: Tensor, weight: Tensor, lq_logit: Tensor
) -> Config | RowConfig:
    if weight.shape[0] == 1:
        return norm_rows.heuristic(x.shape[-1])
    if x.dtype == torch.float32:  # no tensor cores: a tile of sums that fits the registers
        return Config(64, 64, 32, group=8, pieces=1, num_warps=4, num_stages=2)
    # Two programs of 8 warps on a multiprocessor, so that one multiplies while the other is in its
    # epilogue, whose traffic takes two thirds of the product's time: at most 128 registers a thread
    # (`pieces`) and half of the shared memory each. Tiles of 128 x 256 ask less of that memory
    # (it feeds 128 x 128 at 80 % of the tensor cores' peak) but leave room for one program.
    if capability[0] in (9, 10):  # 228 KB
        return Config(128, 128, 64, group=8, pieces=4, num_warps=8, num_stages=3)
    return Config(128, 128, 32, group=8, pieces=2, num_warps=8, num_stages=4)  # 100 KB


def key(x: Tensor, feature: Tensor, weight: Tensor, lq_logit: Tensor) -> str:
    return f"{norm_rows.key(x)} per {'token' if weight.shape[0] == 1 else 'channel'}"


def candidates(
    x: Tensor, feature: Tensor, weight: Tensor, lq_logit: Tensor
) -> list[Config] | list[RowConfig]:
    if weight.shape[0] == 1:
        return norm_rows.candidates(x.shape[-1])
    if x.dtype == torch.float32:
        return [Config(64, n, k, 8, 1, 4, 2) for n in (32, 64) for k in (16, 32)]
    large = [Config(128, 128, 64, g, p, 8, 3) for g in (4, 8, 16) for p in (2, 4)]
    large += [Config(128, 256, 64, 8, 4, 8, s) for s in (3, 4)]
    small = [Config(128, 128, 32, 8, 2, 8, s) for s in (3, 4)]
    return [*large, *small, Config(128, 64, 64, 8, 2, 4, 3)]


def launch(
    x: Tensor,  # (B, N, D)
    feature: Tensor,  # (B, N, D)
    weight: Tensor,  # (K, D), K = D or 1
    lq_logit: Tensor,  # (B, N, K)
    config: Config | RowConfig | None = None,
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    args = (x, feature, weight, lq_logit)
    with torch.cuda.device_of(x):
        if weight.shape[0] == 1:
            _per_token(*args, y, config or configs.choose(OP, RowConfig, heuristic, key, args))
        else:
            _per_channel(*args, y, config or configs.choose(OP, Config, heuristic, key, args))
    return y


def _per_channel(
    x: Tensor, feature: Tensor, weight: Tensor, lq_logit: Tensor, y: Tensor, c: Config
) -> None:
    B, N, D = x.shape
    tiles = triton.cdiv(N, c.block_m) * triton.cdiv(D, c.block_n)
    sigma_gate_channel_kernel[(B * tiles,)](
        x,
        feature,
        weight,
        lq_logit,
        y,
        N,
        D,
        x.stride(0),
        x.stride(1),
        feature.stride(0),
        feature.stride(1),
        weight.stride(0),
        lq_logit.stride(0),
        lq_logit.stride(1),
        EVEN_N=D % c.block_n == 0,
        EVEN_K=D % c.block_k == 0,
        BLOCK_M=c.block_m,
        BLOCK_N=c.block_n,
        BLOCK_K=c.block_k,
        GROUP=c.group,
        PIECES=c.pieces,
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )


def _per_token(
    x: Tensor, feature: Tensor, weight: Tensor, lq_logit: Tensor, y: Tensor, c: RowConfig
) -> None:
    B, N, D = x.shape
    sigma_gate_token_kernel[(B * triton.cdiv(N, c.rows),)](
        x,
        feature,
        weight,
        lq_logit,
        y,
        N,
        D,
        x.stride(0),
        x.stride(1),
        feature.stride(0),
        feature.stride(1),
        lq_logit.stride(0),
        lq_logit.stride(1),
        ROWS=c.rows,
        BLOCK_D=norm_rows.columns(D),
        num_warps=c.num_warps,
    )
