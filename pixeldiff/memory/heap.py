"""glibc's heap, by its rules: the bytes that are resident for blocks, which is more than lives.

A block from the threshold on is mapped, and goes back when it is freed; the threshold follows the
largest block that was so freed, up to 32 MB. All others are cut from the smallest free chunk that
holds them, or from the end of one growing heap, of which nothing but a free end is ever given
back. A tensor wants an address that is a multiple of 64 and takes 96 bytes more for it, which it
gives back at once; chunks as small as these wait in lists, and keep what was free on both sides
of them from growing together. So a freed block of some MB often cannot hold the next tensor of
its own size, and the heap grows.

Source: glibc 2.36, malloc/malloc.c: sysmalloc, _int_malloc, _int_free, _int_memalign, systrim.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable

PAGE, WORD, LEAST = 4096, 16, 32  # bytes; chunks are multiples of WORD, and no smaller than LEAST
TENSOR = 64  # alignment of PyTorch's on a CPU
TOP_PAD = 128 << 10  # DEFAULT_TOP_PAD
LARGEST_THRESHOLD = 32 << 20  # DEFAULT_MMAP_THRESHOLD_MAX on 64 bits
# What `import torch` leaves the threshold at: blocks of 1.8 MB were cut and of 2.1 MB were mapped.
THRESHOLD = 2 << 20
KEPT, KEPT_SIZE = 7, 1040  # chunks of a size, and the largest size, that a thread keeps for itself
FAST_SIZE = 128  # up to which others wait for the next large block before they grow together
LARGE_REQUEST, LARGE_FREE = 1024, 65536  # when they do; and when the end may be given back


class Heap:
    """Blocks by key. Addresses are counted from where the heap begins.

    Args:
        kept: by size, how many chunks from elsewhere the thread keeps already.
        threshold: bytes from which on a block is mapped, at first.
    """

    def __init__(self, kept: dict[int, int] | None = None, threshold: int = THRESHOLD) -> None:
        self.threshold = threshold
        self.most = 0  # resident, at the worst moment
        self._mapped = self._touched = 0
        self._top, self._end = 0, TOP_PAD
        self._blocks: dict[Hashable, tuple[int | None, int]] = {}
        self._size_at: dict[int, int] = {}  # of free chunks, by where they begin
        self._ending_at: dict[int, int] = {}  # where they begin, by where they end
        self._by_size: list[tuple[int, int]] = []
        # A chunk from elsewhere lies where nothing is beside it.
        self._kept: dict[int, list[int]] = {
            size: [-(size << 32) - (i << 16) for i in range(1, count + 1)]
            for size, count in (kept or {}).items()
        }
        self._fast: list[tuple[int, int]] = []

    @property
    def resident(self) -> int:
        return self._mapped + self._touched

    def allocate(self, key: Hashable, count: int, *, aligned: bool = True) -> None:
        """A block of so many bytes.

        Args:
            aligned: as tensors are.
        """
        size = max(LEAST, _up(count + 8, WORD))
        if not aligned and self._kept.get(size):
            self._blocks[key] = self._kept[size].pop(), size
            return
        wanted = size + TENSOR + LEAST if aligned else size
        at, got = self._chunk(wanted)
        if at is None:
            self._blocks[key] = None, _up(wanted + 8, PAGE)
            self._mapped += _up(wanted + 8, PAGE)
        else:
            if aligned:
                before = -(at + WORD) % TENSOR
                before += TENSOR if 0 < before < LEAST else 0
                if before:
                    self._free(at, before)
                    at, got = at + before, got - before
                if got - size >= LEAST:
                    self._free(at + size, got - size)
                    got = size
            self._blocks[key] = at, got
        self.most = max(self.most, self.resident)

    def release(self, key: Hashable) -> None:
        at, size = self._blocks.pop(key)
        if at is not None:
            self._free(at, size)
            return
        self._mapped -= size
        if size <= LARGEST_THRESHOLD:
            self.threshold = max(self.threshold, size)

    def _chunk(self, size: int) -> tuple[int | None, int]:
        """Where a chunk is and how large, or None: it is to be mapped."""
        if size >= LARGE_REQUEST:
            self._consolidate()
        i = bisect_left(self._by_size, (size,))
        if i < len(self._by_size):
            found, at = self._by_size[i]
            self._take(at)
            if found - size < LEAST:
                return at, found
            self._put(at + size, found - size)
            return at, size
        if self._end - self._top < size + LEAST:
            if size >= self.threshold:
                return None, 0
            self._end += _up(size + TOP_PAD + LEAST - (self._end - self._top), PAGE)
        at, self._top = self._top, self._top + size
        self._touched = max(self._touched, self._top)
        return at, size

    def _free(self, at: int, size: int) -> None:
        if size <= KEPT_SIZE:
            kept = self._kept.setdefault(size, [])
            if len(kept) < KEPT:
                kept.append(at)
                return
        if size <= FAST_SIZE:
            self._fast.append((at, size))
            return
        if self._grown(at, size) < LARGE_FREE:
            return
        self._consolidate()
        spare = self._end - self._top
        if spare >= 2 * self.threshold:
            self._end -= (spare - LEAST - 1 - TOP_PAD) // PAGE * PAGE
            self._touched = min(self._touched, self._end)

    def _consolidate(self) -> None:
        fast, self._fast = self._fast, []
        for at, size in fast:
            self._grown(at, size)

    def _grown(self, at: int, size: int) -> int:
        """The size of a chunk together with what is free beside it, made free."""
        if at in self._ending_at:
            before = self._ending_at[at]
            size, at = size + self._take(before), before
        if at + size in self._size_at:
            size += self._take(at + size)
        if at + size == self._top:
            self._top = at
            return self._end - at
        self._put(at, size)
        return size

    def _put(self, at: int, size: int) -> None:
        self._size_at[at], self._ending_at[at + size] = size, at
        insort(self._by_size, (size, at))

    def _take(self, at: int) -> int:
        size = self._size_at.pop(at)
        del self._ending_at[at + size]
        del self._by_size[bisect_left(self._by_size, (size, at))]
        return size


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
