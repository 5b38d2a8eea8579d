"""MMDiT block: image and text streams with their own weights and one joint attention."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ... import ops
from ..feed_forward import SwiGLU
from ..fp8 import Fp8Linear, Rows
from .layers import RMSNorm
from .residual import Stream

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

    def joint_qkv(
        self,
        x: Tensor | Rows,
        y: Tensor | Rows,
        rope: Rope,
        txt_rope: Rope,
        chunk: int | None = None,
    ) -> Tensor:
        """(3, B, T+N, G, d): normalised, rotated, text rows first. `chunk`: image rows at a time,
        so that what is neither normalised nor rotated never exists for all of them."""
        image = (self.q_norm_x.weight, self.k_norm_x.weight, rope)
        text = (self.q_norm_y.weight, self.k_norm_y.weight, txt_rope)
        if type(self.qkv_x) is type(self.qkv_y) is nn.Linear:
            whole = (x, self.qkv_x.weight, *image)
            how = {"heads": self.heads, "text": (y, self.qkv_y.weight, *text)}
            if ops.fuses_qkv(*whole, **how):
                return ops.qkv_norm_rope(*whole, **how)
            del whole, how
        if chunk is not None:
            return self._joined(x, y, image, text, chunk)
        qkv, text_qkv = self.qkv_x(x), self.qkv_y(y)
        del x, y  # if the caller keeps none of its own, their memory is free for the result
        return ops.qk_norm_rope(qkv, *image, heads=self.heads, text=(text_qkv, *text))

    def _joined(self, x, y, image, text, chunk):
        first = ops.qk_norm_rope(self.qkv_y(y), *text, heads=self.heads)
        batch, rows, count = first.shape[1], first.shape[2], x.shape[1]
        joint = first.new_empty((3, batch, rows + count, *first.shape[3:]))
        joint[:, :, :rows] = first
        *norms, rope = image
        step = max(1, chunk // batch)
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            table = tuple(t[part] for t in rope)
            own = ops.qk_norm_rope(self.qkv_x(x[:, part]), *norms, table, heads=self.heads)
            joint[:, :, rows + part.start : rows + part.stop] = own
            del own
        return joint


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
        x: Stream,
        y: Stream,
        mod_x: Tensor,
        mod_y: Tensor,
        rope: Rope,
        txt_rope: Rope,
        *,
        image_only: bool = False,
        chunk: int | None = None,
        trace: Trace | None = None,
    ) -> None:
        """Advance the streams x (B, N, D) and y (B, T, D). `image_only` leaves y (last block);
        `chunk` is how many image rows to project and feed forward at a time, without gradients."""
        self._attend(
            x, y, mod_x, mod_y, (rope, txt_rope, chunk), image_only=image_only, trace=trace
        )
        self._feed_forward(x, mod_x, self.norm_x2, self.mlp_x, chunk)
        if not image_only:
            self._feed_forward(y, mod_y, self.norm_y2, self.mlp_y)

    def _attend(self, x, y, mod_x, mod_y, rotary, *, image_only, trace):
        attn = self.attn

        def normed(
            name: str, stream: Stream, norm: RMSNorm, mod: Tensor, reader: nn.Module
        ) -> Tensor | Rows:
            fp8 = isinstance(reader, Fp8Linear)
            h = stream.norm(norm.weight, scale=mod[:, 1], shift=mod[:, 0], fp8=fp8)
            if trace:
                trace(name, h.multiplied() if isinstance(h, Rows) else h)
            return h

        def add(name: str, stream: Stream, mod: Tensor, o: Tensor) -> None:
            stream.add(mod[:, 2], o)
            if trace:
                trace(name, o)

        q, k, v = attn.joint_qkv(
            normed("x_mod", x, self.norm_x1, mod_x, attn.qkv_x),
            normed("y_mod", y, self.norm_y1, mod_y, attn.qkv_y),
            *rotary,
        ).unbind(0)
        rows = y.rows
        if image_only:
            q = q[:, rows:]
        o = ops.joint_attention(q, k, v).flatten(2)
        del q, k, v
        if image_only:
            return add("attn_x", x, mod_x, attn.proj_x(o))
        add("attn_x", x, mod_x, attn.proj_x(o[:, rows:]))
        add("attn_y", y, mod_y, attn.proj_y(o[:, :rows]))

    @staticmethod
    def _feed_forward(stream, mod, norm, mlp, chunk=None):
        h = stream.norm(norm.weight, scale=mod[:, 4], shift=mod[:, 3], fp8=mlp.fp8)
        stream.feed(mlp, mod[:, 5], h, chunk)
