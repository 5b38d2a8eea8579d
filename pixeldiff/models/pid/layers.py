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


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), no biases."""

    def __init__(self, dim: int, hidden: int, **factory) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False, **factory)
        self.w3 = nn.Linear(dim, hidden, bias=False, **factory)
        self.w2 = nn.Linear(hidden, dim, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(ops.swiglu(self.w1(x), self.w3(x)))


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
        return self.mlp(time_embedding(t).to(self.mlp[0].weight.dtype))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, channels: int, **factory) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, **factory)
        self.linear = nn.Linear(dim, channels, **factory)
