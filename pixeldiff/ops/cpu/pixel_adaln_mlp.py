"""pixel_adaln_mlp on the CPU; kernel in csrc/cpu/pixel_adaln_mlp.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from . import pixel_adaln
from .pixel_adaln import chunk_patches, fp32, groups, planar


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
    gemm = (q, u, attn, expand_weight, expand_bias, ada_weight, ada_bias)
    return pixel_adaln.why_not(*gemm, norm_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias)


def launch(
    q: Tensor,  # (R, P*P, p)
    u: Tensor,  # (R, D)
    attn: Tensor,  # (R, A)
    expand_weight: Tensor,  # (P*P*p, A)
    expand_bias: Tensor,  # (P*P*p,)
    ada_weight: Tensor,  # (6*p*P*P, D)
    ada_bias: Tensor,  # (6*p*P*P,)
    norm_weight: Tensor,  # (p,)
    fc1_weight: Tensor,  # (F, p)
    fc1_bias: Tensor,  # (F,)
    fc2_weight: Tensor,  # (p, F)
    fc2_bias: Tensor,  # (p,)
    eps: float,
    *,
    isa: int | None = None,  # a code of native.ISA_CODES; None takes the best
    threads: int | None = None,  # of the kernel; None takes PyTorch's number. GEMMs use PyTorch's
) -> Tensor:
    patches, pixels, p = q.shape
    q = q.contiguous()
    out = torch.empty_like(q)
    if q.numel() == 0:
        return out
    kernel = native.load().pixel_adaln_mlp_cpu
    isa = native.best_isa() if isa is None else isa
    threads = torch.get_num_threads() if threads is None else threads
    norm, fc1, fc2_columns = fp32(norm_weight), fp32(fc1_weight), fp32(fc2_weight.t())
    fc1_b, fc2_b = fp32(fc1_bias), fp32(fc2_bias)
    group = min(pixel_adaln.GROUP, pixels)
    chunk = chunk_patches(patches, 5 * group * p * q.element_size())
    mod = q.new_empty(chunk * 4 * group * p)
    expanded = q.new_empty(chunk * group * p)
    # Pixels are independent: the groups are the outer loop, and one group's weights are held.
    for js in groups(pixels):
        width = (js.stop - js.start) * p
        first = js.start * p
        w, b = planar(ada_weight, js, slice(2, 6), p), planar(ada_bias, js, slice(2, 6), p)
        ew, eb = expand_weight[first : first + width], expand_bias[first : first + width]
        for r in range(0, patches, chunk):
            rows = slice(r, min(r + chunk, patches))
            count = rows.stop - r
            m = mod[: count * 4 * width].view(count, 4 * width)
            a = expanded[: count * width].view(count, width)
            torch.addmm(b, u[rows], w.t(), out=m)
            torch.addmm(eb, attn[rows], ew.t(), out=a)
            offset = (r * pixels * p + first) * q.element_size()
            kernel(
                (count, js.stop - js.start, p, pixels * p),
                native.DTYPE_CODES[q.dtype],
                q.data_ptr() + offset,
                m.data_ptr(),
                norm.data_ptr(),
                eps,
                a.data_ptr(),
                fc1.shape[0],
                fc1.data_ptr(),
                fc1_b.data_ptr(),
                fc2_columns.data_ptr(),
                fc2_b.data_ptr(),
                out.data_ptr() + offset,
                isa,
                threads,
            )
    return out
