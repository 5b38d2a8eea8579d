"""qk_norm_rope on the CPU; kernel in csrc/cpu/qk_norm_rope.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native

_ABSENT = (0, (0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0), (0, 0))


def why_not(
    qkv, q_weight, k_weight, cos, sin, txt_qkv, txt_q_weight, txt_k_weight, txt_cos, txt_sin,
    heads, eps,
) -> str | None:  # fmt: skip
    tables = (cos, sin, txt_cos, txt_sin)
    for table in tables:
        if table is not None and table.dtype != torch.float32:
            return f"takes rotary tables in float32, got {table.dtype}"
    tensors = (qkv, q_weight, k_weight, txt_qkv, txt_q_weight, txt_k_weight)
    return native.why_not() or native.why_not_tensors("cpu", *tensors, *tables)


def launch(
    qkv: Tensor,  # (B, N, 3*G*d)
    q_weight: Tensor,  # (d,)
    k_weight: Tensor,  # (d,)
    cos: Tensor,  # (N, d/2) fp32
    sin: Tensor,  # (N, d/2) fp32
    txt_qkv: Tensor | None,  # (B, T, 3*G*d), dtype of qkv; the other text arguments go with it
    txt_q_weight: Tensor | None,  # (d,)
    txt_k_weight: Tensor | None,  # (d,)
    txt_cos: Tensor | None,  # (T, d/2) fp32
    txt_sin: Tensor | None,  # (T, d/2) fp32
    heads: int,
    eps: float,
    *,
    isa: int | None = None,  # a code of native.ISA_CODES; None takes the best
    threads: int | None = None,  # None takes PyTorch's number
) -> Tensor:
    b, n, c = qkv.shape
    t = 0 if txt_qkv is None else txt_qkv.shape[1]
    d = c // (3 * heads)
    out = qkv.new_empty((3, b, t + n, heads, d))
    if out.numel() == 0:
        return out
    native.load().qk_norm_rope_cpu(
        (b, heads, d),
        native.DTYPE_CODES[qkv.dtype],
        _stream(txt_qkv, txt_q_weight, txt_k_weight, txt_cos, txt_sin) if t else _ABSENT,
        _stream(qkv, q_weight, k_weight, cos, sin) if n else _ABSENT,
        out.data_ptr(),
        eps,
        native.best_isa() if isa is None else isa,
        torch.get_num_threads() if threads is None else threads,
    )
    return out


def _stream(qkv, q_weight, k_weight, cos, sin) -> tuple:
    return (
        qkv.shape[1],
        native.rows(qkv),
        native.vector(q_weight),
        native.vector(k_weight),
        (cos.data_ptr(), cos.stride(0)),
        (sin.data_ptr(), sin.stride(0)),
    )
