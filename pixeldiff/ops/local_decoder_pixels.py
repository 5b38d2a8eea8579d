"""local_decoder_pixels: the last layer of L2P's local decoder, and the mix of guidance."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .checks import check_device, check_float, check_last_contiguous, check_rank, check_shape
from .registry import Backend, define, upcast

BACKENDS = (Backend("triton", "pixeldiff.triton_kernels.local_decoder_pixels"),)


def reference(x: Tensor, weight: Tensor, bias: Tensor, guidance: Tensor | None) -> Tensor:
    if guidance is not None:  # one half at a time: a copy of both in fp32 is large
        positive, negative = (reference(half, weight, bias, None) for half in x.chunk(2))
        return torch.lerp(negative, positive, guidance.to(negative.dtype))
    u = linear(upcast(x), upcast(weight), upcast(bias))
    return u.permute(0, 3, 1, 2).contiguous()


def _fake(x, weight, bias, guidance):
    images = x.shape[0] if guidance is None else x.shape[0] // 2
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((images, weight.shape[0], x.shape[1], x.shape[2]), dtype=dtype)


_op = define(
    "local_decoder_pixels",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? guidance) -> Tensor",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def local_decoder_pixels(
    x: Tensor, weight: Tensor, bias: Tensor, guidance: Tensor | None = None
) -> Tensor:
    """Project a picture's channels to colours, in fp32; under guidance, of two pictures mixed.

        u[b] = weight x[b] + bias                                       without guidance
        u[b] = u_neg + g (u_pos - u_neg), u_pos of x[b], u_neg of x[B/2 + b]

    The projection is linear and the shares of the mix add up to 1: a fused backend mixes what goes
    in and projects once. Where both are equal the result is that without guidance.

    Shapes: B images of H x W pixels, C channels, K colours.

    Args:
        x: (B, H, W, C), fp32 | fp16 | bf16, last axis contiguous; B even under guidance.
        weight: (K, C). bias: (K,). Any of the same dtypes.
        guidance: (), g, any of the same dtypes. None is none.

    Returns:
        (B, K, H, W), or (B/2, K, H, W) under guidance, contiguous, fp32 (fp64 for fp64).

    Raises:
        ValueError: shape, stride or device. TypeError: dtype. NotImplementedError: a forced
        backend cannot run; says why.

    Backends: triton (fp32, bf16, fp16), reference. Gradients: through the reference.
    Cost: B*H*W*C*sizeof(x) bytes read and 4*K*H*W written for each result; bandwidth-bound.
    Source: L2P (arXiv 2605.12013), out_conv of the local decoder; classifier-free guidance.
    """
    op = "local_decoder_pixels"
    check_float(op, x=x, weight=weight, bias=bias, guidance=guidance)
    check_rank(op, "x", x, "(B, H, W, C)")
    check_rank(op, "weight", weight, "(K, C)")
    colours = weight.shape[0]
    check_shape(op, "weight", weight, "(K, C)", (colours, x.shape[3]))
    check_shape(op, "bias", bias, "(K,)", (colours,))
    if guidance is not None:
        check_shape(op, "guidance", guidance, "()", ())
        if x.shape[0] % 2:
            raise ValueError(
                f"{op}: x must have an even number of images under guidance, got {x.shape[0]}"
            )
    check_last_contiguous(op, x=x, weight=weight)
    check_device(op, x, weight=weight, bias=bias, guidance=guidance)
    return _op(x, weight, bias, guidance)
