"""joint_attention: softmax(q k^T) v over text and image rows, token-major in and out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .checks import check_device, check_float, check_last_contiguous, check_rank, check_shape
from .registry import Backend, define, upcast

CHUNK = 1 << 24  # logits the reference holds at a time for the log-sum-exp: 64 MB in fp32


def _beyond_sdpa(q, k, v, scale, key_mask, return_lse) -> bool:
    """On a GPU PyTorch's flash attention is the faster one until measurements say otherwise, but it
    takes no mask and gives no log-sum-exp: the reference would copy k and v, or compute twice."""
    return q.is_cuda and (key_mask is not None or return_lse)


BACKENDS = (
    Backend("triton", "pixeldiff.triton_kernels.joint_attention", automatic=_beyond_sdpa),
    # By name only until it has been measured.
    Backend("cuda", "pixeldiff.ops.cuda.joint_attention", automatic=False),
    Backend("cpu", "pixeldiff.ops.cpu.joint_attention"),
    # PyTorch's kernels one by one: what the reference picks from without a mask, by name or where
    # measurement puts one first.
    *(
        Backend(name, f"pixeldiff.ops.cuda.sdpa:{name}", automatic=False)
        for name in ("flash", "cudnn", "efficient")
    ),
)


def reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor]:
    mask, empty = key_mask, None
    if key_mask is not None:
        # Values of masked rows must not be seen, and 0 * NaN is NaN.
        k, v = (torch.where(key_mask[..., None, None], t, 0) for t in (k, v))
        # An image without a key attends to all of them instead; its rows are then replaced.
        empty = ~key_mask.any(1)
        mask = (key_mask | empty[:, None])[:, None, None]
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    o = scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale).transpose(1, 2)
    if empty is not None:
        o = torch.where(empty[:, None, None, None], 0, o)
    return o, _lse(q, k, scale, mask, empty) if return_lse else _unwanted(q)


def _lse(q: Tensor, k: Tensor, scale: float, mask: Tensor | None, empty: Tensor | None) -> Tensor:
    """(B, L, G): ln(sum(exp(scale * q k^T))), a few query rows at a time."""
    k = upcast(k)
    rows = max(1, CHUNK // max(1, k.shape[0] * k.shape[1] * k.shape[2]))
    parts = []
    for some in q.split(rows, dim=1):
        logits = scale * torch.einsum("blgd,bsgd->blgs", upcast(some), k)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        parts.append(logits.logsumexp(-1))
    lse = torch.cat(parts, dim=1)
    # A logit of +inf has no softmax: NaN in the result, and so here.
    lse = torch.where(lse == torch.inf, torch.nan, lse)
    return lse if empty is None else torch.where(empty[:, None, None], -torch.inf, lse)


def _unwanted(q: Tensor) -> Tensor:
    return q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))


def _fake(q, k, v, scale, key_mask, return_lse):
    lse = _unwanted(q)
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    return o, lse.new_empty(q.shape[:3]) if return_lse else lse


_op = define(
    "joint_attention",
    "(Tensor q, Tensor k, Tensor v, float scale, Tensor? key_mask, bool return_lse)"
    " -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query row over all key rows, or over those that a mask leaves.

        o   = softmax(scale * q k^T) v              per head
        lse = ln(sum over keys of exp(scale * q k^T))

    Attention over two sets of keys merges from its halves: lse = logaddexp(lse1, lse2) and
    o = exp(lse1 - lse) o1 + exp(lse2 - lse) o2.

    Shapes: B images, L query rows, S key rows, G heads of d channels.

    Args:
        q: (B, L, G, d), fp32 | fp16 | bf16, last axis contiguous, other strides free.
        k, v: (B, S, G, d), the dtype of q. S >= 1.
        scale: of the logits; None means 1 / sqrt(d).
        key_mask: (B, S) bool, True = takes part, last axis contiguous; None = all do. Rows of k and
            v that do not take part have no influence, whatever they hold. An image none of whose
            keys takes part gives o = 0 and lse = -inf.
        return_lse: whether to return lse too.

    Returns:
        o (B, L, G, d), contiguous, dtype of q; with `return_lse` (o, lse), lse (B, L, G) fp32. A
        row with NaN or +inf among its logits is NaN in both.

    Raises:
        ValueError: shape, stride or device. TypeError: dtype. NotImplementedError: a forced
        backend cannot run; says why.

    Backends: triton (head_dim a multiple of 8 up to 128; by itself only for a mask or lse on cuda),
    cuda (sm_80+, bf16 and fp16, the same head_dims; by name only), flash, cudnn and efficient
    (those kernels of PyTorch's; no mask, no lse; by name only), cpu (fp32, bf16, fp16), reference
    (PyTorch's scaled dot product attention; copies k and v for a mask, computes the logits again
    for lse). Where measurements are installed, they choose. Gradients: through the reference.
    Cost: 4*B*L*S*G*d FLOPs and B*L*S*G exponentials; compute-bound.
    Source: PiD (arXiv 2605.23902), MMDiT joint attention and the PiT blocks' attention.
    """
    op = "joint_attention"
    check_qkv(op, q, k, v)
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise TypeError(f"{op}: key_mask must be torch.bool, got {key_mask.dtype}")
        check_shape(op, "key_mask", key_mask, "(B, S)", tuple(k.shape[:2]))
    check_last_contiguous(op, key_mask=key_mask)
    check_device(op, q, key_mask=key_mask)
    o, lse = _op(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, key_mask, return_lse)
    return (o, lse) if return_lse else o


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    check_float(op, q=q, k=k, v=v)
    check_rank(op, "q", q, "(B, L, G, d)")
    check_rank(op, "k", k, "(B, S, G, d)")
    b, _, g, d = q.shape
    check_shape(op, "k", k, "(B, S, G, d)", (b, k.shape[1], g, d))
    check_shape(op, "v", v, "(B, S, G, d)", tuple(k.shape))
    if k.shape[1] == 0:
        raise ValueError(f"{op}: k must have at least one row, got {tuple(k.shape)}")
    if d == 0:
        raise ValueError(f"{op}: q must have at least one channel, got {tuple(q.shape)}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            f"{op}: k and v must have the dtype of q, {q.dtype}, got {k.dtype}, {v.dtype}"
        )
    check_last_contiguous(op, q=q, k=k, v=v)
    check_device(op, q, k=k, v=v)
