"""What the CPU backends of the two pixel_adaln ops share: modulation, a bounded piece at a time.

A plain GEMM makes the modulation of a group of pixels for a chunk of patches in a reused buffer,
and one C++ pass uses it up while it is in the cache. The GEMM's weight rows are first copied into
an order that leaves a plane of pixels for every channel, so that no vector lane of the pass needs
another's. Every row is copied once a call: 1/R of the GEMM's multiplications, in loads and stores.

The sizes decide speed only: every patch and pixel is computed by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native

GROUP = 16  # pixels of a patch at a time: one AVX-512 vector, a GEMM of 16 * 4p columns
CHUNK_BYTES = 4 << 20  # of modulation and what accompanies it: well inside the last-level cache


def why_not(*tensors: Tensor) -> str | None:
    """The first of `tensors` is q; GEMMs want the others in its dtype."""
    q = tensors[0]
    reason = native.why_not() or native.why_not_tensors("cpu", q[..., :1])
    if reason is not None:
        return reason
    for t in tensors[1:]:
        if t.device != q.device or t.dtype != q.dtype:
            return f"needs every tensor in {q.dtype} on the CPU, got {t.dtype} on {t.device}"
    return why_not_channels(q.shape[2])


def why_not_channels(p: int) -> str | None:
    if p % 4 or not 4 <= p <= 64:
        return f"takes p of 4 to 64 channels, a multiple of 4, got {p}"
    return None


def chunk_patches(patches: int, bytes_per_patch: int) -> int:
    """Patches in a chunk: as many as CHUNK_BYTES hold, all chunks of about the same size."""
    most = max(1, CHUNK_BYTES // bytes_per_patch)
    chunks = -(-patches // most)
    return -(-patches // chunks)


def planar(rows: Tensor, pixels: slice, chunks: slice, p: int) -> Tensor:
    """Rows (or biases) of a projection for some pixels and chunks, copied in the order (chunk,
    channel, pixel)."""
    picked = rows.unflatten(0, (-1, 6, p))[pixels, chunks]
    return picked.movedim(0, 2).flatten(0, 2)


def groups(pixels: int) -> list[slice]:
    return [slice(j, min(j + GROUP, pixels)) for j in range(0, pixels, GROUP)]


def fp32(t: Tensor) -> Tensor:
    return t.to(torch.float32).contiguous()
