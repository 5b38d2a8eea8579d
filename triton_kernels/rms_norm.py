"""y = round(x * rsqrt(mean(x^2) + eps)) * weight, in Triton.

Bytes: numel*(sizeof(x) + sizeof(y)). FLOPs: 4*numel. Bandwidth-bound: PiD norms its caption with
it, 300 rows of 1536 once an image, 2 MB and under a microsecond.

fp32 inside and two roundings, both of the definition: the normalised value to the dtype of x, the
product to the promoted dtype of x and weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, norm_rows
from .elementwise_rows import three_axes
from .norm_rows import Config

OP = "rms_norm"


@triton.jit(do_not_specialize=["N", "programs"])
def rms_norm_kernel(
    x_ptr,  # (B, N, D)
    weight_ptr,  # (D,)
    y_ptr,  # (B, N, D) contiguous
    N,
    D,
    programs,  # of an image
    x_stride_b,
    x_stride_n,
    eps,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # int64 before any multiply: a row offset can pass 2^31.
    image = (tl.program_id(0) // programs).to(tl.int64)
    n = (tl.program_id(0) % programs).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = (n < N)[:, None] & (column < D)[None, :]

    x_offset = (image * x_stride_b + n * x_stride_n)[:, None] + column[None, :]
    x = tl.load(x_ptr + x_offset, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x * x, axis=1) / D
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    h = (x * inverse[:, None]).to(x_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    y = h * weight[None, :]
    y_offset = ((image * N + n) * D)[:, None] + column[None, :]
    tl.store(y_ptr + y_offset, y.to(y_ptr.dtype.element_ty), mask=inside)


def why_not(x: Tensor, weight: Tensor, eps: float) -> str | None:
    return norm_rows.why_not(x, weight)


def heuristic(capability: tuple[int, int], x: Tensor, *rest: object) -> Config:
    return norm_rows.heuristic(x.shape[-1])


def key(x: Tensor, *rest: object) -> str:
    return norm_rows.key(x)


def candidates(x: Tensor, *rest: object) -> list[Config]:
    return norm_rows.candidates(x.shape[-1])


def launch(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (D,)
    eps: float,
    config: Config | None = None,
) -> Tensor:
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    if y.numel() == 0:
        return y
    chosen = config or configs.choose(OP, Config, heuristic, key, (x, weight, eps))
    x = three_axes(x)
    B, N, D = x.shape
    programs = triton.cdiv(N, chosen.rows)
    with torch.cuda.device_of(x):
        rms_norm_kernel[(B * programs,)](
            x,
            weight,
            y,
            N,
            D,
            programs,
            x.stride(0),
            x.stride(1),
            eps,
            ROWS=chosen.rows,
            BLOCK_D=norm_rows.columns(D),
            num_warps=chosen.num_warps,
        )
    return y
