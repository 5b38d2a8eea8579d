"""local_decoder_up on the CPU; kernel in csrc/cpu/local_decoder_up.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from .pixels import by_output, fp32, pixels, why_not_pixels

# Numbers of the kernel's weights that it takes. They are read again for every row of a strip: up to
# 64 channels it is 0.95 to 2.6 times as fast as PyTorch's convolutions on two cores
# (kernels-l2p.json); at 256 and 512 (1.6 and 6.6 million) it was slower on one busy core.
MOST_WEIGHTS = 1 << 19


def why_not(
    x: Tensor, skip: Tensor, up_weight: Tensor, up_bias: Tensor, weight: Tensor, bias: Tensor
) -> str | None:
    reason = why_not_pixels((x, skip), (up_weight, up_bias, weight, bias))
    # Each of four phases has four taps.
    count = 16 * up_weight[:, :, 0, 0].numel() + weight.numel()
    if reason is None and count > MOST_WEIGHTS:
        return (
            f"takes up to {MOST_WEIGHTS} weights (16*Ci*Cu + 9*(Cu + Cs)*Co), here {count}: "
            "PyTorch's convolutions are faster"
        )
    return reason


def launch(
    x: Tensor,  # (B, H/2, W/2, Ci)
    skip: Tensor,  # (S, H, W, Cs)
    up_weight: Tensor,  # (Cu, Ci, 3, 3)
    up_bias: Tensor,  # (Cu,)
    weight: Tensor,  # (Co, Cu + Cs, 3, 3)
    bias: Tensor,  # (Co,)
    *,
    isa: int | None = None,  # a code of native.ISA_CODES; None takes the best
    threads: int | None = None,  # None takes PyTorch's number
) -> Tensor:
    b, _, _, before = x.shape
    s, height, width, beside = skip.shape
    middle, out = up_weight.shape[0], weight.shape[0]
    y = torch.empty((b, height, width, out), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    up_weight, up_bias = by_output(up_weight), fp32(up_bias)
    weight, bias = by_output(weight), fp32(bias)
    native.load().local_decoder_up_cpu(
        (b, s, height, width),
        (before, middle, beside, out),
        native.DTYPE_CODES[x.dtype],
        pixels(x),
        pixels(skip),
        up_weight.data_ptr(),
        up_bias.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        y.data_ptr(),
        native.best_isa() if isa is None else isa,
        torch.get_num_threads() if threads is None else threads,
    )
    return y
