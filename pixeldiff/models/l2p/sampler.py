"""Sampling with an L2P network: guidance, and Euler steps from noise to an image.

Source: L2P (arXiv 2605.12013) and its releases.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...jobs import Stages
from ..steps import Callback, fp32, report
from .bands import DECODER_MEMORY
from .network import L2PCondition, L2PNet
from .scheduler import Schedule

Predict = Callable[[Tensor, float], Tensor]
Replace = Callable[[int, float, Tensor, Tensor], Tensor]


class Steps(NamedTuple):
    """What makes the steps of one image: predict(x, t) -> u, and where its x lies, if anywhere."""

    predict: Predict
    state: Tensor | None = None


@dataclass(frozen=True)
class Prediction:
    """predict(x, t) -> u, guided or not, from what `guided` prepared.

    Args:
        conditions: of all captions, or of the positive and the negative ones apart, to be run one
            after the other.
        guidance: () g on the network's device, or None for none.
        decoder_memory: see `L2PNet.decoded`.
    """

    net: L2PNet
    conditions: tuple[L2PCondition, ...]
    guidance: Tensor | None
    decoder_memory: int | None

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """u (B, 3, H, W) fp32, the negative velocity, at x (B, 3, H, W)."""
        kept = {"guidance": self.guidance, "decoder_memory": self.decoder_memory}
        if len(self.conditions) == 1:
            return self.net.step(x, t, self.conditions[0], **kept)
        # The features are small: both trunks run before the decoder's large tensors exist.
        rows = [self.net.features(x, t, condition) for condition in self.conditions]
        features = torch.cat(rows).unflatten(1, self.conditions[0].grid)
        del rows
        return self.net.decoded(x, features, **kept)


def guided(
    net: L2PNet,
    positive: Sequence[Tensor],
    negative: Sequence[Tensor] | None,
    size: tuple[int, int],
    *,
    guidance_scale: float = 1.0,
    times: Sequence[float] = (),
    together: bool = True,
    decoder_memory: int | None = DECODER_MEMORY,
) -> Prediction:
    """predict(x, t) -> u with classifier-free guidance: u = u_neg + g (u_pos - u_neg), in fp32.

    What depends neither on x nor on t is computed here, once.

    Args:
        net: the network.
        positive, negative: B caption features (T_b, E) each; the negative ones are not used, and
            may be None, where guidance_scale is 1.
        size: (H, W).
        guidance_scale: g; 1 is none and costs one branch instead of two.
        times: of the network calls to come.
        together: run both branches as one batch. They share the patch embedding, the half of the
            local decoder that sees the image only and, where the image needs no padding, the noise
            refiner. Otherwise one branch runs after the other, with half the activations in the
            trunk; they share that half of the local decoder alone. Equal up to rounding.
        decoder_memory: bytes that the local decoder may hold, both branches together, beside its
            inputs and its result; see `L2PNet.decoded`.

    Returns:
        A function of x (B, 3, H, W) and t that gives u (B, 3, H, W) fp32, the negative velocity.

    Raises:
        ValueError: guidance without negative captions, or another number of them; and as
            `L2PNet.prepare`.
    """
    if guidance_scale == 1:
        condition = net.prepare(positive, size, times=times)
        return Prediction(net, (condition,), None, decoder_memory)
    if negative is None:
        raise ValueError(
            f"guidance_scale = {guidance_scale} needs the negative prompt's embeddings; pass them, "
            f"or guidance_scale=1"
        )
    if len(negative) != len(positive):
        raise ValueError(
            f"negative captions must be as many as the positive ones, {len(positive)}, got "
            f"{len(negative)}"
        )
    g = torch.full((), guidance_scale, dtype=torch.float32, device=net.device)
    if together:
        conditions = (net.prepare([*positive, *negative], size, times=times),)
    else:
        first = net.prepare(positive, size, times=times)
        second = dataclasses.replace(net.prepare(negative, size), modulations=first.modulations)
        conditions = (first, second)
    return Prediction(net, conditions, g, decoder_memory)


def start(noise: Tensor, schedule: Schedule, image: Tensor | None = None) -> Tensor:
    """The state at the first noise level: noise, or an image with its share of noise.

    Args:
        noise: (B, 3, H, W) fp32 standard normal.
        image: (B or 1, 3, H, W) in [-1, 1].
    """
    if image is None:
        return noise
    sigma = schedule.sigmas[0]
    return fp32(1 - sigma) * image.float() + sigma * noise


def sample(
    predict: Predict,
    x: Tensor,
    schedule: Schedule,
    *,
    callback: Callback | None = None,
    replace: Replace | None = None,
    state: Tensor | None = None,
    stages: Stages | None = None,
) -> Tensor:
    """Euler steps: x <- x - (sigma' - sigma) u, all in fp32.

    Args:
        predict: (x, t) -> u, the negative velocity x0 - eps.
        x: (B, 3, H, W) fp32, the state at the first noise level, see `start`; or after
            `stages.first` steps.
        schedule: noise levels and times.
        callback: told after each step (`StepInfo`); returning False stops.
        replace: (step, timestep, x, x0) -> the state to go on with, after each step; step counts
            from 0, timestep is 1000 sigma of the step just made.
        state: (B, 3, H, W) fp32, where to keep x instead of anew in every step; see `Steps`.
        stages: where x is kept after each step, for a later run.

    Returns:
        (B, 3, H, W) fp32, unclamped; `state` where that is given and nothing replaced it.

    Raises:
        Interrupted: the callback returned False.
    """
    wanted = callback is not None or replace is not None
    timesteps = schedule.timesteps
    if state is not None:
        x = state.copy_(x)
    levels = enumerate(itertools.pairwise(schedule.sigmas))
    for i, (sigma, after) in itertools.islice(levels, stages.first if stages else 0, None):
        u = predict(x, schedule.times[i])
        x0 = torch.add(x, u, alpha=sigma) if wanted else None
        x = torch.add(x, u, alpha=fp32(sigma - after), out=state)
        del u
        if replace is not None:  # to be kept: the next step writes over the state
            x = replace(i, timesteps[i], x if state is None else x.clone(), x0)
        if stages:
            stages.made(i + 1, schedule.steps, {"x": x})
        report(callback, i + 1, schedule.steps, sigma, x0)
        del x0  # it would last through the next network call
    return x
