"""gated_norm_residual on the CPU; kernel in csrc/cpu/gated_norm_residual.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native


def why_not(x: Tensor, y: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> str | None:
    return native.why_not() or native.why_not_tensors("cpu", x, y, weight, gate)


def launch(
    x: Tensor,  # (B, N, D)
    y: Tensor,  # (B, N, D), dtype of x
    weight: Tensor,  # (D,)
    gate: Tensor | None,  # (B, D)
    eps: float,
    *,
    isa: int | None = None,  # a code of native.ISA_CODES; None takes the best
    threads: int | None = None,  # None takes PyTorch's number
) -> Tensor:
    r = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if r.numel() == 0:
        return r
    native.load().gated_norm_residual_cpu(
        x.shape,
        native.DTYPE_CODES[x.dtype],
        native.rows(x),
        native.rows(y),
        native.vector(weight),
        native.vector(gate),
        r.data_ptr(),
        eps,
        native.best_isa() if isa is None else isa,
        torch.get_num_threads() if threads is None else threads,
    )
    return r
