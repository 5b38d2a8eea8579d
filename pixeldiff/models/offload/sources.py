"""Where a weight that is not on the device is read from: its file, or host memory."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

PIECE = 4 << 20  # bytes read at a time


class Source(Protocol):
    """The values of one weight."""

    def write(self, out: Tensor) -> None:
        """Into a contiguous tensor of the weight's shape on the CPU, in its dtype.

        Raises:
            OSError: the file cannot be read, or has become shorter.
        """


@dataclass(frozen=True)
class InMemory:
    tensor: Tensor

    def write(self, out: Tensor) -> None:
        out.copy_(self.tensor)


@dataclass(frozen=True)
class InFile:
    """Read anew each time, by file operations: nothing of it stays mapped into the process.

    Args:
        path: of the file, which is kept open: deleting or replacing it does no harm.
        offset: of the first byte.
        stored: dtype in the file; converted piece by piece.
    """

    path: Path
    offset: int
    stored: torch.dtype
    file: BinaryIO = field(repr=False)

    def write(self, out: Tensor) -> None:
        flat, at = out.view(-1), self.offset
        piece = PIECE // self.stored.itemsize
        straight = out.dtype == self.stored
        values = flat if straight else torch.empty(min(piece, flat.numel()), dtype=self.stored)
        for first in range(0, flat.numel(), piece):
            part = flat[first : first + piece]
            into = part if straight else values[: part.numel()]
            self._read(into, at)
            if not straight:
                part.copy_(into)
            at += into.nbytes

    def holds(self, tensor: Tensor) -> bool:
        """Whether the file has these very bytes."""
        flat, at = tensor.view(-1), self.offset
        values = torch.empty(min(PIECE // self.stored.itemsize, flat.numel()), dtype=self.stored)
        for part in flat.split(max(1, values.numel())):
            into = values[: part.numel()]
            try:
                self._read(into, at)
            except OSError:
                return False
            if not torch.equal(into.view(torch.uint8), part.view(torch.uint8)):
                return False
            at += into.nbytes
        return True

    def _read(self, into: Tensor, at: int) -> None:
        view = memoryview(into.view(torch.uint8).numpy())
        while view:
            count = os.preadv(self.file.fileno(), [view], at)
            if not count:
                raise OSError(
                    f"{self.path} has become shorter while a network reads its weights from it; "
                    f"restore it and load the network again"
                )
            view, at = view[count:], at + count


class MappedFiles:
    """The files that were mapped into the process when this was made. Knows them on Linux only."""

    def __init__(self) -> None:
        self._spans: list[tuple[int, int, int, Path]] = []  # start, end, offset in the file
        self._opened: dict[Path, BinaryIO] = {}
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/maps").read_text().splitlines():
                self._add(line)

    def _add(self, line: str) -> None:
        span, _, offset, _, inode, *name = line.split(maxsplit=5)
        if inode != "0" and name and not name[0].endswith(" (deleted)"):
            start, end = (int(address, 16) for address in span.split("-"))
            self._spans.append((start, end, int(offset, 16), Path(name[0])))

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is a view of one of them."""
        return self._at(tensor) is not None

    def source_of(self, tensor: Tensor) -> Source:
        """Where the values of a tensor can be read again: in the file that it is a view of, if that
        still says the same, else in memory."""
        tensor = tensor.detach()
        if (found := self._at(tensor)) is None:
            return InMemory(tensor)
        path, offset = found
        try:
            if path not in self._opened:
                self._opened[path] = path.open("rb", buffering=0)
        except OSError:
            return InMemory(tensor)
        source = InFile(path, offset, tensor.dtype, self._opened[path])
        # A private view may have been written to; those values are in no file.
        return source if source.holds(tensor) else InMemory(tensor.clone())

    def _at(self, tensor: Tensor) -> tuple[Path, int] | None:
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
            return None
        first = tensor.data_ptr()
        for start, end, offset, path in self._spans:
            if start <= first and first + tensor.nbytes <= end:
                return path, offset + first - start
        return None
