"""Live tensor memory without a device: what a run allocates, counted on the meta device.

Shapes alone decide: a network of released size at 4096 x 4096 takes seconds on any machine. What a
fused op allocates inside itself for a moment (workspaces) does not show, nor does fragmentation.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .heap import Heap


@dataclass(frozen=True, eq=False)
class Allocation:
    """A storage: its bytes, and the tensor and the line of code that it was made for."""

    bytes: int
    what: str
    line: tuple[str, int]  # file and number

    @property
    def where(self) -> str:
        file, number = self.line
        text = linecache.getline(file, number).strip()
        return f"{file.rpartition('/')[2]}:{number}  {text[:60]}" if file else ""


class LiveMemory(TorchDispatchMode):
    """Counts storages that were allocated inside the block and are still alive.

        with LiveMemory() as memory:
            net.step(x, t, condition)
        print(memory.peak, memory.table())

    What was there before does not count: weights, and inputs made outside. With a `heap`,
    `resident` is the most that its allocator had resident for them.
    """

    def __init__(self, heap: Heap | None = None) -> None:
        super().__init__()
        self.heap = heap
        self.now = self.peak = self.resident = 0
        self.at_peak: list[Allocation] = []
        self.phases: dict[str, int] = {}
        self._phase: str | None = None
        self._live: dict[int, Allocation] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, peaks count for `phases[name]` too. Phases do not nest: the inner one counts."""
        outer, self._phase = self._phase, name
        self._top(self.now)
        try:
            yield
        finally:
            self._phase = outer

    def moment(self, count: int, what: str) -> None:
        """So many bytes beside all that is alive, for a moment: what an op takes inside itself."""
        if not count:
            return
        if self.heap is not None:
            self.heap.allocate(what, count)
        self._top(self.now + count, Allocation(count, what, _caller()))
        if self.heap is not None:
            self.heap.release(what)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = None
        for t in _tensors(result):
            storage = _storage(t)
            key = storage._cdata
            if key in self._live or not storage.nbytes():
                continue
            if given is None:
                given = {_storage(t)._cdata for t in _tensors((args, kwargs))}
            if key not in given:
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
        if self.heap is not None:
            self.heap.allocate(entry, entry.bytes)
        weakref.finalize(storage, self._remove, key, entry)
        self._top(self.now)

    def _top(self, count: int, extra: Allocation | None = None) -> None:
        if self.heap is not None:
            self.resident = max(self.resident, self.heap.resident)
        if self._phase is not None:
            self.phases[self._phase] = max(self.phases.get(self._phase, 0), count)
        if count > self.peak:
            self.peak, self.at_peak = count, [*self._live.values(), *filter(None, [extra])]

    def _remove(self, key: int, entry: Allocation) -> None:
        if self._live.get(key) is entry:
            del self._live[key]
            self.now -= entry.bytes
            if self.heap is not None:
                self.heap.release(entry)


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(t: torch.Tensor) -> torch.UntypedStorage:
    return t.untyped_storage()


def _kind(t: torch.Tensor) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"


def _caller() -> tuple[str, int]:
    """The line of the package that the allocation belongs to."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "pixeldiff" in name and "/ops/" not in name and "/memory/" not in name:
            return name, frame.f_lineno
        frame = frame.f_back
    return "", 0
