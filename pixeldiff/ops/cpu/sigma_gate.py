"""sigma_gate on the CPU; kernels in csrc/cpu/sigma_gate.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native

# Logits that exist at once where there is one a channel: they stay in the caches between the GEMM
# that writes them and the pass that reads them, and are tall enough for the GEMM's full speed.
PRODUCT_BYTES = 4 << 20


def why_not(x: Tensor, feature: Tensor, weight: Tensor, lq_logit: Tensor) -> str | None:
    reason = native.why_not() or native.why_not_tensors("cpu", x, feature, weight, lq_logit)
    if reason is None and feature.dtype != x.dtype:
        reason = f"needs feature in the dtype of x, {x.dtype}, got {feature.dtype}"
    if reason is None and lq_logit.dtype not in (x.dtype, torch.float32):
        reason = f"needs lq_logit in float32 or the dtype of x, {x.dtype}, got {lq_logit.dtype}"
    return reason


def launch(
    x: Tensor,  # (B, N, D)
    feature: Tensor,  # (B, N, D), dtype of x
    weight: Tensor,  # (K, D), dtype of x; K = 1 or D
    lq_logit: Tensor,  # (B, N, K), fp32 or the dtype of x
    *,
    isa: int | None = None,  # a code of native.ISA_CODES; None takes the best
    threads: int | None = None,  # None takes PyTorch's number
) -> Tensor:
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    dtype, logit_dtype = native.DTYPE_CODES[x.dtype], native.DTYPE_CODES[lq_logit.dtype]
    how = (
        native.best_isa() if isa is None else isa,
        torch.get_num_threads() if threads is None else threads,
    )
    if weight.shape[0] == 1:
        native.load().sigma_gate_per_token_cpu(
            x.shape,
            dtype,
            native.rows(x),
            native.rows(feature),
            native.vector(weight[0]),
            native.rows(lq_logit),
            logit_dtype,
            y.data_ptr(),
            *how,
        )
        return y
    batch, tokens, dim = x.shape
    piece = min(tokens, max(1, PRODUCT_BYTES // (dim * x.element_size())))
    buffer = x.new_empty((1, piece, dim))
    for b in range(batch):
        for first in range(0, tokens, piece):
            here = (slice(b, b + 1), slice(first, first + piece))
            rows = x[here]
            product = buffer[:, : rows.shape[1]]
            torch.mm(rows[0], weight.t(), out=product[0])
            native.load().sigma_gate_per_channel_cpu(
                rows.shape,
                dtype,
                native.rows(rows),
                native.rows(feature[here]),
                native.rows(product),
                native.rows(lq_logit[here]),
                logit_dtype,
                y[here].data_ptr(),
                *how,
            )
    return y
