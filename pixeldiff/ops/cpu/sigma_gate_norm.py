"""sigma_gate_norm on the CPU: the kernels of its two halves, one after the other."""

from __future__ import annotations

from torch import Tensor

from ... import native
from . import rms_norm_modulate, sigma_gate


def why_not(
    x: Tensor,
    feature: Tensor,
    weight: Tensor,
    lq_logit: Tensor,
    norm_weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
) -> str | None:
    reason = sigma_gate.why_not(x, feature, weight, lq_logit)
    return reason or native.why_not_tensors("cpu", norm_weight, scale, shift)


def launch(
    x: Tensor,  # (B, N, D)
    feature: Tensor,  # (B, N, D), dtype of x
    weight: Tensor,  # (K, D), dtype of x; K = 1 or D
    lq_logit: Tensor,  # (B, N, K), fp32 or the dtype of x
    norm_weight: Tensor,  # (D,)
    scale: Tensor,  # (B, D)
    shift: Tensor | None,  # (B, D)
    eps: float,
    *,
    isa: int | None = None,  # a code of native.ISA_CODES; None takes the best
    threads: int | None = None,  # None takes PyTorch's number
) -> tuple[Tensor, Tensor]:
    how = {"isa": isa, "threads": threads}
    y = sigma_gate.launch(x, feature, weight, lq_logit, **how)
    return y, rms_norm_modulate.launch(y, norm_weight, scale, shift, eps, **how)
