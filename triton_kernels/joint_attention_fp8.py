"""o = softmax(scale * q k^T) v for every image and head with both products in e4m3, in Triton.

Three kernels: column statistics of k and v, their quantised copies, attention.

FLOPs: 4*B*L*S*G*d and B*L*S*G exponentials; compute-bound. At PiD 2048 on 1600 TFLOP/s a call of
the 14 MMDiT blocks (16684 rows, 24 heads of 64) does 1.71 TFLOP, 1.1 ms, and 6.7 G exponentials,
1.8 ms of the special function units, which are the floor: 25 of the 77 ms of a step. Before it k
and v are read twice and written once in e4m3: 4*S + 2*S/2 rows of 24*64 bf16, 256 MB, 0.09 ms.

q is quantised as it is loaded, each row by itself: rows do not depend on their neighbours. The
copy of k is (keys, d), that of v (d, keys): the contraction is the contiguous axis of both, as
8-bit operands of Hopper's tensor cores must be, so nothing is transposed in the loop. Both are
padded with zeros to whole tiles and need no masks. Within a tile the products are added up by the
tensor core, which keeps fewer than fp32's bits on Hopper; between tiles in fp32.

A head dim that is no power of two is multiplied in two parts, 72 as 64 + 8; a contraction of 8 is
padded to the 32 that the instruction takes, a result to 16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launching
from . import joint_attention as plain
from .arithmetic import INTERPRETED, rounded

OP = "joint_attention_fp8"
E4M3 = torch.float8_e4m3fn
MINIMUM = (8, 9)
ROWS = 128  # rows of k that share a scale; rows of q of one program
MAX_KEYS = 1 << 23  # times the channels of a head stays an int32
CHUNK = 2048  # rows whose statistics one program takes: 216 programs at PiD 2048

LARGEST = tl.constexpr(448.0)
LOG2_WEIGHT = tl.constexpr(8.0)  # the largest weight is stored as 256


@triton.jit
def _dot(a, b, sums):
    """sums + a b, e4m3 operands."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums)


