"""pixel_embed: pixels to tokens with full-image sin/cos positions, in patch order."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .checks import check_float, check_rank, check_shape
from .registry import Backend, define, upcast

BACKENDS = (
    Backend("triton", "pixeldiff.triton_kernels.pixel_embed"),
    Backend("cpu", "pixeldiff.ops.cpu.pixel_embed"),
)


def reference(x: Tensor, weight: Tensor, bias: Tensor, pos_x: Tensor, pos_y: Tensor, patch: int):
    b, _, height, width = x.shape
    p = weight.shape[0]
    w = upcast(weight)
    q = linear(x.permute(0, 2, 3, 1).to(w.dtype), w, bias.to(w.dtype))
    q = torch.cat((q[..., : p // 2] + pos_x, q[..., p // 2 :] + pos_y[:, None]), -1)
    q = q.reshape(b, height // patch, patch, width // patch, patch, p)
    return q.transpose(2, 3).reshape(-1, patch * patch, p).to(weight.dtype)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, pos_x: Tensor, pos_y: Tensor, patch: int):
    b, _, height, width = x.shape
    tokens = b * (height // patch) * (width // patch)
    return weight.new_empty((tokens, patch * patch, weight.shape[0]))


_op = define(
    "pixel_embed",
    "(Tensor x, Tensor weight, Tensor bias, Tensor pos_x, Tensor pos_y, int patch) -> Tensor",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def pixel_embed(
    x: Tensor, weight: Tensor, bias: Tensor, pos_x: Tensor, pos_y: Tensor, *, patch: int
) -> Tensor:
    """Embed every pixel and group the pixels by patch.

        q[n, py*P + px] = weight x[:, Y, X] + bias + [pos_x[X] | pos_y[Y]]

    with (Y, X) = pixel (py, px) of patch n, patches in raster order.

    Shapes: B images of C x H x W, P pixels a side of a patch, N = H/P * W/P, p channels.

    Args:
        x: (B, C, H, W), floating point; H and W multiples of patch.
        weight: (p, C); bias: (p,). Their dtype is the result's.
        pos_x: (W, p/2), pos_y: (H, p/2), fp32: the separable sin/cos table of the whole image.
        patch: P.

    Returns:
        (B*N, P*P, p), contiguous, dtype of weight. fp32 inside, one rounding.

    Raises:
        ValueError: shape. TypeError: dtype.

    Backends: triton, cpu (both fp32, bf16, fp16), reference. Gradients: through the reference.
    Cost: B*H*W*(C*sizeof(x) + p*sizeof(weight)) bytes; bandwidth-bound.
    Source: PiD (arXiv 2605.23902), pixel stream embedding.
    """
    op = "pixel_embed"
    check_float(op, x=x, weight=weight, bias=bias)
    check_rank(op, "x", x, "(B, C, H, W)")
    _, c, height, width = x.shape
    if patch < 1 or height % patch or width % patch:
        raise ValueError(
            f"{op}: H and W must be multiples of patch = {patch}, got {height}x{width}"
        )
    p = weight.shape[0]
    if p % 2:
        raise ValueError(f"{op}: p must be even, got {p}")
    check_shape(op, "weight", weight, "(p, C)", (p, c))
    check_shape(op, "bias", bias, "(p,)", (p,))
    check_shape(op, "pos_x", pos_x, "(W, p/2)", (width, p // 2))
    check_shape(op, "pos_y", pos_y, "(H, p/2)", (height, p // 2))
    return _op(x, weight, bias, pos_x, pos_y, patch)
