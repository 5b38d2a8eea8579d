"""gated_residual_norm on CUDA; kernel in csrc/cuda/gated_residual_norm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native


def why_not(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
) -> str | None:
    return native.why_not_cuda() or native.why_not_tensors("cuda", x, y, gate, weight, scale, shift)


def launch(
    x: Tensor,  # (B, N, D)
    y: Tensor,  # (B, N, D), dtype of x
    gate: Tensor,  # (B, D)
    weight: Tensor,  # (D,)
    scale: Tensor,  # (B, D)
    shift: Tensor | None,  # (B, D)
    eps: float,
) -> tuple[Tensor, Tensor]:
    x_new = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if h.numel() == 0:
        return x_new, h
    native.load().gated_residual_norm_cuda(
        x.shape,
        native.DTYPE_CODES[x.dtype],
        native.rows(x),
        native.rows(y),
        native.vector(gate),
        native.vector(weight),
        native.vector(scale),
        native.vector(shift),
        x_new.data_ptr(),
        h.data_ptr(),
        eps,
        x.device.index,
        torch.cuda.current_stream(x.device).cuda_stream,
    )
    return x_new, h
