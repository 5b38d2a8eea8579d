"""swiglu: silu(a) * b."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from .checks import check_float, check_shape
from .registry import Backend, define, upcast

BACKENDS = (
    Backend("triton", "pixeldiff.triton_kernels.swiglu"),
    Backend("cpu", "pixeldiff.ops.cpu.swiglu"),
)


def gated(a: Tensor, b: Tensor) -> Tensor:
    """The result before its rounding to the dtype of a."""
    return silu(upcast(a)) * upcast(b)


def reference(a: Tensor, b: Tensor) -> Tensor:
    return gated(a, b).to(a.dtype)


def _fake(a: Tensor, b: Tensor) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


_op = define(
    "swiglu",
    "(Tensor a, Tensor b) -> Tensor",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """Gate one projection with the SiLU of the other.

        y = a * sigmoid(a) * b

    Args:
        a, b: (..., F), fp32 | fp16 | bf16, the same shape and dtype; halves of one fused
            projection may be given as views.

    Returns:
        (..., F), contiguous, dtype of a. fp32 inside, one rounding.

    Raises:
        ValueError: shape. TypeError: dtype.

    Backends: triton, cpu (both fp32, bf16, fp16; last axis contiguous), reference. Gradients:
    through the reference.
    Cost: 3*numel*sizeof(a) bytes; bandwidth-bound.
    Source: PiD (arXiv 2605.23902), feed-forward of the MMDiT blocks.
    """
    check_halves("swiglu", a, b)
    return _op(a, b)


def check_halves(op: str, a: Tensor, b: Tensor) -> None:
    check_float(op, a=a, b=b)
    check_shape(op, "b", b, "shape of a", tuple(a.shape))
    if b.dtype != a.dtype:
        raise TypeError(f"{op}: b must have the dtype of a, {a.dtype}, got {b.dtype}")
