"""Whether the state of an image stays finite, told step by step without waiting for the device.

After each network call the state's least and largest value are taken where it lies (NaN wins
both), one read of it: 50 MB at 2048 x 2048, which are 17 us on 3 TB/s beside a step of 77 ms, and
two numbers come back. A CPU has them at once. From a CUDA device they are copied behind the work
that is queued; a later step looks whether they have arrived, and only the end waits for them, as
it waits for the image. The check lies between the replays of CUDA graphs and is part of none.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ...errors import NonFiniteError
from ...finite import ends
from .inspection import Inspection

R = TypeVar("R")


@dataclass(frozen=True)
class Place:
    """Where in a run something is: before its first network call (step 0), or in one."""

    step: int = 0  # 1-based
    steps: int = 0
    t: float = 0.0
    tile: tuple[int, int] | None = None  # 1-based first of those in the call, and of how many

    def __str__(self) -> str:
        where = "before the first step"
        if self.step:
            where = f"in step {self.step} of {self.steps} (t = {self.t:.4g})"
        if self.tile is not None:
            where += f", tile {self.tile[0]} of {self.tile[1]}"
        return where


@dataclass(frozen=True)
class _Reading:
    """Least and largest value of a state, on their way to the host."""

    place: Place
    size: tuple[int, int]
    ends: Tensor  # (2,)
    arrived: torch.cuda.Event | None  # None: reading `ends` waits for them

    @property
    def ready(self) -> bool:
        if self.arrived is None:
            return self.ends.device.type == "cpu"
        return self.arrived.query()

    def values(self) -> tuple[float, float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return tuple(self.ends.tolist())


class Watch(contextlib.AbstractContextManager):
    """Around the making of an image, in the thread that makes it.

        with Watch(net, "bf16") as watch:
            watch.begin(1, 4, 0.999)
            x = ...
            watch.made(x)

    Args:
        net: whose modules are named.
        precision: of its weights, for the message.
        debug: check what every operation of this thread makes, and name the first that makes NaN or
            infinity. The network is not touched, other threads may use it meanwhile; each
            operation is waited for, and its result is read once more.

    Raises, at the latest where the block ends:
        NonFiniteError: NaN or infinity; says in which step, and in debug which module made it.
    """

    def __init__(self, net: nn.Module, precision: str, *, debug: bool = False) -> None:
        if not isinstance(debug, bool):
            raise TypeError(f"debug must be True or False, got {debug!r}")
        self.precision = precision
        self.place = Place()
        self._pending: deque[_Reading] = deque()
        self._inspection = Inspection(net, precision, lambda: self.place) if debug else None

    def __enter__(self) -> Watch:
        if self._inspection is not None:
            self._inspection.__enter__()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._inspection is not None:
            self._inspection.__exit__(kind, error, trace)
        if kind is None:
            self.settle()

    def settle(self) -> None:
        """Waits for all that was made; raises as the end of the block does."""
        while self._pending:
            self._read(self._pending.popleft())

    def begin(self, step: int, steps: int, t: float) -> None:
        """Before a network call, or the calls of all tiles, at t."""
        self.place = Place(step, steps, t, self.place.tile)

    def at_tile(self, tile: int, tiles: int) -> None:
        """Before the work on a tile, 1-based; of several together, on the first of them."""
        p = self.place
        self.place = Place(p.step, p.steps, p.t, (tile, tiles))

    def blended(self) -> None:
        """The tiles are one image again."""
        p = self.place
        self.place = Place(p.step, p.steps, p.t)

    def made(self, x: Tensor) -> None:
        """The state (B, C, H, W) after the step."""
        with self.outside():
            if x.numel() == 0 or x.device.type == "meta":
                return
            reading = self._reading(x)
        self._pending.append(reading)
        while self._pending and self._pending[0].ready:
            self._read(self._pending.popleft())

    def _reading(self, x: Tensor) -> _Reading:
        values, arrived = ends(x), None
        if x.device.type == "cuda":
            host = torch.empty(2, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            arrived = torch.cuda.current_stream(x.device).record_event()
        return _Reading(self.place, tuple(x.shape[-2:]), values, arrived)

    def _read(self, reading: _Reading) -> None:
        low, high = reading.values()
        if math.isfinite(low) and math.isfinite(high):
            return
        what = "NaN" if math.isnan(low) or math.isnan(high) else "infinity"
        height, width = reading.size
        ways = ["embeddings of the network's own text encoder", 'backend("reference")']
        if self.precision != "fp32":
            ways.insert(0, 'precision="fp32"')
        more = ""
        if self._inspection is None:
            more = "; run it again with debug=True (--debug) to learn which layer made it"
        raise NonFiniteError(
            f"the network returned {what} at {height} x {width} in {self.precision}, first "
            f"{reading.place}{more}; try {', '.join(ways)}",
            step=reading.place.step,
        )

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Around what is not the network's: not inspected."""
        if self._inspection is None:
            yield
            return
        with self._inspection.paused():
            yield

    def around(self, callback: Callable[..., R] | None) -> Callable[..., R] | None:
        """The callback, not inspected."""
        if callback is None or self._inspection is None:
            return callback

        @functools.wraps(callback)
        def called(*args, **kwargs):
            with self.outside():
                return callback(*args, **kwargs)

        return called
