"""local_decoder_up of few channels, from capability 8.0 on; kernels in
csrc/cuda/local_decoder_up.cu."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ... import native
from .joint_attention import why_not_capability

# Of x and skip, of u, and of the result.
MAX_CHANNELS, MAX_MIDDLE, OUT = 32, 32, 16
PACKED = 3  # channels of a skip that is read as rows of bytes
ALIGNMENT = 16  # bytes: of addresses and strides, for cp.async
STRIP = 16  # columns of x that a block has
MAX_STRIPS = 1 << 20
MAX_SIDE = 1 << 28


def why_not(
    x: Tensor, skip: Tensor, up_weight: Tensor, up_bias: Tensor, weight: Tensor, bias: Tensor
) -> str | None:
    reason = native.why_not_cuda() or native.why_not_tensors("cuda", x, skip)
    return reason or _why_not_device(x.device) or why_not_call(x, skip, up_weight, weight)


@functools.cache
def _why_not_device(device: torch.device) -> str | None:
    if not hasattr(native.load(), "local_decoder_up_cuda"):
        return "pixeldiff._C was built from older sources, without this kernel; rebuild it"
    archs = native.load().build_info()["cuda_archs"]
    return why_not_capability(torch.cuda.get_device_capability(device), archs)


def why_not_call(x: Tensor, skip: Tensor, up_weight: Tensor, weight: Tensor) -> str | None:
    """Why the kernel cannot take these shapes and strides, on whatever device they are, or None."""
    # fp16 could not hold the products of small weights.
    if x.dtype != torch.bfloat16:
        return f"takes bfloat16, got {x.dtype}"
    for name, t in (("x", x), ("skip", skip)):
        channels, other = t.shape[3], f", or {PACKED}" if name == "skip" else ""
        if name == "skip" and channels == PACKED:
            continue
        if channels % 8 or not 8 <= channels <= MAX_CHANNELS:
            return (
                f"takes a multiple of 8 channels of {name}, at most {MAX_CHANNELS}{other}, "
                f"got {channels}"
            )
    if not 1 <= up_weight.shape[0] <= MAX_MIDDLE:
        return f"takes 1 to {MAX_MIDDLE} channels of u, got {up_weight.shape[0]}"
    if weight.shape[0] != OUT:
        return f"takes {OUT} channels of the result, got {weight.shape[0]}"
    images, rows, columns, _ = x.shape
    if max(rows, columns) > MAX_SIDE or images * (columns // STRIP + 1) > MAX_STRIPS:
        return f"takes at most 2^20 strips of {STRIP} columns of x, got {tuple(x.shape)}"
    for name, t in (("x", x), ("skip", skip)):
        if t.numel() and t.data_ptr() % ALIGNMENT:
            return f"needs {name} to start at a multiple of {ALIGNMENT} bytes"
        *outer, across = strides(t)
        if t.shape[3] == PACKED:
            if t.shape[2] % 8 or across != PACKED:
                return (
                    f"needs pixels of {PACKED} channels of {name} side by side, in a multiple of 8 "
                    f"columns, got {tuple(t.shape)} at {tuple(t.stride())} elements"
                )
            across = 0
        if t.stride(3) != 1 or any(s * t.element_size() % ALIGNMENT for s in (*outer, across)):
            return (
                f"needs the channels of {name} side by side and its other strides multiples of "
                f"{ALIGNMENT} bytes, got {tuple(t.stride())} elements; call .contiguous()"
            )
    return None


def strides(t: Tensor) -> list[int]:
    """Of images, rows and columns; where there is only one, 0."""
    return [
        stride if size > 1 else 0 for size, stride in zip(t.shape[:3], t.stride()[:3], strict=True)
    ]


def launch(
    x: Tensor,  # (B, H/2, W/2, Ci)
    skip: Tensor,  # (S, H, W, Cs)
    up_weight: Tensor,  # (Cu, Ci, 3, 3)
    up_bias: Tensor,  # (Cu,)
    weight: Tensor,  # (Co, Cu + Cs, 3, 3)
    bias: Tensor,  # (Co,)
) -> Tensor:
    images, rows, columns, before = x.shape
    skips, *_, beside = skip.shape
    out = x.new_empty((images, 2 * rows, 2 * columns, weight.shape[0]))
    if out.numel() == 0:
        return out
    up_bias, bias = up_bias.contiguous(), bias.contiguous()
    count = native.load().local_decoder_up_workspace(before, beside)
    workspace = torch.empty(count, dtype=torch.uint8, device=x.device)
    native.load().local_decoder_up_cuda(
        (images, skips, rows, columns),
        (before, up_weight.shape[0], beside, weight.shape[0]),
        (x.data_ptr(), *strides(x)),
        (skip.data_ptr(), *strides(skip)),
        (up_weight.data_ptr(), *up_weight.stride()),
        (weight.data_ptr(), *weight.stride()),
        (up_bias.data_ptr(), bias.data_ptr()),
        workspace.data_ptr(),
        out.data_ptr(),
        x.device.index,
        torch.cuda.current_stream(x.device).cuda_stream,
    )
    return out
