"""quantize_rows: values to e4m3 with one fp32 scale a row, for fp8_linear."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_float, check_last_contiguous, check_no_grad, check_rows
from .registry import Backend, define, upcast

BACKENDS = (Backend("triton", "pixeldiff.triton_kernels.quantize_rows"),)
E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
SMALLEST_NORMAL = torch.finfo(torch.float32).smallest_normal


def quantized(h: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 values, fp32 scales) of the rows of h, fp32 or fp64: the definition of every op here
    that quantises. The scale has the shape of h without its last axis."""
    if h.shape[-1] == 0:
        return h.to(E4M3), h.new_ones(h.shape[:-1], dtype=torch.float32)
    largest = h.abs().amax(-1).float()
    scale = torch.where(largest == 0, 1.0, (largest / LARGEST).clamp(min=SMALLEST_NORMAL))
    # The largest may come to 448 (1 + 2^-22), which rounds to 448: no conversion overflows.
    return (h * (1 / scale)[..., None]).to(E4M3), scale


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantized(upcast(x))


def fake_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values and row scales as the quantising ops return them, without content."""
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty(x.shape[:-1], dtype=torch.float32)


_op = define(
    "quantize_rows",
    "(Tensor x) -> (Tensor, Tensor)",
    reference=reference,
    fake=fake_rows,
    backends=BACKENDS,
)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each row to e4m3 with a scale of its own.

        row_scale = max|x of the row| / 448
        y         = x / row_scale, to the nearest e4m3, ties to even

    y * row_scale is within half an e4m3 spacing of x: 2^-4 of its magnitude, or 2^-10 row_scale
    where that is more. A row of zeros has scale 1. No scale is below the smallest normal fp32
    number, so rows of less than 5e-36 keep fewer bits. A row with a NaN or an infinity has a scale
    that is not finite, so that all of it, multiplied out, is NaN; its values are of no meaning.

    Args:
        x: (..., D), two axes or more, fp32 | fp16 | bf16, last axis contiguous. The strides of the
            others are free; of more than three axes only a view keeps that from being a copy.

    Returns:
        (y, row_scale): (..., D) e4m3 (torch.float8_e4m3fn) and (...) fp32, contiguous.

    Raises:
        ValueError: shape or stride. TypeError: dtype. NotImplementedError: a forced backend cannot
        run; says why. RuntimeError: a gradient is asked for; there is none.

    Backends: triton (capability 8.9 and later), reference.
    Cost: numel*(sizeof(x) + 1) bytes; bandwidth-bound.
    """
    op = "quantize_rows"
    check_float(op, x=x)
    check_rows(op, "x", x)
    check_last_contiguous(op, x=x)
    check_no_grad(op, x)
    return _op(x)
