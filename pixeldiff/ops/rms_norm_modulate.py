"""rms_norm_modulate: RMSNorm of every token, then the image's AdaLN scale and shift."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_device, check_float, check_last_contiguous, check_rank, check_shape
from .registry import Backend, define, upcast

BACKENDS = (
    Backend("cuda", "pixeldiff.ops.cuda.rms_norm_modulate", automatic=False),
    Backend("triton", "pixeldiff.triton_kernels.rms_norm_modulate"),
    Backend("cpu", "pixeldiff.ops.cpu.rms_norm_modulate"),
)


def modulated(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    """The result before its rounding to the dtype of x."""
    h = upcast(x)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    h = h * upcast(weight) * (1 + upcast(scale)[:, None])
    if shift is not None:
        h = h + upcast(shift)[:, None]
    return h


def reference(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    return modulated(x, weight, scale, shift, eps).to(x.dtype)


def _fake(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_op = define(
    "rms_norm_modulate",
    "(Tensor x, Tensor weight, Tensor scale, Tensor? shift, float eps) -> Tensor",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def rms_norm_modulate(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor | None, *, eps: float = 1e-6
) -> Tensor:
    """RMS-normalise each token, then apply a per-image scale and shift.

        y = x / sqrt(mean(x^2, last axis) + eps) * weight * (1 + scale) + shift

    Shapes: B images, N tokens, D channels.

    Args:
        x: (B, N, D), fp32 | fp16 | bf16, last axis contiguous. Other strides are free, so a
            `.chunk()` view costs no copy.
        weight: (D,), the norm's own gain, any of the same dtypes.
        scale, shift: (B, D), any of the same dtypes, upcast to fp32 before `1 + scale`.
            shift may be None (no shift).
        eps: added to the mean square, same unit as x^2.

    Returns:
        (B, N, D), contiguous, dtype of x. Arithmetic is fp32 and rounds once, at the end.

    Raises:
        ValueError: shape, stride or device. TypeError: dtype. NotImplementedError: a forced
        backend cannot run; says why.

    Backends: triton, cpu (all fp32, bf16, fp16), cuda on request, reference. Gradients: through
    the reference.
    Cost: 2*B*N*D*sizeof(x) bytes; bandwidth-bound.
    Source: PiD (arXiv 2605.23902), AdaLN of the MMDiT blocks.
    """
    check_modulation("rms_norm_modulate", x, weight, scale, shift)
    return _op(x, weight, scale, shift, eps)


def check_modulation(
    op: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    *,
    weight_name: str = "weight",
) -> None:
    vectors = {weight_name: weight, "scale": scale, "shift": shift}
    check_float(op, x=x, **vectors)
    check_rank(op, "x", x, "(B, N, D)")
    b, _, d = x.shape
    check_shape(op, weight_name, weight, "(D,)", (d,))
    check_shape(op, "scale", scale, "(B, D)", (b, d))
    if shift is not None:
        check_shape(op, "shift", shift, "(B, D)", (b, d))
    check_last_contiguous(op, x=x, **vectors)
    check_device(op, x, **vectors)
