"""The latent branch's convolutions where one of their tensors is large: in place, in bands of rows.

As written they hold five such tensors on a CPU: the stream, what is normed, padded and multiplied,
and copies in the multiplication's own layout. That is the peak of a decode in independent tiles,
which holds nothing else of the picture's size. Here it is two and a quarter: the stream, and one
that is overwritten. A norm needs all of a group of channels and nothing of the others; a
convolution of 3 x 3 needs a row more than it makes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, group_norm, pad, silu

LARGE = 1 << 28  # bytes of a tensor; at 4096 x 4096 in bf16 a released network's has 67 MB
_BAND = 1 << 25  # bytes of the rows that are convolved at a time


def is_large(batch: int, channels: int, grid: tuple[int, int], dtype: torch.dtype) -> bool:
    return batch * channels * grid[0] * grid[1] * dtype.itemsize > LARGE


def convolved(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv(x), 3 x 3 with a padding of 1, made in bands of rows."""
    out = x.new_empty(x.shape[0], conv.out_channels, *x.shape[2:])
    for first, last in _bands(out):
        above = x[:, :, first - 1 : first] if first else None
        out[:, :, first:last] = _rows(x, first, last, above, conv)
    return out


def convolve_(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv(x) in the memory of x, as many channels as it makes."""
    above = None
    for first, last in _bands(x):
        next_above = x[:, :, last - 1 : last].clone()
        x[:, :, first:last] = _rows(x, first, last, above, conv)
        above = next_above
    return x


def add_convolved_(out: Tensor, x: Tensor, conv: nn.Conv2d) -> Tensor:
    """out + conv(x) in the memory of out."""
    for first, last in _bands(x):
        above = x[:, :, first - 1 : first] if first else None
        out[:, :, first:last] += _rows(x, first, last, above, conv)
    return out


def normed(x: Tensor, norm: nn.GroupNorm, out: Tensor) -> Tensor:
    """silu(norm(x)) in `out`, which may be x."""
    for g in range(norm.num_groups):
        size = x.shape[1] // norm.num_groups
        part = slice(g * size, (g + 1) * size)
        affine = norm.weight[part], norm.bias[part]
        out[:, part] = silu(group_norm(x[:, part], 1, *affine, norm.eps), inplace=True)
    return out


def _rows(x: Tensor, first: int, last: int, above: Tensor | None, conv: nn.Conv2d) -> Tensor:
    """Rows of conv(x), with the row above them, since that of x may be overwritten already."""
    below = min(last + 1, x.shape[2])
    part = x[:, :, first:below] if above is None else torch.cat((above, x[:, :, first:below]), 2)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    part = pad(part, (1, 1, int(above is None), int(below == last)), mode=mode)
    return conv2d(part, conv.weight, conv.bias)


def _bands(x: Tensor) -> list[tuple[int, int]]:
    batch, channels, height, width = x.shape
    rows = max(1, _BAND // (batch * channels * width * x.element_size()))
    return [(i, min(i + rows, height)) for i in range(0, height, rows)]
