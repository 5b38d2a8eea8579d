"""Live tensor memory without a device: what a run allocates, counted on the meta device.

Shapes alone decide: a network of released size at 4096 x 4096 takes seconds on any machine. What a
fused op allocates inside itself for a moment (workspaces) does not show, nor does fragmentation.
"""

from __future__ import annotations

import linecache
import sys
import weakref
from collections import Counter
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Allocation:
    """A storage: its bytes, and the tensor and the line of code that it was made for."""

    bytes: int
    what: str
    where: str


class LiveMemory(TorchDispatchMode):
    """Counts storages that were allocated inside the block and are still alive.

        with LiveMemory() as memory:
            net.step(x, t, condition)
        print(memory.peak, memory.table())

    What was there before does not count: weights, and inputs made outside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.at_peak: list[Allocation] = []
        self._live: dict[int, Allocation] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {_storage(t)._cdata for t in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        for t in _tensors(result):
            storage = _storage(t)
            key = storage._cdata
            if key not in given and key not in self._live and storage.nbytes():
                self._add(key, storage, f"{func} {_kind(t)}")
        return result

    def table(self, least: int = 1 << 20) -> str:
        """What was alive at the peak, largest first."""
        counts = Counter((a.bytes, a.what, a.where) for a in self.at_peak if a.bytes >= least)
        rows = [
            f"{count * size / 1e6:9.1f} MB  {count} x {what}  {where}"
            for (size, what, where), count in sorted(
                counts.items(), key=lambda item: -item[0][0] * item[1]
            )
        ]
        return "\n".join([f"{self.peak / 1e6:9.1f} MB  in all", *rows])

    def _add(self, key: int, storage: torch.UntypedStorage, what: str) -> None:
        entry = Allocation(storage.nbytes(), what, _caller())
        self._live[key] = entry
        self.now += entry.bytes
        weakref.finalize(storage, self._remove, key, entry)
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, list(self._live.values())

    def _remove(self, key: int, entry: Allocation) -> None:
        if self._live.get(key) is entry:
            del self._live[key]
            self.now -= entry.bytes


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(t: torch.Tensor) -> torch.UntypedStorage:
    return t.untyped_storage()


def _kind(t: torch.Tensor) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"


def _caller() -> str:
    """The line of the package that the allocation belongs to."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "pixeldiff" in name and "/ops/" not in name:
            line = linecache.getline(name, frame.f_lineno).strip()
            return f"{name.rpartition('/')[2]}:{frame.f_lineno}  {line[:60]}"
        frame = frame.f_back
    return ""
