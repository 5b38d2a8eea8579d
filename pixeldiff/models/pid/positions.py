"""Positional tables: rotary angles of image and text rows, sin/cos of pixels, time embedding.

They depend on grid sizes only, and are evaluated on the CPU whatever the device of the result, in
the precision of the released implementation, so that every machine uses the same tables.

Source: PiD (arXiv 2605.23902) and its PixelDiT backbone.
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
    if mode not in ("ntk_aware", "original"):
        raise ValueError(f"rope_2d: mode must be ntk_aware or original, got {mode!r}")
    h, w = grid
    base_y = base_x = theta
    if mode == "ntk_aware":
        g = head_dim // 2
        k = g / (g - 2) if g > 2 else 0.0
        base_y *= (h / reference[0]) ** k
        base_x *= (w / reference[1]) ** k
    slots = torch.arange(0, head_dim, 4, dtype=torch.float32, device="cpu") / head_dim
    angle_x = torch.outer(torch.linspace(0, SPAN, w, device="cpu"), 1 / base_x**slots)
    angle_y = torch.outer(torch.linspace(0, SPAN, h, device="cpu"), 1 / base_y**slots)
    grids = (angle_x[None].expand(h, w, -1), angle_y[:, None].expand(h, w, -1))
    angle = torch.stack(grids, -1).reshape(h * w, head_dim // 2)
    return angle.cos().to(device), angle.sin().to(device)


def rope_1d(
    length: int, head_dim: int, *, theta: float = 10000.0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of the text's rotary angles, each (length, head_dim/2) fp32."""
    slots = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), 1 / theta**slots)
    return angle.cos().to(device), angle.sin().to(device)


def pixel_sincos(
    length: int, channels: int, *, start: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """One axis of the pixel table, [sin | cos] of position * 10000^(-j/m): (length, p/2) fp32.

    `channels` is the full width p, a multiple of 4, and m = p/4. A pixel's position is the entry of
    its column in the horizontal table, then of its row in the vertical one. Evaluated in fp64.
    """
    m = channels // 4
    freq = 10000.0 ** (-torch.arange(m, dtype=torch.float64, device="cpu") / m)
    angle = torch.arange(start, start + length, dtype=torch.float64, device="cpu")[:, None] * freq
    return torch.cat((angle.sin(), angle.cos()), -1).float().to(device)


def time_frequencies(device: torch.device | str = "cpu") -> Tensor:
    """(128,) fp32: exp(-ln(10) * i / 128) of an fp32 argument.

    The exponential itself is rounded from fp64: network times reach 1000, so that one ulp here is
    visible, and the fp32 exponential of different machines differs by as much.
    """
    half = TIME_CHANNELS // 2
    # On a GPU itself, which has fp64: a copy from here would wait for it, and no graph records one.
    where = device if torch.device(device).type == "cuda" else "cpu"
    argument = -math.log(TIME_MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=where)
    return (argument / half).double().exp().float().to(device)


def time_embedding(t: Tensor) -> Tensor:
    """(B,) network times (1000 * diffusion time) -> (B, 256) fp32, cosines first."""
    angle = t.float()[:, None] * time_frequencies(t.device)
    return torch.cat((angle.cos(), angle.sin()), -1)
