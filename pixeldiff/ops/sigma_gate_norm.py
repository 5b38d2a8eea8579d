"""sigma_gate_norm: add the gated features of the latent, then the next sub-layer's AdaLN."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import Backend, define
from .rms_norm_modulate import check_modulation
from .rms_norm_modulate import reference as norm_reference
from .sigma_gate import check_gate
from .sigma_gate import reference as gate_reference

BACKENDS = (
    Backend("triton", "pixeldiff.triton_kernels.sigma_gate_norm"),
    Backend("cpu", "pixeldiff.ops.cpu.sigma_gate_norm"),
)


def reference(
    x: Tensor,
    feature: Tensor,
    weight: Tensor,
    lq_logit: Tensor,
    norm_weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    y = gate_reference(x, feature, weight, lq_logit)
    return y, norm_reference(y, norm_weight, scale, shift, eps)


def _fake(x, feature, weight, lq_logit, norm_weight, scale, shift, eps):
    empty = torch.empty_like(x, memory_format=torch.contiguous_format)
    return empty, torch.empty_like(empty)


_op = define(
    "sigma_gate_norm",
    "(Tensor x, Tensor feature, Tensor weight, Tensor lq_logit, Tensor norm_weight, Tensor scale,"
    " Tensor? shift, float eps) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def sigma_gate_norm(
    x: Tensor,
    feature: Tensor,
    weight: Tensor,
    lq_logit: Tensor,
    norm_weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Add latent features to the stream through their gate and normalise the sum.

        y = x + sigmoid(x weight^T + lq_logit) * feature
        h = y / sqrt(mean(y^2, last axis) + eps) * norm_weight * (1 + scale) + shift

    h is computed from y as stored, that is after y's rounding to the dtype of x.

    Shapes: B images, N tokens, D channels, K = D (one logit per channel) or 1 (one per token).

    Args:
        x: (B, N, D), fp32 | fp16 | bf16, last axis contiguous.
        feature: (B, N, D).
        weight: (K, D), the x half of the gate's linear; dtype of x; may be a column slice.
        lq_logit: (B, N, K), what does not depend on x (see `sigma_gate`).
        norm_weight: (D,), the norm's own gain.
        scale, shift: (B, D); shift may be None.
        eps: added to the mean square.

    Returns:
        (y, h), both (B, N, D), contiguous, dtype of x. h is fp32 inside and rounds once.

    Raises:
        ValueError: shape, stride or device. TypeError: dtype. NotImplementedError: a forced
        backend cannot run; says why.

    Backends: triton, cpu (both fp32, bf16, fp16, last axes contiguous; on cpu feature of the dtype
    of x, lq_logit of it or fp32), reference. Gradients: through the reference.
    Cost: K = D: 2*B*N*D*D FLOPs and 2*B*N*D*sizeof(x) bytes after them; K = 1:
    4*B*N*D*sizeof(x) bytes, bandwidth-bound.
    Source: PiD (arXiv 2605.23902), sigma-aware adapter before an MMDiT block.
    """
    op = "sigma_gate_norm"
    check_gate(op, x, feature, weight, lq_logit)
    check_modulation(op, x, norm_weight, scale, shift, weight_name="norm_weight")
    return _op(x, feature, weight, lq_logit, norm_weight, scale, shift, eps)
