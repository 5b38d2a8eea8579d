"""o = softmax(scale * q k^T) v for every image and head, one pass over the keys, in Triton.

FLOPs: 4*B*L*S*G*d and B*L*S*G exponentials; compute-bound. At PiD 2048 in bf16 on 798 TFLOP/s a
call of the 14 MMDiT blocks (16684 rows, 24 heads of 64) does 1.71 TFLOP, 2.1 ms, and 6.7 G
exponentials, 1.8 ms of the special function units; the 14 are 30 of the 77 ms of a step. A call of
the 2 PiT blocks (16384 rows, 16 heads of 72) does 1.24 TFLOP, 1.5 ms. Bytes:
2*B*(L+S)*G*d*sizeof(q), 205 MB or 0.07 ms; K and V of one head (4.3 MB) are read again by each of
its query blocks and must come from the L2 cache: the query blocks of a head run together.

A head dim that is no power of two is multiplied in two parts: 72 as 64 + 8, the 8 padded to the 16
that a tensor core needs. Padded to 128 it would cost 1.8 times the products, so it costs 1.1.

Maximum, exponential, sum and accumulators are fp32; the weights are rounded to the dtype of v. A
weight is 2^((logit - max) * scale / ln 2): the difference is taken first, so that it is never
positive however large the logits are, and the product hides behind the exponential.

Keys that a mask leaves out have no influence, whatever they hold. A row of logits that are all
-inf, or that has none, gives 0 and an lse of -inf; NaN or +inf among them gives NaN in both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launching
from .arithmetic import dot, rounded

OP = "joint_attention"
LOG2E = 1.4426950408889634
MAX_D = 128
MAX_ROW_STRIDE = 1 << 24  # times the rows of a tile stays an int32

LN2 = tl.constexpr(0.6931471805599453)
# Where the maximum starts: finite, so that a block of logits that are all -inf weighs 0.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _tile(ptr, row, stride, valid, MASKED: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """ptr[row, 0:WIDTH] and zeros up to PADDED; zeros where `valid` is not, if MASKED."""
    column = tl.arange(0, PADDED)
    address = ptr + (row[:, None] * stride + column[None, :])
    if MASKED and WIDTH < PADDED:
        tile = tl.load(address, mask=valid[:, None] & (column < WIDTH)[None, :], other=0.0)
    elif MASKED:
        tile = tl.load(address, mask=valid[:, None], other=0.0)
    elif WIDTH < PADDED:
        tile = tl.load(address, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(address)
    return tile


@triton.jit
def _attend(
    q,  # (BLOCK_M, D)
    q_rest,  # (BLOCK_M, D_REST), if there is one
    k_ptr,  # (S, HEAD_DIM), of this head
    v_ptr,  # (S, HEAD_DIM)
    mask_ptr,  # (S,)
    k_stride_n,
    v_stride_n,
    start,
    S,
    scale_log2,
    o,  # (BLOCK_M, D) fp32, not yet divided by the sum
    o_rest,  # (BLOCK_M, D_REST)
    most,  # (BLOCK_M,) fp32, largest logit so far, not scaled
    total,  # (BLOCK_M,) fp32, sum of the weights
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    D_REST: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TAIL: tl.constexpr,  # whether the block may reach past the last key
    BLOCK_N: tl.constexpr,
):
    """Keys [start, start + BLOCK_N) into the softmax rows of one block of queries."""
    MASKED: tl.constexpr = HAS_MASK or TAIL
    WIDTH: tl.constexpr = min(D, HEAD_DIM)
    WIDTH_REST: tl.constexpr = HEAD_DIM - D
    row = tl.arange(0, BLOCK_N)
    inside = start + row < S
    valid = inside
    if HAS_MASK and TAIL:
        valid = tl.load(mask_ptr + start + row, mask=inside, other=0) != 0
    elif HAS_MASK:
        valid = tl.load(mask_ptr + start + row) != 0
    first = tl.cast(start, tl.int64)
    k_ptr += first * k_stride_n
    v_ptr += first * v_stride_n

    # Of a key that is left out, k is read and its logit dropped; v is not: 0 times NaN is NaN.
    k = _tile(k_ptr, row, k_stride_n, inside, TAIL, WIDTH, D)
    logits = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32))
    if D_REST > 0:
        k_rest = _tile(k_ptr + D, row, k_stride_n, inside, TAIL, WIDTH_REST, D_REST)
        logits = dot(q_rest, tl.trans(k_rest), logits)
    if MASKED:
        logits = tl.where(valid[None, :], logits, float("-inf"))

    now = tl.maximum(most, tl.max(logits, 1))
    rescale = tl.exp2((most - now) * scale_log2)
    weights = tl.exp2((logits - now[:, None]) * scale_log2)
    total = total * rescale + tl.sum(weights, 1)
    weights = rounded(weights, v_ptr.dtype.element_ty)

    v = _tile(v_ptr, row, v_stride_n, valid, MASKED, WIDTH, D)
    o = dot(weights, v, o * rescale[:, None])
    if D_REST > 0:
        v_rest = _tile(v_ptr + D, row, v_stride_n, valid, MASKED, WIDTH_REST, D_REST)
        o_rest = dot(weights, v_rest, o_rest * rescale[:, None])
    return o, o_rest, now, total


@triton.jit(
    do_not_specialize=[
        *("L", "S", "G", "mask_stride_b"),
        *("q_stride_b", "q_stride_n", "q_stride_g"),
        *("k_stride_b", "k_stride_n", "k_stride_g"),
        *("v_stride_b", "v_stride_n", "v_stride_g"),
    ]
)
def joint_attention_kernel(
    q_ptr,  # (B, L, G, HEAD_DIM)
    k_ptr,  # (B, S, G, HEAD_DIM)
    v_ptr,  # (B, S, G, HEAD_DIM)
    mask_ptr,  # (B, S) uint8, 0 = left out; any valid pointer when HAS_MASK is False
    o_ptr,  # (B, L, G, HEAD_DIM) contiguous
    lse_ptr,  # (B, L, G) contiguous; any valid pointer when WANT_LSE is False
    L,
    S,
    G,
    q_stride_b: tl.int64,
    q_stride_n,
    q_stride_g: tl.int64,
    k_stride_b: tl.int64,
    k_stride_n,
    k_stride_g: tl.int64,
    v_stride_b: tl.int64,
    v_stride_n,
    v_stride_g: tl.int64,
    mask_stride_b: tl.int64,
    scale_log2,  # scale / ln 2
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,  # HEAD_DIM = D + the rest, each padded to a power of two
    D_REST: tl.constexpr,  # 0: there is no rest
    ALIGN: tl.constexpr,  # elements in a unit of the strides of q, k and v
    HAS_MASK: tl.constexpr,
    WANT_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The blocks of one head run together, so that they find its K and V in the L2 cache.
    blocks = tl.cdiv(L, BLOCK_M)
    head = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < L
    b = (head // G).to(tl.int64)
    g = (head % G).to(tl.int64)

    q_stride_n *= ALIGN
    k_stride_n *= ALIGN
    v_stride_n *= ALIGN
    q_ptr += (b * q_stride_b + g * q_stride_g) * ALIGN
    k_ptr += (b * k_stride_b + g * k_stride_g) * ALIGN
    v_ptr += (b * v_stride_b + g * v_stride_g) * ALIGN
    mask_ptr += b * mask_stride_b

    WIDTH: tl.constexpr = min(D, HEAD_DIM)
    WIDTH_REST: tl.constexpr = HEAD_DIM - D
    wide_row = row.to(tl.int64)
    q = _tile(q_ptr, wide_row, q_stride_n, inside, True, WIDTH, D)
    q_rest = q
    o = tl.zeros((BLOCK_M, D), tl.float32)
    o_rest = o
    if D_REST > 0:
        q_rest = _tile(q_ptr + D, wide_row, q_stride_n, inside, True, WIDTH_REST, D_REST)
        o_rest = tl.zeros((BLOCK_M, D_REST), tl.float32)
    most = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)

    # Only the last block can reach past the last key: the others do without a mask for it. It comes
    # first: with products both in the loop and behind it, ptxas waits for each single instruction
    # of every product on Hopper (its C7515).
    last = (S - 1) // BLOCK_N * BLOCK_N
    o, o_rest, most, total = _attend(
        q, q_rest, k_ptr, v_ptr, mask_ptr, k_stride_n, v_stride_n, last, S, scale_log2,
        o, o_rest, most, total, HEAD_DIM, D, D_REST, HAS_MASK, True, BLOCK_N,
    )  # fmt: skip
    for start in range(0, last, BLOCK_N):
        o, o_rest, most, total = _attend(
            q, q_rest, k_ptr, v_ptr, mask_ptr, k_stride_n, v_stride_n, start, S, scale_log2,
            o, o_rest, most, total, HEAD_DIM, D, D_REST, HAS_MASK, False, BLOCK_N,
        )  # fmt: skip

    inverse = tl.where(total == 0, 0.0, tl.div_rn(1.0, total))[:, None]
    dtype = o_ptr.dtype.element_ty
    out_row = (b * L + row) * G + g
    out = o_ptr + (out_row * HEAD_DIM)[:, None]
    column = tl.arange(0, D)[None, :]
    tl.store(out + column, rounded(o * inverse, dtype), mask=inside[:, None] & (column < WIDTH))
    if D_REST > 0:
        column_rest = tl.arange(0, D_REST)[None, :]
        inside_rest = inside[:, None] & (column_rest < WIDTH_REST)
        tl.store(out + D + column_rest, rounded(o_rest * inverse, dtype), mask=inside_rest)
    if WANT_LSE:
        tl.store(lse_ptr + out_row, (most * scale_log2 + tl.log2(total)) * LN2, mask=inside)


@dataclass(frozen=True)
class Config:
    block_m: int  # queries of a tile
    block_n: int  # keys of a tile
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread


def parts(d: int) -> tuple[int, int]:
    """Head dim as the largest power of two in it and what is left, padded; 0 if nothing is."""
    first = max(16, 1 << (d.bit_length() - 1))
    return first, 0 if d <= first else max(16, triton.next_power_of_2(d - first))


def why_not(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None, return_lse: bool
) -> str | None:
    reason = launching.why_not(q, k, v)
    if reason is not None:
        return reason
    d = q.shape[-1]
    if d % 8 or not 8 <= d <= MAX_D:
        return f"takes head dims that are multiples of 8 up to {MAX_D}, got {d}"
    if not scale > 0:
        return f"takes a positive scale, got {scale}"
    stride = max(t.stride(1) for t in (k, v))
    if stride >= MAX_ROW_STRIDE:
        return f"takes rows of k and v less than {MAX_ROW_STRIDE} elements apart, got {stride}"
    return None


def heuristic(
    capability: tuple[int, int],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_mask: Tensor | None,
    return_lse: bool,
) -> Config:
    """Not yet measured: chosen by registers and shared memory of what the compiler makes of it."""
    d = q.shape[-1]
    if q.dtype == torch.float32:
        # Exact fp32 products are not for tensor cores; larger tiles do not fit the registers.
        return Config(16, 32, 8, 2)
    # A mask's predicates take registers that a wide head has not got.
    keys = 32 if key_mask is not None and d > 80 and capability[0] != 9 else 64
    if capability[0] in (9, 10):
        # At most 128 registers a thread at d 64 and 72, so that two programs share a
        # multiprocessor: one's softmax runs while the other multiplies. 128 keys a tile would need
        # 190, and the two halves of one program wait for each other at every tile. Told so on
        # Hopper, the compiler does with 128 where it would take up to 139; of 72 with a mask it
        # would spill.
        most = 128 if capability[0] == 9 and d <= (80 if key_mask is None else 64) else None
        return Config(128, keys, 8, 3, most)
    if capability in ((8, 0), (8, 7)):
        # 164 KB of shared memory. Four warps of 32 rows each read half as much of it as eight do,
        # and fit the registers at d 64 without a mask, with two stages.
        few = d <= 64 and key_mask is None
        return Config(128, keys, 4 if few else 8, 2 if few else 3)
    # 100 KB: two stages, so that two programs fit at d 64 and 72. Eight warps: four would spill.
    return Config(128, keys, 8, 2)


def key(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None, return_lse: bool
) -> str:
    dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[q.dtype]
    return f"{dtype} d{q.shape[-1]}" + ("" if key_mask is None else " mask")


def candidates(q: Tensor, *rest: object) -> list[Config]:
    if q.dtype == torch.float32:
        return [
            Config(32, 16, 8, 2),
            Config(32, 16, 4, 2),
            Config(32, 32, 8, 2),
            Config(16, 32, 4, 2),
        ]
    return [
        Config(128, 64, 8, 3),
        Config(128, 64, 8, 3, 128),
        Config(128, 64, 8, 2),
        Config(128, 64, 4, 3),
        Config(128, 64, 4, 2),
        Config(128, 128, 8, 3),
        Config(128, 128, 8, 2),
        Config(128, 128, 4, 2),
        Config(128, 32, 4, 4),
        Config(128, 32, 8, 3),
        Config(64, 64, 4, 3),
        Config(64, 128, 4, 2),
    ]


def launch(
    q: Tensor,  # (B, L, G, d)
    k: Tensor,  # (B, S, G, d), dtype of q
    v: Tensor,  # (B, S, G, d), dtype of q
    scale: float,
    key_mask: Tensor | None,  # (B, S) bool
    return_lse: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    B, L, G, d = q.shape
    S = k.shape[1]
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, L, G) if return_lse else 0, dtype=torch.float32, device=q.device)
    if o.numel() == 0:
        return o, lse
    c = config or configs.choose(OP, Config, heuristic, key, (q, k, v, scale, key_mask, return_lse))
    mask = q if key_mask is None else key_mask.view(torch.uint8)
    first, rest = parts(d)
    align = alignment(q, k, v)
    strides = [stride // align for t in (q, k, v) for stride in t.stride()[:3]]
    with torch.cuda.device_of(q):
        joint_attention_kernel[(triton.cdiv(L, c.block_m) * B * G,)](
            q,
            k,
            v,
            mask,
            o,
            lse if return_lse else o,
            L,
            S,
            G,
            *strides,
            0 if key_mask is None else key_mask.stride(0),
            scale * LOG2E,
            HEAD_DIM=d,
            D=first,
            D_REST=rest,
            ALIGN=align,
            HAS_MASK=key_mask is not None,
            WANT_LSE=return_lse,
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            num_warps=c.num_warps,
            num_stages=c.num_stages,
            maxnreg=c.max_registers,
        )
    return o, lse


def alignment(*tensors: Tensor) -> int:
    """Elements of 16 bytes if every row of every head starts at a multiple of them, else 1.

    Strides in this unit tell the compiler how wide it may load whatever the sizes: of a number it
    knows only whether it is a multiple of 16, and a head of 72 starts at a multiple of 8.
    """
    wide = 16 // tensors[0].element_size()
    strides = (
        stride
        for t in tensors
        for size, stride in zip(t.shape[:3], t.stride()[:3], strict=True)
        if size > 1
    )
    return wide if all(stride % wide == 0 for stride in strides) else 1
