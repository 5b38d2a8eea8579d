"""pixel_embed on the CPU; kernel in csrc/cpu/pixel_embed.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from .pixel_adaln import fp32, why_not_channels


def why_not(
    x: Tensor, weight: Tensor, bias: Tensor, pos_x: Tensor, pos_y: Tensor, patch: int
) -> str | None:
    tensors = (weight, bias, pos_x, pos_y)
    return (
        native.why_not()
        or native.why_not_tensors("cpu", x[..., :1], *(t[..., :1] for t in tensors))
        or why_not_channels(weight.shape[0])
    )


def launch(
    x: Tensor,  # (B, C, H, W)
    weight: Tensor,  # (p, C)
    bias: Tensor,  # (p,)
    pos_x: Tensor,  # (W, p/2)
    pos_y: Tensor,  # (H, p/2)
    patch: int,
    *,
    isa: int | None = None,  # a code of native.ISA_CODES; None takes the best
    threads: int | None = None,  # None takes PyTorch's number
) -> Tensor:
    b, _, height, width = x.shape
    p = weight.shape[0]
    q = weight.new_empty((b * (height // patch) * (width // patch), patch * patch, p))
    if q.numel() == 0:
        return q
    if width > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    w, planes, rows = fp32(weight), fp32(pos_x.t()), fp32(pos_y)
    bias = fp32(bias)
    native.load().pixel_embed_cpu(
        x.shape,
        patch,
        p,
        x.data_ptr(),
        native.DTYPE_CODES[x.dtype],
        x.stride()[:3],
        w.data_ptr(),
        bias.data_ptr(),
        planes.data_ptr(),
        rows.data_ptr(),
        native.DTYPE_CODES[q.dtype],
        q.data_ptr(),
        native.best_isa() if isa is None else isa,
        torch.get_num_threads() if threads is None else threads,
    )
    return q
