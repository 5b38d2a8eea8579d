"""rms_norm_modulate_fp8: RMSNorm and AdaLN, quantised for fp8_linear."""

from __future__ import annotations

from torch import Tensor

from .checks import check_no_grad
from .quantize_rows import fake_rows, quantized
from .registry import Backend, define
from .rms_norm_modulate import check_modulation, modulated

BACKENDS = (Backend("triton", "pixeldiff.triton_kernels.rms_norm_modulate_fp8"),)


def reference(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return quantized(modulated(x, weight, scale, shift, eps))


def _fake(x, weight, scale, shift, eps):
    return fake_rows(x)


_op = define(
    "rms_norm_modulate_fp8",
    "(Tensor x, Tensor weight, Tensor scale, Tensor? shift, float eps) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def rms_norm_modulate_fp8(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor | None, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`rms_norm_modulate`, quantised row by row as by `quantize_rows`.

    The fp32 result is quantised, not the one rounded to the dtype of x.

    Args:
        x, weight, scale, shift, eps: as for `rms_norm_modulate`.

    Returns:
        (y, row_scale): (B, N, D) e4m3 and (B, N) fp32, contiguous.

    Raises:
        ValueError: shape, stride or device. TypeError: dtype. NotImplementedError: a forced
        backend cannot run; says why. RuntimeError: a gradient is asked for; there is none.

    Backends: triton (capability 8.9 and later), reference.
    Cost: B*N*D*(sizeof(x) + 1) bytes; bandwidth-bound.
    Source: PiD (arXiv 2605.23902), AdaLN of the MMDiT blocks; the quantisation is ours.
    """
    op = "rms_norm_modulate_fp8"
    check_modulation(op, x, weight, scale, shift)
    check_no_grad(op, x, weight, scale, shift)
    return _op(x, weight, scale, shift, eps)
