"""Weights that multiply the same input, next to each other in one buffer: one GEMM takes them."""

from __future__ import annotations

from torch import Tensor


def follows(a: Tensor, b: Tensor) -> bool:
    """Whether b's memory begins where a's ends, in one storage, both contiguous."""
    return (
        a.is_contiguous()
        and b.is_contiguous()
        and a.dtype == b.dtype
        and a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and a.storage_offset() + a.numel() == b.storage_offset()
    )
