"""Small parts of the trunk. Attribute names are the released state-dict keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, silu

from ... import ops
from ...ops.registry import upcast
from .config import TIME_CHANNELS, TIME_HIDDEN
from .positions import time_embedding

FINAL_EPS = 1e-6


class Gain(nn.Module):
    """The gain of an RMSNorm, under the name `weight`; fused ops take it from here."""

    def __init__(self, dim: int, **factory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, **factory))


class TimeEmbedder(nn.Module):
    """(B,) scaled times (1000 t) -> (B, a) fp32.

    In fp32 whatever the weights: it is made once a step, and all modulation comes from it.
    """

    def __init__(self, width: int, **factory) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_CHANNELS, TIME_HIDDEN, **factory),
            nn.SiLU(),
            nn.Linear(TIME_HIDDEN, width, **factory),
        )

    def forward(self, t: Tensor, frequencies: Tensor | None = None) -> Tensor:
        first, last = self.mlp[0], self.mlp[2]
        weight = upcast(first.weight)
        waves = time_embedding(t, frequencies).to(weight.dtype)
        h = silu(linear(waves, weight, upcast(first.bias)))
        return linear(h, upcast(last.weight), upcast(last.bias))


class CaptionEmbedder(nn.Sequential):
    """(B, T, E) caption features -> (B, T, D)."""

    def __init__(self, width: int, dim: int, eps: float, **factory) -> None:
        super().__init__(Gain(width, **factory), nn.Linear(width, dim, **factory))
        self.eps = eps

    def forward(self, y: Tensor) -> Tensor:
        gain, project = self
        still = y.new_zeros(y.shape[0], y.shape[2])
        return project(ops.rms_norm_modulate(y, gain.weight, still, None, eps=self.eps))


class FinalLayer(nn.Module):
    """(B, N, D) and time vectors (B, a) -> (B, N, channels): the end of the latent model."""

    def __init__(self, dim: int, adaln_dim: int, channels: int, **factory) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, channels, **factory)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(adaln_dim, dim, **factory))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        project = self.adaLN_modulation[1]
        scale = linear(silu(upcast(e)), upcast(project.weight), upcast(project.bias))
        h = layer_norm(upcast(x), x.shape[-1:], eps=FINAL_EPS) * (1 + scale[:, None])
        return self.linear(h.to(x.dtype))
