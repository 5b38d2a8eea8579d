"""joint_attention_fp8 on Hopper; kernels in csrc/cuda/joint_attention_fp8_sm90.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from .hopper import why_not_hopper

MAX_D = 128
ALIGNMENT = 16  # bytes: of addresses and strides, for 16-byte loads
MAX_ROWS = 1 << 31  # of all heads


def why_not(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    reason = native.why_not_cuda() or native.why_not_tensors("cuda", q, k, v)
    return (
        reason
        or why_not_hopper("joint_attention_fp8_cuda", q.device)
        or why_not_call(q, k, v, scale)
    )


def why_not_call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """Why the kernels cannot take these shapes and strides, on whatever device they are, or
    None."""
    if q.dtype not in native.DTYPE_CODES:
        return f"takes float32, bfloat16 and float16, got {q.dtype}"
    d = q.shape[-1]
    if d % 8 or d > MAX_D:
        return f"takes head dims that are multiples of 8 up to {MAX_D}, got {d}"
    if not scale > 0:
        return f"takes a positive scale, got {scale}"
    for name, t in (("q", q), ("k", k), ("v", v)):
        B, rows, G, _ = t.shape
        if B * rows * G >= MAX_ROWS:
            return f"takes fewer than 2^31 rows of {name} in all heads, got {tuple(t.shape)}"
        if t.numel() and t.data_ptr() % ALIGNMENT:
            return f"needs {name} to start at a multiple of {ALIGNMENT} bytes"
        for count, stride in zip(t.shape[:3], t.stride()[:3], strict=True):
            if count > 1 and stride * t.element_size() % ALIGNMENT:
                return (
                    f"needs strides of {name} that are multiples of {ALIGNMENT} bytes, "
                    f"got {tuple(t.stride())} elements; call .contiguous()"
                )
    return None


def launch(
    q: Tensor,  # (B, L, G, d)
    k: Tensor,  # (B, S, G, d), dtype of q
    v: Tensor,  # (B, S, G, d), dtype of q
    scale: float,
) -> Tensor:
    B, L, G, d = q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if o.numel() == 0:
        return o
    sizes = (B, L, k.shape[1], G, d)
    # PyTorch's blocks start at multiples of 512 bytes.
    count = native.load().joint_attention_fp8_workspace(sizes)
    workspace = torch.empty(count, dtype=torch.uint8, device=q.device)
    native.load().joint_attention_fp8_cuda(
        sizes,
        native.DTYPE_CODES[q.dtype],
        _heads(q),
        _heads(k),
        _heads(v),
        o.data_ptr(),
        scale,
        workspace.data_ptr(),
        q.device.index,
        torch.cuda.current_stream(q.device).cuda_stream,
    )
    return o


def _heads(t: Tensor) -> tuple[int, int, int, int]:
    return t.data_ptr(), *t.stride()[:3]
