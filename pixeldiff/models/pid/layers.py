"""Small building blocks of the network. Attribute names are the released state-dict keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import ops
from ...ops.registry import needs_grad
from .positions import TIME_CHANNELS, time_embedding

# Tokens that go through the feed-forward at a time: its three wide buffers never exist for the
# whole image. The weights are read once a piece, which 1024 tokens of arithmetic hide on a CPU;
# elsewhere a piece has to fill a larger machine.
FEED_FORWARD_PIECE = {"cpu": 1024}
FEED_FORWARD_PIECE_ELSEWHERE = 8192


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

    def add_gated(self, x: Tensor, gate: Tensor, h: Tensor) -> Tensor:
        """x + gate * forward(h) for x, h (B, N, D) and gate (B, D).

        Without gradients the result is written into x, piece by piece.
        """
        gate, tokens = gate[:, None], x.shape[1]
        if needs_grad(x, gate, h, *self.parameters()):
            return torch.addcmul(x, gate, self(h))
        piece = FEED_FORWARD_PIECE.get(x.device.type, FEED_FORWARD_PIECE_ELSEWHERE)
        if tokens <= piece:
            return x.addcmul_(gate, self(h))
        for first in range(0, tokens, piece):
            rows = slice(first, first + piece)
            x[:, rows].addcmul_(gate, self(h[:, rows]))
        return x


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
