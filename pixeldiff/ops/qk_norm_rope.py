"""qk_norm_rope: per-head RMSNorm and rotary of q and k, text and image into one joint buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_device, check_float, check_last_contiguous, check_rank, check_shape
from .registry import Backend, define, upcast

BACKENDS = (
    Backend("triton", "pixeldiff.triton_kernels.qk_norm_rope"),
    Backend("cpu", "pixeldiff.ops.cpu.qk_norm_rope"),
)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent channel pairs of x (B, L, G, d) by the angles of its row, in fp32 (or fp64)."""
    a, b = upcast(x).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None].to(a.dtype), sin[:, None].to(a.dtype)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def _norm_rope(qkv, q_weight, k_weight, cos, sin, heads, eps):
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
    out = []
    for t, weight in ((q, q_weight), (k, k_weight)):
        h = upcast(t)
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * upcast(weight)
        out.append(rotate(h, cos, sin).to(qkv.dtype))
    return torch.stack((*out, v))


def reference(
    qkv, q_weight, k_weight, cos, sin, txt_qkv, txt_q_weight, txt_k_weight, txt_cos, txt_sin,
    heads, eps,
):  # fmt: skip
    image = _norm_rope(qkv, q_weight, k_weight, cos, sin, heads, eps)
    if txt_qkv is None:
        return image
    text = _norm_rope(txt_qkv, txt_q_weight, txt_k_weight, txt_cos, txt_sin, heads, eps)
    return torch.cat((text, image), 2)


def _fake(qkv, q_weight, k_weight, cos, sin, txt_qkv, tq, tk, tc, ts, heads, eps):
    b, n, c = qkv.shape
    t = 0 if txt_qkv is None else txt_qkv.shape[1]
    return qkv.new_empty((3, b, t + n, heads, c // (3 * heads)))


_op = define(
    "qk_norm_rope",
    "(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, Tensor? txt_qkv,"
    " Tensor? txt_q_weight, Tensor? txt_k_weight, Tensor? txt_cos, Tensor? txt_sin, int heads,"
    " float eps) -> Tensor",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: tuple[Tensor, Tensor],
    *,
    heads: int,
    text: tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]] | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Normalise q and k per head, rotate them, and lay text and image rows into one buffer.

        q, k: x / sqrt(mean(x^2 over the head) + eps) * weight, then channel pair (2s, 2s+1) of
        row n turned by the angle of slot s;  v: copied

    Shapes: B images, N image rows, T text rows, G heads of d channels.

    Args:
        qkv: (B, N, 3*G*d), the projection of the image rows, columns [q | k | v], each head-major.
        q_weight, k_weight: (d,) gains of the two norms.
        rope: (cos, sin), each (N, d/2) fp32.
        heads: G.
        text: (qkv (B, T, 3*G*d), q_weight, k_weight, (cos, sin)) of the text rows, or None.
        eps: added to the mean square.

    Returns:
        (3, B, T+N, G, d), contiguous, dtype of qkv: q, k, v; text rows first. fp32 inside, one
        rounding.

    Raises:
        ValueError: shape, stride or device. TypeError: dtype. NotImplementedError: a forced
        backend cannot run; says why.

    Backends: triton (fp32, bf16, fp16, tables too; d up to 256), cpu (the same types; tables in
    fp32), reference. Gradients: through the reference.
    Cost: 6*B*(T+N)*G*d*sizeof(qkv) bytes; bandwidth-bound.
    Source: PiD (arXiv 2605.23902), joint attention of the MMDiT blocks, and PixelDiT's rotary.
    """
    op = "qk_norm_rope"
    _check(op, "", qkv, q_weight, k_weight, rope, heads, qkv)
    if text is None:
        return _op(qkv, q_weight, k_weight, *rope, None, None, None, None, None, heads, eps)
    txt_qkv, txt_q_weight, txt_k_weight, txt_rope = text
    _check(op, "text ", txt_qkv, txt_q_weight, txt_k_weight, txt_rope, heads, qkv)
    if txt_qkv.shape[0] != qkv.shape[0] or txt_qkv.shape[2] != qkv.shape[2]:
        raise ValueError(
            f"{op}: text qkv must be (B, T, 3*G*d) with B = {qkv.shape[0]} and 3*G*d = "
            f"{qkv.shape[2]}, got {tuple(txt_qkv.shape)}"
        )
    if txt_qkv.dtype != qkv.dtype:
        raise TypeError(
            f"{op}: text qkv must have the dtype of qkv, {qkv.dtype}, got {txt_qkv.dtype}"
        )
    return _op(
        qkv, q_weight, k_weight, *rope, txt_qkv, txt_q_weight, txt_k_weight, *txt_rope, heads, eps
    )


def _check(op, who, qkv, q_weight, k_weight, rope, heads, first):
    check_rank(op, f"{who}qkv", qkv, "(B, N, 3*G*d)")
    n, c = qkv.shape[1:]
    if heads < 1 or c % (6 * heads):
        raise ValueError(
            f"{op}: {who}qkv must have 3*G*d channels with even d and G = {heads} heads, got {c}"
        )
    d = c // (3 * heads)
    check_float(op, **{f"{who}qkv": qkv, f"{who}q_weight": q_weight, f"{who}k_weight": k_weight})
    check_shape(op, f"{who}q_weight", q_weight, "(d,)", (d,))
    check_shape(op, f"{who}k_weight", k_weight, "(d,)", (d,))
    for name, table in zip(("cos", "sin"), rope, strict=True):
        check_shape(op, f"{who}{name}", table, "(N, d/2)", (n, d // 2))
    check_last_contiguous(op, **{f"{who}qkv": qkv})
    tensors = (qkv, q_weight, k_weight, *rope)
    names = ("qkv", "q_weight", "k_weight", "cos", "sin")
    check_device(op, first, **{f"{who}{n}": t for n, t in zip(names, tensors, strict=True)})
