"""The per-pixel AdaLN of a PiT block: layout of its projection, shared by the two pixel_adaln ops.

One linear maps a patch's conditioning u (D) to six vectors of p channels for each of its P*P
pixels; output row j*6p + c*p + i is channel i of chunk c of pixel j, the chunks being
shift, scale, gate of the attention half and shift, scale, gate of the MLP half.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .checks import check_float, check_rank, check_shape
from .registry import upcast


def modulation(
    u: Tensor, weight: Tensor, bias: Tensor, channels: int, first: int, last: int
) -> tuple[Tensor, ...]:
    """Chunks first..last-1 for every patch and pixel, each (R, P*P, p), in the dtype of u."""
    w = weight.unflatten(0, (-1, 6, channels))[:, first:last]
    b = bias.unflatten(0, (-1, 6, channels))[:, first:last]
    m = linear(u, w.reshape(-1, weight.shape[1]), b.reshape(-1))
    return m.unflatten(1, (-1, last - first, channels)).unbind(2)


def norm_modulate(q: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    h = upcast(q)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * upcast(weight)
    return (h * (1 + upcast(scale)) + upcast(shift)).to(q.dtype)


def check_pixel_stream(op: str, q: Tensor, u: Tensor, ada_weight: Tensor, ada_bias: Tensor) -> None:
    check_float(op, q=q, u=u, ada_weight=ada_weight, ada_bias=ada_bias)
    if u.dtype != q.dtype:
        raise TypeError(f"{op}: u must have the dtype of q, {q.dtype}, got {u.dtype}")
    check_rank(op, "q", q, "(R, P*P, p)")
    check_rank(op, "u", u, "(R, D)")
    rows, pixels, p = q.shape
    check_shape(op, "u", u, "(R, D)", (rows, u.shape[1]))
    check_shape(op, "ada_weight", ada_weight, "(6*p*P*P, D)", (6 * p * pixels, u.shape[1]))
    check_shape(op, "ada_bias", ada_bias, "(6*p*P*P,)", (6 * p * pixels,))
