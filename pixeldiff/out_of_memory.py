"""Recognising that memory ran out, whoever ran out of it."""

from __future__ import annotations

import torch

# PyTorch's CPU allocator raises a plain RuntimeError: the first text is of POSIX, the second of
# Windows. The third is of CUDA libraries and MPS.
_TEXTS = ("can't allocate memory", "not enough memory", "out of memory")


def is_out_of_memory(e: BaseException) -> bool:
    """Whether an error says that an allocation failed."""
    if isinstance(e, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(e, RuntimeError) and any(text in str(e).lower() for text in _TEXTS)
