"""rms_norm_modulate on the CPU; kernel in csrc/cpu/rms_norm_modulate.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native


def why_not(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor | None, eps: float
) -> str | None:
    return native.why_not() or native.why_not_tensors("cpu", x, weight, scale, shift)


def launch(
    x: Tensor,  # (B, N, D)
    weight: Tensor,  # (D,)
    scale: Tensor,  # (B, D)
    shift: Tensor | None,  # (B, D)
    eps: float,
    *,
    isa: int | None = None,  # a code of native.ISA_CODES; None takes the best
    threads: int | None = None,  # None takes PyTorch's number
) -> Tensor:
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    native.load().rms_norm_modulate_cpu(
        x.shape,
        native.DTYPE_CODES[x.dtype],
        native.rows(x),
        native.vector(weight),
        native.vector(scale),
        native.vector(shift),
        y.data_ptr(),
        eps,
        native.best_isa() if isa is None else isa,
        torch.get_num_threads() if threads is None else threads,
    )
    return y
