"""Weights side by side in one buffer, so that one copy takes all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes; of a device allocation, and more than any kernel asks for


@dataclass(frozen=True)
class Entry:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # bytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """Where each weight lies in a buffer of `nbytes` bytes."""

    entries: tuple[Entry, ...]
    nbytes: int

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], *, adjacent: bool) -> Layout:
        """In the order of their names' last parts, else as given.

        Args:
            adjacent: without gaps where sizes allow it, as `pack_` would lay them: weights of
                layers that read the same input then lie next to each other, and one GEMM takes
                them. False keeps them apart, as they are in memory of their own.
        """
        order = sorted(weights, key=lambda name: _KINDS.get(name.rpartition(".")[2], 0))
        entries, end = [], 0
        for name in order:
            entry = Entry(name, tuple(weights[name].shape), weights[name].dtype, end)
            entries.append(entry)
            end = _aligned(end + entry.nbytes + (0 if adjacent else 1))
        return cls(tuple(entries), end)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The weights of a buffer (nbytes or more,) uint8, as entries."""
        return [
            buffer[e.offset : e.offset + e.nbytes].view(e.dtype).view(e.shape) for e in self.entries
        ]


_KINDS = {"weight": 1, "weight_scale": 2, "bias": 3}


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
