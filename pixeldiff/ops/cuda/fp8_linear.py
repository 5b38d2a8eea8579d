"""fp8_linear on CUDA: torch._scaled_mm with row-wise scales, cuBLASLt or CUTLASS by PyTorch.

PiD at 2048: 13.23 TFLOP of MMDiT linears a step, 8.3 ms at twice the 798 TFLOP/s of bf16; one
(16384, 1536) x (1536, 4608) is 232 GFLOP, 0.145 ms, and reads and writes 183 MB, 0.06 ms.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MINIMUM = (8, 9)
ALIGNMENT = 16  # bytes of a row, of both operands
# False: the tensor cores' partial sums, of about 14 bits, are added up in fp32.
FAST_ACCUMULATION = False


def why_not(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> str | None:
    if out_dtype != torch.bfloat16:
        return f"torch._scaled_mm with row-wise scales returns bfloat16, out_dtype is {out_dtype}"
    if bias is not None and bias.dtype != out_dtype:
        return f"takes a bias in the dtype of the result, {out_dtype}, got {bias.dtype}"
    channels, k = weight.shape
    if k % ALIGNMENT or channels % ALIGNMENT:
        return f"K and N must be multiples of {ALIGNMENT}, got K = {k}, N = {channels}"
    if x.device.type != "cuda":
        return f"runs on cuda, the tensors are on {x.device}"
    return why_not_device(x.device)


def why_not_device(device: torch.device) -> str | None:
    """Why this device multiplies no e4m3 matrices with row-wise scales, or None."""
    if device.type != "cuda":
        return f"runs on cuda, not on {device}"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return _probe(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _probe(index: int) -> str | None:
    """One small product. Whether a device has row-wise scales depends on PyTorch's version and on
    the cuBLAS it was built with (sm_89, sm_100 and sm_120 came one by one), so ask it."""
    found = torch.cuda.get_device_capability(index)
    if found < MINIMUM:
        return f"e4m3 needs compute capability 8.9, this device is {found[0]}.{found[1]}"
    side = 256
    device = torch.device("cuda", index)
    ones = torch.ones(side, side, device=device).to(torch.float8_e4m3fn)
    scale = torch.arange(1.0, side + 1, device=device)
    try:
        y = _multiply(ones, scale, ones, scale, None)
        right = torch.equal(y, (side * scale[:, None] * scale).to(y.dtype))
    except (RuntimeError, ValueError, NotImplementedError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        return f"torch._scaled_mm of PyTorch {torch.__version__} refuses row-wise scales: {reason}"
    if not right:
        return f"torch._scaled_mm of PyTorch {torch.__version__} multiplies wrongly on this device"
    return None


def launch(
    x: Tensor,  # (..., K) e4m3
    x_scale: Tensor,  # (...) fp32
    weight: Tensor,  # (N, K) e4m3
    weight_scale: Tensor,  # (N,) fp32
    bias: Tensor | None,  # (N,)
    out_dtype: torch.dtype,
) -> Tensor:
    shape = (*x.shape[:-1], weight.shape[0])
    if x.numel() == 0 or weight.numel() == 0:
        empty = torch.zeros(shape, dtype=out_dtype, device=x.device)
        return empty if bias is None else empty + bias
    rows = x.reshape(-1, x.shape[-1])
    return _multiply(rows, x_scale.reshape(-1), weight, weight_scale, bias).view(shape)


def _multiply(
    x: Tensor,  # (M, K)
    x_scale: Tensor,  # (M,)
    weight: Tensor,  # (N, K)
    weight_scale: Tensor,  # (N,)
    bias: Tensor | None,
) -> Tensor:
    return torch._scaled_mm(
        _aligned(x),
        _aligned(weight).t(),  # the second operand must be column-major
        scale_a=_aligned(x_scale)[:, None],
        scale_b=_aligned(weight_scale)[None],
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=FAST_ACCUMULATION,
    )


def _aligned(t: Tensor) -> Tensor:
    """Contiguous, and where cuBLASLt reads it: a view into a row of scales need not be."""
    if t.data_ptr() % ALIGNMENT == 0:
        return t.contiguous()
    return t.clone(memory_format=torch.contiguous_format)
