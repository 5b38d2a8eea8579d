"""What is resident in a process for the tensors that it makes: its heap, small objects and all.

Around a tensor's memory PyTorch allocates objects of a few dozen bytes: the tensor's, its
storage's, those of views of it. Where these come to lie decides what of the heap grows together
again (heap.py), and differs from run to run of the same program. So several processes are
simulated, each with luck of its own, and the median counts.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Hashable

from .heap import KEPT, KEPT_SIZE, LEAST, WORD, Heap

PROCESSES = 3
STORAGE, TENSOR, SIZES = 96, 176, (24, 32, 40)  # bytes of PyTorch's objects; sizes and strides
FOR_A_WHILE = (32, 312)  # of a call
MORE = 2  # at most so many others live as long as a tensor: views of it


class Blocks:
    """What was allocated and released, in order: a `Heap` is asked later."""

    def __init__(self) -> None:
        self._events: list[tuple[Hashable, int | None]] = []

    def allocate(self, key: Hashable, count: int) -> None:
        self._events.append((key, count))

    def release(self, key: Hashable) -> None:
        self._events.append((key, None))

    @property
    def resident(self) -> int:
        """Bytes at the worst moment, of the median of several processes."""
        return int(statistics.median(self._simulated(luck) for luck in range(PROCESSES)))

    def _simulated(self, luck: int) -> int:
        draw = random.Random(luck)
        sizes = range(LEAST, KEPT_SIZE + 1, WORD)
        heap = Heap({size: draw.randint(0, KEPT) for size in sizes})
        others: dict[Hashable, list[tuple[Hashable, int]]] = {}
        for key, count in self._events:
            if count is None:
                heap.release(key)
                for other in others.pop(key):
                    heap.release(other)
                continue
            sizes = [STORAGE, TENSOR, SIZES[0]]
            for _ in range(draw.randint(0, MORE)):
                sizes += TENSOR, draw.choice(SIZES)
            others[key] = [(key, i) for i in range(len(sizes))]
            for size in FOR_A_WHILE:
                heap.allocate(size, size, aligned=False)
            heap.allocate(others[key][0], sizes[0], aligned=False)
            heap.allocate(key, count)
            for other, size in zip(others[key][1:], sizes[1:], strict=True):
                heap.allocate(other, size, aligned=False)
            for size in FOR_A_WHILE:
                heap.release(size)
        return heap.most
