"""Small building blocks of the network. Attribute names are the released state-dict keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ... import ops
from ...ops.registry import needs_grad
from .positions import TIME_CHANNELS, time_embedding
from .residual import Stream

# Tokens that go through the feed-forward at a time: its three wide buffers never exist for the
# whole image. The weights are read once a piece, which 1024 tokens of arithmetic hide on a CPU;
# elsewhere a piece has to fill a larger machine.
FEED_FORWARD_PIECE = {"cpu": 1024}
FEED_FORWARD_PIECE_ELSEWHERE = 8192
# Devices on which a piece is added to the stream at once, while it is in the caches. Elsewhere the
# next norm adds all of it.
ADD_EACH_PIECE = ("cpu",)


class RMSNorm(nn.Module):
    """The gain of an RMSNorm; blocks hand it to a fused op, `forward` is the norm alone."""

    def __init__(self, dim: int, **factory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), no biases.

    `pack_` lays w1 and w3 into one buffer, whose product with x is one GEMM. They stay parameters
    of their own; what gives one of them other memory (`.to()`, `deepcopy`) ends it.
    """

    def __init__(self, dim: int, hidden: int, **factory) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False, **factory)
        self.w3 = nn.Linear(dim, hidden, bias=False, **factory)
        self.w2 = nn.Linear(hidden, dim, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D), piece by piece unless there are gradients."""
        tokens, piece = x.shape[:-1].numel(), _piece(x)
        if tokens <= piece or needs_grad(x, *self.parameters()):
            return self.w2(self._gated(x))
        rows = x.flatten(0, -2)
        y = torch.empty_like(rows)
        for first in range(0, tokens, piece):
            part = slice(first, first + piece)
            torch.mm(self._gated(rows[part]), self.w2.weight.t(), out=y[part])
        return y.view(x.shape)

    def add_to(self, stream: Stream, gate: Tensor, h: Tensor) -> None:
        """stream + gate * forward(h) for h (B, N, D) and gate (B, D)."""
        if h.device.type in ADD_EACH_PIECE:
            stream.x = self.add_gated(stream.x, gate, h)
        else:
            stream.add(gate, self(h))

    def add_gated(self, x: Tensor, gate: Tensor, h: Tensor) -> Tensor:
        """x + gate * forward(h) for x, h (B, N, D) and gate (B, D).

        Without gradients the result is written into x, piece by piece.
        """
        gate, tokens, piece = gate[:, None], x.shape[1], _piece(x)
        if needs_grad(x, gate, h, *self.parameters()):
            return torch.addcmul(x, gate, self(h))
        for first in range(0, tokens, piece):
            rows = slice(first, first + piece)
            x[:, rows].addcmul_(gate, self.w2(self._gated(h[:, rows])))
        return x

    def _gated(self, x: Tensor) -> Tensor:
        both = self._packed(x)
        if both is None:
            return ops.swiglu(self.w1(x), self.w3(x))
        return ops.swiglu(*linear(x, both).chunk(2, -1))

    def _packed(self, x: Tensor) -> Tensor | None:
        """(2F, D), w1 above w3, where they lie so in one buffer."""
        w1, w3 = self.w1.weight, self.w3.weight
        if torch.compiler.is_compiling() or needs_grad(x, w1, w3):
            return None  # no addresses while tracing, and a view of w1 has no gradient for w3
        if not (type(self.w1) is type(self.w3) is nn.Linear and follows(w1, w3)):
            return None
        return w1.as_strided((2 * w1.shape[0], w1.shape[1]), w1.stride())

    @torch.no_grad()
    def pack_(self) -> SwiGLU:
        w1, w3 = self.w1.weight, self.w3.weight
        if not follows(w1, w3):
            both = torch.cat((w1, w3))
            w1.data, w3.data = both.chunk(2)
        return self


def follows(a: Tensor, b: Tensor) -> bool:
    """Whether b's memory begins where a's ends, in one storage, both contiguous."""
    return (
        a.is_contiguous()
        and b.is_contiguous()
        and a.dtype == b.dtype
        and a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and a.storage_offset() + a.numel() == b.storage_offset()
    )


def _piece(x: Tensor) -> int:
    return FEED_FORWARD_PIECE.get(x.device.type, FEED_FORWARD_PIECE_ELSEWHERE)


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
