"""rms_norm_modulate on CUDA; kernel in csrc/cuda/rms_norm_modulate.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native


def why_not(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor | None, eps: float
) -> str | None:
    return native.why_not_cuda() or native.why_not_tensors("cuda", x, weight, scale, shift)


def launch(
    x: Tensor,  # (B, N, D)
    weight: Tensor,  # (D,)
    scale: Tensor,  # (B, D)
    shift: Tensor | None,  # (B, D)
    eps: float,
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    native.load().rms_norm_modulate_cuda(
        x.shape,
        native.DTYPE_CODES[x.dtype],
        native.rows(x),
        native.vector(weight),
        native.vector(scale),
        native.vector(shift),
        y.data_ptr(),
        eps,
        x.device.index,
        torch.cuda.current_stream(x.device).cuda_stream,
    )
    return y
