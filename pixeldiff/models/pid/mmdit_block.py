"""MMDiT block: image and text streams with their own weights and one joint attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ... import ops
from .layers import RMSNorm, SwiGLU

Rope = tuple[Tensor, Tensor]
Trace = Callable[[str, Tensor], None]


class JointAttention(nn.Module):
    """Weights of the joint attention; `forward` of the block runs them."""

    def __init__(self, dim: int, heads: int, **factory) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_x = nn.Linear(dim, 3 * dim, bias=False, **factory)
        self.qkv_y = nn.Linear(dim, 3 * dim, bias=False, **factory)
        for name in ("q_norm_x", "k_norm_x", "q_norm_y", "k_norm_y"):
            setattr(self, name, RMSNorm(dim // heads, **factory))
        self.proj_x = nn.Linear(dim, dim, **factory)
        self.proj_y = nn.Linear(dim, dim, **factory)

    def joint_qkv(self, x: Tensor, y: Tensor, rope: Rope, txt_rope: Rope) -> Tensor:
        """(3, B, T+N, G, d): normalised, rotated, text rows first."""
        return ops.qk_norm_rope(
            self.qkv_x(x),
            self.q_norm_x.weight,
            self.k_norm_x.weight,
            rope,
            heads=self.heads,
            text=(self.qkv_y(y), self.q_norm_y.weight, self.k_norm_y.weight, txt_rope),
        )


class MMDiTBlock(nn.Module):
    """PiD (arXiv 2605.23902), patch stream block.

    Modulation vectors come in as (B, 6, D): shift, scale, gate of the attention, then of the MLP.
    """

    def __init__(self, dim: int, heads: int, ffn: int, **factory) -> None:
        super().__init__()
        self.norm_x1 = RMSNorm(dim, **factory)
        self.norm_y1 = RMSNorm(dim, **factory)
        self.attn = JointAttention(dim, heads, **factory)
        self.norm_x2 = RMSNorm(dim, **factory)
        self.norm_y2 = RMSNorm(dim, **factory)
        self.mlp_x = SwiGLU(dim, ffn, **factory)
        self.mlp_y = SwiGLU(dim, ffn, **factory)
        self.adaLN_modulation_img = nn.Sequential(nn.Linear(dim, 6 * dim, **factory))
        self.adaLN_modulation_txt = nn.Sequential(nn.Linear(dim, 6 * dim, **factory))

    def modulation(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) activated time vector -> image and text vectors, each (B, 6, D)."""
        image, text = self.adaLN_modulation_img(c), self.adaLN_modulation_txt(c)
        return image.unflatten(-1, (6, -1)), text.unflatten(-1, (6, -1))

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        mod_x: Tensor,
        mod_y: Tensor,
        rope: Rope,
        txt_rope: Rope,
        *,
        image_only: bool = False,
        trace: Trace | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x (B, N, D), y (B, T, D) -> the same. `image_only` returns y as it came (last block)."""
        shift_x, scale_x, gate_x, *mlp_x = mod_x.unbind(1)
        shift_y, scale_y, gate_y, *mlp_y = mod_y.unbind(1)
        xn = ops.rms_norm_modulate(x, self.norm_x1.weight, scale_x, shift_x)
        yn = ops.rms_norm_modulate(y, self.norm_y1.weight, scale_y, shift_y)
        q, k, v = self.attn.joint_qkv(xn, yn, rope, txt_rope).unbind(0)
        rows = y.shape[1]
        if image_only:
            o = ops.joint_attention(q[:, rows:], k, v).flatten(2)
            return self._finish(x, self.attn.proj_x(o), gate_x, mlp_x, self.norm_x2, self.mlp_x), y
        o = ops.joint_attention(q, k, v).flatten(2)
        ox, oy = self.attn.proj_x(o[:, rows:]), self.attn.proj_y(o[:, :rows])
        if trace:
            for name, value in (("x_mod", xn), ("y_mod", yn), ("attn_x", ox), ("attn_y", oy)):
                trace(name, value)
        x = self._finish(x, ox, gate_x, mlp_x, self.norm_x2, self.mlp_x)
        y = self._finish(y, oy, gate_y, mlp_y, self.norm_y2, self.mlp_y)
        return x, y

    @staticmethod
    def _finish(x, o, gate, mlp_mod, norm, mlp):
        shift, scale, mlp_gate = mlp_mod
        x, h = ops.gated_residual_norm(x, o, gate, norm.weight, scale, shift)
        return torch.addcmul(x, mlp_gate[:, None], mlp(h))
