"""qkv_norm_rope: the q, k, v projection of text and image, normalised, rotated, in one buffer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .checks import check_device, check_float, check_last_contiguous, check_rank, check_shape
from .qk_norm_rope import qk_norm_rope
from .qk_norm_rope import reference as norm_rope_reference
from .registry import Backend, define, named_backend, prefers

# By name only until it has been measured.
BACKENDS = (Backend("cuda", "pixeldiff.ops.cuda.qkv_norm_rope", automatic=False),)


def reference(
    x, weight, q_weight, k_weight, cos, sin, txt_x, txt_weight, txt_q_weight, txt_k_weight, txt_cos,
    txt_sin, heads, eps,
):  # fmt: skip
    text = None if txt_x is None else linear(txt_x, txt_weight)
    image = (linear(x, weight), q_weight, k_weight, cos, sin)
    return norm_rope_reference(
        *image, text, txt_q_weight, txt_k_weight, txt_cos, txt_sin, heads, eps
    )


def _fake(x, weight, q_weight, k_weight, cos, sin, txt_x, tw, tq, tk, tc, ts, heads, eps):
    b, n, _ = x.shape
    t = 0 if txt_x is None else txt_x.shape[1]
    return x.new_empty((3, b, t + n, heads, weight.shape[0] // (3 * heads)))


_op = define(
    "qkv_norm_rope",
    "(Tensor x, Tensor weight, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin,"
    " Tensor? txt_x, Tensor? txt_weight, Tensor? txt_q_weight, Tensor? txt_k_weight,"
    " Tensor? txt_cos, Tensor? txt_sin, int heads, float eps) -> Tensor",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)

Stream = tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]


def qkv_norm_rope(
    x: Tensor,
    weight: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: tuple[Tensor, Tensor],
    *,
    heads: int,
    text: Stream | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Project rows to q, k, v, and do to them what `qk_norm_rope` does.

        qkv = x weight^T, rounded to the dtype of x; the rest is `qk_norm_rope`

    Rounding in between is part of the definition: what is fused and what is not then differ only
    in the order of the products' sums.

    Shapes: B images, N image rows, T text rows, K channels of a row, G heads of d channels.

    Args:
        x: (B, N, K), the image rows, fp32 | fp16 | bf16, last axis contiguous.
        weight: (3*G*d, K), the dtype of x, rows [q | k | v], each head-major.
        q_weight, k_weight: (d,) gains of the two norms.
        rope: (cos, sin), each (N, d/2) fp32.
        heads: G.
        text: (x (B, T, K), weight, q_weight, k_weight, (cos, sin)) of the text rows, or None.
        eps: added to the mean square.

    Returns:
        (3, B, T+N, G, d), contiguous, dtype of x: q, k, v; text rows first.

    Raises:
        ValueError: shape, stride or device. TypeError: dtype. NotImplementedError: a forced
        backend cannot run; says why.

    Backends: cuda (Hopper, bf16 and fp16, d 64, 72 and 128; only where it is asked for by this
    op's own name or was measured to be faster), reference. Otherwise the call is PyTorch's `linear`
    and `qk_norm_rope`, with the backend that would be chosen for it. Gradients: through the
    reference.
    Cost: 6*B*(T+N)*K*G*d FLOPs; compute-bound.
    Source: PiD (arXiv 2605.23902), joint attention of the MMDiT blocks.
    """
    op = "qkv_norm_rope"
    _check(op, "", x, weight, q_weight, k_weight, rope, heads, x)
    if text is not None:
        txt_x, txt_weight, txt_q_weight, txt_k_weight, txt_rope = text
        _check(op, "text ", txt_x, txt_weight, txt_q_weight, txt_k_weight, txt_rope, heads, x)
        if txt_x.shape[0] != x.shape[0] or txt_x.shape[2] != x.shape[2]:
            raise ValueError(
                f"{op}: text x must be (B, T, K) with B = {x.shape[0]} and K = {x.shape[2]}, got "
                f"{tuple(txt_x.shape)}"
            )
        if txt_x.dtype != x.dtype:
            raise TypeError(f"{op}: text x must have the dtype of x, {x.dtype}, got {txt_x.dtype}")
        check_shape(op, "text weight", txt_weight, "(3*G*d, K)", tuple(weight.shape))
    if not fuses_qkv(x, weight, q_weight, k_weight, rope, heads=heads, text=text, eps=eps):
        return _separately(x, weight, q_weight, k_weight, rope, heads, text, eps)
    return _op(*_flat(x, weight, q_weight, k_weight, rope, heads, text, eps))


def fuses_qkv(
    x: Tensor,
    weight: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: tuple[Tensor, Tensor],
    *,
    heads: int,
    text: Stream | None = None,
    eps: float = 1e-6,
) -> bool:
    """Whether `qkv_norm_rope` of these arguments would run as one: it is asked for by name, or a
    backend that takes the call was measured to be faster than its parts.

    Under `torch.compile` only the name counts: a choice among measurements is not traced.
    """
    if named_backend("qkv_norm_rope") is not None:
        return True
    if torch.compiler.is_compiling():
        return False
    return prefers("qkv_norm_rope", *_flat(x, weight, q_weight, k_weight, rope, heads, text, eps))


def _flat(x, weight, q_weight, k_weight, rope, heads, text, eps):
    """In schema order."""
    texts = (None,) * 6 if text is None else (*text[:4], *text[4])
    return (x, weight, q_weight, k_weight, *rope, *texts, heads, eps)


def _separately(x, weight, q_weight, k_weight, rope, heads, text, eps):
    if text is not None:
        text = (linear(text[0], text[1]), *text[2:])
    return qk_norm_rope(
        linear(x, weight), q_weight, k_weight, rope, heads=heads, text=text, eps=eps
    )


def _check(op, who, x, weight, q_weight, k_weight, rope, heads, first):
    check_rank(op, f"{who}x", x, "(B, N, K)")
    check_rank(op, f"{who}weight", weight, "(3*G*d, K)")
    c, _ = weight.shape
    if heads < 1 or c % (6 * heads):
        raise ValueError(
            f"{op}: {who}weight must have 3*G*d rows with even d and G = {heads} heads, got {c}"
        )
    check_shape(op, f"{who}weight", weight, "(3*G*d, K)", (c, x.shape[2]))
    d = c // (3 * heads)
    check_float(op, **{f"{who}x": x, f"{who}q_weight": q_weight, f"{who}k_weight": k_weight})
    if weight.dtype != x.dtype:
        raise TypeError(
            f"{op}: {who}weight must have the dtype of {who}x, {x.dtype}, got {weight.dtype}"
        )
    check_shape(op, f"{who}q_weight", q_weight, "(d,)", (d,))
    check_shape(op, f"{who}k_weight", k_weight, "(d,)", (d,))
    for name, table in zip(("cos", "sin"), rope, strict=True):
        check_shape(op, f"{who}{name}", table, "(N, d/2)", (x.shape[1], d // 2))
    check_last_contiguous(op, **{f"{who}x": x, f"{who}weight": weight})
    tensors = (x, weight, q_weight, k_weight, *rope)
    names = ("x", "weight", "q_weight", "k_weight", "cos", "sin")
    check_device(op, first, **{f"{who}{n}": t for n, t in zip(names, tensors, strict=True)})
