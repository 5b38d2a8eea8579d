"""pixel_head on the CPU; kernel in csrc/cpu/pixel_head.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from .pixel_adaln import fp32, why_not_channels


def why_not(
    q: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    height: int,
    width: int,
    patch: int,
    eps: float,
) -> str | None:
    return (
        native.why_not()
        or native.why_not_tensors("cpu", *(t[..., :1] for t in (q, norm_weight, weight, bias)))
        or why_not_channels(q.shape[2])
    )


def launch(
    q: Tensor,  # (B*N, P*P, p)
    norm_weight: Tensor,  # (p,)
    weight: Tensor,  # (C, p)
    bias: Tensor,  # (C,)
    height: int,
    width: int,
    patch: int,
    eps: float,
    *,
    isa: int | None = None,  # a code of native.ISA_CODES; None takes the best
    threads: int | None = None,  # None takes PyTorch's number
) -> Tensor:
    images, channels = q.shape[0] * patch * patch // (height * width), weight.shape[0]
    v = q.new_empty((images, channels, height, width), dtype=torch.float32)
    if v.numel() == 0:
        return v
    q, norm, weight, bias = q.contiguous(), fp32(norm_weight), fp32(weight), fp32(bias)
    native.load().pixel_head_cpu(
        (q.shape[0], height, width, channels),
        patch,
        q.shape[2],
        native.DTYPE_CODES[q.dtype],
        q.data_ptr(),
        norm.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        eps,
        v.data_ptr(),
        native.best_isa() if isa is None else isa,
        torch.get_num_threads() if threads is None else threads,
    )
    return v
