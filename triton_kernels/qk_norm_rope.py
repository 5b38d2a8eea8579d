"""q and k normalised per head and rotated, v copied, into one joint buffer, in Triton.

Bytes: 6*B*(T+N)*G*d*sizeof(qkv) + 4*(T+N)*d. FLOPs: 14*B*(T+N)*G*d. Bandwidth-bound: a PiD block
at 2048 moves 0.31 GB (v alone 0.10), 0.10 ms at 3.0 TB/s; 14 blocks are 1.4 ms, 2% of a 77 ms step,
and the two PiT blocks (0.23 GB each) 0.15 ms.

A tile is some heads of consecutive rows; q, k and v of a head share its row of the tables. Text and
image rows are two launches of one kernel into one buffer: what the second costs, about 2 us of a
block's 5.5 ms, does not pay for choosing between two sets of pointers in every program.

A head of 72 channels runs in a tile of 128 columns. The idle lanes cost instructions, not bytes:
about 0.05 ms of them a block, under the 0.08 ms of its memory traffic.

fp32 inside, one rounding; v moves bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launching

OP = "qk_norm_rope"
MAX_D = 256


@dataclass(frozen=True)
class Config:
    heads: int  # of a tile
    num_warps: int


@triton.jit
def _norm_turn(x, weight, cos, sin, D: tl.constexpr, eps):
    """x and weight (HEADS, BLOCK_D) in fp32, 0 outside; cos, sin (HEADS, BLOCK_D/2)."""
    HEADS: tl.constexpr = x.shape[0]
    BLOCK_D: tl.constexpr = x.shape[1]
    mean = tl.sum(x * x, axis=1) / D
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    h = x * inverse[:, None] * weight
    # Neighbouring channels lie in one thread: splitting them moves nothing, and loads and stores
    # keep their 16 bytes.
    a, b = tl.split(tl.reshape(h, (HEADS, BLOCK_D // 2, 2)))
    turned = tl.join(a * cos - b * sin, a * sin + b * cos)
    return tl.reshape(turned, (HEADS, BLOCK_D))


@triton.jit(do_not_specialize=["B", "N", "joint", "first", "tiles"])
def qk_norm_rope_kernel(
    qkv_ptr,  # (B, N, 3*G*D)
    q_weight_ptr,  # (D,)
    k_weight_ptr,  # (D,)
    cos_ptr,  # (N, D/2)
    sin_ptr,  # (N, D/2)
    out_ptr,  # (3, B, joint, G, D) contiguous
    B,
    N,
    joint,  # T + N, rows of the buffer
    first,  # the buffer's row that row 0 goes to
    tiles,  # programs an image
    qkv_stride_b,
    qkv_stride_n,
    eps,
    COS_STRIDE: tl.constexpr,
    SIN_STRIDE: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    item = tile * HEADS + tl.arange(0, HEADS)
    head = item % G
    # int64 before any multiply: an offset can pass 2^31.
    n = (item // G).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    slot = tl.arange(0, BLOCK_D // 2)
    row_inside = (item < N * G)[:, None]
    inside = row_inside & (column < D)[None, :]
    turns = row_inside & (slot < D // 2)[None, :]

    qkv_offset = b.to(tl.int64) * qkv_stride_b + n * qkv_stride_n + head * D
    qkv = qkv_ptr + qkv_offset[:, None] + column[None, :]
    q = tl.load(qkv, mask=inside, other=0.0)
    k = tl.load(qkv + G * D, mask=inside, other=0.0)
    v = tl.load(qkv + 2 * G * D, mask=inside, other=0.0)
    cos = tl.load(cos_ptr + (n * COS_STRIDE)[:, None] + slot[None, :], mask=turns, other=0.0)
    sin = tl.load(sin_ptr + (n * SIN_STRIDE)[:, None] + slot[None, :], mask=turns, other=0.0)
    cos = cos.to(tl.float32)
    sin = sin.to(tl.float32)
    # A copy for every head of the tile, 16 bytes from the first-level cache: a vector alone would
    # be spread over all threads and come to its columns through shared memory and a barrier.
    weights = (item * 0)[:, None] + column[None, :]
    q_weight = tl.load(q_weight_ptr + weights, mask=inside, other=0.0).to(tl.float32)
    k_weight = tl.load(k_weight_ptr + weights, mask=inside, other=0.0).to(tl.float32)

    row = b.to(tl.int64) * joint + first + n
    out = out_ptr + ((row * G + head) * D)[:, None] + column[None, :]
    part = B.to(tl.int64) * joint * (G * D)
    turned = _norm_turn(q.to(tl.float32), q_weight, cos, sin, D, eps)
    tl.store(out, turned.to(out_ptr.dtype.element_ty), mask=inside)
    turned = _norm_turn(k.to(tl.float32), k_weight, cos, sin, D, eps)
    tl.store(out + part, turned.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out + 2 * part, v, mask=inside)


def why_not(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    txt_qkv: Tensor | None,
    txt_q_weight: Tensor | None,
    txt_k_weight: Tensor | None,
    txt_cos: Tensor | None,
    txt_sin: Tensor | None,
    heads: int,
    eps: float,
) -> str | None:
    d = qkv.shape[-1] // (3 * heads)
    if d > MAX_D:
        return f"takes heads of at most {MAX_D} channels, got {d}"
    rows = qkv.shape[1] if txt_qkv is None else max(qkv.shape[1], txt_qkv.shape[1])
    if rows * heads >= 2**31 - 2**16:  # they are counted in 32 bits, to the end of the last tile
        return f"takes fewer than 2^31 heads an image, got {rows} rows of {heads}"
    image = (qkv, q_weight, k_weight, cos, sin)
    return launching.why_not(*image, txt_qkv, txt_q_weight, txt_k_weight, txt_cos, txt_sin)


def _columns(qkv: Tensor, heads: int) -> int:
    return triton.next_power_of_2(qkv.shape[-1] // (3 * heads))


def heuristic(capability: tuple[int, int], *args: object) -> Config:
    """One 16-byte vector each of q, k and v a thread, in 64 registers: 48 KB on their way on a
    multiprocessor of Hopper. Of two a thread has its norm weights and their conversion twice."""
    qkv, heads = args[0], args[-2]
    values = 16 // qkv.element_size() * 128
    return Config(max(1, values // _columns(qkv, heads)), 4)


def key(*args: object) -> str:
    qkv, heads = args[0], args[-2]
    return f"{str(qkv.dtype).removeprefix('torch.')} d{qkv.shape[-1] // (3 * heads)}"


def candidates(*args: object) -> list[Config]:
    """Tiles of one to four 16-byte vectors a thread."""
    qkv, heads = args[0], args[-2]
    vector = 16 // qkv.element_size()
    return [
        Config(max(1, vectors * vector * 32 * warps // _columns(qkv, heads)), warps)
        for warps in (2, 4, 8)
        for vectors in (1, 2, 4)
    ]


def launch(
    qkv: Tensor,  # (B, N, 3*G*d)
    q_weight: Tensor,  # (d,)
    k_weight: Tensor,  # (d,)
    cos: Tensor,  # (N, d/2)
    sin: Tensor,  # (N, d/2)
    txt_qkv: Tensor | None,  # (B, T, 3*G*d), dtype of qkv; the other text arguments go with it
    txt_q_weight: Tensor | None,  # (d,)
    txt_k_weight: Tensor | None,  # (d,)
    txt_cos: Tensor | None,  # (T, d/2)
    txt_sin: Tensor | None,  # (T, d/2)
    heads: int,
    eps: float,
    config: Config | None = None,
) -> Tensor:
    B, N, C = qkv.shape
    T = 0 if txt_qkv is None else txt_qkv.shape[1]
    out = qkv.new_empty((3, B, T + N, heads, C // (3 * heads)))
    if out.numel() == 0:
        return out
    args = (qkv, q_weight, k_weight, cos, sin)
    text = (txt_qkv, txt_q_weight, txt_k_weight, txt_cos, txt_sin)
    chosen = config or configs.choose(OP, Config, heuristic, key, (*args, *text, heads, eps))
    with torch.cuda.device_of(qkv):
        if T:
            _launch_rows(*text, out, 0, eps, chosen)
        if N:
            _launch_rows(*args, out, T, eps, chosen)
    return out


def _launch_rows(qkv, q_weight, k_weight, cos, sin, out, first, eps, chosen) -> None:
    _, B, joint, G, D = out.shape
    tiles = triton.cdiv(qkv.shape[1] * G, chosen.heads)
    qk_norm_rope_kernel[(B * tiles,)](
        qkv,
        q_weight,
        k_weight,
        cos,
        sin,
        out,
        B,
        qkv.shape[1],
        joint,
        first,
        tiles,
        qkv.stride(0),
        qkv.stride(1),
        eps,
        COS_STRIDE=cos.stride(0),
        SIN_STRIDE=sin.stride(0),
        G=G,
        D=D,
        HEADS=chosen.heads,
        BLOCK_D=triton.next_power_of_2(D),
        num_warps=chosen.num_warps,
    )
