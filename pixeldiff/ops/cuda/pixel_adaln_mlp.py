"""pixel_adaln_mlp on Hopper; kernel in csrc/cuda/pixel_adaln_mlp_sm90.cu.

expand(attn) is the vendor's product, over PIECE patches at a time, as with the Triton kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from . import pixel_adaln

OP = "pixel_adaln_mlp"
MAX_HIDDEN = 256
# 34 MB of expand(attn) in bf16, which the 50 MB second-level cache can hold until it is read. Its
# 1024 tiles of four blocks are 32 for each of the clusters that run at once.
PIECE = 4096


def why_not(
    q: Tensor,
    u: Tensor,
    attn: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    ada_weight: Tensor,
    ada_bias: Tensor,
    norm_weight: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    eps: float,
) -> str | None:
    tensors = (q, u, attn, expand_weight, expand_bias, ada_weight, ada_bias, norm_weight)
    tensors += (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return pixel_adaln.why_not(OP, *tensors) or why_not_call(*tensors)


def why_not_call(
    q: Tensor,
    u: Tensor,
    attn: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    ada_weight: Tensor,
    ada_bias: Tensor,
    norm_weight: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
) -> str | None:
    """Why the kernel cannot take these shapes and strides, on whatever device they are, or None."""
    vectors = {"ada_bias": ada_bias, "norm_weight": norm_weight}
    vectors |= {"fc1 weight": fc1_weight, "fc1 bias": fc1_bias}
    vectors |= {"fc2 weight": fc2_weight, "fc2 bias": fc2_bias}
    expand = {"attn": attn, "expand weight": expand_weight, "expand bias": expand_bias}
    # Two channels are one load.
    reason = pixel_adaln.why_not_product(q, u, ada_weight, expand | vectors, multiple=2)
    F = fc1_weight.shape[0]
    if reason is None and (F % 16 or not 16 <= F <= MAX_HIDDEN):
        return f"takes an MLP width that is a multiple of 16, at most {MAX_HIDDEN}, got {F}"
    return reason or pixel_adaln.why_not_starts({"q": q} | vectors, 4)


def launch(
    q: Tensor,  # (R, P*P, 16)
    u: Tensor,  # (R, D)
    attn: Tensor,  # (R, A)
    expand_weight: Tensor,  # (P*P*16, A)
    expand_bias: Tensor,  # (P*P*16,)
    ada_weight: Tensor,  # (96*P*P, D)
    ada_bias: Tensor,  # (96*P*P,)
    norm_weight: Tensor,  # (16,)
    fc1_weight: Tensor,  # (F, 16)
    fc1_bias: Tensor,  # (F,)
    fc2_weight: Tensor,  # (16, F)
    fc2_bias: Tensor,  # (16,)
    eps: float,
) -> Tensor:
    patches, pixels, p = q.shape
    out = q.new_empty(q.shape)
    if out.numel() == 0:
        return out
    vectors = [t.contiguous() for t in (ada_bias, norm_weight)]
    mlp = [t.contiguous() for t in (fc1_weight, fc1_bias, fc2_weight, fc2_bias)]
    expanded = q.new_empty((min(patches, PIECE), pixels * p))
    for start in range(0, patches, PIECE):
        piece = slice(start, start + PIECE)
        rows = min(PIECE, patches - start)
        a = expanded[:rows]
        torch.addmm(expand_bias, attn[piece], expand_weight.t(), out=a)
        native.load().pixel_adaln_mlp_cuda(
            (rows, pixels, u.shape[1]),
            native.DTYPE_CODES[q.dtype],
            (q[piece].data_ptr(), q.stride(0), q.stride(1)),
            (u[piece].data_ptr(), u.stride(0)),
            a.data_ptr(),
            (ada_weight.data_ptr(), ada_weight.stride(0)),
            [t.data_ptr() for t in vectors],
            (fc1_weight.shape[0], *(t.data_ptr() for t in mlp)),
            out[piece].data_ptr(),
            eps,
            q.device.index,
            torch.cuda.current_stream(q.device).cuda_stream,
        )
    return out
