"""y = x * rsqrt(mean(x^2) + eps) * weight * (1 + scale) + shift, in Triton.

Bytes: 2*B*N*D*sizeof(x) + 2*B*D*sizeof(scale). FLOPs: 5*B*N*D. Bandwidth-bound: one read and
one write. fp32 inside, one rounding at the end.
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
    y_ptr,  # (B, N, D) contiguous
    count,  # B * N
    N,
    D,
    x_stride_b,
    x_stride_n,
    scale_stride_b,
    shift_stride_b,
    eps,
    HAS_SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # int64 before any multiply: a row offset can pass 2^31.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b = row // N
    n = row % N
    column = tl.arange(0, BLOCK_D)
    inside = (row < count)[:, None] & (column < D)[None, :]

    x_offset = (b * x_stride_b + n * x_stride_n)[:, None] + column[None, :]
    x = tl.load(x_ptr + x_offset, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x * x, axis=1) / D
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))

    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    scale_offset = (b * scale_stride_b)[:, None] + column[None, :]
    scale = tl.load(scale_ptr + scale_offset, mask=inside, other=0.0).to(tl.float32)
    y = x * inverse[:, None] * (weight[None, :] * (1.0 + scale))
    if HAS_SHIFT:
        shift_offset = (b * shift_stride_b)[:, None] + column[None, :]
        y += tl.load(shift_ptr + shift_offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        y_ptr + (row * D)[:, None] + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside
    )


def why_not(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor | None, eps: float
) -> str | None:
    return norm_rows.why_not(x, weight, scale, shift)


def heuristic(capability: tuple[int, int], x: Tensor, *rest: object) -> Config:
    return norm_rows.heuristic(x.shape[-1])


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
    B, N, D = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    chosen = config or configs.choose(OP, Config, heuristic, key, (x,))
    with torch.cuda.device_of(x):
        rms_norm_modulate_kernel[(triton.cdiv(B * N, chosen.rows),)](
            x,
            weight,
            scale,
            scale if shift is None else shift,
            y,
            B * N,
            N,
            D,
            x.stride(0),
            x.stride(1),
            scale.stride(0),
            0 if shift is None else shift.stride(0),
            eps,
            HAS_SHIFT=shift is not None,
            ROWS=chosen.rows,
            BLOCK_D=norm_rows.columns(D),
            num_warps=chosen.num_warps,
        )
    return y
