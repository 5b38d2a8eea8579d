"""Blocks whose weights visit the device: the copy of the next runs while one computes."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..fp8 import Fp8Linear
from .lanes import Lane, Mark
from .layout import Layout
from .sources import MappedFiles

SLOTS = 2  # buffers on the device: one that computes, one that is being filled


@dataclass(frozen=True)
class Part:
    """Blocks that are run one after the other, and which of their weights that takes.

    Args:
        name: to ask for it by.
        blocks: the blocks.
        wanted: by parameter name within a block; together the parts take every weight of a block.
        then: name of the part that usually comes next.
    """

    name: str
    blocks: Sequence[nn.Module]
    wanted: Callable[[str], bool]
    then: str


@dataclass(eq=False)
class Piece:
    """The weights of one visit: some or all of a block's."""

    block: nn.Module  # all of its parameters are on the meta device
    layout: Layout
    kept: Any  # by the lane

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes


@dataclass(eq=False)
class Slot:
    """A buffer on the device, and blocks whose parameters are views of it."""

    buffer: Tensor
    holds: Piece | None = None
    sent: Mark = None
    uses: dict[Hashable, Mark] = field(default_factory=dict)  # since it was filled, the last ones
    _blocks: dict[tuple, nn.Module] = field(default_factory=dict)

    def block(self, piece: Piece) -> nn.Module:
        """A block with the weights of a piece that this slot holds."""
        kind = (type(piece.block), piece.layout)
        if kind not in self._blocks:
            self._blocks[kind] = _standing_in(piece, self.buffer)
        return self._blocks[kind]


