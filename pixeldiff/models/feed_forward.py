"""The gated feed-forward of both networks' blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .. import ops
from ..ops.registry import needs_grad
from .devices import kind_of
from .fp8 import Fp8Linear, Rows, product
from .packing import follows

# Tokens that go through the feed-forward at a time: its three wide buffers never exist for the
# whole image. The weights are read once a piece, which 1024 tokens of arithmetic hide on a CPU;
# elsewhere a piece has to fill a larger machine.
FEED_FORWARD_PIECE = {"cpu": 1024}
FEED_FORWARD_PIECE_ELSEWHERE = 8192


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), no biases. The three layers may be `Fp8Linear`, all of them or none.

    `pack_` lays w1 and w3 into one buffer, whose product with x is one GEMM. They stay parameters
    of their own; what gives one of them other memory (`.to()`, `deepcopy`) ends it.
    """

    def __init__(self, dim: int, hidden: int, **factory) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False, **factory)
        self.w3 = nn.Linear(dim, hidden, bias=False, **factory)
        self.w2 = nn.Linear(hidden, dim, bias=False, **factory)

    @property
    def fp8(self) -> bool:
        return isinstance(self.w1, Fp8Linear)

    def forward(self, x: Tensor | Rows, chunk: int | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D), piece by piece unless there are gradients; `chunk` makes the
        pieces smaller than they would be."""
        tokens = x.shape[:-1].numel()
        piece = _piece(x, tokens, chunk)
        if tokens <= piece or needs_grad(x, *self.parameters()):
            return self.w2(self._gated(x))
        rows = x.flatten(0, -2)
        y = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        for first in range(0, tokens, piece):
            part = slice(first, first + piece)
            if self.fp8:
                y[part] = self.w2(self._gated(rows[part]))
            else:
                torch.mm(self._gated(rows[part]), self.w2.weight.t(), out=y[part])
        return y.view(x.shape)

    def add_gated(
        self, x: Tensor, gate: Tensor, h: Tensor | Rows, chunk: int | None = None
    ) -> Tensor:
        """x + gate * forward(h) for x, h (B, N, D) and gate (B, D).

        Without gradients the result is written into x, piece by piece.
        """
        gate, tokens = gate[:, None], x.shape[1]
        piece = _piece(x, tokens, chunk)
        if needs_grad(x, gate, h, *self.parameters()):
            return torch.addcmul(x, gate, self(h))
        for first in range(0, tokens, piece):
            rows = slice(first, first + piece)
            x[:, rows].addcmul_(gate, self.w2(self._gated(h[:, rows])))
        return x

    def _gated(self, x: Tensor | Rows) -> Tensor | Rows:
        a, b = self._up(x)
        if self.fp8:
            return Rows(*ops.swiglu_fp8(a, b), a.dtype)
        return ops.swiglu(a, b)

    def _up(self, x: Tensor | Rows) -> tuple[Tensor, Tensor]:
        if self.fp8 and isinstance(x, Tensor):
            x = Rows.of(x)  # once for both
        both = self._packed(x)
        if both is None:
            return self.w1(x), self.w3(x)
        return (product if self.fp8 else linear)(x, *both).chunk(2, -1)

    def _packed(self, x: Tensor | Rows) -> list[Tensor] | None:
        """[(2F, D)], w1 above w3, where they lie so in one buffer; and their scales (2F,)."""
        if torch.compiler.is_compiling() or needs_grad(x, *self.parameters()):
            return None  # no addresses while tracing, and a view of w1 has no gradient for w3
        if not (type(self.w1) is type(self.w3) and type(self.w1) in (nn.Linear, Fp8Linear)):
            return None
        if not all(follows(a, b) for a, b in self._pairs()):
            return None
        return [a.as_strided((2 * a.shape[0], *a.shape[1:]), a.stride()) for a, _ in self._pairs()]

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """What of w1 and w3 lies in one buffer when packed."""
        pairs = [(self.w1.weight, self.w3.weight)]
        if self.fp8:
            pairs.append((self.w1.weight_scale, self.w3.weight_scale))
        return pairs

    @torch.no_grad()
    def pack_(self) -> SwiGLU:
        for first, second in self._pairs():
            if not follows(first, second):
                both = first.new_empty((2 * first.shape[0], *first.shape[1:]))
                halves = both.chunk(2)
                for ours, half in zip((first, second), halves, strict=True):
                    half.copy_(ours)
                first.data, second.data = halves
        return self


def _piece(x: Tensor | Rows, tokens: int, chunk: int | None = None) -> int:
    """Tokens of a piece, `chunk` at most: as few pieces as may be, equally long; a short one would
    read the weights for little."""
    most = FEED_FORWARD_PIECE.get(kind_of(x.device), FEED_FORWARD_PIECE_ELSEWHERE)
    most = most if chunk is None else min(most, chunk)
    pieces = max(1, -(-tokens // most))
    return max(1, -(-tokens // pieces))
