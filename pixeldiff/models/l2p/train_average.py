"""A running average of the weights that learn, which is less noisy than they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class RunningAverage:
    """fp32 averages of weights, by name: average <- d average + (1 - d) weights after each step.

    The weight d of the past grows to `decay`, min(decay, (n + 1) / (n + 10)) in step n + 1, so that
    the first steps are soon forgotten.

    Args:
        weights: fp32, as before the first step.
        decay: in (0, 1).
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.values = {name: w.detach().clone() for name, w in weights.items()}
        self.decay = decay

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Take in the weights after `step` steps, `step` >= 1."""
        decay = min(self.decay, step / (step + 9))
        own = [self.values[name] for name in weights]
        torch._foreach_lerp_(own, [w.detach() for w in weights.values()], 1 - decay)

    @contextlib.contextmanager
    def within(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """The parameters hold the averages, rounded to their types, until the end."""
        before = {name: p.detach().clone() for name, p in parameters.items()}
        try:
            _copy(self.values, parameters)
            yield
        finally:
            _copy(before, parameters)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    for name, p in parameters.items():
        p.copy_(values[name])
