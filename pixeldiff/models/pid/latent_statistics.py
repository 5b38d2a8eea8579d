"""Normalisation of raw VAE latents, per generator: published constants and given statistics.

Source: the published VAE configurations of the generators.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import LatentError

BATCH_NORM_EPS = 1e-4  # FLUX.2's VAE
RAE_EPS = 1e-5  # statistics of the DINOv2 autoencoder

# fmt: off
_QWEN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
              0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
_QWEN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
             3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on


@dataclass(frozen=True)
class LatentStatistics:
    """An affine normalisation: normalised = (raw - shift) * scale.

    Args:
        shift, scale: fp32, broadcastable to (Cz, zh, zw): scalars, (Cz, 1, 1) or (Cz, zh, zw).
    """

    shift: Tensor
    scale: Tensor

    @classmethod
    def from_scale_shift(cls, scale: float, shift: float = 0.0) -> LatentStatistics:
        """From `scaling_factor` and `shift_factor` of a VAE configuration."""
        return cls(torch.tensor(float(shift)), torch.tensor(float(scale)))

    @classmethod
    def from_moments(cls, mean: Tensor, var: Tensor, *, eps: float) -> LatentStatistics:
        """(raw - mean) / sqrt(var + eps).

        Args:
            mean, var: both (Cz,), for example `vae.bn.running_mean` and `.running_var` of FLUX.2
                with `eps=BATCH_NORM_EPS`, or both (Cz, zh, zw), the DINOv2 statistics with
                `eps=RAE_EPS`.

        Raises:
            LatentError: other shapes, negative variance, NaN or infinity.
        """
        mean, var = torch.as_tensor(mean).detach(), torch.as_tensor(var).detach()
        if mean.shape != var.shape or mean.dim() not in (1, 3):
            raise LatentError(
                "LatentStatistics: mean and var must both be (Cz,) or (Cz, zh, zw), got "
                f"{tuple(mean.shape)} and {tuple(var.shape)}"
            )
        mean, var = mean.double(), var.double()
        if not (mean.isfinite().all() and var.isfinite().all() and (var >= 0).all()):
            raise LatentError("LatentStatistics: mean and var must be finite and var >= 0")
        if mean.dim() == 1:
            mean, var = mean[:, None, None], var[:, None, None]
        return cls(mean.float(), (var + eps).rsqrt().float())


@functools.cache
def published_statistics(family: str) -> LatentStatistics | None:
    """Constants of a backbone family, or None where they come with the weights or do not exist."""
    if family == "flux":
        return LatentStatistics.from_scale_shift(0.3611, 0.1159)
    if family == "sd3":
        return LatentStatistics.from_scale_shift(1.5305, 0.0609)
    if family == "sdxl":
        return LatentStatistics.from_scale_shift(0.13025)
    if family == "qwenimage":
        std = torch.tensor(_QWEN_STD, dtype=torch.float64)
        return LatentStatistics.from_moments(torch.tensor(_QWEN_MEAN), std.square(), eps=0.0)
    return None
