"""joint_attention: softmax(q k^T) v over text and image rows, token-major in and out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .checks import check_device, check_float, check_last_contiguous, check_rank, check_shape
from .registry import Backend, define

BACKENDS = (Backend("cpu", "pixeldiff.ops.cpu.joint_attention"),)


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


_op = define(
    "joint_attention",
    "(Tensor q, Tensor k, Tensor v, float scale) -> Tensor",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def joint_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention of every query row over all key rows, no mask.

        o = softmax(scale * q k^T) v        per head

    Shapes: B images, L query rows, S key rows, G heads of d channels.

    Args:
        q: (B, L, G, d), fp32 | fp16 | bf16, last axis contiguous, other strides free.
        k, v: (B, S, G, d), the dtype of q. S >= 1.
        scale: of the logits; None means 1 / sqrt(d).

    Returns:
        (B, L, G, d), contiguous, dtype of q.

    Raises:
        ValueError: shape, stride or device. TypeError: dtype. NotImplementedError: a forced
        backend cannot run; says why.

    Backends: cpu (fp32, bf16, fp16), reference (PyTorch's scaled dot product attention).
    Gradients: through the reference.
    Cost: 4*B*L*S*G*d FLOPs and B*L*S*G exponentials; compute-bound.
    Source: PiD (arXiv 2605.23902), MMDiT joint attention and the PiT blocks' attention.
    """
    op = "joint_attention"
    check_float(op, q=q, k=k, v=v)
    check_rank(op, "q", q, "(B, L, G, d)")
    check_rank(op, "k", k, "(B, S, G, d)")
    b, _, g, d = q.shape
    check_shape(op, "k", k, "(B, S, G, d)", (b, k.shape[1], g, d))
    check_shape(op, "v", v, "(B, S, G, d)", tuple(k.shape))
    if k.shape[1] == 0:
        raise ValueError(f"{op}: k must have at least one row, got {tuple(k.shape)}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            f"{op}: k and v must have the dtype of q, {q.dtype}, got {k.dtype}, {v.dtype}"
        )
    check_last_contiguous(op, q=q, k=k, v=v)
    check_device(op, q, k=k, v=v)
    return _op(q, k, v, d**-0.5 if scale is None else scale)
