"""Valid arguments for every op, small or of a real network: to ask backends about a machine, to
try an op out, to time it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .quantize_rows import quantized


@dataclass(frozen=True)
class Geometry:
    """Sizes of a network that decide an op's shapes. The defaults are small, with the head, patch
    and pixel widths of the released networks.

    Args:
        grid: (h, w) patches of the image; N = h*w tokens.
        text: T text rows; 0 leaves the text stream out.
        width: D, channels of a token.
        heads, head_dim: of the attention.
        hidden: F, width of the gated feed-forward.
        gates: K of `sigma_gate` and `sigma_gate_norm`, D or 1; None is D.
        patch, pixel: P pixels a side of a patch, p channels of a pixel.
        attn: A, width of the attention over compressed patches.
        guided: two pictures for `local_decoder_pixels` to mix, instead of one.
        shift: whether `rms_norm_modulate` shifts as well as scales.
        decoder: channels of the local decoder's levels, that at full resolution first: of the skip,
            of what is upsampled and of the result. Each further one halves the image's sides.
        bottleneck: channels of what the deepest of them upsamples.
        level: the one that an op of the local decoder stands at.
    """

    grid: tuple[int, int] = (2, 2)
    text: int = 3
    width: int = 128
    heads: int = 2
    head_dim: int = 64
    hidden: int = 128
    gates: int | None = None
    patch: int = 16
    pixel: int = 16
    attn: int = 144
    guided: bool = False
    shift: bool = True
    decoder: tuple[tuple[int, int, int], ...] = ((16, 16, 16), (32, 32, 16))
    bottleneck: int = 64
    level: int = 0

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


SMALL = Geometry()


def arguments(
    op: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    geometry: Geometry = SMALL,
) -> tuple[Any, ...]:
    """Arguments of `op` in schema order: standard normals, matrices scaled by their fan-in.

    Raises:
        KeyError: no such op.
    """
    generator = None
    if torch.device(device).type != "meta":
        generator = torch.Generator(device).manual_seed(0)

    def t(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return _ARGUMENTS[op](t, geometry)


Draw = Callable[..., Tensor]


def _matrix(t: Draw, rows: int, columns: int) -> Tensor:
    return t(rows, columns).mul_(columns**-0.5)


def _rope(t: Draw, rows: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angle = t(rows, head_dim // 2, dtype=torch.float32)
    return angle.cos(), angle.sin()


def _qk_norm_rope(t: Draw, g: Geometry) -> tuple[Any, ...]:
    def rows(count: int) -> tuple[Any, ...]:
        if count == 0:
            return (None,) * 5
        qkv = t(1, count, 3 * g.heads * g.head_dim)
        return (qkv, t(g.head_dim), t(g.head_dim), *_rope(t, count, g.head_dim))

    return (*rows(g.tokens), *rows(g.text), g.heads, 1e-6)


def _qkv_norm_rope(t: Draw, g: Geometry) -> tuple[Any, ...]:
    def rows(count: int) -> tuple[Any, ...]:
        if count == 0:
            return (None,) * 6
        weight = _matrix(t, 3 * g.heads * g.head_dim, g.width)
        gains = t(g.head_dim), t(g.head_dim)
        return (t(1, count, g.width), weight, *gains, *_rope(t, count, g.head_dim))

    return (*rows(g.tokens), *rows(g.text), g.heads, 1e-6)


def _joint_attention(t: Draw, g: Geometry) -> tuple[Any, ...]:
    # q, k and v lie in one buffer, as qk_norm_rope leaves them.
    q, k, v = t(3, 1, g.text + g.tokens, g.heads, g.head_dim).unbind(0)
    return q, k, v, g.head_dim**-0.5, None, False


def _sigma_gate(t: Draw, g: Geometry) -> tuple[Any, ...]:
    gates = g.width if g.gates is None else g.gates
    rows = (1, g.tokens)
    return (
        *(t(*rows, g.width), t(*rows, g.width)),
        *(_matrix(t, gates, g.width), t(*rows, gates)),
    )


def _pixel_stream(t: Draw, g: Geometry) -> tuple[Tensor, ...]:
    return t(g.tokens, g.patch**2, g.pixel), t(g.tokens, g.width)


def _ada(t: Draw, g: Geometry) -> tuple[Tensor, Tensor]:
    rows = 6 * g.pixel * g.patch**2
    return _matrix(t, rows, g.width), t(rows)


def _pixel_mlp(t: Draw, g: Geometry) -> tuple[Any, ...]:
    width, hidden = g.patch**2 * g.pixel, 4 * g.pixel
    expand = (_matrix(t, width, g.attn), t(width))
    mlp = (_matrix(t, hidden, g.pixel), t(hidden), _matrix(t, g.pixel, hidden), t(g.pixel))
    attn = t(g.tokens, g.attn)
    return (*_pixel_stream(t, g), attn, *expand, *_ada(t, g), t(g.pixel), *mlp, 1e-6)


def _pixel_compress(t: Draw, g: Geometry) -> tuple[Any, ...]:
    compress = (_matrix(t, g.attn, g.patch**2 * g.pixel), t(g.attn))
    return (*_pixel_stream(t, g), *_ada(t, g), t(g.pixel), *compress, 1e-6)


def _pixel_embed(t: Draw, g: Geometry) -> tuple[Any, ...]:
    height, width = (side * g.patch for side in g.grid)
    pos_x, pos_y = (t(side, g.pixel // 2, dtype=torch.float32) for side in (width, height))
    image = t(1, 3, height, width, dtype=torch.float32)
    return (image, t(g.pixel, 3), t(g.pixel), pos_x, pos_y, g.patch)


def _pixel_head(t: Draw, g: Geometry) -> tuple[Any, ...]:
    height, width = (side * g.patch for side in g.grid)
    q = t(g.tokens, g.patch**2, g.pixel)
    return (q, t(g.pixel), _matrix(t, 3, g.pixel), t(3), height, width, g.patch, 1e-6)


def _pixel_head_step(t: Draw, g: Geometry) -> tuple[Any, ...]:
    *head, height, width, patch, eps = _pixel_head(t, g)
    x, noise = (t(1, 3, height, width, dtype=torch.float32) for _ in range(2))
    return (*head, x, noise, 0.866, 0.634, False, False, True, True, patch, eps)


def _convolution(t: Draw, before: int, after: int) -> tuple[Tensor, Tensor]:
    return t(after, before, 3, 3).mul_((9 * before) ** -0.5), t(after)


def _level(g: Geometry) -> tuple[int, int]:
    """Rows and columns of the image at a level of the local decoder."""
    rows, columns = (side * g.patch >> g.level for side in g.grid)
    return rows, columns


def _local_decoder_down(t: Draw, g: Geometry) -> tuple[Any, ...]:
    if g.level:
        x = t(1, *_level(g), g.decoder[g.level - 1][0])
    else:
        x = t(1, 3, *_level(g), dtype=torch.float32).permute(0, 2, 3, 1)
    return (x, *_convolution(t, x.shape[3], g.decoder[g.level][0]))


def _local_decoder_up(t: Draw, g: Geometry) -> tuple[Any, ...]:
    height, width = _level(g)
    beside, up, out = g.decoder[g.level]
    deeper = g.decoder[g.level + 1 :]
    below = deeper[0][2] if deeper else g.bottleneck
    x, skip = t(1, height // 2, width // 2, below), t(1, height, width, beside)
    return (x, skip, *_convolution(t, below, up), *_convolution(t, up + beside, out))


def _local_decoder_pixels(t: Draw, g: Geometry) -> tuple[Any, ...]:
    height, width = (side * g.patch for side in g.grid)
    channels = g.decoder[0][2]
    guidance = t(dtype=torch.float32) if g.guided else None
    return (t(1 + g.guided, height, width, channels), _matrix(t, 3, channels), t(3), guidance)


def _rows(t: Draw, g: Geometry) -> Tensor:
    return t(1, g.tokens, g.width)


def _sigma_gate_norm(t: Draw, g: Geometry) -> tuple[Any, ...]:
    return *_sigma_gate(t, g), t(g.width), t(1, g.width), t(1, g.width), 1e-6


def _norm(t: Draw, g: Geometry) -> tuple[Any, ...]:
    shift = t(1, g.width) if g.shift else None
    return _rows(t, g), t(g.width), t(1, g.width), shift, 1e-6


def _residual_norm(t: Draw, g: Geometry) -> tuple[Any, ...]:
    x, *norm = _norm(t, g)
    return x, _rows(t, g), t(1, g.width), *norm


def _halves(t: Draw, g: Geometry) -> tuple[Tensor, Tensor]:
    return t(1, g.tokens, g.hidden), t(1, g.tokens, g.hidden)


def _fp8_linear(t: Draw, g: Geometry) -> tuple[Any, ...]:
    # The block's first linear: queries, keys and values at once.
    x, out = _rows(t, g), 3 * g.heads * g.head_dim
    weight = _matrix(t, out, g.width)
    return *quantized(x.float()), *quantized(weight.float()), t(out), x.dtype


_ARGUMENTS: dict[str, Callable[[Draw, Geometry], tuple[Any, ...]]] = {
    "rms_norm": lambda t, g: (_rows(t, g), t(g.width), 1e-6),
    "rms_norm_modulate": _norm,
    "rms_norm_modulate_fp8": _norm,
    "gated_residual_norm": _residual_norm,
    "gated_residual_norm_fp8": _residual_norm,
    "gated_norm_residual": lambda t, g: (
        *(_rows(t, g), _rows(t, g)),
        *(t(g.width), t(1, g.width), 1e-5),
    ),
    "qk_norm_rope": _qk_norm_rope,
    "qkv_norm_rope": _qkv_norm_rope,
    "joint_attention": _joint_attention,
    "joint_attention_fp8": lambda t, g: _joint_attention(t, g)[:4],
    "swiglu": _halves,
    "swiglu_fp8": _halves,
    "quantize_rows": lambda t, g: (_rows(t, g),),
    "fp8_linear": _fp8_linear,
    "add_silu": lambda t, g: (_rows(t, g), t(1, g.width)),
    "sigma_gate": _sigma_gate,
    "sigma_gate_norm": _sigma_gate_norm,
    "sigma_gate_norm_fp8": _sigma_gate_norm,
    "local_decoder_down": _local_decoder_down,
    "local_decoder_pixels": _local_decoder_pixels,
    "local_decoder_up": _local_decoder_up,
    "pixel_embed": _pixel_embed,
    "pixel_adaln_compress": _pixel_compress,
    "pixel_adaln_mlp": _pixel_mlp,
    "pixel_head": _pixel_head,
    "pixel_head_step": _pixel_head_step,
}
