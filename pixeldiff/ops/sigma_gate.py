"""sigma_gate: add the latent's features to a stream through a noise-aware gate."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .checks import check_device, check_float, check_rank, check_shape
from .registry import Backend, define, upcast

BACKENDS = (
    Backend("triton", "pixeldiff.triton_kernels.sigma_gate"),
    Backend("cpu", "pixeldiff.ops.cpu.sigma_gate"),
)


def reference(x: Tensor, feature: Tensor, weight: Tensor, lq_logit: Tensor) -> Tensor:
    logit = upcast(linear(x, weight)) + upcast(lq_logit)
    return (upcast(x) + torch.sigmoid(logit) * upcast(feature)).to(x.dtype)


def _fake(x: Tensor, feature: Tensor, weight: Tensor, lq_logit: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_op = define(
    "sigma_gate",
    "(Tensor x, Tensor feature, Tensor weight, Tensor lq_logit) -> Tensor",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def sigma_gate(x: Tensor, feature: Tensor, weight: Tensor, lq_logit: Tensor) -> Tensor:
    """Add latent features to the stream, gated by the stream, the features and the noise level.

        y = x + sigmoid(x weight^T + lq_logit) * feature

    lq_logit holds everything in the gate's logit that does not depend on x: the feature half of its
    linear, its bias, and - exp(log_alpha) * sigma.

    Shapes: B images, N tokens, D channels, K = D (one logit per channel) or 1 (one per token).

    Args:
        x: (B, N, D), fp32 | fp16 | bf16.
        feature: (B, N, D).
        weight: (K, D), the x half of the gate's linear; dtype of x; may be a column slice.
        lq_logit: (B, N, K).

    Returns:
        (B, N, D), contiguous, dtype of x.

    Raises:
        ValueError: shape or device. TypeError: dtype. NotImplementedError: a forced backend
        cannot run; says why.

    Backends: triton, cpu (both fp32, bf16, fp16, last axes contiguous; on cpu feature of the dtype
    of x, lq_logit of it or fp32), reference. Gradients: through the reference.
    Cost: K = D: 2*B*N*D*D FLOPs; K = 1: 3*B*N*D*sizeof(x) bytes, bandwidth-bound.
    Source: PiD (arXiv 2605.23902), sigma-aware adapter.
    """
    check_gate("sigma_gate", x, feature, weight, lq_logit)
    return _op(x, feature, weight, lq_logit)


def check_gate(op: str, x: Tensor, feature: Tensor, weight: Tensor, lq_logit: Tensor) -> None:
    check_float(op, x=x, feature=feature, weight=weight, lq_logit=lq_logit)
    check_rank(op, "x", x, "(B, N, D)")
    b, n, d = x.shape
    k = weight.shape[0]
    if k not in (1, d):
        raise ValueError(
            f"{op}: weight must be (D, D) or (1, D) with D = {d}, got {tuple(weight.shape)}"
        )
    if weight.dtype != x.dtype:
        raise TypeError(f"{op}: weight must have the dtype of x, {x.dtype}, got {weight.dtype}")
    check_shape(op, "weight", weight, "(K, D)", (k, d))
    check_shape(op, "feature", feature, "(B, N, D)", (b, n, d))
    check_shape(op, "lq_logit", lq_logit, "(B, N, K)", (b, n, k))
    check_device(op, x, feature=feature, weight=weight, lq_logit=lq_logit)
