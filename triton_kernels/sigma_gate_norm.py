"""y = sigma_gate(x, ...), then h = rms_norm_modulate(y), in Triton; h in the dtype of x, or in e4m3
with a scale a row (sigma_gate_norm_fp8.py).

PiD at 2048, bf16: B*N = 16384, D = 1536, 7 times in a step of 77 ms. h starts from y as stored.

Per token (v1.5): one kernel reads x and feature and writes y and h, 0.20 GB, 0.067 ms at 3.0 TB/s,
0.6 % of a step; apart the two ops move 0.25 GB, 0.084 ms.

Per channel (v1): the gate's GEMM (0.13 to 0.15 ms, see sigma_gate.py), then the norm, which reads y
and writes h: 0.10 GB, 0.034 ms, together 1.5 to 1.7 % of a step. A row of y spans 12 tiles of the
product, so h cannot leave with y. What was weighed against that second pass:

    sums of squares of each row and tile from the epilogue, and a pass that only scales: it still
    reads y and writes h, 0.034 ms and 2 MB of sums more; a row's sum costs nothing where the row
    is in registers anyway;
    whole rows of y in one program: at most 64 of them fit shared memory beside the product's
    tiles, so W is read from the L2 cache 256 times, 1.2 GB or 0.22 ms at 5.5 TB/s, to save the
    0.017 ms that reading y takes.

What can be saved is the part of y that the L2 cache (50 MB, as much as y) still holds: the second
pass goes through the rows backwards, from the last ones written. Expected 0.026 to 0.034 ms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launching, norm_rows, sigma_gate
from .norm_rows import Config
from .sigma_gate import gate

OP = "sigma_gate_norm"


@triton.jit
def store_norm(
    y,  # tuple of pieces (ROWS, BLOCK_D), as stored
    norm_weight_ptr,  # (D,)
    scale_ptr,  # (D,) of the image
    shift_ptr,  # (D,) of the image
    h_ptrs,  # of the first piece
    row_scale_ptrs,  # (ROWS,)
    row_inside,  # (ROWS,)
    D,
    eps,
    HAS_SHIFT: tl.constexpr,
    QUANTIZE: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    inside = _inside(row_inside, D, PIECES, BLOCK_D)
    # For every row of the tile: each thread has the gains where its values are.
    vector = (row_inside.to(tl.int32) * 0)[:, None] + tl.arange(0, BLOCK_D)[None, :]
    norm_weight = norm_rows.load(norm_weight_ptr + vector, inside, PIECES, BLOCK_D)
    scale = norm_rows.load(scale_ptr + vector, inside, PIECES, BLOCK_D)
    shift = scale
    if HAS_SHIFT:
        shift = norm_rows.load(shift_ptr + vector, inside, PIECES, BLOCK_D)
    norm_rows.modulate(
        y, norm_weight, scale, shift, h_ptrs, row_scale_ptrs, inside, row_inside,
        D, eps, HAS_SHIFT, QUANTIZE, PIECES, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _inside(row_inside, D, PIECES: tl.constexpr, BLOCK_D: tl.constexpr):
    """(ROWS, BLOCK_D or 1): of each piece."""
    inside = row_inside[:, None]
    if PIECES == 1:
        inside = inside & (tl.arange(0, BLOCK_D) < D)[None, :]
    return inside


@triton.jit(do_not_specialize=["N", "logit_stride_b", "logit_stride_n"])
def sigma_gate_norm_token_kernel(
    x_ptr,  # (B, N, D)
    feature_ptr,  # (B, N, D)
    weight_ptr,  # (D,)
    logit_ptr,  # (B, N)
    norm_weight_ptr,  # (D,)
    scale_ptr,  # (B, D)
    shift_ptr,  # (B, D); any valid pointer when HAS_SHIFT is False
    y_ptr,  # (B, N, D) contiguous
    h_ptr,  # (B, N, D) contiguous; e4m3 when QUANTIZE
    row_scale_ptr,  # (B, N) fp32, contiguous; any valid pointer when QUANTIZE is False
    N,
    D,
    x_stride_b,
    x_stride_n,
    feature_stride_b,
    feature_stride_n,
    logit_stride_b,
    logit_stride_n,
    scale_stride_b,
    shift_stride_b,
    eps,
    HAS_SHIFT: tl.constexpr,
    QUANTIZE: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,  # of a row
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(N, ROWS)  # of one image
    # int64 before any multiply: a row offset can pass 2^31.
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = _inside(row < N, D, PIECES, BLOCK_D)

    x_offset = (b * x_stride_b + row * x_stride_n)[:, None] + column[None, :]
    feature_offset = (b * feature_stride_b + row * feature_stride_n)[:, None] + column[None, :]
    logit_offset = b * logit_stride_b + row * logit_stride_n
    out_offset = ((b * N + row) * D)[:, None] + column[None, :]
    x = norm_rows.load(x_ptr + x_offset, inside, PIECES, BLOCK_D)
    feature = norm_rows.load(feature_ptr + feature_offset, inside, PIECES, BLOCK_D)
    vector = (row * 0)[:, None] + column[None, :]
    weight = norm_rows.load(weight_ptr + vector, inside, PIECES, BLOCK_D)
    lq_logit = tl.load(logit_ptr + logit_offset, mask=row < N, other=0.0).to(tl.float32)
    gates = gate(x, weight, lq_logit, PIECES)
    y = ()
    for i in tl.static_range(PIECES):
        piece = x[i].to(tl.float32) + gates * feature[i].to(tl.float32)
        piece = piece.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + out_offset + i * BLOCK_D, piece, mask=inside)
        y += (piece,)
    scale_ptr += b * scale_stride_b
    shift_ptr += b * shift_stride_b
    store_norm(
        y, norm_weight_ptr, scale_ptr, shift_ptr, h_ptr + out_offset, row_scale_ptr + b * N + row,
        row < N, D, eps, HAS_SHIFT, QUANTIZE, PIECES, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def norm_backwards_kernel(
    y_ptr,  # (B, N, D) contiguous
    norm_weight_ptr,  # (D,)
    scale_ptr,  # (B, D)
    shift_ptr,  # (B, D); any valid pointer when HAS_SHIFT is False
    h_ptr,  # (B, N, D) contiguous; e4m3 when QUANTIZE
    row_scale_ptr,  # (B, N) fp32, contiguous; any valid pointer when QUANTIZE is False
    N,
    D,
    scale_stride_b,
    shift_stride_b,
    eps,
    HAS_SHIFT: tl.constexpr,
    QUANTIZE: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,  # of a row
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(N, ROWS)  # of one image
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b = (block // blocks).to(tl.int64)
    row = (block % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = _inside(row < N, D, PIECES, BLOCK_D)

    offset = ((b * N + row) * D)[:, None] + column[None, :]
    y = norm_rows.load(y_ptr + offset, inside, PIECES, BLOCK_D)
    scale_ptr += b * scale_stride_b
    shift_ptr += b * shift_stride_b
    store_norm(
        y, norm_weight_ptr, scale_ptr, shift_ptr, h_ptr + offset, row_scale_ptr + b * N + row,
        row < N, D, eps, HAS_SHIFT, QUANTIZE, PIECES, BLOCK_D,
    )  # fmt: skip


def why_not(
    x: Tensor,
    feature: Tensor,
    weight: Tensor,
    lq_logit: Tensor,
    norm_weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
) -> str | None:
    if x.shape[-1] > sigma_gate.MAX_D:
        return f"takes at most {sigma_gate.MAX_D} channels, got {x.shape[-1]}"
    reason = sigma_gate.why_not(x, feature, weight, lq_logit)
    return reason or launching.why_not(norm_weight, scale, shift)


def heuristic(capability: tuple[int, int], x: Tensor, *rest: object) -> Config:
    return norm_rows.heuristic_in_pieces(x.shape[-1])


def key(x: Tensor, feature: Tensor, weight: Tensor, *rest: object) -> str:
    return f"{norm_rows.key(x)} per {'token' if weight.shape[0] == 1 else 'channel'}"


def candidates(x: Tensor, *rest: object) -> list[Config]:
    return norm_rows.candidates(x.shape[-1])


def launch(
    x: Tensor,  # (B, N, D)
    feature: Tensor,  # (B, N, D)
    weight: Tensor,  # (K, D), K = D or 1
    lq_logit: Tensor,  # (B, N, K)
    norm_weight: Tensor,  # (D,)
    scale: Tensor,  # (B, D)
    shift: Tensor | None,  # (B, D)
    eps: float,
    config: Config | None = None,  # of the kernel that writes h; the product has its own
) -> tuple[Tensor, Tensor]:
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if h.numel() == 0:
        return torch.empty_like(h), h
    chosen = config or configs.choose(OP, Config, heuristic, key, (x, feature, weight))
    args = (x, feature, weight, lq_logit, norm_weight, scale, shift, eps)
    return run(*args, h, None, chosen), h


def run(
    x: Tensor,
    feature: Tensor,
    weight: Tensor,
    lq_logit: Tensor,
    norm_weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    h: Tensor,  # (B, N, D) contiguous, dtype of x, or e4m3 with row_scale
    row_scale: Tensor | None,  # (B, N) fp32, contiguous
    config: Config,
) -> Tensor:
    """Launch the kernels into h, quantised where there is a row_scale to fill, and return y."""
    B, N, D = x.shape
    grid = (B * triton.cdiv(N, config.rows),)
    shift_stride = 0 if shift is None else shift.stride(0)
    pieces, block_d = norm_rows.pieces(D)
    constants = {
        "HAS_SHIFT": shift is not None,
        "QUANTIZE": row_scale is not None,
        "ROWS": config.rows,
        "PIECES": pieces,
        "BLOCK_D": block_d,
        "num_warps": config.num_warps,
    }
    if weight.shape[0] != 1:
        y = sigma_gate.launch(x, feature, weight, lq_logit)
        with torch.cuda.device_of(x):
            norm_backwards_kernel[grid](
                y,
                norm_weight,
                scale,
                scale if shift is None else shift,
                h,
                h if row_scale is None else row_scale,
                N,
                D,
                scale.stride(0),
                shift_stride,
                eps,
                **constants,
            )
        return y
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        sigma_gate_norm_token_kernel[grid](
            x,
            feature,
            weight,
            lq_logit,
            norm_weight,
            scale,
            scale if shift is None else shift,
            y,
            h,
            h if row_scale is None else row_scale,
            N,
            D,
            x.stride(0),
            x.stride(1),
            feature.stride(0),
            feature.stride(1),
            lq_logit.stride(0),
            lq_logit.stride(1),
            scale.stride(0),
            shift_stride,
            eps,
            **constants,
        )
    return y
