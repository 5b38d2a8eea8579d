"""Positional tables of the trunk: three-axis rotary angles, and the time embedding.

Evaluated on the CPU whatever the device of the result, in the precision of the released
implementation, so that every machine uses the same tables.

Source: L2P (arXiv 2605.12013), on the Z-Image transformer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import TIME_CHANNELS

TIME_MAX_PERIOD = 10000.0
Rope = tuple[Tensor, Tensor]


def image_positions(grid: tuple[int, int], rows: int, sequence: int) -> Tensor:
    """(rows, 3) int64: (sequence, row, column) of h*w tokens in raster order, then padding at 0."""
    h, w = grid
    where = torch.zeros(rows, 3, dtype=torch.int64, device="cpu")
    token = torch.arange(h * w, device="cpu")
    where[: h * w] = torch.stack((torch.full_like(token, sequence), token // w, token % w), -1)
    return where


def caption_positions(rows: int) -> Tensor:
    """(rows, 3) int64: (1 + k, 0, 0), padding rows included."""
    where = torch.zeros(rows, 3, dtype=torch.int64, device="cpu")
    where[:, 0] = torch.arange(1, rows + 1, device="cpu")
    return where


def rope_3d(
    positions: Tensor,
    axes_dims: tuple[int, int, int],
    *,
    theta: float = 256.0,
    device: torch.device | str | None = None,
) -> Rope:
    """cos and sin of position * theta^(-2j/D) per axis of D channels, each (rows, head_dim/2) fp32.

    Args:
        positions: (rows, 3) integers on the CPU.
        axes_dims: channels of a head that turn with each axis, in order of the pairs.
    """
    angles = []
    for position, width in zip(positions.double().unbind(-1), axes_dims, strict=True):
        slots = torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width
        angles.append(torch.outer(position, theta**-slots).float())
    angle = torch.cat(angles, -1)
    return angle.cos().to(device), angle.sin().to(device)


def time_frequencies() -> Tensor:
    """(128,) fp32, on the CPU."""
    half = TIME_CHANNELS // 2
    slots = torch.arange(half, dtype=torch.float32, device="cpu")
    return torch.exp(-math.log(TIME_MAX_PERIOD) * slots / half)


def time_embedding(t: Tensor, frequencies: Tensor | None = None) -> Tensor:
    """(B,) scaled times (1000 t) -> (B, 256) fp32, cosines first.

    Args:
        frequencies: `time_frequencies` on the device of t; None copies them there.
    """
    frequencies = time_frequencies().to(t.device) if frequencies is None else frequencies
    angle = t.float()[:, None] * frequencies
    return torch.cat((angle.cos(), angle.sin()), -1)
