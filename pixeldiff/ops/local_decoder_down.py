"""local_decoder_down: one level of L2P's local decoder on its way down."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d, silu

from .checks import check_device, check_float, check_rank, check_shape
from .registry import Backend, define

BACKENDS = (
    Backend("triton", "pixeldiff.triton_kernels.local_decoder_down"),
    Backend("cuda", "pixeldiff.ops.cuda.local_decoder_down", automatic=False),
    Backend("cpu", "pixeldiff.ops.cpu.local_decoder_down"),
)


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    # The result takes the order of x: an image that comes channels first changes sides here, while
    # it has three channels.
    x = x.permute(0, 3, 1, 2).to(weight.dtype, memory_format=torch.channels_last)
    skip = silu(conv2d(x, weight, bias, padding=1))
    return skip.permute(0, 2, 3, 1), max_pool2d(skip, 2).permute(0, 2, 3, 1)


def _fake(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    b, height, width, _ = x.shape
    channels = weight.shape[0]
    skip = weight.new_empty((b, height, width, channels))
    return skip, weight.new_empty((b, height // 2, width // 2, channels))


_op = define(
    "local_decoder_down",
    "(Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def local_decoder_down(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve and activate, and halve the resolution of the result.

        skip = silu(conv3x3(x) + bias),  pooled = max over each 2x2 square of skip

    The convolution has stride 1 and zero padding 1.

    Shapes: B images of H x W pixels, channels last.

    Args:
        x: (B, H, W, Ci), fp32 | fp16 | bf16, any strides, H and W positive and even. Another dtype
            than the weight's is rounded to it first: the network's image needs no copy of its own.
        weight: (Co, Ci, 3, 3). bias: (Co,), the dtype of the weight.

    Returns:
        skip (B, H, W, Co) and pooled (B, H/2, W/2, Co), contiguous, dtype of the weight.

    Raises:
        ValueError: shape or device. TypeError: dtype. NotImplementedError: a forced backend cannot
        run; says why.

    Backends: triton, cuda on request (capability 8.0 and later, bf16 weights, 3 channels to 16, of
    x in bf16 side by side or of an fp32 image channels first; of such an image to 3 too), cpu
    (fp32, bf16, fp16; fewer than 128 channels on a side), reference. Gradients: through the
    reference.
    Cost: 18*B*H*W*Ci*Co FLOPs; B*H*W*(Ci*sizeof(x) + 1.25*Co*sizeof(weight)) bytes. At full
    resolution (3 or 16 channels) bandwidth-bound.
    Source: L2P (arXiv 2605.12013), encoder half of the local decoder.
    """
    op = "local_decoder_down"
    check_float(op, x=x, weight=weight, bias=bias)
    check_rank(op, "x", x, "(B, H, W, Ci)")
    check_rank(op, "weight", weight, "(Co, Ci, 3, 3)")
    _, height, width, channels = x.shape
    check_shape(op, "weight", weight, "(Co, Ci, 3, 3)", (weight.shape[0], channels, 3, 3))
    check_shape(op, "bias", bias, "(Co,)", (weight.shape[0],))
    if height % 2 or width % 2 or 0 in (height, width):
        raise ValueError(f"{op}: H and W of x must be positive and even, got {height}x{width}")
    if bias.dtype != weight.dtype:
        raise TypeError(
            f"{op}: bias must have the dtype of weight, {weight.dtype}, got {bias.dtype}"
        )
    check_device(op, x, weight=weight, bias=bias)
    return _op(x, weight, bias)
