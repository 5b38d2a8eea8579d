"""What the C library keeps of memory that was freed: the resident set is more than what lives.

glibc gives back a block of 32 MB or more when it is freed. Smaller ones soon come from one growing
heap (its threshold follows the largest block freed so far), of which nothing but the end is ever
given back: tensors of a few MB leave gaps that the next ones fit in or not.

Source: malloc(3) and mallopt(3), M_MMAP_THRESHOLD.
"""

from __future__ import annotations

LARGE = 32 << 20  # DEFAULT_MMAP_THRESHOLD_MAX on 64 bits
# Heap bytes for each byte that lived in it at most, by what is run. Fitted to the measurements of
# `python -m bench memory`; they scatter by 0.2 from network to network and by 0.1 from run to run.
PID_WHOLE, PID_WHOLE_16_BITS, PID_SYNC = 1.45, 1.35, 1.4
REFERENCE = 1.6  # the ops' definitions in plain PyTorch
PID_INDEPENDENT = 1.85  # tile by tile all of a decode, the latent's branch too
PID_CHUNKS, PID_SYNC_CHUNKS = 1.4, 1.3  # equal pieces fit into each other's gaps
L2P_WHOLE, L2P_TILES = 1.4, 1.65
L2P_BANDS = 1.8  # the local decoder in pieces


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
