"""What the kernels of csrc/cuda/pixel_adaln take."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ... import native
from .hopper import why_not_hopper

CHANNELS = 16  # of a pixel
MAX_SIZE = 1 << 20  # of P*P and D
ALIGNMENT = 16  # bytes: of addresses and strides, for the copy engine


def why_not(op: str, *tensors: Tensor) -> str | None:
    """Why this machine or this device has no such kernel, or None."""
    reason = native.why_not_cuda() or native.why_not_tensors("cuda", *tensors)
    return reason or why_not_hopper(f"{op}_cuda", tensors[0].device)


def why_not_product(
    q: Tensor, u: Tensor, ada_weight: Tensor, others: Mapping[str, Tensor], *, multiple: int
) -> str | None:
    """Why the kernels cannot take these shapes and strides, on whatever device they are, or None.

    Args:
        others: what they read besides, in the dtype of q.
        multiple: channels that are one load; strides of q and the start of everything that is
            read so are multiples of it.
    """
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, got {q.dtype}"
    for t in (u, ada_weight, *others.values()):
        if t.dtype != q.dtype:
            return f"needs every tensor in the dtype of q, {q.dtype}, got {t.dtype}"
    if q.shape[2] != CHANNELS:
        return f"takes {CHANNELS} channels of a pixel, got {q.shape[2]}"
    if not 1 <= u.shape[1] <= MAX_SIZE or q.shape[1] > MAX_SIZE:
        return f"takes 1 to 2^20 channels of u and pixels, got {u.shape[1]} and {q.shape[1]}"
    for name, t in (("u", u), ("ada_weight", ada_weight)):
        if t.numel() and t.data_ptr() % ALIGNMENT:
            return f"needs {name} to start at a multiple of {ALIGNMENT} bytes"
        stride = t.stride(0) * t.element_size()
        if t.shape[0] > 1 and (stride <= 0 or stride % ALIGNMENT):
            return (
                f"needs rows of {name} that are a positive multiple of {ALIGNMENT} bytes apart, "
                f"got {stride}"
            )
    if any(stride % multiple for stride in q.stride()[:2]):
        kind = "even strides of q" if multiple == 2 else f"strides of q in multiples of {multiple}"
        return f"needs {kind}, got {tuple(q.stride())} elements; call .contiguous()"
    return None


def why_not_starts(tensors: Mapping[str, Tensor], bytes: int) -> str | None:
    for name, t in tensors.items():
        if t.numel() and t.data_ptr() % bytes:
            return f"needs {name} to start at a multiple of {bytes} bytes"
    return None
