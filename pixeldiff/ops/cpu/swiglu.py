"""swiglu on the CPU; kernel in csrc/cpu/swiglu.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native


def why_not(a: Tensor, b: Tensor) -> str | None:
    if a.dim() == 0:
        return "needs at least one axis"
    return native.why_not() or native.why_not_tensors("cpu", a, b)


def launch(
    a: Tensor,  # (..., F)
    b: Tensor,  # (..., F), dtype of a
    *,
    isa: int | None = None,  # a code of native.ISA_CODES; None takes the best
    threads: int | None = None,  # None takes PyTorch's number
) -> Tensor:
    y = a.new_empty(a.shape)
    if y.numel() == 0:
        return y
    a, b = _three_axes(a), _three_axes(b)
    native.load().swiglu_cpu(
        a.shape,
        native.DTYPE_CODES[a.dtype],
        native.rows(a),
        native.rows(b),
        y.data_ptr(),
        native.best_isa() if isa is None else isa,
        torch.get_num_threads() if threads is None else threads,
    )
    return y


def _three_axes(t: Tensor) -> Tensor:
    while t.dim() < 3:
        t = t[None]
    return t if t.dim() == 3 else t.flatten(0, -3)
