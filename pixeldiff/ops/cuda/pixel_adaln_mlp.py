"""pixel_adaln_mlp on Hopper; kernel in csrc/cuda/pixel_adaln_mlp_sm90.cu.

expand(attn) is the vendor's product, over PIECE patches at a time, as with the Triton kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from .hopper import why_not_hopper

CHANNELS = 16  # of a pixel
MAX_HIDDEN = 256
MAX_SIZE = 1 << 20  # of P*P and D
ALIGNMENT = 16  # bytes: of addresses and strides, for the copy engine
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
    reason = native.why_not_cuda() or native.why_not_tensors("cuda", *tensors)
    return reason or why_not_hopper("pixel_adaln_mlp_cuda", q.device) or why_not_call(*tensors)


def why_not_call(q: Tensor, u: Tensor, *rest: Tensor) -> str | None:
    """Why the kernel cannot take these shapes and strides, on whatever device they are, or None."""
    _, _, _, ada_weight, ada_bias, norm_weight, fc1_weight, *_ = rest
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, got {q.dtype}"
    for t in rest:
        if t.dtype != q.dtype:
            return f"needs every tensor in the dtype of q, {q.dtype}, got {t.dtype}"
    if q.shape[2] != CHANNELS:
        return f"takes {CHANNELS} channels of a pixel, got {q.shape[2]}"
    F = fc1_weight.shape[0]
    if F % 16 or not 16 <= F <= MAX_HIDDEN:
        return f"takes an MLP width that is a multiple of 16, at most {MAX_HIDDEN}, got {F}"
    if not 1 <= u.shape[1] <= MAX_SIZE or q.shape[1] > MAX_SIZE:
        return f"takes 1 to 2^20 channels of u and pixels, got {u.shape[1]} and {q.shape[1]}"
    for name, t in (("u", u), ("ada_weight", ada_weight)):
        if t.numel() and t.data_ptr() % ALIGNMENT:
            return f"needs {name} to start at a multiple of {ALIGNMENT} bytes"
        stride = t.stride(0) * t.element_size()
        if t.shape[0] > 1 and (stride <= 0 or stride % ALIGNMENT):
            return (
                f"needs rows of {name} that are a positive multiple of {ALIGNMENT} bytes apart, "
                f"got {stride}"
            )
    # Two channels are one load.
    if any(stride % 2 for stride in q.stride()[:2]):
        return f"needs even strides of q, got {tuple(q.stride())} elements; call .contiguous()"
    names = {"q": q, "ada_bias": ada_bias, "norm_weight": norm_weight}
    for name, t in names.items() | _mlp(*rest[6:]).items():
        if t.numel() and t.data_ptr() % 4:
            return f"needs {name} to start at a multiple of 4 bytes"
    return None


def _mlp(
    fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> dict[str, Tensor]:
    named = {"fc1 weight": fc1_weight, "fc1 bias": fc1_bias}
    return {**named, "fc2 weight": fc2_weight, "fc2 bias": fc2_bias}


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
    vectors = [ada_bias, norm_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias]
    vectors = [t.contiguous() for t in vectors]
    expanded = q.new_empty((min(patches, PIECE), pixels * p))
    for start in range(0, patches, PIECE):
        piece = slice(start, start + PIECE)
        rows = min(PIECE, patches - start)
        a = expanded[:rows]
        torch.addmm(expand_bias, attn[piece], expand_weight.t(), out=a)
        native.load().pixel_adaln_mlp_cuda(
            (rows, pixels, u.shape[1], fc1_weight.shape[0]),
            native.DTYPE_CODES[q.dtype],
            (q[piece].data_ptr(), q.stride(0), q.stride(1)),
            (u[piece].data_ptr(), u.stride(0)),
            a.data_ptr(),
            (ada_weight.data_ptr(), ada_weight.stride(0)),
            [t.data_ptr() for t in vectors],
            out[piece].data_ptr(),
            eps,
            q.device.index,
            torch.cuda.current_stream(q.device).cuda_stream,
        )
    return out
