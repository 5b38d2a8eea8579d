"""add_silu: the activation of a stream after one vector per image is added."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from .checks import check_device, check_float, check_rank, check_shape
from .registry import Backend, define, upcast

BACKENDS = (Backend("triton", "pixeldiff.triton_kernels.add_silu"),)


def reference(x: Tensor, shift: Tensor) -> Tensor:
    return silu(upcast(x) + upcast(shift)[:, None]).to(x.dtype)


def _fake(x: Tensor, shift: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_op = define(
    "add_silu",
    "(Tensor x, Tensor shift) -> Tensor",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def add_silu(x: Tensor, shift: Tensor) -> Tensor:
    """Add a vector per image to every token, then apply SiLU.

        y = h * sigmoid(h),  h = x + shift

    Shapes: B images, N tokens, D channels.

    Args:
        x: (B, N, D), fp32 | fp16 | bf16.
        shift: (B, D), any of the same dtypes.

    Returns:
        (B, N, D), contiguous, dtype of x. fp32 inside, one rounding.

    Raises:
        ValueError: shape or device. TypeError: dtype. NotImplementedError: a forced backend cannot
        run; says why.

    Backends: triton (fp32, bf16, fp16; last axes contiguous), reference. Gradients: through the
    reference.
    Cost: 2*B*N*D*sizeof(x) bytes; bandwidth-bound.
    Source: PiD (arXiv 2605.23902), the patch stream's output as the pixel stream's condition.
    """
    op = "add_silu"
    check_float(op, x=x, shift=shift)
    check_rank(op, "x", x, "(B, N, D)")
    check_shape(op, "shift", shift, "(B, D)", (x.shape[0], x.shape[2]))
    check_device(op, x, shift=shift)
    return _op(x, shift)
