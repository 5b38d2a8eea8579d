"""Latents that are not clean: noised on purpose, or taken before the generator is done.

Source: PiD, arXiv 2605.23902.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import LatentError
from .backbones import Backbone, backbone
from .latent_checks import check_map, check_values


def noise_latent(
    latent: Tensor,
    sigma: float | Tensor,
    backbone_name: str,
    generator: torch.Generator | int | Sequence[torch.Generator | int],
) -> Tensor:
    """Noise a normalised latent, so that PiD trusts it less: the `sigma` it must then be told.

        (1 - sigma) z + sigma eps                flow-matching generators
        sqrt(1 - sigma^2) z + sigma eps          sdxl (variance preserving)

    Args:
        latent: (B, Cz, zh, zw), normalised, fp32 | fp16 | bf16.
        sigma: in [0, 1], one number or (B,). PiD was trained with 0 to 0.8.
        backbone_name: a name of `BACKBONES`.
        generator: the only source of randomness. A generator (or a seed) draws once for the whole
            batch; a sequence of B of them draws per image, so an image does not depend on its
            neighbours. Drawn in fp32 on the generator's device (seeds: CPU).

    Returns:
        fp32, shape and device of `latent`. Released pipelines round it with `round_to_bfloat16`.

    Raises:
        UnknownNameError: no such backbone.
        LatentError: shape, dtype, NaN, a sigma outside [0, 1] or of another shape.
    """
    b = backbone(backbone_name)
    op = "noise_latent"
    check_values(op, latent)
    check_map(op, "a normalised latent", latent, b.channels, b)
    z = latent.float()
    s = torch.as_tensor(sigma, dtype=torch.float32, device=z.device)
    if s.dim() > 1 or (s.dim() == 1 and s.shape[0] != z.shape[0]):
        raise LatentError(
            f"{op}: sigma must be a number or (B,) = ({z.shape[0]},), got {tuple(s.shape)}"
        )
    if not bool(((s >= 0) & (s <= 1)).all()):  # also refuses NaN
        raise LatentError(f"{op}: sigma must be in [0, 1], got {sigma}")
    s = s.view(-1, 1, 1, 1)
    keep = (1 - s.square()).sqrt() if b.variance_preserving else 1 - s
    return keep * z + s * _draw(op, z, generator)


def _draw(op: str, like: Tensor, generator) -> Tensor:
    if isinstance(generator, Sequence):
        if len(generator) != like.shape[0]:
            raise LatentError(
                f"{op}: needs one generator or {like.shape[0]} (one per image), got "
                f"{len(generator)}"
            )
        return torch.cat([_draw(op, z[None], g) for z, g in zip(like, generator, strict=True)])
    if isinstance(generator, int) and not isinstance(generator, bool):
        generator = torch.Generator().manual_seed(generator)
    if not isinstance(generator, torch.Generator):
        raise LatentError(
            f"{op}: generator must be a torch.Generator, a seed, or one of them per image, got "
            f"{type(generator).__name__}"
        )
    eps = torch.randn(like.shape, generator=generator, device=generator.device, dtype=torch.float32)
    return eps.to(like.device)


def round_to_bfloat16(latent: Tensor) -> Tensor:
    """fp32 values rounded to bf16, as the released pipelines do before PiD sees a latent."""
    return latent.to(torch.bfloat16).float()


def captured_sigma(
    backbone_name: str,
    step: int,
    *,
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
) -> float:
    """Noise level, as PiD wants it, of a latent taken after `step` network evaluations.

    Args:
        backbone_name: a name of `BACKBONES`.
        step: evaluations done; 0 is pure noise, the last one the finished latent (sigma 0).
        steps: evaluations of the whole generation; needed without `sigmas`.
        sigmas: the scheduler's noise levels, steps + 1 of them, in the scheduler's own unit (for
            sdxl those of the Euler scheduler, up to about 14.6). dinov2 can do without.

    Raises:
        UnknownNameError: no such backbone.
        LatentError: neither `sigmas` nor a known schedule, or `step` outside it.
    """
    return _pid_sigma(*_scheduler_sigma("captured_sigma", backbone_name, step, steps, sigmas))


def from_capture(
    latent: Tensor,
    backbone_name: str,
    step: int,
    *,
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
) -> tuple[Tensor, float]:
    """A scheduler's latent after `step` evaluations -> (normalised latent at PiD's scale, sigma).

    Flow-matching latents pass unchanged. SDXL's Euler scheduler keeps z + sigma eps, which becomes
    the variance-preserving latent / sqrt(sigma^2 + 1); its finished latent passes unchanged.

    Args:
        latent: any shape (packed tokens stay packed), fp32 | fp16 | bf16.
        backbone_name, step, steps, sigmas: as for `captured_sigma`.

    Returns:
        The latent in fp32, and sigma in [0, 1].

    Raises:
        UnknownNameError, LatentError: as `captured_sigma`; LatentError also for NaN or infinity.
    """
    op = "from_capture"
    check_values(op, latent)
    b, level = _scheduler_sigma(op, backbone_name, step, steps, sigmas)
    latent = latent.float()
    if b.variance_preserving:
        latent = latent / math.sqrt(level**2 + 1)
    return latent, _pid_sigma(b, level)


def rae_sigmas(steps: int) -> list[float]:
    """The `steps + 1` noise levels of the DINOv2 generator's Euler sampler, from 1 downwards.

    t = 1 - linspace(0, 0.999, steps + 1), shifted by S t / (1 + (S - 1) t) with
    S = sqrt(768 * 32 * 32 / 4096). The finished latent counts as clean although the last is not 0.
    """
    shift = math.sqrt(768 * 32 * 32 / 4096)
    times = [1 - 0.999 * k / steps for k in range(steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in times]


def _scheduler_sigma(op, backbone_name, step, steps, sigmas) -> tuple[Backbone, float]:
    """(backbone, noise level in the scheduler's unit) after `step` evaluations."""
    b = backbone(backbone_name)
    if sigmas is None and b.family == "dinov2" and steps is not None:
        sigmas = rae_sigmas(steps)
    if sigmas is None:
        raise LatentError(
            f"{op}: {b.name} needs sigmas=, the scheduler's steps + 1 noise levels"
            + (" (or steps=)" if b.family == "dinov2" else "")
        )
    levels = [float(s) for s in sigmas]
    last = len(levels) - 1
    if steps is not None and steps != last:
        raise LatentError(f"{op}: {steps} steps have {steps + 1} sigmas, got {len(levels)}")
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= last:
        raise LatentError(f"{op}: step must be an integer from 0 to {last}, got {step!r}")
    level = 0.0 if step == last else levels[step]
    limit = math.inf if b.variance_preserving else 1.0
    if not 0 <= level <= limit:
        raise LatentError(
            f"{op}: sigmas of {b.name} must lie in [0, {limit:g}], sigmas[{step}] is {level}"
        )
    return b, level


def _pid_sigma(b: Backbone, level: float) -> float:
    return level / math.sqrt(level**2 + 1) if b.variance_preserving else level
