"""gated_residual_norm on the CPU; kernel in csrc/cpu/gated_residual_norm.cpp."""

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
    return native.why_not() or native.why_not_tensors("cpu", x, y, gate, weight, scale, shift)


def launch(
    x: Tensor,  # (B, N, D)
    y: Tensor,  # (B, N, D), dtype of x
    gate: Tensor,  # (B, D)
    weight: Tensor,  # (D,)
    scale: Tensor,  # (B, D)
    shift: Tensor | None,  # (B, D)
    eps: float,
    *,
    isa: int | None = None,  # a code of native.ISA_CODES; None takes the best
    threads: int | None = None,  # None takes PyTorch's number
) -> tuple[Tensor, Tensor]:
    x_new = x.new_empty(x.shape)
    h = x.new_empty(x.shape)
    if h.numel() == 0:
        return x_new, h
    native.load().gated_residual_norm_cpu(
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
        native.best_isa() if isa is None else isa,
        torch.get_num_threads() if threads is None else threads,
    )
    return x_new, h
