"""What the C library keeps of memory that was freed: the resident set is more than what lives.

glibc gives back a block of 32 MB or more when it is freed. Smaller ones soon come from one growing
heap (its threshold follows the largest block freed so far), of which nothing but the end is ever
given back: tensors of a few MB leave gaps that the next ones fit in or not.

A process that fixes the threshold has every freed tensor given back, and what is resident is what
lives: `return_freed_memory`.

Source: malloc(3) and mallopt(3), M_MMAP_THRESHOLD.
"""

from __future__ import annotations

import ctypes
import os

_M_MMAP_THRESHOLD = -3  # of mallopt
MAPPED = 128 << 10  # bytes from which a block is mapped, and given back when it is freed
_MAPPED_AT_MOST = 1 << 20  # tensors below are not what memory goes to
_fixed = _allowed = False  # of this process
ROOMY = 1.25  # of what a heap that keeps it is estimated to take: these estimates scatter

LARGE = 32 << 20  # DEFAULT_MMAP_THRESHOLD_MAX on 64 bits
# Heap bytes for each byte that lived in it at most, by what is run. Fitted to the measurements of
# `python -m bench memory --kept`; they scatter by 0.2 from network to network and by 0.1 from run
# to run.
PID_WHOLE, PID_WHOLE_16_BITS, PID_SYNC = 1.42, 1.27, 1.38
REFERENCE = 1.5  # the ops' definitions in plain PyTorch
PID_INDEPENDENT = 1.8  # tile by tile all of a decode, the latent's branch too
PID_CHUNKS = 1.3  # equal pieces fit into each other's gaps
L2P_WHOLE, L2P_WHOLE_16_BITS, L2P_TILES = 1.45, 1.22, 1.45
L2P_BANDS = 1.8  # the local decoder in pieces


def return_freed_memory() -> bool:
    """Have the C library give freed tensors back to the system at once, in all of this process.

    Decodes and images on a CPU then have less resident, which `estimate_memory` and `memory=` take
    into account; how much less, and what fresh pages cost in time, is in docs/memory.md. For a
    process that is yours, before it loads a network; nothing in this package calls it but the
    command line, under a `--memory` that is tight. Pixels stay the same.

    Returns:
        Whether it holds: glibc alone knows it.
    """
    global _fixed
    mallopt = _mallopt()
    _fixed = _fixed or (mallopt is not None and mallopt(_M_MMAP_THRESHOLD, MAPPED) == 1)
    return _fixed


def allow_returning() -> None:
    """Let a budget decide: `return_freed_memory` where a decode or an image under `memory=` would
    not have a quarter more than it needs otherwise."""
    global _allowed
    _allowed = True


def return_if_tight(peak: int, budget: int) -> None:
    """Where it was allowed, and an estimate of `peak` bytes leaves little of a budget."""
    if _allowed and not _fixed and ROOMY * peak > budget:
        return_freed_memory()


def returns_freed_memory() -> bool:
    """Whether this process gives freed tensors back at once: by `return_freed_memory`, or by the
    environment's MALLOC_MMAP_THRESHOLD_, of at most a MiB, that it was started with."""
    if _fixed:
        return True
    told = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
    return told.isdecimal() and int(told) <= _MAPPED_AT_MOST and _mallopt() is not None


def _mallopt():
    """glibc's, or None."""
    if os.name != "posix":
        return None
    library = ctypes.CDLL(None)
    return library.mallopt if hasattr(library, "gnu_get_libc_version") else None


class Heap:
    """Blocks by key, and the bytes that are resident for them.

    Args:
        gaps: heap bytes for each byte that lived in it at most.
    """

    def __init__(self, gaps: float) -> None:
        self.gaps = gaps
        self.large = self.small = self.most = 0
        self._sizes: dict[object, int] = {}

    @property
    def resident(self) -> int:
        return self.large + int(self.gaps * self.most)

    def allocate(self, key: object, count: int) -> None:
        self._sizes[key] = count
        if count >= LARGE:
            self.large += count
        else:
            self.small += count
            self.most = max(self.most, self.small)

    def release(self, key: object) -> None:
        count = self._sizes.pop(key)
        if count >= LARGE:
            self.large -= count
        else:
            self.small -= count
