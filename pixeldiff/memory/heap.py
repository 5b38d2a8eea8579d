"""What the C library keeps of memory that was freed: the resident set is more than what lives.

glibc gives back a block of 32 MB or more when it is freed. Smaller ones soon come from one growing
heap (its threshold follows the largest block freed so far), of which nothing but the end is ever
given back: tensors of a few MB leave gaps that the next ones fit in or not.

Source: malloc(3) and mallopt(3), M_MMAP_THRESHOLD.
"""

from __future__ import annotations

LARGE = 32 << 20  # DEFAULT_MMAP_THRESHOLD_MAX on 64 bits
# Heap bytes for each byte that lived in it at most. Measured (`python -m bench memory`): 1.0 to 1.7
# over networks and sizes, and it differs from run to run.
GAPS = 1.5


class Heap:
    """Blocks by key, and the bytes that are resident for them."""

    def __init__(self) -> None:
        self.large = self.small = self.most = 0
        self._sizes: dict[object, int] = {}

    @property
    def resident(self) -> int:
        return self.large + int(GAPS * self.most)

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