class Offload:
    """Weights that are not on the device, and the few buffers there that they visit in turn.

    A block that has its weights is not the network's own but one like it, which stands in for all
    blocks of its kind. One thread at a time runs blocks; others wait.

    Args:
        parts: what is run in turn.
        lane: of the device.
        dtype: what they are converted to, but for those of quantised layers.
        adjacent: see `Layout.of`.
        ready: called with each block before its weights are taken.
        slots: buffers; 2 copy the next block while one computes.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        lane: Lane,
        *,
        dtype: torch.dtype,
        adjacent: bool,
        ready: Callable[[nn.Module], None] = lambda block: None,
        slots: int = SLOTS,
    ) -> None:
        self._lane, self._count, self._dtype, self._adjacent = lane, slots, dtype, adjacent
        self._lock = threading.Lock()
        self._slots: list[Slot] = []
        self._running: tuple[nn.Module, nn.Module] | None = None
        self._pieces: dict[str, list[Piece]] = {part.name: [] for part in parts}
        files = MappedFiles()
        every = {id(b): b for part in parts for b in part.blocks}
        for block in every.values():
            ready(block)
            self._take(block, [p for p in parts if any(b is block for b in p.blocks)], files)
        self._following = self._order(parts)
        self.slot_bytes = max(piece.nbytes for pieces in self._pieces.values() for piece in pieces)

    @property
    def device_bytes(self) -> int:
        """Of the buffers on the device."""
        return self._count * self.slot_bytes

    @property
    def host_bytes(self) -> int:
        """Of all weights that visit."""
        return sum(piece.nbytes for pieces in self._pieces.values() for piece in pieces)

    @contextlib.contextmanager
    def visit(self, name: str) -> Iterator[Iterator[nn.Module]]:
        """The blocks of a part, one after the other, each with its weights until the next is asked
        for. An error inside frees the buffers."""
        with self._lock:
            self._lane.check()
            blocks = self._run(self._pieces[name])
            try:
                yield blocks
                blocks.close()
            except BaseException:
                with contextlib.suppress(Exception):  # that one matters, not what follows from it
                    blocks.close()
                self._drop()
                raise

    def weights(self) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
        """The network's own blocks, and the weights of each by name, in the dtype they are run in.
        A block comes as often as parts share it; its weights lie in a buffer until the next."""
        for name, pieces in self._pieces.items():
            with self.visit(name) as blocks:
                for piece, block in zip(pieces, blocks, strict=True):
                    held = block.state_dict()
                    yield piece.block, {e.name: held[e.name] for e in piece.layout.entries}

    def as_running(self, net: nn.Module) -> dict[str, nn.Module]:
        """The network's modules by name; those of the block that is being run, as they are run."""
        modules, running = dict(net.named_modules()), self._running  # others may end theirs
        if running is not None:
            own, block = running
            name = next(name for name, module in modules.items() if module is own)
            modules |= {f"{name}.{part}".rstrip("."): m for part, m in block.named_modules()}
        return modules

    def release(self) -> None:
        """Free the buffers on the device until the next run. Waits for one that is running."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        self._lane.stop()
        self._slots = []

    def _run(self, pieces: Sequence[Piece]) -> Iterator[nn.Module]:
        for piece in pieces:
            slot = self._filled(piece, keep=())
            self._send_ahead(slot)
            self._lane.wait(slot.sent, slot.buffer)
            block = slot.block(piece)
            self._running = (piece.block, block)
            try:
                yield block
            finally:
                self._running = None
                order, mark = self._lane.mark()
                slot.uses[order] = mark

    def _send_ahead(self, current: Slot) -> None:
        keep, piece = [current], current.holds
        while len(keep) < self._count:
            piece = self._following[piece]
            slot = self._filled(piece, keep)
            if slot in keep:
                return
            keep.append(slot)

    def _filled(self, piece: Piece, keep: Sequence[Slot]) -> Slot:
        """A slot that holds the piece, or will; not one of those to keep, unless it does already.

        Of the others the one filled longest ago is written over.
        """
        for slot in self._slots:
            if slot.holds is piece:
                return slot
        if len(self._slots) < self._count:
            slot = Slot(self._lane.buffer(self.slot_bytes))
        else:
            slot = next(s for s in self._slots if s not in keep)
            self._slots.remove(slot)
        self._slots.append(slot)
        slot.sent = self._lane.send(piece.kept, slot.buffer[: piece.nbytes], slot.uses.values())
        slot.holds, slot.uses = piece, {}
        return slot

    def _take(self, block: nn.Module, parts: Sequence[Part], files: MappedFiles) -> None:
        away = {}
        for name, p in block.named_parameters():
            path = name.rpartition(".")[0]
            quantised = isinstance(block.get_submodule(path), Fp8Linear)
            dtype = p.dtype if quantised else self._dtype
            away[name] = torch.empty(p.shape, dtype=dtype, device="meta")
        for part in parts:
            own = {name: t for name, t in away.items() if part.wanted(name)}
            layout = Layout.of(own, adjacent=self._adjacent)
            sources = [files.source_of(block.get_parameter(e.name)) for e in layout.entries]
            piece = Piece(block, layout, self._lane.keep(layout, sources))
            self._pieces[part.name].append(piece)
        for name, t in away.items():
            _set(block, name, t)

    def _order(self, parts: Sequence[Part]) -> Mapping[Piece, Piece]:
        then = {part.name: part.then for part in parts}

        def first(name: str) -> Piece:
            while not self._pieces[name]:
                name = then[name]
            return self._pieces[name][0]

        following = {}
        for name, pieces in self._pieces.items():
            if pieces:
                following |= zip(pieces, [*pieces[1:], first(then[name])], strict=True)
        return following


def visiting(
    offload: Offload | None, name: str, blocks: Sequence[nn.Module]
) -> contextlib.AbstractContextManager[Iterator[nn.Module] | Sequence[nn.Module]]:
    """The blocks of a part with their weights: the network's own where those are on the device."""
    return contextlib.nullcontext(blocks) if offload is None else offload.visit(name)


def _standing_in(piece: Piece, buffer: Tensor) -> nn.Module:
    with torch.inference_mode(False):  # to serve in any mode
        block = copy.deepcopy(piece.block)
        for entry, view in zip(piece.layout.entries, piece.layout.views(buffer), strict=True):
            _set(block, entry.name, view)
    return block


def _set(block: nn.Module, name: str, value: Tensor) -> None:
    path, _, own = name.rpartition(".")
    setattr(block.get_submodule(path), own, nn.Parameter(value, requires_grad=False))
