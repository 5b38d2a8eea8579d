"""x_new = x + gate * y, then h = rms_norm_modulate(x_new), in Triton.

Bytes: 4*B*N*D*sizeof(x) + 3*B*D*sizeof(scale). FLOPs: 7*B*N*D. Bandwidth-bound: x_new stays in
registers between the two. PiD at 2048 in bf16: 0.20 GB, 0.067 ms at 3.0 TB/s, at most twice in
each of 14 blocks, 2.4 % of a step of 77 ms.

fp32 inside; x_new is rounded once and the norm uses the rounded value.
h is rounded to the dtype of x, or to e4m3 with a scale a row (gated_residual_norm_fp8.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, norm_rows
from .norm_rows import Config

OP = "gated_residual_norm"


@triton.jit(do_not_specialize=["count", "N"])
def gated_residual_norm_kernel(
    x_ptr,  # (B, N, D)
    y_ptr,  # (B, N, D)
    gate_ptr,  # (B, D)
    weight_ptr,  # (D,)
    scale_ptr,  # (B, D)
    shift_ptr,  # (B, D); any valid pointer when HAS_SHIFT is False
    x_new_ptr,  # (B, N, D) contiguous
    h_ptr,  # (B, N, D) contiguous; e4m3 when QUANTIZE
    row_scale_ptr,  # (B, N) fp32, contiguous; any valid pointer when QUANTIZE is False
    count,  # B * N
    N,
    D,
    x_stride_b,
    x_stride_n,
    y_stride_b,
    y_stride_n,
    gate_stride_b,
    scale_stride_b,
    shift_stride_b,
    eps,
    HAS_SHIFT: tl.constexpr,
    QUANTIZE: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,  # of a row
    BLOCK_D: tl.constexpr,
):
    # int64 before any multiply: a row offset can pass 2^31.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b = row // N
    n = row % N
    column = tl.arange(0, BLOCK_D)
    inside = (row < count)[:, None]
    if PIECES == 1:
        inside = inside & (column < D)[None, :]

    x_offset = (b * x_stride_b + n * x_stride_n)[:, None] + column[None, :]
    y_offset = (b * y_stride_b + n * y_stride_n)[:, None] + column[None, :]
    gate_offset = (b * gate_stride_b)[:, None] + column[None, :]
    out_offset = (row * D)[:, None] + column[None, :]
    x = norm_rows.load(x_ptr + x_offset, inside, PIECES, BLOCK_D)
    y = norm_rows.load(y_ptr + y_offset, inside, PIECES, BLOCK_D)
    gate = norm_rows.load(gate_ptr + gate_offset, inside, PIECES, BLOCK_D)
    r = ()
    for i in tl.static_range(PIECES):
        x_new = x[i].to(tl.float32) + gate[i].to(tl.float32) * y[i].to(tl.float32)
        x_new = x_new.to(x_new_ptr.dtype.element_ty)
        tl.store(x_new_ptr + out_offset + i * BLOCK_D, x_new, mask=inside)
        r += (x_new,)

    # Asked for before the sum, so that they arrive meanwhile.
    weight_offset = (n * 0)[:, None] + column[None, :]
    weight = norm_rows.load(weight_ptr + weight_offset, inside, PIECES, BLOCK_D)
    scale_offset = (b * scale_stride_b)[:, None] + column[None, :]
    scale = norm_rows.load(scale_ptr + scale_offset, inside, PIECES, BLOCK_D)
    shift = scale
    if HAS_SHIFT:
        shift_offset = (b * shift_stride_b)[:, None] + column[None, :]
        shift = norm_rows.load(shift_ptr + shift_offset, inside, PIECES, BLOCK_D)
    norm_rows.modulate(
        r, weight, scale, shift, h_ptr + out_offset, row_scale_ptr + row, inside, row < count,
        D, eps, HAS_SHIFT, QUANTIZE, PIECES, BLOCK_D,
    )  # fmt: skip


def why_not(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
) -> str | None:
    return norm_rows.why_not(x, y, gate, weight, scale, shift)


def heuristic(capability: tuple[int, int], x: Tensor, *rest: object) -> Config:
    return norm_rows.heuristic_in_pieces(x.shape[-1])


def key(x: Tensor, *rest: object) -> str:
    return norm_rows.key(x)


def candidates(x: Tensor, *rest: object) -> list[Config]:
    return norm_rows.candidates(x.shape[-1])


def launch(
    x: Tensor,  # (B, N, D)
    y: Tensor,  # (B, N, D), dtype of x
    gate: Tensor,  # (B, D)
    weight: Tensor,  # (D,)
    scale: Tensor,  # (B, D)
    shift: Tensor | None,  # (B, D)
    eps: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    x_new = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if h.numel():
        chosen = config or configs.choose(OP, Config, heuristic, key, (x,))
        run(x, y, gate, weight, scale, shift, eps, x_new, h, None, chosen)
    return x_new, h


def run(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    x_new: Tensor,  # (B, N, D) contiguous, dtype of x
    h: Tensor,  # (B, N, D) contiguous, dtype of x, or e4m3 with row_scale
    row_scale: Tensor | None,  # (B, N) fp32, contiguous
    config: Config,
) -> None:
    """Launch the kernel into x_new and h, h quantised where there is a row_scale to fill."""
    B, N, D = x.shape
    pieces, block_d = norm_rows.pieces(D)
    with torch.cuda.device_of(x):
        gated_residual_norm_kernel[(triton.cdiv(B * N, config.rows),)](
            x,
            y,
            gate,
            weight,
            scale,
            scale if shift is None else shift,
            x_new,
            h,
            h if row_scale is None else row_scale,
            B * N,
            N,
            D,
            x.stride(0),
            x.stride(1),
            y.stride(0),
            y.stride(1),
            gate.stride(0),
            scale.stride(0),
            0 if shift is None else shift.stride(0),
            eps,
            HAS_SHIFT=shift is not None,
            QUANTIZE=row_scale is not None,
            ROWS=config.rows,
            PIECES=pieces,
            BLOCK_D=block_d,
            num_warps=config.num_warps,
        )
