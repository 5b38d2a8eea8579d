"""gated_residual_norm_fp8: gated residual, then RMSNorm and AdaLN, quantised for fp8_linear."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_no_grad
from .gated_residual_norm import check_gated_residual, residual
from .quantize_rows import fake_rows, quantized
from .registry import Backend, define
from .rms_norm_modulate import modulated

BACKENDS = (Backend("triton", "pixeldiff.triton_kernels.gated_residual_norm_fp8"),)


def reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    out = residual(x, y, gate)
    return out, *quantized(modulated(out, weight, scale, shift, eps))


def _fake(x, y, gate, weight, scale, shift, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), *fake_rows(x)


_op = define(
    "gated_residual_norm_fp8",
    "(Tensor x, Tensor y, Tensor gate, Tensor weight, Tensor scale, Tensor? shift, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def gated_residual_norm_fp8(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_residual_norm` with its norm quantised row by row as by `quantize_rows`.

    The fp32 norm of the residual as stored is quantised, not the one rounded to the dtype of x.

    Args:
        x, y, gate, weight, scale, shift, eps: as for `gated_residual_norm`.

    Returns:
        (r, h, row_scale): the residual (B, N, D) in the dtype of x, its norm (B, N, D) e4m3 and
        (B, N) fp32, contiguous.

    Raises:
        ValueError: shape, stride or device. TypeError: dtype. NotImplementedError: a forced
        backend cannot run; says why. RuntimeError: a gradient is asked for; there is none.

    Backends: triton (capability 8.9 and later), reference.
    Cost: B*N*D*(3*sizeof(x) + 1) bytes; bandwidth-bound.
    Source: PiD (arXiv 2605.23902), residual updates of the MMDiT blocks; the quantisation is ours.
    """
    op = "gated_residual_norm_fp8"
    check_gated_residual(op, x, y, gate, weight, scale, shift)
    check_no_grad(op, x, y, gate, weight, scale, shift)
    return _op(x, y, gate, weight, scale, shift, eps)
