"""Small valid arguments for every op: to ask backends about a machine, and to try an op out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

D, HEADS, HEAD_DIM, TOKENS, TEXT, PATCH, PIXEL, ATTN = 128, 2, 64, 4, 3, 16, 16, 144


def arguments(op: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
    """Arguments of `op` in schema order, with the head and pixel widths of the released networks.

    Raises:
        KeyError: no such op.
    """
    generator = torch.Generator().manual_seed(0)

    def t(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return _ARGUMENTS[op](t)


def _rope(t: Callable[..., Tensor], rows: int) -> tuple[Tensor, Tensor]:
    angle = t(rows, HEAD_DIM // 2, dtype=torch.float32)
    return angle.cos(), angle.sin()


def _qk_norm_rope(t: Callable[..., Tensor]) -> tuple[Any, ...]:
    image = (t(1, TOKENS, 3 * D), t(HEAD_DIM), t(HEAD_DIM), *_rope(t, TOKENS))
    text = (t(1, TEXT, 3 * D), t(HEAD_DIM), t(HEAD_DIM), *_rope(t, TEXT))
    return (*image, *text, HEADS, 1e-6)


def _pixel_stream(t: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    return t(TOKENS, PATCH**2, PIXEL), t(TOKENS, D)


def _ada(t: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    rows = 6 * PIXEL * PATCH**2
    return t(rows, D), t(rows)


def _pixel_mlp(t: Callable[..., Tensor]) -> tuple[Any, ...]:
    width = PATCH**2 * PIXEL
    expand, hidden = (t(width, ATTN), t(width)), 4 * PIXEL
    mlp = (t(hidden, PIXEL), t(hidden), t(PIXEL, hidden), t(PIXEL))
    return (*_pixel_stream(t), t(TOKENS, ATTN), *expand, *_ada(t), t(PIXEL), *mlp, 1e-6)


def _pixel_compress(t: Callable[..., Tensor]) -> tuple[Any, ...]:
    compress = (t(ATTN, PATCH**2 * PIXEL), t(ATTN))
    return (*_pixel_stream(t), *_ada(t), t(PIXEL), *compress, 1e-6)


def _pixel_embed(t: Callable[..., Tensor]) -> tuple[Any, ...]:
    table = t(2 * PATCH, PIXEL // 2, dtype=torch.float32)
    return (_image(t), t(PIXEL, 3), t(PIXEL), table, table, PATCH)


def _image(t: Callable[..., Tensor]) -> Tensor:
    return t(1, 3, 2 * PATCH, 2 * PATCH, dtype=torch.float32)


def _head(t: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    return t(TOKENS, PATCH**2, PIXEL), t(PIXEL), t(3, PIXEL), t(3)


_ARGUMENTS: dict[str, Callable[[Callable[..., Tensor]], tuple[Any, ...]]] = {
    "rms_norm": lambda t: (t(1, TOKENS, D), t(D), 1e-6),
    "rms_norm_modulate": lambda t: (t(1, TOKENS, D), t(D), t(1, D), t(1, D), 1e-6),
    "gated_residual_norm": lambda t: (
        *(t(1, TOKENS, D), t(1, TOKENS, D), t(1, D)),
        *(t(D), t(1, D), t(1, D), 1e-6),
    ),
    "qk_norm_rope": _qk_norm_rope,
    "joint_attention": lambda t: (
        *(t(1, TOKENS, HEADS, HEAD_DIM), t(1, TOKENS, HEADS, HEAD_DIM)),
        *(t(1, TOKENS, HEADS, HEAD_DIM), HEAD_DIM**-0.5),
    ),
    "swiglu": lambda t: (t(1, TOKENS, D), t(1, TOKENS, D)),
    "sigma_gate": lambda t: (t(1, TOKENS, D), t(1, TOKENS, D), t(D, D), t(1, TOKENS, D)),
    "pixel_embed": _pixel_embed,
    "pixel_adaln_compress": _pixel_compress,
    "pixel_adaln_mlp": _pixel_mlp,
    "pixel_head": lambda t: (*_head(t), 2 * PATCH, 2 * PATCH, PATCH, 1e-6),
    "pixel_head_step": lambda t: (
        *(*_head(t), _image(t), _image(t), 0.866, 0.634),
        *(False, False, True, True, PATCH, 1e-6),
    ),
}
