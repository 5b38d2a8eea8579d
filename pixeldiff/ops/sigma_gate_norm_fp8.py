"""sigma_gate_norm_fp8: the latent's gate, then RMSNorm and AdaLN, quantised for fp8_linear."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_no_grad
from .quantize_rows import fake_rows, quantized
from .registry import Backend, define
from .rms_norm_modulate import check_modulation, modulated
from .sigma_gate import check_gate
from .sigma_gate import reference as gate_reference

BACKENDS = (Backend("triton", "pixeldiff.triton_kernels.sigma_gate_norm_fp8"),)


def reference(
    x: Tensor,
    feature: Tensor,
    weight: Tensor,
    lq_logit: Tensor,
    norm_weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    y = gate_reference(x, feature, weight, lq_logit)
    return y, *quantized(modulated(y, norm_weight, scale, shift, eps))


def _fake(x, feature, weight, lq_logit, norm_weight, scale, shift, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), *fake_rows(x)


_op = define(
    "sigma_gate_norm_fp8",
    "(Tensor x, Tensor feature, Tensor weight, Tensor lq_logit, Tensor norm_weight, Tensor scale,"
    " Tensor? shift, float eps) -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def sigma_gate_norm_fp8(
    x: Tensor,
    feature: Tensor,
    weight: Tensor,
    lq_logit: Tensor,
    norm_weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """`sigma_gate_norm` with its norm quantised row by row as by `quantize_rows`.

    The fp32 norm of y as stored is quantised, not the one rounded to the dtype of x.

    Args:
        x, feature, weight, lq_logit, norm_weight, scale, shift, eps: as for `sigma_gate_norm`.

    Returns:
        (y, h, row_scale): the gated sum (B, N, D) in the dtype of x, its norm (B, N, D) e4m3 and
        (B, N) fp32, contiguous.

    Raises:
        ValueError: shape, stride or device. TypeError: dtype. NotImplementedError: a forced
        backend cannot run; says why. RuntimeError: a gradient is asked for; there is none.

    Backends: triton (capability 8.9 and later), reference.
    Cost: that of `sigma_gate_norm`, less B*N*D*(sizeof(x) - 1) bytes.
    Source: PiD (arXiv 2605.23902), sigma-aware adapter before an MMDiT block; the quantisation is
    ours.
    """
    op = "sigma_gate_norm_fp8"
    check_gate(op, x, feature, weight, lq_logit)
    check_modulation(op, x, norm_weight, scale, shift, weight_name="norm_weight")
    check_no_grad(op, x, feature, weight, lq_logit, norm_weight, scale, shift)
    return _op(x, feature, weight, lq_logit, norm_weight, scale, shift, eps)
