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
LITTLE = 1.02  # of what lived: where no more is resident, luck does not matter
_RELEASED = -1


class Blocks:
    """What was allocated and released, in order: a `Heap` is asked later."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, tuple[int, int]] = {}
        self._next = self._living = self._most = 0
        # A block's number and its bytes, by turns: the garbage collector has nothing to follow.
        self._events: list[int] = []

    def allocate(self, key: Hashable, count: int) -> None:
        self._numbers[key] = self._next, count
        self._events += self._next, count
        self._next += 1
        self._living += count
        self._most = max(self._most, self._living)

    def release(self, key: Hashable) -> None:
        number, count = self._numbers.pop(key)
        self._events += number, _RELEASED
        self._living -= count

    @property
    def resident(self) -> int:
        """Bytes at the worst moment, of the median of several processes."""
        found = [self._simulated(0)]
        if found[0] > LITTLE * self._most:
            found += [self._simulated(luck) for luck in range(1, PROCESSES)]
        return statistics.median_low(found)

    def _simulated(self, luck: int) -> int:
        draw = random.Random(luck)
        heap = Heap({n: draw.randint(0, KEPT) for n in range(LEAST, KEPT_SIZE + 1, WORD)})
        others: dict[int, range] = {}
        small = -1  # numbers of small objects, downwards
        for number, count in zip(self._events[::2], self._events[1::2], strict=True):
            if count == _RELEASED:
                heap.release(number)
                for other in others.pop(number):
                    heap.release(other)
                continue
            sizes = [TENSOR, SIZES[0]]
            for _ in range(draw.randint(0, MORE)):
                sizes += TENSOR, draw.choice(SIZES)
            first, small = small, small - 1 - len(sizes)
            others[number] = range(first, small, -1)
            for size in FOR_A_WHILE:
                heap.allocate(("call", size), size, aligned=False)
            heap.allocate(first, STORAGE, aligned=False)
            heap.allocate(number, count)
            for other, size in zip(others[number][1:], sizes, strict=True):
                heap.allocate(other, size, aligned=False)
            for size in FOR_A_WHILE:
                heap.release(("call", size))
        return heap.most
