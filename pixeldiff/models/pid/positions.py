"""Positional tables: rotary angles of image and text rows, sin/cos of pixels, time embedding.

They depend on grid sizes only. Source: PiD (arXiv 2605.23902) and its PixelDiT backbone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SPAN = 16.0  # rotary coordinates run over [0, 16] whatever the grid
TIME_CHANNELS = 256
TIME_MAX_PERIOD = 10.0


def rope_2d(
    grid: tuple[int, int],
    head_dim: int,
    *,
    mode: str = "ntk_aware",
    reference: tuple[int, int] | None = None,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of the image's rotary angles, each (h*w, head_dim/2) fp32, raster order.

    Even slots turn with the column, odd slots with the row. "ntk_aware" rescales the base of each
    axis by (grid / reference)^(g/(g-2)), g = head_dim/2; it equals "original" when they are equal.

    Args:
        grid: (h, w) in patches.
        head_dim: a multiple of 4.
        mode: "ntk_aware" or "original".
        reference: (h, w) of the reference grid in patches; needed by "ntk_aware".
        theta: the unscaled base.
    """
    h, w = grid
    base_y = base_x = theta
    if mode == "ntk_aware":
        g = head_dim // 2
        k = g / (g - 2) if g > 2 else 0.0
        base_y *= (h / reference[0]) ** k
        base_x *= (w / reference[1]) ** k
    slots = torch.arange(head_dim // 4, dtype=torch.float64, device=device) * (-4 / head_dim)
    y = torch.linspace(0, SPAN, h, dtype=torch.float32, device=device).double()
    x = torch.linspace(0, SPAN, w, dtype=torch.float32, device=device).double()
    angle_x = (x[:, None] * base_x**slots).expand(h, w, -1)
    angle_y = (y[:, None] * base_y**slots)[:, None].expand(h, w, -1)
    angle = torch.stack((angle_x, angle_y), -1).reshape(h * w, head_dim // 2)
    return angle.cos().float(), angle.sin().float()


def rope_1d(
    length: int, head_dim: int, *, theta: float = 10000.0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of the text's rotary angles, each (length, head_dim/2) fp32."""
    slots = torch.arange(head_dim // 2, dtype=torch.float64, device=device) * (-2 / head_dim)
    rows = torch.arange(length, dtype=torch.float64, device=device)
    angle = rows[:, None] * theta**slots
    return angle.cos().float(), angle.sin().float()


def pixel_sincos(
    length: int, channels: int, *, start: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """One axis of the pixel table: [sin | cos] of position * 10000^(-j/m), (length, channels/2) fp32.

    channels = p is the full width (a multiple of 4), m = p/4. The table of a pixel is its column's
    row of this, then its row's. Evaluated in fp64.
    """
    m = channels // 4
    freq = 10000.0 ** (-torch.arange(m, dtype=torch.float64, device=device) / m)
    angle = torch.arange(start, start + length, dtype=torch.float64, device=device)[:, None] * freq
    return torch.cat((angle.sin(), angle.cos()), -1).float()


def time_frequencies(device: torch.device | str | None = None) -> Tensor:
    """(128,) fp32. Rounded in fp32 at each step: arguments reach 999, so one ulp here is visible."""
    half = TIME_CHANNELS // 2
    log_period = torch.tensor(-math.log(TIME_MAX_PERIOD), dtype=torch.float32, device=device)
    return torch.exp(log_period * torch.arange(half, dtype=torch.float32, device=device) / half)


def time_embedding(t: Tensor) -> Tensor:
    """(B,) network times (1000 * diffusion time) -> (B, 256) fp32, cosines first."""
    angle = t.float()[:, None] * time_frequencies(t.device)
    return torch.cat((angle.cos(), angle.sin()), -1)
