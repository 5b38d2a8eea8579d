"""rms_norm: RMSNorm over the last axis, with the published rounding of mixed dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_float, check_shape
from .registry import Backend, define, upcast

BACKENDS = (Backend("triton", "pixeldiff.triton_kernels.rms_norm"),)


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    h = upcast(x)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return h.to(x.dtype) * weight


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))


_op = define(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps) -> Tensor",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """RMS-normalise the last axis.

        y = round(x / sqrt(mean(x^2) + eps)) * weight

    The normalised value is rounded to the dtype of x before the weight multiplies it, and the
    product follows type promotion: a bf16 x with an fp32 weight gives an fp32 result.

    Args:
        x: (..., D), floating point.
        weight: (D,), floating point.
        eps: added to the mean square, same unit as x^2.

    Returns:
        (..., D), the promoted dtype of x and weight.

    Raises:
        ValueError: shape. TypeError: dtype.

    Backends: triton (fp32, bf16, fp16; last axis contiguous), reference. Gradients: through the
    reference.
    Cost: numel*(sizeof(x) + sizeof(y)) bytes; bandwidth-bound.
    Source: PiD (arXiv 2605.23902), released networks' RMSNorm.
    """
    check_float("rms_norm", x=x, weight=weight)
    check_shape("rms_norm", "weight", weight, "(D,)", (x.shape[-1],))
    return _op(x, weight, eps)
