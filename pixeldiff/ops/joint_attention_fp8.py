"""joint_attention_fp8: softmax(q k^T) v with both products in e4m3."""

from __future__ import annotations

import torch
from torch import Tensor

from .joint_attention import check_qkv
from .registry import Backend, define, needs_grad, upcast

BACKENDS = (
    Backend("triton", "pixeldiff.triton_kernels.joint_attention_fp8", automatic=False),
    Backend("cuda", "pixeldiff.ops.cuda.joint_attention_fp8", automatic=False),
)
E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
ROWS = 128  # keys that share a scale, and between two updates of the maximum
WEIGHT = 256.0  # what the largest weight is stored as
CHUNK = 1 << 24  # logits of one block of keys that the reference holds at a time


def quantized(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(values of e4m3 in the dtype of x, scales) with one scale for all of `axes`."""
    largest = x.abs().amax(axes, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest / LARGEST)
    return (x * (1 / scale)).to(E4M3).to(x.dtype), scale


def _by_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, G, S, d) -> values, scales (B, G, S): every ROWS rows of a head have one."""
    rows = x.shape[2]
    blocks = torch.nn.functional.pad(x, (0, 0, 0, -rows % ROWS)).unflatten(2, (-1, ROWS))
    values, scale = quantized(blocks, (3, 4))
    scale = scale.expand_as(blocks[..., :1]).flatten(2)[:, :, :rows]
    return values.flatten(2, 3)[:, :, :rows], scale


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if q.numel() == 0:
        return torch.empty_like(q)
    dtype = q.dtype
    q, k, v = (upcast(t).transpose(1, 2) for t in (q, k, v))
    q8, q_scale = quantized(q, (3,))
    k8, k_scale = _by_blocks(k - k.mean(2, keepdim=True))
    v8, v_scale = quantized(v, (2,))
    rows = max(1, CHUNK // (q.shape[0] * q.shape[1] * ROWS))
    parts = [
        _attend(a, s * scale, k8, k_scale, v8)
        for a, s in zip(q8.split(rows, 2), q_scale.split(rows, 2), strict=True)
    ]
    return (torch.cat(parts, 2) * v_scale).transpose(1, 2).to(dtype).contiguous()


def _attend(q8: Tensor, scale: Tensor, k8: Tensor, k_scale: Tensor, v8: Tensor) -> Tensor:
    """Keys a block at a time, since the weights are rounded against the maximum so far."""
    most = torch.full_like(scale, -torch.inf)
    total, o = torch.zeros_like(scale), torch.zeros_like(q8)
    for start in range(0, k8.shape[2], ROWS):
        block = slice(start, start + ROWS)
        logits = q8 @ k8[:, :, block].transpose(2, 3) * (scale * k_scale[:, :, None, block])
        now = torch.maximum(most, logits.amax(-1, keepdim=True))
        weights = (logits - now).exp() * WEIGHT
        rescale = (most - now).exp()
        total = total * rescale + weights.sum(-1, keepdim=True)
        o = o * rescale + weights.to(E4M3).to(o.dtype) @ v8[:, :, block]
        most = now
    return o / total


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


_op = define(
    "joint_attention_fp8",
    "(Tensor q, Tensor k, Tensor v, float scale) -> Tensor",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def joint_attention_fp8(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention of every query row over all key rows, multiplied in e4m3.

        o = softmax(scale * q k^T) v                        per head

    q has one scale for every row of a head, v one for every channel, and k one for every 128 rows
    after their mean over all rows is taken off: that adds the same to all logits of a row, which
    the softmax does not see, and what is left is smaller. Each is max|values| / 448. The weights
    are rounded to e4m3 as fractions of 256, against the largest logit so far, and divided by their
    sum before rounding. Every step is fp32 but for those roundings. For normal q, k and v of 16384
    rows the result is wrong by 5 to 6 % of its norm, where bf16's is by 0.4 %.

    Shapes: B images, L query rows, S key rows, G heads of d channels.

    Args:
        q: (B, L, G, d), fp32 | fp16 | bf16, last axis contiguous, other strides free.
        k, v: (B, S, G, d), the dtype of q. S >= 1.
        scale: of the logits, positive; None means 1 / sqrt(d).

    Returns:
        (B, L, G, d), contiguous, dtype of q. A row does not depend on the other rows of q. NaN and
        infinities spread to all that shares a scale or a mean with them.

    Raises:
        ValueError: shape, stride, scale or device. TypeError: dtype. RuntimeError: an argument
        requires a gradient. NotImplementedError: a forced backend cannot run; says why.

    Backends: cuda (Hopper) and triton (compute capability 8.9) on request, both for head dims that
    are multiples of 8 up to 128; reference. No gradients.
    Cost: 4*B*L*S*G*d FLOPs at twice the rate of bf16 and B*L*S*G exponentials, which then take as
    long; k and v are read twice and their quantised copies written and read.
    Source: PiD (arXiv 2605.23902), the attention blocks; smoothing of k as in SageAttention
    (arXiv 2410.02367), section 4.2.
    """
    op = "joint_attention_fp8"
    check_qkv(op, q, k, v)
    if scale is not None and not scale > 0:
        raise ValueError(f"{op}: scale must be positive, got {scale}")
    if needs_grad(q, k, v):
        raise RuntimeError(
            f"{op}: an argument requires a gradient, and quantisation has none; call it under "
            f"torch.no_grad(), or use joint_attention"
        )
    return _op(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
