"""What a run on the meta device leaves: bytes by phase, and what was alive at the worst moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.offload.visits import SLOTS
from .live import Allocation
from .op_memory import OpMemory

META = torch.device("meta")
# What writing row by row takes beside a band, and for each pixel of the width: as measured of a
# PNG; a TIFF takes less.
WRITER, WRITER_WIDTH = 6_000_000, 2_200
BAND = 7_000_000  # of `images.uint8_bands`: 2^18 pixels in fp32 twice, and in 8 bits


@dataclass(frozen=True)
class Counts:
    """Bytes.

    Args:
        weights: of the network.
        phases: the most that was alive in each, weights not counted, by name.
        resident: the most that the C library's heap took for it; 0 where it was not asked.
        at_peak: what was alive at the worst moment.
        products: matrix products of different shapes, in 16 bits.
    """

    weights: int
    phases: Mapping[str, int]
    resident: int
    at_peak: tuple[Allocation, ...]
    products: frozenset[tuple] = frozenset()

    @property
    def peak(self) -> int:
        """Of all phases."""
        return max(self.phases.values())

    def table(self, least: int = 1 << 20) -> list[str]:
        """What was alive at the worst moment, largest first: bytes, tensor, line."""
        kinds = Counter((a.bytes, a.what, a.where) for a in self.at_peak if a.bytes >= least)
        return [
            f"{count * size / 1e6:9.1f} MB  {count} x {what}  {where}"
            for (size, what, where), count in sorted(
                kinds.items(), key=lambda item: -item[0][0] * item[1]
            )
        ]

    @classmethod
    def of(cls, weights: int, memory: OpMemory) -> Counts:
        found = tuple(memory.at_peak)
        products = frozenset(memory.products)
        return cls(weights, dict(memory.phases), memory.resident, found, products)

    def extended(self, next_one: Counts, times: int) -> Counts:
        """Of a run with so many more pieces, where `next_one` is of a run with one more."""
        phases = {
            name: count + times * (next_one.phases[name] - count)
            for name, count in self.phases.items()
        }
        resident = self.resident + times * (next_one.resident - self.resident)
        return Counts(self.weights, phases, resident, next_one.at_peak, next_one.products)


class Watched:
    """A network whose methods are phases of a recording.

    Args:
        phases: the name of the phase by that of the method.
    """

    def __init__(self, net: nn.Module, memory: OpMemory, phases: Mapping[str, str]) -> None:
        self._net, self._memory, self._phases = net, memory, phases

    def __getattr__(self, name: str) -> Any:
        found, phase = getattr(self._net, name), self._phases.get(name)
        if phase is None:
            return found

        def watched(*args: Any, **options: Any) -> Any:
            with self._memory.phase(phase):
                return found(*args, **options)

        return watched


def storage_bytes(net: nn.Module) -> int:
    """Of all parameters and buffers; what shares a buffer counts once."""
    tensors = [*net.parameters(), *net.buffers()]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def visiting_weights(
    net: nn.Module, blocks: Iterable[tuple[nn.Module, Callable[[str], bool] | None]]
) -> int:
    """Bytes of an offloaded network on its device: all but its blocks, and the buffers in which
    these visit it.

    Args:
        blocks: each with what tells, by name, the weights that visit apart from its others.
    """
    away, largest = 0, 0
    for block, apart in blocks:
        sizes = [0, 0]
        for name, p in block.named_parameters():
            sizes[apart is not None and apart(name)] += p.nbytes
        away, largest = away + sum(sizes), max(largest, *sizes)
    return storage_bytes(net) - away + SLOTS * largest


def converted(x: Tensor, output: str, device: str) -> int:
    """What the form that the caller asked for takes beside the result (B, 3, H, W), in the same
    memory."""
    if output == "pt":
        return 0
    if output == "np":
        return 2 * x.nbytes
    return BAND + pictures(output, x.shape[0], (x.shape[2], x.shape[3]), device)


def pictures(output: str, batch: int, size: tuple[int, int], device: str) -> int:
    """Bytes of pictures in 8 bits, which lie on the host; a file that is written row by row has
    none."""
    return 4 * batch * size[0] * size[1] if device == "cpu" and output != "file" else 0
