"""pixel_adaln_mlp: the gated attention residual and the modulated MLP of the pixel stream."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from .checks import check_float, check_shape
from .pixel_adaln import check_pixel_stream, modulation, norm_modulate
from .registry import Backend, define, upcast

BACKENDS = (
    Backend("triton", "pixeldiff.triton_kernels.pixel_adaln_mlp"),
    # On request until it has been measured.
    Backend("cuda", "pixeldiff.ops.cuda.pixel_adaln_mlp", automatic=False),
    Backend("cpu", "pixeldiff.ops.cpu.pixel_adaln_mlp"),
)


def reference(
    q, u, attn, expand_weight, expand_bias, ada_weight, ada_bias, norm_weight, fc1_weight,
    fc1_bias, fc2_weight, fc2_bias, eps,
):  # fmt: skip
    gate1, shift, scale, gate2 = modulation(u, ada_weight, ada_bias, q.shape[2], 2, 6)
    a = linear(attn, expand_weight, expand_bias).unflatten(1, q.shape[1:])
    q = (upcast(q) + upcast(gate1) * upcast(a)).to(q.dtype)
    h = norm_modulate(q, norm_weight, shift, scale, eps)
    h = linear(gelu(linear(h, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
    return (upcast(q) + upcast(gate2) * upcast(h)).to(q.dtype)


def _fake(q, *args):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


_op = define(
    "pixel_adaln_mlp",
    "(Tensor q, Tensor u, Tensor attn, Tensor expand_weight, Tensor expand_bias, Tensor ada_weight,"
    " Tensor ada_bias, Tensor norm_weight, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight,"
    " Tensor fc2_bias, float eps) -> Tensor",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def pixel_adaln_mlp(
    q: Tensor,
    u: Tensor,
    attn: Tensor,
    expand: tuple[Tensor, Tensor],
    ada: tuple[Tensor, Tensor],
    norm_weight: Tensor,
    fc1: tuple[Tensor, Tensor],
    fc2: tuple[Tensor, Tensor],
    *,
    eps: float = 1e-6,
) -> Tensor:
    """Return the attention result to the pixels, then the pixels' modulated MLP.

        (gate1, shift, scale, gate2) = chunks 2..5 of ada u
        q <- q + gate1 * (expand attn)
        q <- q + gate2 * fc2 gelu(fc1 (rms_norm(q) * norm_weight * (1 + scale) + shift))

    GELU is the exact (erf) form.

    Shapes: R = B*N patches, P*P pixels of p channels each, D conditioning width, A attention width,
    F MLP width.

    Args:
        q: (R, P*P, p), the pixel stream, fp32 | fp16 | bf16.
        u: (R, D), conditioning of each patch, dtype of q.
        attn: (R, A), attention output of each patch.
        expand: weight (P*P*p, A) and bias (P*P*p,).
        ada: weight (6*p*P*P, D) and bias (6*p*P*P,), the block's whole AdaLN projection.
        norm_weight: (p,).
        fc1: weight (F, p), bias (F,). fc2: weight (p, F), bias (p,).
        eps: added to the mean square.

    Returns:
        (R, P*P, p), contiguous, dtype of q.

    Raises:
        ValueError: shape. TypeError: dtype.

    Backends: triton and cpu (fp32, bf16, fp16; neither stores more than a few MB of modulation, the
    first none, and both are fp32 between their products), cuda on request (bf16 and fp16, p = 16,
    compute capability 9.0; as triton), reference (all 4*R*P*P*p values of it, rounded to the dtype
    of q). Gradients: through the reference.
    Cost: 2*R*P*P*p*(4*D + A + 2*F) FLOPs.
    Source: PiD (arXiv 2605.23902), PiT block, second half.
    """
    op = "pixel_adaln_mlp"
    check_pixel_stream(op, q, u, *ada)
    check_float(op, attn=attn, expand=expand[0], norm_weight=norm_weight, fc1=fc1[0], fc2=fc2[0])
    rows, pixels, p = q.shape
    hidden = fc1[0].shape[0]
    check_shape(op, "attn", attn, "(R, A)", (rows, attn.shape[-1]))
    check_shape(op, "expand weight", expand[0], "(P*P*p, A)", (pixels * p, attn.shape[-1]))
    check_shape(op, "expand bias", expand[1], "(P*P*p,)", (pixels * p,))
    check_shape(op, "norm_weight", norm_weight, "(p,)", (p,))
    check_shape(op, "fc1 weight", fc1[0], "(F, p)", (hidden, p))
    check_shape(op, "fc1 bias", fc1[1], "(F,)", (hidden,))
    check_shape(op, "fc2 weight", fc2[0], "(p, F)", (p, hidden))
    check_shape(op, "fc2 bias", fc2[1], "(p,)", (p,))
    return _op(q, u, attn, *expand, *ada, norm_weight, *fc1, *fc2, eps)
