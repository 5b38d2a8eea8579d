"""PiT block: one attention token per patch, everything else per pixel."""

from __future__ import annotations

from torch import Tensor, nn

from ... import ops
from .layers import RMSNorm
from .mmdit_block import Rope, Trace


class RotaryAttention(nn.Module):
    """Self-attention over the patch tokens of each image."""

    def __init__(self, dim: int, heads: int, **factory) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **factory)
        self.q_norm = RMSNorm(dim // heads, **factory)
        self.k_norm = RMSNorm(dim // heads, **factory)
        self.proj = nn.Linear(dim, dim, **factory)

    def joint_qkv(self, a: Tensor, rope: Rope) -> Tensor:
        """(B, N, A) tokens -> (3, B, N, G, d): projected, normalised, rotated."""
        how = (self.q_norm.weight, self.k_norm.weight, rope)
        if type(self.qkv) is nn.Linear:
            whole = (a, self.qkv.weight, *how)
            if ops.fuses_qkv(*whole, heads=self.heads):
                return ops.qkv_norm_rope(*whole, heads=self.heads)
            del whole
        qkv = self.qkv(a)
        del a
        return ops.qk_norm_rope(qkv, *how, heads=self.heads)

    def attend(self, qkv: Tensor) -> Tensor:
        """(3, B, N, G, d) of `joint_qkv` -> (B, N, A)."""
        o = self.attended(qkv)
        del qkv
        return self.proj(o)

    def attended(self, qkv: Tensor) -> Tensor:
        """`attend` without its projection: (B, N, A)."""
        return ops.joint_attention(*qkv.unbind(0)).flatten(2)


class PixelMLP(nn.Module):
    """Weights of the pixel MLP p -> 4p -> p."""

    def __init__(self, dim: int, hidden: int, **factory) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **factory)
        self.fc2 = nn.Linear(hidden, dim, **factory)


class PiTBlock(nn.Module):
    """PiD (arXiv 2605.23902), pixel stream block."""

    def __init__(
        self, context: int, dim: int, patch: int, attn_dim: int, heads: int, **factory
    ) -> None:
        super().__init__()
        pixels = patch * patch
        self.adaLN_modulation = nn.Sequential(nn.Linear(context, 6 * dim * pixels, **factory))
        self.norm1 = RMSNorm(dim, **factory)
        self.compress_to_attn = nn.Linear(dim * pixels, attn_dim, **factory)
        self.attn = RotaryAttention(attn_dim, heads, **factory)
        self.expand_from_attn = nn.Linear(attn_dim, dim * pixels, **factory)
        self.norm2 = RMSNorm(dim, **factory)
        self.mlp = PixelMLP(dim, 4 * dim, **factory)

    def forward(
        self, q: Tensor, u: Tensor, rope: Rope, batch: int, *, trace: Trace | None = None
    ) -> Tensor:
        """q (B*N, P*P, p), u (B*N, D) -> q."""
        # Nothing here is named that attention only passes through: it would last to its end.
        o = self.attn.attend(self.attn.joint_qkv(self.compressed(q, u, batch, trace), rope))
        if trace:
            trace("attn", o)
        return self.returned(q, u, o.flatten(0, 1))

    def returned(self, q: Tensor, u: Tensor, o: Tensor) -> Tensor:
        """The second half: the attention's result o (R, A) goes back to the pixels q (R, P*P, p)
        of R patches, then their MLP."""
        ada = self.adaLN_modulation[0]
        return ops.pixel_adaln_mlp(
            q,
            u,
            o,
            (self.expand_from_attn.weight, self.expand_from_attn.bias),
            (ada.weight, ada.bias),
            self.norm2.weight,
            (self.mlp.fc1.weight, self.mlp.fc1.bias),
            (self.mlp.fc2.weight, self.mlp.fc2.bias),
        )

    def compressed(self, q: Tensor, u: Tensor, batch: int, trace: Trace | None = None) -> Tensor:
        """(B, N, A): one attention token of each patch."""
        ada = self.adaLN_modulation[0]
        a = ops.pixel_adaln_compress(
            q,
            u,
            ada.weight,
            ada.bias,
            self.norm1.weight,
            self.compress_to_attn.weight,
            self.compress_to_attn.bias,
        )
        if trace:
            trace("compressed", a)
        return a.unflatten(0, (batch, -1))
