"""The feed-forward in pieces: as few as may be, and equally long."""

from __future__ import annotations

import pytest
import torch

from pixeldiff.models import feed_forward
from pixeldiff.models.feed_forward import SwiGLU


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [(0, []), (1, [1]), (8, [8]), (9, [5, 4]), (16, [8, 8]), (17, [6, 6, 5]), (33, [7] * 4 + [5])],
)
def test_pieces(tokens, pieces, monkeypatch):
    monkeypatch.setitem(feed_forward.FEED_FORWARD_PIECE, "cpu", 8)
    mlp, seen = SwiGLU(6, 10).double().requires_grad_(False), []
    x, gate = torch.randn(1, tokens, 6).double(), torch.randn(1, 6).double()
    want = mlp.w2(torch.nn.functional.silu(mlp.w1(x)) * mlp.w3(x))
    inner = mlp._gated
    monkeypatch.setattr(mlp, "_gated", lambda h: seen.append(h.shape[-2]) or inner(h))
    torch.testing.assert_close(mlp(x), want)
    assert [n for n in seen if n] == pieces
    seen.clear()
    added = mlp.add_gated(x.clone(), gate, x)
    torch.testing.assert_close(added, x + gate[:, None] * want)
    assert seen == pieces
