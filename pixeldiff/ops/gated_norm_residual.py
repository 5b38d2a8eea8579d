"""gated_norm_residual: RMSNorm of a sub-layer's output, gated, onto the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_device, check_float, check_last_contiguous, check_rank, check_shape
from .registry import Backend, define, upcast

BACKENDS = (
    Backend("triton", "pixeldiff.triton_kernels.gated_norm_residual"),
    Backend("cpu", "pixeldiff.ops.cpu.gated_norm_residual"),
)


def reference(x: Tensor, y: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> Tensor:
    h = upcast(y)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * upcast(weight)
    if gate is not None:
        h = h * upcast(gate)[:, None]
    return (upcast(x) + h).to(x.dtype)


def _fake(x: Tensor, y: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_op = define(
    "gated_norm_residual",
    "(Tensor x, Tensor y, Tensor weight, Tensor? gate, float eps) -> Tensor",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def gated_norm_residual(
    x: Tensor, y: Tensor, weight: Tensor, gate: Tensor | None, *, eps: float = 1e-5
) -> Tensor:
    """RMS-normalise a sub-layer's output and add it to the residual stream through a gate.

        r = x + gate * y / sqrt(mean(y^2, last axis) + eps) * weight

    The gate comes activated (L2P's is tanh of a projection of the time, made once a step), so that
    no token computes it again.

    Shapes: B images, N tokens, D channels.

    Args:
        x, y: (B, N, D), fp32 | fp16 | bf16, the same dtype, last axis contiguous.
        weight: (D,), the norm's own gain, any of the same dtypes.
        gate: (B, D), any of the same dtypes; None is 1.
        eps: added to the mean square, same unit as y^2.

    Returns:
        (B, N, D), contiguous, dtype of x. Arithmetic is fp32 and rounds once, at the end.

    Raises:
        ValueError: shape, stride or device. TypeError: dtype. NotImplementedError: a forced
        backend cannot run; says why.

    Backends: triton, cpu (both fp32, bf16, fp16), reference. Gradients: through the reference.
    Cost: 3*B*N*D*sizeof(x) bytes; bandwidth-bound.
    Source: L2P (arXiv 2605.12013), residual updates of the Z-Image blocks.
    """
    op = "gated_norm_residual"
    check_float(op, x=x, y=y, weight=weight, gate=gate)
    check_rank(op, "x", x, "(B, N, D)")
    b, _, d = x.shape
    check_shape(op, "y", y, "(B, N, D)", tuple(x.shape))
    if y.dtype != x.dtype:
        raise TypeError(f"{op}: y must have the dtype of x, {x.dtype}, got {y.dtype}")
    check_shape(op, "weight", weight, "(D,)", (d,))
    if gate is not None:
        check_shape(op, "gate", gate, "(B, D)", (b, d))
    check_last_contiguous(op, x=x, y=y, weight=weight, gate=gate)
    check_device(op, x, y=y, weight=weight, gate=gate)
    return _op(x, y, weight, gate, eps)
