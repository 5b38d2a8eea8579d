"""swiglu_fp8: silu(a) * b, quantised for fp8_linear."""

from __future__ import annotations

from torch import Tensor

from .checks import check_last_contiguous, check_no_grad, check_rows
from .quantize_rows import fake_rows, quantized
from .registry import Backend, define
from .swiglu import check_halves, gated

BACKENDS = (Backend("triton", "pixeldiff.triton_kernels.swiglu_fp8"),)


def reference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return quantized(gated(a, b))


def _fake(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return fake_rows(a)


_op = define(
    "swiglu_fp8",
    "(Tensor a, Tensor b) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def swiglu_fp8(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`swiglu`, quantised row by row as by `quantize_rows`.

    The fp32 product is quantised, not the one rounded to the dtype of a.

    Args:
        a, b: (..., F), two axes or more, fp32 | fp16 | bf16, the same dtype, last axis contiguous;
            halves of one fused projection may be given as views.

    Returns:
        (y, row_scale): (..., F) e4m3 and (...) fp32, contiguous.

    Raises:
        ValueError: shape or stride. TypeError: dtype. NotImplementedError: a forced backend cannot
        run; says why. RuntimeError: a gradient is asked for; there is none.

    Backends: triton (capability 8.9 and later), reference.
    Cost: numel*(2*sizeof(a) + 1) bytes; bandwidth-bound.
    Source: PiD (arXiv 2605.23902), feed-forward of the MMDiT blocks; the quantisation is ours.
    """
    op = "swiglu_fp8"
    check_halves(op, a, b)
    check_rows(op, "a", a)
    check_last_contiguous(op, a=a, b=b)
    check_no_grad(op, a, b)
    return _op(a, b)
