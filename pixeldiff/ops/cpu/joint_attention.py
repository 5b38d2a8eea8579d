"""joint_attention on the CPU; kernel in csrc/cpu/joint_attention.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native


def why_not(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None, return_lse: bool
) -> str | None:
    reason = native.why_not() or native.why_not_tensors("cpu", q, k, v)
    if reason is None and native.best_isa() == native.ISA_CODES["portable"]:
        return "needs AVX2: without wide vectors PyTorch's own attention is faster"
    return reason


def launch(
    q: Tensor,  # (B, L, G, d)
    k: Tensor,  # (B, S, G, d), dtype of q
    v: Tensor,  # (B, S, G, d), dtype of q
    scale: float,
    key_mask: Tensor | None,  # (B, S) bool
    return_lse: bool,
    *,
    isa: int | None = None,  # a code of native.ISA_CODES; None takes the best
    threads: int | None = None,  # None takes PyTorch's number
) -> tuple[Tensor, Tensor]:
    o = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3] if return_lse else 0, dtype=torch.float32)
    b, rows, g, d = q.shape
    native.load().joint_attention_cpu(
        (b, rows, k.shape[1], g, d),
        native.DTYPE_CODES[q.dtype],
        _heads(q),
        _heads(k),
        _heads(v),
        o.data_ptr(),
        scale,
        (0, 0) if key_mask is None else (key_mask.data_ptr(), key_mask.stride(0)),
        lse.data_ptr(),
        native.best_isa() if isa is None else isa,
        torch.get_num_threads() if threads is None else threads,
    )
    return o, lse


def _heads(t: Tensor) -> tuple[int, int, int, int]:
    return t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)
