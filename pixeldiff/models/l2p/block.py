"""Transformer block of the trunk: one stream of image and caption tokens, full attention.

Source: L2P (arXiv 2605.12013), on the Z-Image transformer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ... import ops
from ...ops.registry import needs_grad, upcast
from ..feed_forward import SwiGLU
from ..packing import follows
from .layers import Gain
from .positions import Rope


class SelfAttention(nn.Module):
    """Attention with normalised and rotated queries and keys; no biases.

    `pack_` lays the three projections into one buffer, whose product with x is one GEMM.
    """

    def __init__(self, dim: int, heads: int, eps: float, **factory) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        for name in ("to_q", "to_k", "to_v"):
            setattr(self, name, nn.Linear(dim, dim, bias=False, **factory))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False, **factory)])
        self.norm_q = Gain(dim // heads, **factory)
        self.norm_k = Gain(dim // heads, **factory)

    def forward(
        self, h: Tensor, rope: Rope, key_mask: Tensor | None = None, queries: int | None = None
    ) -> Tensor:
        """(B, L, D) -> (B, queries, D); arguments as in `Block.forward`."""
        batch, rows = h.shape[:2]
        q, k, v = self._joint_qkv(h, rope).view(3, batch, rows, self.heads, -1)
        # Projecting the other queries too takes less than a product of its own would.
        o = ops.joint_attention(q[:, :queries], k, v, key_mask=key_mask)
        del q, k, v
        return self.to_out[0](o.flatten(2))

    def _joint_qkv(self, h: Tensor, rope: Rope) -> Tensor:
        """(3, 1, B*L, G, d): q, k and v of every row, normalised and rotated."""
        # Each row has a table row of its own, whatever image it belongs to.
        rows = (1, h.shape[0] * h.shape[1], -1)
        norms = (self.norm_q.weight, self.norm_k.weight, rope)
        how = {"heads": self.heads, "eps": self.eps}
        weight = self._joint_weight(h)
        if weight is None:
            qkv = torch.cat([p(h) for p in (self.to_q, self.to_k, self.to_v)], -1)
        elif ops.fuses_qkv(h.reshape(rows), weight, *norms, **how):
            return ops.qkv_norm_rope(h.reshape(rows), weight, *norms, **how)
        else:
            qkv = linear(h, weight)
        return ops.qk_norm_rope(qkv.reshape(rows), *norms, **how)

    def _joint_weight(self, h: Tensor) -> Tensor | None:
        """(3D, D): the three weights as the one matrix they are in memory, or None."""
        q, k, v = (p.weight for p in (self.to_q, self.to_k, self.to_v))
        # Tracing knows no addresses, and a view of q's weight has no gradient for the others.
        if torch.compiler.is_compiling() or needs_grad(h, q, k, v) or not self._packed():
            return None
        return q.as_strided((3 * q.shape[0], q.shape[1]), q.stride())

    def _packed(self) -> bool:
        q, k, v = parts = (self.to_q, self.to_k, self.to_v)
        plain = all(type(p) is nn.Linear for p in parts)
        return plain and follows(q.weight, k.weight) and follows(k.weight, v.weight)

    @torch.no_grad()
    def pack_(self) -> SelfAttention:
        if not self._packed():
            q, k, v = (p.weight for p in (self.to_q, self.to_k, self.to_v))
            q.data, k.data, v.data = torch.cat((q, k, v)).chunk(3)
        return self


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and after.

    Args:
        adaln_dim: width of the time vector that modulates the block; None for the context
            refiner's, which nothing modulates.
    """

    def __init__(
        self, dim: int, heads: int, ffn: int, adaln_dim: int | None, eps: float, **factory
    ) -> None:
        super().__init__()
        self.eps = eps
        self.attention = SelfAttention(dim, heads, eps, **factory)
        self.feed_forward = SwiGLU(dim, ffn, **factory)
        for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            setattr(self, name, Gain(dim, **factory))
        if adaln_dim is not None:
            self.adaLN_modulation = nn.Sequential(nn.Linear(adaln_dim, 4 * dim, **factory))

    def modulation(self, e: Tensor) -> Tensor:
        """(B, a) time vectors -> (B, 4, D) fp32: scale and gate of the attention, then of the
        feed-forward; the gates after their tanh.

        In fp32 whatever the weights: it is made once a step for all tokens.
        """
        project = self.adaLN_modulation[0]
        m = linear(upcast(e), upcast(project.weight), upcast(project.bias))
        m = m.unflatten(-1, (2, 2, -1))
        return torch.stack((m[:, :, 0], m[:, :, 1].tanh()), 2).flatten(1, 2)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor | None,
        rope: Rope,
        *,
        key_mask: Tensor | None = None,
        queries: int | None = None,
    ) -> Tensor:
        """(B, L, D) -> (B, queries, D).

        Args:
            x: (B, L, D).
            modulation: (B, 4, D) of `modulation`, or None for a block without.
            rope: cos and sin, (B*L, head_dim/2) each: rows of the first image, then of the next.
            key_mask: (B, L) bool, True for the rows to attend to; None = all.
            queries: only the first so many rows are wanted; None = all.
        """
        if modulation is None:
            scale = ff_scale = x.new_zeros(x.shape[0], x.shape[2])
            gate = ff_gate = None
        else:
            scale, gate, ff_scale, ff_gate = modulation.unbind(1)
        h = ops.rms_norm_modulate(x, self.attention_norm1.weight, scale, None, eps=self.eps)
        h = self.attention(h, rope, key_mask, queries)
        norm = self.attention_norm2.weight
        x = ops.gated_norm_residual(x[:, :queries], h, norm, gate, eps=self.eps)
        h = ops.rms_norm_modulate(x, self.ffn_norm1.weight, ff_scale, None, eps=self.eps)
        h = self.feed_forward(h)
        return ops.gated_norm_residual(x, h, self.ffn_norm2.weight, ff_gate, eps=self.eps)
