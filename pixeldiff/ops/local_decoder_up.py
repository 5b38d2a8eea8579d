"""local_decoder_up: one level of L2P's local decoder on its way up."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import conv2d, interpolate, silu

from .checks import check_device, check_float, check_rank, check_shape
from .registry import Backend, define

BACKENDS = (
    Backend("triton", "pixeldiff.triton_kernels.local_decoder_up"),
    # On request until it has been measured.
    Backend("cuda", "pixeldiff.ops.cuda.local_decoder_up", automatic=False),
    Backend("cpu", "pixeldiff.ops.cpu.local_decoder_up"),
)


def reference(
    x: Tensor, skip: Tensor, up_weight: Tensor, up_bias: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    doubled = interpolate(x.permute(0, 3, 1, 2), scale_factor=2, mode="nearest")
    raised = conv2d(doubled, up_weight, up_bias, padding=1)
    del doubled
    return join(raised, skip, weight, bias)


def join(raised: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu(conv3x3([raised, skip])), without the concatenation: the weight is split instead.

    raised is (B, Cu, H, W), skip (S, H, W, Cs), the result (B, H, W, Co).
    """
    ours, theirs = weight.split((raised.shape[1], skip.shape[3]), 1)
    y = conv2d(raised, ours, bias, padding=1)
    from_skip = conv2d(skip.permute(0, 3, 1, 2), theirs, padding=1)
    if skip.shape[0] != raised.shape[0]:  # image b reads skip b % S
        y = (y.unflatten(0, (-1, skip.shape[0])) + from_skip).flatten(0, 1)
    else:
        y = y + from_skip
    return silu(y).permute(0, 2, 3, 1)


def _fake(x, skip, up_weight, up_bias, weight, bias):
    return x.new_empty((x.shape[0], skip.shape[1], skip.shape[2], weight.shape[0]))


_op = define(
    "local_decoder_up",
    "(Tensor x, Tensor skip, Tensor up_weight, Tensor up_bias, Tensor weight, Tensor bias)"
    " -> Tensor",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def local_decoder_up(
    x: Tensor, skip: Tensor, up_weight: Tensor, up_bias: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Double the resolution, convolve, and convolve again together with the skip tensor.

        u = conv3x3(nearest-neighbour doubling of x) + up_bias          no activation
        y = silu(conv3x3([u, skip]) + bias)                             u's channels first

    Both convolutions have stride 1 and zero padding 1. Images that differ only in x share a skip:
    under guidance both branches saw the same picture.

    Shapes: B images, S skips, channels last.

    Args:
        x: (B, H/2, W/2, Ci), fp32 | fp16 | bf16, any strides, as skip.
        skip: (S, H, W, Cs), S a divisor of B: image b reads skip b % S.
        up_weight: (Cu, Ci, 3, 3). up_bias: (Cu,).
        weight: (Co, Cu + Cs, 3, 3). bias: (Co,). All six have one dtype.

    Returns:
        (B, H, W, Co), contiguous.

    Raises:
        ValueError: shape or device. TypeError: dtype. NotImplementedError: a forced backend cannot
        run; says why.

    Backends: triton, cuda on request (capability 8.0 and later, bf16, 8 to 32 channels of x and
    skip in eights, 16 of the result), cpu (fp32, bf16, fp16; up to about 128 channels), reference.
    Gradients: through the reference.
    Cost: 18*H*W*(B*Ci*Cu + B*Cu*Co + S*Cs*Co) FLOPs and H*W*(B*Ci/4 + S*Cs + B*Co)*sizeof(x) bytes.
    At full resolution (16 channels) bandwidth-bound. The first product takes 8 in place of 18 as
    four 2x2 convolutions of x, one for each parity of row and column, whose taps are sums of those
    that meet the same value of x: for kernels. Through PyTorch's convolutions on a CPU that gained
    nothing (0.7x at 16 channels, 1.1x at 128), so the reference doubles x. Of few channels the
    GPU's kernels compose the two convolutions, between which is no activation, and never have u.
    Source: L2P (arXiv 2605.12013), decoder half of the local decoder.
    """
    op = "local_decoder_up"
    tensors = {"skip": skip, "up_weight": up_weight, "up_bias": up_bias}
    tensors.update(weight=weight, bias=bias)
    check_float(op, x=x, **tensors)
    check_rank(op, "x", x, "(B, H/2, W/2, Ci)")
    check_rank(op, "skip", skip, "(S, H, W, Cs)")
    check_rank(op, "up_weight", up_weight, "(Cu, Ci, 3, 3)")
    check_rank(op, "weight", weight, "(Co, Cu + Cs, 3, 3)")
    b, height, width, channels = x.shape
    s, *_, beside = skip.shape
    if (b % s if s else b) != 0:
        raise ValueError(f"{op}: skip must have S images, S a divisor of B = {b}, got {s}")
    check_shape(op, "skip", skip, "(S, H, W, Cs)", (s, 2 * height, 2 * width, beside))
    if 0 in (height, width):
        raise ValueError(f"{op}: x must have rows and columns, got {tuple(x.shape)}")
    middle, out = up_weight.shape[0], weight.shape[0]
    check_shape(op, "up_weight", up_weight, "(Cu, Ci, 3, 3)", (middle, channels, 3, 3))
    check_shape(op, "up_bias", up_bias, "(Cu,)", (middle,))
    check_shape(op, "weight", weight, "(Co, Cu + Cs, 3, 3)", (out, middle + beside, 3, 3))
    check_shape(op, "bias", bias, "(Co,)", (out,))
    for name, t in tensors.items():
        if t.dtype != x.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of x, {x.dtype}, got {t.dtype}")
    check_device(op, x, **tensors)
    return _op(x, skip, up_weight, up_bias, weight, bias)
