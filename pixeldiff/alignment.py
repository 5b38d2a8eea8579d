"""Memory that starts where PyTorch's allocator would put it."""

from __future__ import annotations

from torch import Tensor

ALIGNMENT = 64  # bytes; of PyTorch's allocators, CPU and CUDA, and of a cache line


def aligned(t: Tensor) -> Tensor:
    """`t`, copied if its data does not start on a multiple of 64 bytes.

    Matrix libraries choose their loops by the alignment of their operands, and so the order of
    summation: the same numbers at another address would give other pixels, by rounding. Weights
    stay where they are, mapped from their file: there their alignment is always the same.
    """
    if t.is_meta or t.data_ptr() % ALIGNMENT == 0:
        return t
    return t.clone()
