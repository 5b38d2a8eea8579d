"""gated_residual_norm: add a gated sub-layer output, then the next sub-layer's AdaLN."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_device, check_float, check_last_contiguous, check_shape
from .registry import Backend, define, upcast
from .rms_norm_modulate import check_modulation
from .rms_norm_modulate import reference as norm_reference

BACKENDS = (
    Backend("cuda", "pixeldiff.ops.cuda.gated_residual_norm", automatic=False),
    Backend("triton", "pixeldiff.triton_kernels.gated_residual_norm"),
    Backend("cpu", "pixeldiff.ops.cpu.gated_residual_norm"),
)


def residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return (upcast(x) + upcast(gate)[:, None] * upcast(y)).to(x.dtype)


def reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    out = residual(x, y, gate)
    return out, norm_reference(out, weight, scale, shift, eps)


def _fake(x, y, gate, weight, scale, shift, eps):
    empty = torch.empty_like(x, memory_format=torch.contiguous_format)
    return empty, torch.empty_like(empty)


_op = define(
    "gated_residual_norm",
    "(Tensor x, Tensor y, Tensor gate, Tensor weight, Tensor scale, Tensor? shift, float eps)"
    " -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def gated_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Add a gated sub-layer output to the residual stream and normalise the sum.

        r = x + gate * y
        h = r / sqrt(mean(r^2, last axis) + eps) * weight * (1 + scale) + shift

    h is computed from r as stored, that is after r's rounding to the dtype of x.

    Shapes: B images, N tokens, D channels.

    Args:
        x, y: (B, N, D), fp32 | fp16 | bf16, the same dtype, last axis contiguous.
        gate, scale, shift: (B, D); shift may be None.
        weight: (D,), the norm's own gain.
        eps: added to the mean square.

    Returns:
        (r, h), both (B, N, D), contiguous, dtype of x. Arithmetic is fp32; each rounds once.

    Raises:
        ValueError: shape, stride or device. TypeError: dtype. NotImplementedError: a forced
        backend cannot run; says why.

    Backends: triton, cpu (all fp32, bf16, fp16), cuda on request, reference. Gradients: through
    the reference.
    Cost: 4*B*N*D*sizeof(x) bytes; bandwidth-bound.
    Source: PiD (arXiv 2605.23902), residual updates of the MMDiT blocks.
    """
    check_gated_residual("gated_residual_norm", x, y, gate, weight, scale, shift)
    return _op(x, y, gate, weight, scale, shift, eps)


def check_gated_residual(
    op: str,
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
) -> None:
    check_modulation(op, x, weight, scale, shift)
    check_float(op, y=y, gate=gate)
    if y.dtype != x.dtype:
        raise TypeError(f"{op}: y must have the dtype of x, {x.dtype}, got {y.dtype}")
    check_shape(op, "y", y, "(B, N, D)", tuple(x.shape))
    check_shape(op, "gate", gate, "(B, D)", (x.shape[0], x.shape[2]))
    check_last_contiguous(op, y=y, gate=gate)
    check_device(op, x, y=y, gate=gate)
