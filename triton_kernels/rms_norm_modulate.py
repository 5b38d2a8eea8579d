"""y = x * rsqrt(mean(x^2) + eps) * weight * (1 + scale) + shift, in Triton.

Bytes: 2*B*N*D*sizeof(x) + 2*B*D*sizeof(scale). FLOPs: 5*B*N*D. Bandwidth-bound: one read and
one write. PiD at 2048 in bf16: 0.10 GB, 0.034 ms at 3.0 TB/s, 0.04 % of a step of 77 ms.

fp32 inside, one rounding at the end: to the dtype of y, or to e4m3 with a scale a row
(rms_norm_modulate_fp8.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, norm_rows
from .norm_rows import Config

OP = "rms_norm_modulate"


@triton.jit(do_not_specialize=["count", "N"])
def rms_norm_modulate_kernel(
    x_ptr,  # (B, N, D)
    weight_ptr,  # (D,)
    scale_ptr,  # (B, D)
    shift_ptr,  # (B, D); any valid pointer when HAS_SHIFT is False
    y_ptr,  # (B, N, D) contiguous; e4m3 when QUANTIZE
    row_scale_ptr,  # (B, N) fp32, contiguous; any valid pointer when QUANTIZE is False
    count,  # B * N
    N,
    D,
    x_stride_b,
    x_stride_n,
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
    x = norm_rows.load(x_ptr + x_offset, inside, PIECES, BLOCK_D)
    # Asked for before the sum, so that they arrive meanwhile.
    weight_offset = (n * 0)[:, None] + column[None, :]
    weight = norm_rows.load(weight_ptr + weight_offset, inside, PIECES, BLOCK_D)
    scale_offset = (b * scale_stride_b)[:, None] + column[None, :]
    scale = norm_rows.load(scale_ptr + scale_offset, inside, PIECES, BLOCK_D)
    shift = scale
    if HAS_SHIFT:
        shift_offset = (b * shift_stride_b)[:, None] + column[None, :]
        shift = norm_rows.load(shift_ptr + shift_offset, inside, PIECES, BLOCK_D)

    y_offset = (row * D)[:, None] + column[None, :]
    norm_rows.modulate(
        x, weight, scale, shift, y_ptr + y_offset, row_scale_ptr + row, inside, row < count,
        D, eps, HAS_SHIFT, QUANTIZE, PIECES, BLOCK_D,
    )  # fmt: skip


def why_not(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor | None, eps: float
) -> str | None:
    return norm_rows.why_not(x, weight, scale, shift)


def heuristic(capability: tuple[int, int], x: Tensor, *rest: object) -> Config:
    return norm_rows.heuristic_in_pieces(x.shape[-1])


def key(x: Tensor, *rest: object) -> str:
    return norm_rows.key(x)


def candidates(x: Tensor, *rest: object) -> list[Config]:
    return norm_rows.candidates(x.shape[-1])


def launch(
    x: Tensor,  # (B, N, D)
    weight: Tensor,  # (D,)
    scale: Tensor,  # (B, D)
    shift: Tensor | None,  # (B, D)
    eps: float,
    config: Config | None = None,
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        chosen = config or configs.choose(OP, Config, heuristic, key, (x,))
        run(x, weight, scale, shift, eps, y, None, chosen)
    return y


def run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    y: Tensor,  # (B, N, D) contiguous, dtype of x, or e4m3 with row_scale
    row_scale: Tensor | None,  # (B, N) fp32, contiguous
    config: Config,
) -> None:
    """Launch the kernel into y, quantised where there is a row_scale to fill."""
    B, N, D = x.shape
    pieces, block_d = norm_rows.pieces(D)
    with torch.cuda.device_of(x):
        rms_norm_modulate_kernel[(triton.cdiv(B * N, config.rows),)](
            x,
            weight,
            scale,
            scale if shift is None else shift,
            y,
            y if row_scale is None else row_scale,
            B * N,
            N,
            D,
            x.stride(0),
            x.stride(1),
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
