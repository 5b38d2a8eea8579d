"""local_decoder_down on the CPU; kernel in csrc/cpu/local_decoder_down.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from .pixels import by_output, fp32, pixels, why_not_pixels

# From here on PyTorch's convolution is as fast (the kernel 0.93 to 1.07 times as fast as it): at 64
# channels and fewer on a side it is 0.96 to 2.0 times as fast on two cores (kernels-l2p.json).
WIDE = 128


def why_not(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    reason = why_not_pixels((x,), (weight, bias))
    if reason is None and min(weight.shape[:2]) >= WIDE:
        return (
            f"leaves {WIDE} channels and more on both sides, here {weight.shape[1]} to "
            f"{weight.shape[0]}, to PyTorch's convolution, which is as fast"
        )
    return reason


def launch(
    x: Tensor,  # (B, H, W, Ci)
    weight: Tensor,  # (Co, Ci, 3, 3)
    bias: Tensor,  # (Co,)
    *,
    isa: int | None = None,  # a code of native.ISA_CODES; None takes the best
    threads: int | None = None,  # None takes PyTorch's number
) -> tuple[Tensor, Tensor]:
    b, height, width, _ = x.shape
    channels = weight.shape[0]
    like = {"dtype": weight.dtype, "device": weight.device}
    skip = torch.empty((b, height, width, channels), **like)
    pooled = torch.empty((b, height // 2, width // 2, channels), **like)
    if skip.numel() == 0:
        return skip, pooled
    weight, bias = by_output(weight), fp32(bias)
    native.load().local_decoder_down_cpu(
        (*x.shape, channels),
        native.DTYPE_CODES[x.dtype],
        pixels(x),
        native.DTYPE_CODES[skip.dtype],
        weight.data_ptr(),
        bias.data_ptr(),
        skip.data_ptr(),
        pooled.data_ptr(),
        native.best_isa() if isa is None else isa,
        torch.get_num_threads() if threads is None else threads,
    )
    return skip, pooled
