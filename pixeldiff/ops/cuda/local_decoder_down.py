"""local_decoder_down of three channels to 16, or of an fp32 image to three, from capability 8.0 on;
the kernel in csrc/cuda/local_decoder_down.cu."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ... import native
from .joint_attention import why_not_capability
from .local_decoder_up import ALIGNMENT, MAX_SIDE, MAX_STRIPS, strides

CHANNELS, OUT = 3, 16  # of x and of the result; of planes also as many as of x
STRIP = 128  # columns of x that a block has
MAX_WEIGHT_STRIDE = 1 << 24


def why_not(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    reason = native.why_not_cuda() or native.why_not_tensors("cuda", x, weight)
    return reason or _why_not_device(x.device) or why_not_call(x, weight)


@functools.cache
def _why_not_device(device: torch.device) -> str | None:
    if not hasattr(native.load(), "local_decoder_down_cuda"):
        return "pixeldiff._C was built from older sources, without this kernel; rebuild it"
    archs = native.load().build_info()["cuda_archs"]
    return why_not_capability(torch.cuda.get_device_capability(device), archs)


def why_not_call(x: Tensor, weight: Tensor) -> str | None:
    """Why the kernel cannot take these shapes and strides, on whatever device they are, or None."""
    if weight.dtype != torch.bfloat16 or x.dtype not in (torch.bfloat16, torch.float32):
        return (
            "takes weights in bfloat16 and x in bfloat16 or float32, "
            f"got {weight.dtype} and {x.dtype}"
        )
    if max(weight.stride()) > MAX_WEIGHT_STRIDE:
        return (
            "takes weights at strides of at most 2^24 elements, "
            f"got {tuple(weight.stride())}; call .contiguous()"
        )
    images, height, width, before = x.shape
    planes, after = x.dtype == torch.float32, weight.shape[0]
    if before != CHANNELS or (after != OUT and not (planes and after == CHANNELS)):
        return (
            f"takes {CHANNELS} channels to {OUT}, or to {CHANNELS} of x in float32, "
            f"got {before} to {after} of x in {x.dtype}"
        )
    if max(height, width) > MAX_SIDE or images * (width // STRIP + 1) > MAX_STRIPS:
        return f"takes at most 2^20 strips of {STRIP} columns of x, got {tuple(x.shape)}"
    if x.numel() and x.data_ptr() % ALIGNMENT:
        return f"needs x to start at a multiple of {ALIGNMENT} bytes"
    *outer, pixel = strides(x)
    if planes:
        outer.append(x.stride(3))
        apart, how = pixel != 1 or width % 4, "a row's pixels of a channel side by side"
        columns = 4
    else:
        apart = (pixel, x.stride(3)) != (CHANNELS, 1) or width % 8
        how, columns = "pixels and their channels side by side", 8
    if apart or any(s * x.element_size() % ALIGNMENT for s in outer):
        return (
            f"needs x in {x.dtype} with {how}, in a multiple of {columns} columns, and "
            f"{'its' if planes else 'its other'} strides multiples of {ALIGNMENT} bytes, "
            f"got {tuple(x.shape)} at {tuple(x.stride())} elements"
        )
    return None


def launch(
    x: Tensor,  # (B, H, W, 3)
    weight: Tensor,  # (Co, 3, 3, 3)
    bias: Tensor,  # (Co,)
) -> tuple[Tensor, Tensor]:
    images, height, width, before = x.shape
    rows, columns, after = height // 2, width // 2, weight.shape[0]
    skip = weight.new_empty((images, height, width, after))
    pooled = weight.new_empty((images, rows, columns, after))
    if skip.numel() == 0:
        return skip, pooled
    bias = bias.contiguous()
    native.load().local_decoder_down_cuda(
        (images, rows, columns, before, after),
        native.DTYPE_CODES[x.dtype],
        (x.data_ptr(), *strides(x), x.stride(3)),
        (weight.data_ptr(), *weight.stride()),
        bias.data_ptr(),
        skip.data_ptr(),
        pooled.data_ptr(),
        x.device.index,
        torch.cuda.current_stream(x.device).cuda_stream,
    )
    return skip, pooled