@triton.jit
def _rows(ptr, row, stride, count, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """ptr[row, 0:HEAD_DIM] in fp32; zeros from `count` rows on and up to WIDTH columns."""
    column = tl.arange(0, WIDTH)
    inside = (row < count)[:, None] & (column < HEAD_DIM)[None, :]
    offset = row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(ptr + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _scale(largest):
    return tl.where(largest == 0, 1.0, tl.div_rn(largest, LARGEST))


@triton.jit(do_not_specialize=["S", "G", "chunks"])
def column_statistics_kernel(
    k_ptr,  # (B, S, G, HEAD_DIM)
    v_ptr,  # (B, S, G, HEAD_DIM)
    sum_ptr,  # (B*G, chunks, WIDTH), sums of k over the rows of a chunk
    largest_ptr,  # (B*G, chunks, WIDTH), max|v| over them
    S,
    G,
    chunks,
    k_stride_b: tl.int64,
    k_stride_n: tl.int64,
    k_stride_g: tl.int64,
    v_stride_b: tl.int64,
    v_stride_n: tl.int64,
    v_stride_g: tl.int64,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0) % chunks
    head = tl.program_id(0) // chunks
    b = (head // G).to(tl.int64)
    g = (head % G).to(tl.int64)
    k_ptr += (b * k_stride_b + g * k_stride_g) * ALIGN
    v_ptr += (b * v_stride_b + g * v_stride_g) * ALIGN
    sums = tl.zeros((WIDTH,), tl.float32)
    largest = tl.zeros((WIDTH,), tl.float32)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, S), ROWS):
        row = start + tl.arange(0, ROWS)
        sums += tl.sum(_rows(k_ptr, row, k_stride_n * ALIGN, S, HEAD_DIM, WIDTH), 0)
        v = tl.abs(_rows(v_ptr, row, v_stride_n * ALIGN, S, HEAD_DIM, WIDTH))
        largest = tl.maximum(largest, tl.max(v, 0))
    out = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    tl.store(sum_ptr + out, sums)
    tl.store(largest_ptr + out, largest)


@triton.jit(do_not_specialize=["S", "G", "chunks", "blocks"])
def quantize_keys_kernel(
    k_ptr,  # (B, S, G, HEAD_DIM)
    v_ptr,  # (B, S, G, HEAD_DIM)
    sum_ptr,  # (B*G, chunks, WIDTH)
    largest_ptr,  # (B*G, chunks, WIDTH)
    k8_ptr,  # (B*G, blocks*ROWS, K_WIDTH) e4m3, less its mean over the keys
    v8_ptr,  # (B*G, V_WIDTH, blocks*ROWS) e4m3
    k_scale_ptr,  # (B*G, blocks)
    v_scale_ptr,  # (B*G, V_WIDTH)
    S,
    G,
    chunks,
    blocks,
    k_stride_b: tl.int64,
    k_stride_n: tl.int64,
    k_stride_g: tl.int64,
    v_stride_b: tl.int64,
    v_stride_n: tl.int64,
    v_stride_g: tl.int64,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
):
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks
    b = (head // G).to(tl.int64)
    g = (head % G).to(tl.int64)
    k_ptr += (b * k_stride_b + g * k_stride_g) * ALIGN
    v_ptr += (b * v_stride_b + g * v_stride_g) * ALIGN
    head = head.to(tl.int64)
    column = tl.arange(0, WIDTH)

    mean = tl.zeros((WIDTH,), tl.float32)
    largest = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, chunks, 16):
        chunk = start + tl.arange(0, 16)
        offset = ((head * chunks + chunk) * WIDTH)[:, None] + column[None, :]
        inside = (chunk < chunks)[:, None]
        mean += tl.sum(tl.load(sum_ptr + offset, mask=inside, other=0.0), 0)
        most = tl.max(tl.load(largest_ptr + offset, mask=inside, other=0.0), 0)
        largest = tl.maximum(largest, most)
    mean = mean / S
    v_scale = _scale(largest)
    if block == 0:
        tl.store(v_scale_ptr + head * V_WIDTH + column, v_scale, mask=column < V_WIDTH)

    row = block * ROWS + tl.arange(0, ROWS)
    inside = (row < S)[:, None] & (column < HEAD_DIM)[None, :]
    k = _rows(k_ptr, row, k_stride_n * ALIGN, S, HEAD_DIM, WIDTH)
    k = tl.where(inside, k - mean[None, :], 0.0)
    k_scale = _scale(tl.max(tl.max(tl.abs(k), 1), 0))
    tl.store(k_scale_ptr + head * blocks + block, k_scale)
    at = (head * blocks * ROWS + row) * K_WIDTH
    k8 = rounded(k * tl.div_rn(1.0, k_scale), k8_ptr.dtype.element_ty)
    tl.store(k8_ptr + at[:, None] + column[None, :], k8, mask=(column < K_WIDTH)[None, :])

    v = _rows(v_ptr, row, v_stride_n * ALIGN, S, HEAD_DIM, WIDTH)
    v8 = rounded(v * tl.div_rn(1.0, v_scale)[None, :], v8_ptr.dtype.element_ty)
    at = (head * V_WIDTH + column) * (blocks * ROWS)
    tl.store(v8_ptr + at[None, :] + row[:, None], v8, mask=(column < V_WIDTH)[None, :])


@triton.jit
def _attend(
    q8,  # (ROWS, D) e4m3
    q8_rest,  # (ROWS, K_REST) e4m3, if there is one
    q_factor,  # (ROWS,) scales of q * scale / ln 2
    k8_ptr,  # (keys, D + K_REST) of this head
    v8_ptr,  # (D + V_REST, keys)
    k_scale_ptr,
    start,
    S,
    keys,
    o,  # (ROWS, D) fp32
    o_rest,  # (ROWS, V_REST)
    most,  # (ROWS,) largest logit so far, in units of log 2
    total,  # (ROWS,) sum of the weights
    D: tl.constexpr,
    K_REST: tl.constexpr,
    V_REST: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    key = tl.arange(0, BLOCK_N)
    wide = tl.arange(0, D)
    k8_ptr += tl.cast(start, tl.int64) * (D + K_REST)
    v8_ptr += start
    k_row = (key * (D + K_REST))[:, None]
    logits = tl.zeros((ROWS, BLOCK_N), tl.float32)
    logits = _dot(q8, tl.trans(tl.load(k8_ptr + (k_row + wide[None, :]))), logits)
    if K_REST > 0:
        k_rest = tl.load(k8_ptr + D + (k_row + tl.arange(0, K_REST)[None, :]))
        logits = _dot(q8_rest, tl.trans(k_rest), logits)
    if TAIL:
        logits = tl.where((start + key < S)[None, :], logits, float("-inf"))

    # Less the maximum first: no weight is more than 256, however large the logits are.
    factor = q_factor * tl.load(k_scale_ptr + start // ROWS)
    here = tl.max(logits, 1)
    now = tl.maximum(most, here * factor)
    shift = here * factor - now + LOG2_WEIGHT
    weights = tl.exp2((logits - here[:, None]) * factor[:, None] + shift[:, None])
    rescale = tl.exp2(most - now)
    total = total * rescale + tl.sum(weights, 1)
    weights = rounded(weights, v8_ptr.dtype.element_ty)

    v = tl.load(v8_ptr + ((wide * keys)[:, None] + key[None, :]))
    zeros = tl.zeros((ROWS, D), tl.float32)
    o = o * rescale[:, None] + _dot(weights, tl.trans(v), zeros)
    if K_REST > 0:
        narrow = D + tl.arange(0, V_REST)
        v_rest = tl.load(v8_ptr + ((narrow * keys)[:, None] + key[None, :]))
        zeros_rest = tl.zeros((ROWS, V_REST), tl.float32)
        o_rest = o_rest * rescale[:, None] + _dot(weights, tl.trans(v_rest), zeros_rest)
    return o, o_rest, now, total


@triton.jit(do_not_specialize=["L", "S", "G", "blocks", "q_stride_b", "q_stride_n", "q_stride_g"])
def joint_attention_fp8_kernel(
    q_ptr,  # (B, L, G, HEAD_DIM)
    k8_ptr,  # (B*G, blocks*ROWS, D + K_REST) e4m3
    v8_ptr,  # (B*G, D + V_REST, blocks*ROWS) e4m3
    k_scale_ptr,  # (B*G, blocks)
    v_scale_ptr,  # (B*G, D + V_REST)
    o_ptr,  # (B, L, G, HEAD_DIM) contiguous
    L,
    S,
    G,
    blocks,
    q_stride_b: tl.int64,
    q_stride_n: tl.int64,
    q_stride_g: tl.int64,
    scale_log2,  # scale / ln 2
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    K_REST: tl.constexpr,  # 0: there is no rest
    V_REST: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The blocks of one head run together, so that they find its K and V in the L2 cache.
    programs = tl.cdiv(L, ROWS)
    head = tl.program_id(0) // programs
    row = tl.program_id(0) % programs * ROWS + tl.arange(0, ROWS)
    b = (head // G).to(tl.int64)
    g = (head % G).to(tl.int64)
    keys = blocks * ROWS
    head = head.to(tl.int64)
    k8_ptr += head * keys * (D + K_REST)
    v8_ptr += head * keys * (D + V_REST)
    k_scale_ptr += head * blocks
    v_scale_ptr += head * (D + V_REST)

    WIDTH: tl.constexpr = min(D, HEAD_DIM)
    WIDTH_REST: tl.constexpr = HEAD_DIM - D
    dtype = k8_ptr.dtype.element_ty
    q_ptr += (b * q_stride_b + g * q_stride_g) * ALIGN
    q = _rows(q_ptr, row, q_stride_n * ALIGN, L, WIDTH, D)
    largest = tl.max(tl.abs(q), 1)
    q_rest = q
    if K_REST > 0:
        q_rest = _rows(q_ptr + D, row, q_stride_n * ALIGN, L, WIDTH_REST, K_REST)
        largest = tl.maximum(largest, tl.max(tl.abs(q_rest), 1))
    q_scale = _scale(largest)
    q8 = rounded(q * tl.div_rn(1.0, q_scale)[:, None], dtype)
    q8_rest = q8
    o = tl.zeros((ROWS, D), tl.float32)
    o_rest = o
    if K_REST > 0:
        q8_rest = rounded(q_rest * tl.div_rn(1.0, q_scale)[:, None], dtype)
        o_rest = tl.zeros((ROWS, V_REST), tl.float32)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)

    factor = q_scale * scale_log2
    last = (S - 1) // BLOCK_N * BLOCK_N
    for start in range(0, last, BLOCK_N):
        o, o_rest, most, total = _attend(
            q8, q8_rest, factor, k8_ptr, v8_ptr, k_scale_ptr, start, S, keys,
            o, o_rest, most, total, D, K_REST, V_REST, False, ROWS, BLOCK_N,
        )  # fmt: skip
    for start in range(last, S, BLOCK_N):
        o, o_rest, most, total = _attend(
            q8, q8_rest, factor, k8_ptr, v8_ptr, k_scale_ptr, start, S, keys,
            o, o_rest, most, total, D, K_REST, V_REST, True, ROWS, BLOCK_N,
        )  # fmt: skip

    inverse = tl.div_rn(1.0, total)[:, None]
    dtype = o_ptr.dtype.element_ty
    inside = (row < L)[:, None]
    out = o_ptr + (((b * L + row) * G + g) * HEAD_DIM)[:, None]
    column = tl.arange(0, D)
    o = o * inverse * tl.load(v_scale_ptr + column)[None, :]
    tl.store(out + column[None, :], rounded(o, dtype), mask=inside & (column < WIDTH)[None, :])
    if K_REST > 0:
        column = tl.arange(0, V_REST)
        o_rest = o_rest * inverse * tl.load(v_scale_ptr + D + column)[None, :]
        inside = inside & (column < WIDTH_REST)[None, :]
        tl.store(out + D + column[None, :], rounded(o_rest, dtype), mask=inside)


@dataclass(frozen=True)
class Config:
    block_n: int  # keys of a tile, a divisor of the 128 that share a scale
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def parts(d: int) -> tuple[int, int, int]:
    """Head dim as the largest power of two in it and what is left, padded as a contraction and as
    columns of a result; 0 if nothing is left."""
    first, rest = max(32, 1 << (d.bit_length() - 1)), 0
    if d > first:
        rest = triton.next_power_of_2(d - first)
    return first, rest and max(32, rest), rest and max(16, rest)


def why_not(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    reason = plain.why_not(q, k, v, scale, None, False)
    if reason is None and k.shape[1] > MAX_KEYS:
        reason = f"takes at most {MAX_KEYS} keys, got {k.shape[1]}"
    if reason is not None or launching.INTERPRETED:
        return reason
    found = launching.capability(q)
    if found < MINIMUM:
        return f"e4m3 needs compute capability 8.9, this device is {found[0]}.{found[1]}"
    return None


def heuristic(capability: tuple[int, int], q: Tensor, *rest: object) -> Config:
    """Not yet measured: chosen by registers and shared memory of what the compiler makes of it."""
    # On Hopper the compiler takes 129 registers at d 64, and 128 let a second program in: one's
    # softmax runs while the other multiplies. Told so, it does with 128 and spills nothing.
    if capability[0] == 9:
        return Config(64, 8, 3, 128 if q.shape[-1] <= 80 else None)
    # Two stages are 32 KB at d 64; a third costs Blackwell the register that it spills.
    return Config(64, 8, 2)


def key(q: Tensor, *rest: object) -> str:
    return plain.key(q, q, q, 1.0, None, False)


def candidates(q: Tensor, *rest: object) -> list[Config]:
    free = [Config(n, warps, s) for n in (64, 128) for warps in (4, 8) for s in (2, 3)]
    return [*free, Config(64, 8, 3, 128), Config(128, 8, 3, 128)]


def launch(
    q: Tensor,  # (B, L, G, d)
    k: Tensor,  # (B, S, G, d), dtype of q
    v: Tensor,  # (B, S, G, d), dtype of q
    scale: float,
    config: Config | None = None,
) -> Tensor:
    B, L, G, d = q.shape
    S = k.shape[1]
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if o.numel() == 0:
        return o
    c = config or configs.choose(OP, Config, heuristic, key, (q, k, v, scale))
    first, k_rest, v_rest = parts(d)
    width = max(32, triton.next_power_of_2(d))
    blocks, chunks = triton.cdiv(S, ROWS), triton.cdiv(S, CHUNK)

    def workspace(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(B * G, *shape, dtype=dtype, device=q.device)

    sums, largest = workspace(chunks, width), workspace(chunks, width)
    k8 = workspace(blocks * ROWS, first + k_rest, dtype=E4M3)
    v8 = workspace(first + v_rest, blocks * ROWS, dtype=E4M3)
    k_scale, v_scale = workspace(blocks), workspace(first + v_rest)
    align = plain.alignment(q, k, v)
    q_strides, k_strides, v_strides = ([s // align for s in t.stride()[:3]] for t in (q, k, v))
    shared = {"HEAD_DIM": d, "ALIGN": align, "ROWS": ROWS}
    with torch.cuda.device_of(q):
        column_statistics_kernel[(B * G * chunks,)](
            *(k, v, sums, largest, S, G, chunks, *k_strides, *v_strides),
            WIDTH=width,
            CHUNK=CHUNK,
            num_warps=8,
            **shared,
        )
        quantize_keys_kernel[(B * G * blocks,)](
            *(k, v, sums, largest, k8, v8, k_scale, v_scale),
            *(S, G, chunks, blocks, *k_strides, *v_strides),
            WIDTH=width,
            K_WIDTH=first + k_rest,
            V_WIDTH=first + v_rest,
            num_warps=8,
            **shared,
        )
        joint_attention_fp8_kernel[(triton.cdiv(L, ROWS) * B * G,)](
            *(q, k8, v8, k_scale, v_scale, o, L, S, G, blocks, *q_strides),
            scale * plain.LOG2E,
            D=first,
            K_REST=k_rest,
            V_REST=v_rest,
            BLOCK_N=c.block_n,
            num_warps=c.num_warps,
            num_stages=c.num_stages,
            maxnreg=c.max_registers,
            **shared,
        )
    return o
