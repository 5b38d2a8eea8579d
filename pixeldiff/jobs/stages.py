"""What a sampler keeps on its way: parts of the current step, and the state between steps.

    state-000002            after two steps: x, what else the sampler carries, its generators
    step-000003-...         what is finished of the third step

A state makes everything before it superfluous. That is dropped once the state is on the disk, so
that a store holds two states and one step's parts at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from .store import PLACES, JobStore


class Generators(Protocol):
    def states(self) -> list[Tensor]:
        """Of the generators, in their order."""

    def restore(self, states: list[Tensor]) -> None:
        """Set them back to `states`."""


class Stages:
    """The progress of a sampler. Without a store nothing is kept and all parts are made.

    Args:
        store: begun, or None.
        source: whose generators the sampler draws from; set to where they were in the state found.
        device: that tensors come back to.
    """

    def __init__(
        self, store: JobStore | None, source: Generators, device: torch.device | str
    ) -> None:
        self._store, self._source, self._device = store, source, device
        self._held: dict[str, Tensor] = {}
        self.first = 0  # steps that are made already
        if store is None:
            return
        for name in reversed(store.names("state-")):
            held = store.get(name)
            if held is not None:
                self.first = int(name.removeprefix("state-"))
                self._restore(held)
                self._drop_before(self.first)
                return

    def held(self, name: str, make: Callable[[], Tensor | None]) -> Tensor | None:
        """A tensor of the state found, once; made where none was found."""
        return self._held.pop(name).to(self._device) if self.first else make()

    def part(self, step: int, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A part of a step: found, or made and kept.

        Args:
            step: 1-based. name: within the step.
        """
        if self._store is None:
            return make()
        name = f"step-{step:0{PLACES}d}-{name}"
        held = self._store.get(name)
        if held is not None and held.keys() == {"part"}:
            return held["part"].to(self._device)
        part = make()
        self._store.put(name, {"part": part})
        return part

    def made(self, step: int, steps: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the state after a step, but the last: that one's parts are the result."""
        if self._store is None or step == steps:
            return
        generators = {f"generator-{i}": s for i, s in enumerate(self._source.states())}
        self._store.put(f"state-{step:0{PLACES}d}", {**tensors, **generators})
        self._drop_before(step)

    def _restore(self, held: dict[str, Tensor]) -> None:
        count = sum(key.startswith("generator-") for key in held)
        self._source.restore([held.pop(f"generator-{i}") for i in range(count)])
        self._held = held

    def _drop_before(self, step: int) -> None:
        for kind, last in (("state-", step - 1), ("step-", step)):
            for name in self._store.names(kind):
                if int(name.removeprefix(kind)[:PLACES]) <= last:
                    self._store.drop(name)
