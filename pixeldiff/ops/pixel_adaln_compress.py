"""pixel_adaln_compress: AdaLN of the pixel stream, folded to one attention token per patch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from .checks import check_float, check_shape
from .pixel_adaln import check_pixel_stream, modulation, norm_modulate
from .registry import Backend, define

BACKENDS = (
    Backend("triton", "pixeldiff.triton_kernels.pixel_adaln_compress"),
    # On request until it has been measured.
    Backend("cuda", "pixeldiff.ops.cuda.pixel_adaln_compress", automatic=False),
    Backend("cpu", "pixeldiff.ops.cpu.pixel_adaln_compress"),
)


def reference(q, u, ada_weight, ada_bias, norm_weight, weight, bias, eps):
    shift, scale = modulation(u, ada_weight, ada_bias, q.shape[2], 0, 2)
    z = norm_modulate(q, norm_weight, shift, scale, eps)
    return linear(z.flatten(1), weight, bias)


def _fake(q, u, ada_weight, ada_bias, norm_weight, weight, bias, eps):
    return q.new_empty((q.shape[0], weight.shape[0]))


_op = define(
    "pixel_adaln_compress",
    "(Tensor q, Tensor u, Tensor ada_weight, Tensor ada_bias, Tensor norm_weight, Tensor weight,"
    " Tensor bias, float eps) -> Tensor",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def pixel_adaln_compress(
    q: Tensor,
    u: Tensor,
    ada_weight: Tensor,
    ada_bias: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """Modulate the pixels of each patch and compress them to one attention token.

        (shift, scale) = chunks 0, 1 of ada_weight u + ada_bias
        z = rms_norm(q) * norm_weight * (1 + scale) + shift
        a = weight flatten(z) + bias              flat index pixel*p + channel

    Shapes: R = B*N patches, P*P pixels of p channels each, D conditioning width, A attention width.

    Args:
        q: (R, P*P, p), the pixel stream, fp32 | fp16 | bf16.
        u: (R, D), conditioning of each patch, dtype of q.
        ada_weight, ada_bias: (6*p*P*P, D), (6*p*P*P,), the block's whole AdaLN projection.
        norm_weight: (p,). weight, bias: (A, P*P*p), (A,).
        eps: added to the mean square.

    Returns:
        (R, A), contiguous, dtype of q.

    Raises:
        ValueError: shape. TypeError: dtype.

    Backends: triton and cpu (fp32, bf16, fp16; neither stores more than a few MB of modulation, the
    first none), cuda on request (bf16 and fp16, p = 16, compute capability 9.0; as triton),
    reference (all 2*R*P*P*p values of it). Gradients: through the reference.
    Cost: 2*R*P*P*p*(2*D + A) FLOPs.
    Source: PiD (arXiv 2605.23902), PiT block, first half.
    """
    op = "pixel_adaln_compress"
    check_pixel_stream(op, q, u, ada_weight, ada_bias)
    check_float(op, norm_weight=norm_weight, weight=weight, bias=bias)
    _, pixels, p = q.shape
    check_shape(op, "norm_weight", norm_weight, "(p,)", (p,))
    check_shape(op, "weight", weight, "(A, P*P*p)", (weight.shape[0], pixels * p))
    check_shape(op, "bias", bias, "(A,)", (weight.shape[0],))
    return _op(q, u, ada_weight, ada_bias, norm_weight, weight, bias, eps)
