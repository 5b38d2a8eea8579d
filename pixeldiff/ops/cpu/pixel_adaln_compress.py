"""pixel_adaln_compress on the CPU; kernel in csrc/cpu/pixel_adaln_compress.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from . import pixel_adaln
from .pixel_adaln import chunk_patches, fp32, groups, planar


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
    return pixel_adaln.why_not(q, u, ada_weight, ada_bias, norm_weight, weight, bias)


def launch(
    q: Tensor,  # (R, P*P, p)
    u: Tensor,  # (R, D)
    ada_weight: Tensor,  # (6*p*P*P, D)
    ada_bias: Tensor,  # (6*p*P*P,)
    norm_weight: Tensor,  # (p,)
    weight: Tensor,  # (A, P*P*p)
    bias: Tensor,  # (A,)
    eps: float,
    *,
    isa: int | None = None,  # a code of native.ISA_CODES; None takes the best
    threads: int | None = None,  # of the kernel; None takes PyTorch's number. GEMMs use PyTorch's
) -> Tensor:
    patches, pixels, p = q.shape
    out = q.new_empty((patches, weight.shape[0]))
    if q.numel() == 0:
        return out.copy_(bias)
    kernel = native.load().pixel_adaln_compress_cpu
    isa = native.best_isa() if isa is None else isa
    threads = torch.get_num_threads() if threads is None else threads
    q, norm = q.contiguous(), fp32(norm_weight)
    # The tokens of a chunk need all its pixels, so that the groups are the inner loop and their
    # weights are copied before it.
    projections = [
        (js, planar(ada_weight, js, slice(0, 2), p), planar(ada_bias, js, slice(0, 2), p))
        for js in groups(pixels)
    ]
    chunk = chunk_patches(patches, pixels * p * q.element_size())
    z = q.new_empty((chunk, pixels * p))
    widest = projections[0][1].shape[0]
    mod = q.new_empty(chunk * widest)
    for r in range(0, patches, chunk):
        rows = slice(r, min(r + chunk, patches))
        count = rows.stop - r
        for js, w, b in projections:
            m = mod[: count * len(w)].view(count, len(w))
            torch.addmm(b, u[rows], w.t(), out=m)
            first = js.start * p
            kernel(
                (count, js.stop - js.start, p, pixels * p),
                native.DTYPE_CODES[q.dtype],
                q[r].data_ptr() + first * q.element_size(),
                m.data_ptr(),
                norm.data_ptr(),
                eps,
                z.data_ptr() + first * q.element_size(),
                isa,
                threads,
            )
        torch.addmm(bias, z[:count], weight.t(), out=out[rows])
    return out
