"""Where the randomness of a sample comes from: seeds and generators of the caller's own."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class NoiseSource:
    """Standard normal draws in upstream's order: the initial state, then one per SDE step.

    Args:
        generators: one `torch.Generator` for the batch, drawn in one call of shape (B, 3, H, W) as
            upstream does, or one for each sample, so that a sample does not depend on its batch.
        device: where the noise is needed. It is drawn on the generator's own device: the same seed
            gives other numbers on CUDA than on the CPU.
    """

    def __init__(
        self, generators: torch.Generator | Sequence[torch.Generator], device: torch.device | str
    ) -> None:
        self.generators = generators
        self.device = device

    @property
    def kind(self) -> str:
        """Device type of the generators: decides the numbers a seed gives."""
        one = self.generators
        if not isinstance(one, torch.Generator):
            one = one[0]
        return one.device.type

    def states(self) -> list[Tensor]:
        """Where the generators are: set back to it, they give the same numbers again."""
        return [g.get_state() for g in self._all()]

    def restore(self, states: Sequence[Tensor]) -> None:
        """Set the generators to what `states` returned."""
        for generator, state in zip(self._all(), states, strict=True):
            generator.set_state(state)

    def _all(self) -> list[torch.Generator]:
        one = self.generators
        return [one] if isinstance(one, torch.Generator) else list(one)

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        if isinstance(self.generators, torch.Generator):
            return _draw(shape, self.generators).to(self.device)
        if len(self.generators) != shape[0]:
            raise ValueError(
                f"generator: a list must hold one generator per sample, {shape[0]}, got "
                f"{len(self.generators)}"
            )
        draws = [_draw((1, *shape[1:]), g) for g in self.generators]
        return torch.cat(draws).to(self.device)


def _draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)


def noise_source(
    seed: int | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    batch: int,
    device: torch.device,
    *,
    what: str = "image",
) -> tuple[NoiseSource, int | list[int | None] | None]:
    """The source for what a caller gave, and the seed to report.

    Args:
        seed: of a generator made here on `device`; None draws one, unless there is a generator.
        generator: one for the batch or `batch` of them; its seed is reported if it is fresh.
        what: name of one of the batch in errors.

    Raises:
        ValueError: both, a seed that is none, or another number of generators. TypeError: no
            generators.
    """
    if seed is not None and generator is not None:
        raise ValueError("seed and generator exclude each other; pass one")
    if generator is None:
        # Not from PyTorch's global generator: a host's own draws must not change.
        seed = secrets.randbelow(2**31) if seed is None else _seed(seed)
        generator = torch.Generator(device).manual_seed(seed)
        return NoiseSource(generator, device), seed
    if isinstance(generator, torch.Generator):
        return NoiseSource(generator, device), _seed_of(generator)
    if not isinstance(generator, list | tuple) or not all(
        isinstance(g, torch.Generator) for g in generator
    ):
        raise TypeError(
            f"generator must be a torch.Generator or a list of them, got {type(generator).__name__}"
        )
    if len(generator) != batch:
        raise ValueError(
            f"generator: a list must hold one generator per {what}, {batch}, got {len(generator)}"
        )
    return NoiseSource(list(generator), device), [_seed_of(g) for g in generator]


def _seed(seed: Any) -> int:
    try:
        value = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        value = -1
    if not 0 <= value < 2**64:
        raise ValueError(f"seed must be an integer in [0, 2^64), got {seed!r}")
    return value


def _seed_of(generator: torch.Generator) -> int | None:
    """The generator's seed, or None where it has been drawn from and its seed says nothing."""
    seed = generator.initial_seed()
    fresh = torch.Generator(generator.device).manual_seed(seed)
    return seed if torch.equal(generator.get_state(), fresh.get_state()) else None
