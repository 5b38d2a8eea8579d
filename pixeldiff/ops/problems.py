"""The class of problem that a call is: what decides which backend of an op is the fastest.

A class is (kind, size). `kind` holds what changes a kernel's code or what limits it: dtype, head
dim, channels, what is optional. `size` is what grows with the image or the batch, as the nearest
power of two: launches, waves of blocks and caches matter by factors, not by rows, so that no size
of image is a class of its own.

A call is first described in a few raw numbers, since every call on a GPU is; the words of its class
are made of those once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# (what grows, what else decides): dtype, widths and whether something is there.
Raw = tuple[Any, ...]


@dataclass(frozen=True)
class Classes:
    """Of one op. `words` names the values of `describe` after the first: a dtype is its own name, a
    number follows its word, and a word alone says that something is there.

    A word ending in "<=" is of a width that a kernel rounds up to a power of two.
    """

    describe: Callable[..., Raw]
    words: tuple[str, ...]

    def kind(self, raw: Raw) -> str:
        """ "bfloat16 d64 mask" """
        said = (_said(word, v) for word, v in zip(self.words, raw[1:], strict=True))
        return " ".join(filter(None, said))


def problem(op: str, args: tuple[Any, ...]) -> tuple[str, int]:
    """(kind, size) of a call of `op`; `args` in schema order."""
    classes = classes_of(op)
    raw = classes.describe(*args)
    return classes.kind(raw), power(raw[0])


def classes_of(op: str) -> Classes:
    return _CLASSES.get(op, _ROWS)


def power(n: int) -> int:
    """The exponent of the power of two nearest to n by ratio; -1 of nothing."""
    return ((2 * n * n).bit_length() - 1) >> 1


def _said(word: str, value: Any) -> str:
    if isinstance(value, torch.dtype):
        return word + str(value).removeprefix("torch.")
    if isinstance(value, bool):
        return word if value else ""
    return f"{word}{1 << (value - 1).bit_length() if word.endswith('<=') else value}"


def _rows(x: Tensor, *_: Any) -> Raw:
    width = x.shape[-1]
    return x.numel() // (width or 1), x.dtype, width


def _attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, lse: bool = False
) -> Raw:
    # Head dim sets the balance of products and exponentials; a mask and the log-sum-exp, who can
    # take the call at all. The keys are what a tile of queries goes through.
    _, keys, _, d = k.shape
    return keys, q.dtype, d, mask is not None, lse


def _qk(x: Tensor, q_weight: Tensor, *_: Any) -> Raw:
    batch, rows, _ = x.shape
    return batch * rows, x.dtype, q_weight.numel()


def _qkv(x: Tensor, weight: Tensor, q_weight: Tensor, *_: Any) -> Raw:
    return _qk(x, q_weight)


def _gate(x: Tensor, feature: Tensor, weight: Tensor, *_: Any) -> Raw:
    # One logit a channel is a matrix product, one logit a token a single pass.
    return *_rows(x), weight.shape[0] == 1


def _linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Any
) -> Raw:
    rows, _, k = _rows(x)
    return rows, out, k, weight.shape[0]


def _patches(x: Tensor, *_: Any) -> Raw:
    # (patches, pixels of one, channels); the pixels of (pictures, height, width, channels).
    channels = x.shape[-1]
    return x.numel() // (channels or 1), x.dtype, channels


def _embed(image: Tensor, weight: Tensor, *_: Any) -> Raw:
    # The image is fp32 whatever the network is.
    return image.numel() // 3, weight.dtype, weight.shape[0]


def _down(x: Tensor, weight: Tensor, *_: Any) -> Raw:
    # A level is its channels, read and made. The first level's image is fp32.
    out, channels, _, _ = weight.shape
    return x.numel() // (channels or 1), weight.dtype, channels, out


def _up(
    x: Tensor, skip: Tensor, up_weight: Tensor, up_bias: Tensor, weight: Tensor, bias: Tensor
) -> Raw:
    out, channels, _, _ = weight.shape
    return 2 * skip.numel() // (channels or 1), x.dtype, channels, out


def _mixed(x: Tensor, weight: Tensor, bias: Tensor, guidance: Tensor | None) -> Raw:
    # With guidance two pictures are read for one.
    return *_patches(x), guidance is not None


_ROWS = Classes(_rows, ("", "D<="))
_GATE = Classes(_gate, ("", "D<=", "one a token"))
_PATCHES = Classes(_patches, ("", "p"))
_CLASSES: dict[str, Classes] = {
    "joint_attention": Classes(_attention, ("", "d", "mask", "lse")),
    "joint_attention_fp8": Classes(_attention, ("", "d", "mask", "lse")),
    "qk_norm_rope": Classes(_qk, ("", "d")),
    "qkv_norm_rope": Classes(_qkv, ("", "d")),
    "sigma_gate": _GATE,
    "sigma_gate_norm": _GATE,
    "sigma_gate_norm_fp8": _GATE,
    "fp8_linear": Classes(_linear, ("to ", "K<=", "N<=")),
    "pixel_adaln_compress": _PATCHES,
    "pixel_adaln_mlp": _PATCHES,
    "pixel_head": _PATCHES,
    "pixel_head_step": _PATCHES,
    "pixel_embed": Classes(_embed, ("", "p")),
    "local_decoder_down": Classes(_down, ("", "from c", "to c")),
    "local_decoder_up": Classes(_up, ("", "from c", "to c")),
    "local_decoder_pixels": Classes(_mixed, ("", "p", "guided")),
}
