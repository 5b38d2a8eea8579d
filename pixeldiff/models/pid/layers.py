"""Small building blocks of the network. Attribute names are the released state-dict keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import ops
from .positions import TIME_CHANNELS, time_embedding


class RMSNorm(nn.Module):
    """The gain of an RMSNorm; blocks hand it to a fused op, `forward` is the norm alone."""

    def __init__(self, dim: int, **factory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight)


class Projection(nn.Module):
    """A linear under the name `proj`."""

    def __init__(self, dim_in: int, dim_out: int, **factory) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class CaptionEmbedder(nn.Module):
    def __init__(self, dim_in: int, dim_out: int, **factory) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out, **factory)
        self.norm = RMSNorm(dim_out, **factory)

    def forward(self, y: Tensor) -> Tensor:
        return self.norm(self.proj(y))


class TimeEmbedder(nn.Module):
    """(B,) network times -> (B, D)."""

    def __init__(self, dim: int, **factory) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_CHANNELS, dim, **factory), nn.SiLU(), nn.Linear(dim, dim, **factory)
        )

    def forward(self, t: Tensor) -> Tensor:
        return self.embedded(time_embedding(t))

    def embedded(self, times: Tensor) -> Tensor:
        """The same for times that went through `time_embedding`, (B, 256)."""
        return self.mlp(times.to(self.mlp[0].weight.dtype))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, channels: int, **factory) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, **factory)
        self.linear = nn.Linear(dim, channels, **factory)
