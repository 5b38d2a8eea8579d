"""pixel_adaln_compress on Hopper; kernel in csrc/cuda/pixel_adaln_compress_sm90.cu.

It modulates PIECE patches at a time; the product that makes tokens of them is the vendor's, as with
the Triton kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from . import pixel_adaln

OP = "pixel_adaln_compress"
# 67 MB of modulated pixels in bf16. Their 512 tiles of four blocks are 16 for each of the 32
# clusters that run at once; the vendor's product has 81 % of three rounds of multiprocessors, where
# with 4096 patches it would have 61 % of two.
PIECE = 8192


def why_not(
    q: Tensor,
    u: Tensor,
    ada_weight: Tensor,
    ada_bias: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> str | None:
    tensors = (q, u, ada_weight, ada_bias, norm_weight, weight, bias)
    return pixel_adaln.why_not(OP, *tensors) or why_not_call(*tensors)


def why_not_call(
    q: Tensor,
    u: Tensor,
    ada_weight: Tensor,
    ada_bias: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> str | None:
    """Why the kernel cannot take these shapes and strides, on whatever device they are, or None."""
    vectors = {"ada_bias": ada_bias, "norm_weight": norm_weight}
    others = {**vectors, "weight": weight, "bias": bias}
    # Eight channels are one load.
    reason = pixel_adaln.why_not_product(q, u, ada_weight, others, multiple=8)
    return reason or pixel_adaln.why_not_starts({"q": q} | vectors, 16)


def launch(
    q: Tensor,  # (R, P*P, 16)
    u: Tensor,  # (R, D)
    ada_weight: Tensor,  # (96*P*P, D)
    ada_bias: Tensor,  # (96*P*P,)
    norm_weight: Tensor,  # (16,)
    weight: Tensor,  # (A, P*P*16)
    bias: Tensor,  # (A,)
    eps: float,
) -> Tensor:
    patches, pixels, p = q.shape
    out = q.new_empty((patches, weight.shape[0]))
    if q.numel() == 0:
        return out.copy_(bias)
    vectors = [t.contiguous() for t in (ada_bias, norm_weight)]
    z = q.new_empty((min(patches, PIECE), pixels * p))
    for start in range(0, patches, PIECE):
        piece = slice(start, start + PIECE)
        rows = min(PIECE, patches - start)
        native.load().pixel_adaln_compress_cuda(
            (rows, pixels, u.shape[1]),
            native.DTYPE_CODES[q.dtype],
            (q[piece].data_ptr(), q.stride(0), q.stride(1)),
            (u[piece].data_ptr(), u.stride(0)),
            (ada_weight.data_ptr(), ada_weight.stride(0)),
            [t.data_ptr() for t in vectors],
            z.data_ptr(),
            eps,
            q.device.index,
            torch.cuda.current_stream(q.device).cuda_stream,
        )
        torch.addmm(bias, z[:rows], weight.t(), out=out[piece])
    return out
