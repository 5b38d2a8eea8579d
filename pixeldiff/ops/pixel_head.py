"""pixel_head: final norm and projection of the pixel stream, back to an image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .checks import check_float, check_rank, check_shape
from .patchify import unpatchify
from .registry import Backend, define, upcast

BACKENDS = (
    Backend("triton", "pixeldiff.triton_kernels.pixel_head"),
    Backend("cpu", "pixeldiff.ops.cpu.pixel_head"),
)


def reference(q, norm_weight, weight, bias, height, width, patch, eps):
    h = upcast(q)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * upcast(norm_weight)
    return unpatchify(linear(h, upcast(weight), upcast(bias)), height, width, patch)


def _fake(q, norm_weight, weight, bias, height, width, patch, eps):
    images = q.shape[0] * patch * patch // (height * width)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((images, weight.shape[0], height, width), dtype=dtype)


_op = define(
    "pixel_head",
    "(Tensor q, Tensor norm_weight, Tensor weight, Tensor bias, int height, int width, int patch,"
    " float eps) -> Tensor",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def pixel_head(
    q: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    size: tuple[int, int],
    patch: int,
    eps: float = 1e-6,
) -> Tensor:
    """Project the pixel stream to channels and fold the patches back to an image.

        v[:, Y, X] = weight (rms_norm(q[n, py*P + px]) * norm_weight) + bias

    Shapes: B images of C x H x W, P pixels a side of a patch, N = H/P * W/P, p channels.

    Args:
        q: (B*N, P*P, p), fp32 | fp16 | bf16.
        norm_weight: (p,). weight: (C, p). bias: (C,).
        size: (H, W), multiples of patch.
        patch: P.
        eps: added to the mean square.

    Returns:
        (B, C, H, W), contiguous, fp32 (never rounded to the dtype of q).

    Raises:
        ValueError: shape. TypeError: dtype.

    Backends: triton, cpu (both fp32, bf16, fp16), reference. Gradients: through the reference.
    Cost: B*H*W*(p*sizeof(q) + 4*C) bytes; bandwidth-bound.
    Source: PiD (arXiv 2605.23902), final layer.
    """
    height, width = size
    check("pixel_head", q, norm_weight, weight, bias, size, patch)
    return _op(q, norm_weight, weight, bias, height, width, patch, eps)


def check(
    op: str,
    q: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    size: tuple[int, int],
    patch: int,
) -> None:
    check_float(op, q=q, norm_weight=norm_weight, weight=weight, bias=bias)
    check_rank(op, "q", q, "(B*N, P*P, p)")
    height, width = size
    if patch < 1 or height < patch or width < patch or height % patch or width % patch:
        raise ValueError(f"{op}: size must be positive multiples of patch = {patch}, got {size}")
    rows, pixels, p = q.shape
    if pixels != patch * patch or rows % (height * width // pixels):
        raise ValueError(
            f"{op}: q must be (B*N, P*P, p) with N = {height * width // patch**2} and P*P = "
            f"{patch * patch}, got {tuple(q.shape)}"
        )
    check_shape(op, "norm_weight", norm_weight, "(p,)", (p,))
    check_shape(op, "weight", weight, "(C, p)", (weight.shape[0], p))
    check_shape(op, "bias", bias, "(C,)", (weight.shape[0],))
