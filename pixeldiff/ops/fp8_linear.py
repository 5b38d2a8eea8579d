"""fp8_linear: a linear layer whose input and weight are e4m3 with a scale for each row."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_device, check_no_grad, check_shape
from .quantize_rows import E4M3
from .registry import Backend, define

# None for the CPU: there torch._scaled_mm takes 1.4 times as long as the reference, and its sums
# are twice as far from fp64 (256 x 1536 x 4608 on an AMD EPYC with AVX-512, torch 2.13).
BACKENDS = (Backend("cuda", "pixeldiff.ops.cuda.fp8_linear"),)
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def reference(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    # A product of two e4m3 values is exact in fp32; the scales wait until the sum is done.
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x.to(wide) @ weight.to(wide).mT
    out = out * x_scale.to(wide)[..., None] * weight_scale.to(wide)
    if bias is not None:
        out = out + bias.to(wide)
    return out if wide == torch.float64 else out.to(out_dtype)


def _fake(x, x_scale, weight, weight_scale, bias, out_dtype):
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


_op = define(
    "fp8_linear",
    "(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias,"
    " ScalarType out_dtype) -> Tensor",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def fp8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Multiply rows quantised by one of the `..._fp8` ops with a weight quantised the same way.

        y = (x * x_scale[..., None]) @ (weight * weight_scale[:, None])^T + bias

    Args:
        x: (..., K) e4m3 (torch.float8_e4m3fn); x_scale: (...), fp32, one a row.
        weight: (N, K) e4m3; weight_scale: (N,) fp32, one an output channel.
        bias: (N,) fp32 | fp16 | bf16, or None.
        out_dtype: fp32, fp16 or bf16.

    Returns:
        (..., N), contiguous, out_dtype. Products are exact, sums fp32, one rounding at the end.

    Raises:
        ValueError: shape or device. TypeError: dtype. NotImplementedError: a forced backend cannot
        run; says why. RuntimeError: a gradient is asked for; there is none.

    Backends: cuda (torch._scaled_mm with row-wise scales: capability 8.9 and later as far as
    PyTorch's build supports it there, bf16 results, K and N multiples of 16), reference.
    Cost: 2*M*N*K FLOPs for M rows; M*K + N*K + M*N*sizeof(out) bytes.
    """
    op = "fp8_linear"
    for name, t in {"x": x, "weight": weight}.items():
        if t.dtype != E4M3:
            raise TypeError(
                f"{op}: {name} must be {E4M3}, got {t.dtype}; quantise it with quantize_rows"
            )
    for name, t in {"x_scale": x_scale, "weight_scale": weight_scale}.items():
        if t.dtype != torch.float32:
            raise TypeError(f"{op}: {name} must be torch.float32, got {t.dtype}")
    if out_dtype not in OUT_DTYPES:
        raise TypeError(
            f"{op}: out_dtype must be {', '.join(map(str, OUT_DTYPES))}, got {out_dtype}"
        )
    if bias is not None and bias.dtype not in OUT_DTYPES:
        raise TypeError(f"{op}: bias must be float32, float16 or bfloat16, got {bias.dtype}")
    if x.dim() < 1 or weight.dim() != 2:
        raise ValueError(
            f"{op}: x must be (..., K) and weight (N, K), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    channels = weight.shape[0]
    check_shape(op, "weight", weight, "(N, K)", (channels, x.shape[-1]))
    check_shape(op, "x_scale", x_scale, "(...)", tuple(x.shape[:-1]))
    check_shape(op, "weight_scale", weight_scale, "(N,)", (channels,))
    if bias is not None:
        check_shape(op, "bias", bias, "(N,)", (channels,))
        check_device(op, x, bias=bias)
    check_device(op, x, x_scale=x_scale, weight=weight, weight_scale=weight_scale)
    check_no_grad(op, x_scale, weight_scale, bias)
    return _op(x, x_scale, weight, weight_scale, bias, out_dtype)
