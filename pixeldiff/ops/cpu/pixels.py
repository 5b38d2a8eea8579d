"""What the CPU backends of the two local_decoder ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native


def why_not_pixels(images: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> str | None:
    tensors = (*images, *weights)
    reason = native.why_not() or native.why_not_tensors("cpu", *(t[..., :1] for t in tensors))
    if reason is None and native.best_isa() == native.ISA_CODES["portable"]:
        return "needs AVX2: without wide vectors PyTorch's own convolutions are faster"
    if reason is None and 0 in (
        *(n for w in weights for n in w.shape),
        *(t.shape[-1] for t in images),
    ):
        return "needs at least one channel everywhere"
    return reason


def pixels(t: Tensor) -> tuple[int, int, int, int, int]:
    """(B, H, W, C) tensor of any strides, as the extension takes it."""
    return t.data_ptr(), *t.stride()


def fp32(bias: Tensor) -> Tensor:
    return bias.to(torch.float32).contiguous()


def by_output(weight: Tensor) -> Tensor:
    """(Co, Ci, 3, 3) in fp32 as (Ci * 9, Co): the kernels' vectors hold outputs."""
    return weight.flatten(1).t().to(torch.float32).contiguous()
