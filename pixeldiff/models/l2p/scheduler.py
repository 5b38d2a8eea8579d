"""The flow-matching schedule of L2P: noise levels, and the times the network is told.

Source: L2P (arXiv 2605.12013) and its releases; the shift is that of SD3 (arXiv 2403.03206).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..steps import one_of

SHIFT = 3.0  # of every released network, in training and sampling
TIMESTEPS = 1000.0
TIME_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STRENGTH_RULES = ("rescale", "skip")


@dataclass(frozen=True)
class Schedule:
    """Noise levels of n steps and the times that go with them.

    Args:
        sigmas: n + 1 decreasing noise levels, 1 pure noise, each an fp32 value; the last is 0.
        times: t of the n network calls, 0 pure noise and 1 clean.
    """

    sigmas: tuple[float, ...]
    times: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.times)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """1000 sigma of the n network calls, in fp32: what diffusers calls timesteps."""
        return tuple((_fp32(self.sigmas[:-1]) * TIMESTEPS).tolist())


def schedule(
    steps: int,
    *,
    shift: float = SHIFT,
    strength: float = 1.0,
    strength_rule: str = "rescale",
    time_dtype: str = "fp32",
) -> Schedule:
    """The schedule of `steps` Euler steps.

        l_i = strength (1 - i / steps);  sigma_i = shift l_i / (1 + (shift - 1) l_i)

    Args:
        steps: any number >= 1.
        shift: > 0; above 1 more of the steps are spent at high noise.
        strength: in (0, 1]; below 1 for an image to start from.
        strength_rule: "rescale" (L2P): all `steps` are made, from the noise level above, which for
            strength 0.6 and shift 3 is 0.818. "skip" (diffusers): the first steps of the whole
            schedule are left out, and `steps * strength` of them, rounded up, are made.
        time_dtype: "bf16" rounds the times as the released 4K, 8K and 10K programs do, off by up to
            0.004; other pixels.

    Raises:
        ValueError: an argument out of range.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}")
    if not _is_number(shift) or not 0 < shift < float("inf"):
        raise ValueError(f"shift must be a positive number, got {shift!r}")
    if not _is_number(strength) or not 0 < strength <= 1:
        raise ValueError(f"strength must be in (0, 1], got {strength!r}")
    one_of("strength_rule", strength_rule, STRENGTH_RULES)
    one_of("time_dtype", time_dtype, tuple(TIME_DTYPES))
    skipped = strength_rule == "skip"
    highest = 1.0 if skipped else strength
    levels = torch.linspace(highest, 0, steps + 1, dtype=torch.float32, device="cpu")[:-1]
    sigmas = shift * levels / (1 + (shift - 1) * levels)
    if skipped:
        sigmas = sigmas[min(int(steps - steps * strength), steps - 1) :]
    return Schedule((*sigmas.tolist(), 0.0), _times(sigmas, TIME_DTYPES[time_dtype]))


def _times(sigmas: Tensor, dtype: torch.dtype) -> tuple[float, ...]:
    t = (TIMESTEPS - (sigmas * TIMESTEPS).to(dtype)) / TIMESTEPS
    if dtype == torch.float32:
        return tuple(t.tolist())
    # The released programs also multiply by 1000 in bf16; the network does so in fp32.
    return tuple(((t * TIMESTEPS).float() / TIMESTEPS).tolist())


def _fp32(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
