"""Weights that golden files describe by a seed instead of holding them: the same on any machine."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BASIS, _PRIME = 0xCBF29CE484222325, 0x100000001B3
_CHUNK = 1 << 22


def generated(seed: str, key: str, shape: list[int], offset: float, scale: float) -> Tensor:
    """fp32 values uniform in offset +- scale: element i is splitmix64 of a hash of seed and key."""
    state = fnv1a(f"{seed}:{key}")
    count = int(np.prod(shape, dtype=np.int64))
    out = np.empty(count, dtype=np.float32)
    for first in range(0, count, _CHUNK):
        index = np.arange(first + 1, min(first + _CHUNK, count) + 1, dtype=np.uint64)
        z = index * np.uint64(_GOLDEN) + np.uint64(state)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_FIRST)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_SECOND)
        z ^= z >> np.uint64(31)
        unit = (z >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)
        out[first : first + len(index)] = unit * np.float32(scale) + np.float32(offset)
    return torch.from_numpy(out).reshape(shape)


def fnv1a(text: str) -> int:
    """FNV-1a, 64 bits, of the UTF-8 bytes."""
    value = _BASIS
    for byte in text.encode():
        value = (value ^ byte) * _PRIME % 2**64
    return value
