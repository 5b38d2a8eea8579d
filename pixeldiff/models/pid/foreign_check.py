"""Whether an adopted network computes what its own forward computes, by one small call."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import AccelerationError
from .config import PiDConfig

# Relative RMS difference. Two right implementations differ by 1e-6 to 1e-4 in fp32 and by 1e-2 to
# 5e-2 in 16 bits; another activation, table or order of terms by more than this.
LIMIT = {torch.float64: 1e-3, torch.float32: 1e-3}
LIMIT_16_BITS = 0.15


@torch.no_grad()
def check_results(
    who: str,
    own: Callable[..., Tensor],
    ours: Callable[..., Tensor],
    config: PiDConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Call both with the same random image of a few patches.

    16-bit weights run under autocast, which the published network needs with them.

    Raises:
        AccelerationError: they differ, or the network's own result cannot tell.
    """
    given = {k: v.to(device) for k, v in _inputs(config).items()}
    if dtype == torch.float64:
        given = {k: v.double() for k, v in given.items()}
    context = contextlib.nullcontext()
    if dtype not in LIMIT:
        context = torch.autocast(device.type, dtype)
    with context:
        want, got = own(**given).double(), ours(**given).double()
    scale = want.square().mean().sqrt().item()
    if not math.isfinite(scale) or scale == 0:
        what = "zeros" if scale == 0 else "NaN or infinity"
        raise AccelerationError(
            f"accelerate(verify=True): {who} returns {what}, which verifies nothing; load its "
            "weights first"
        )
    difference = (got - want).square().mean().sqrt().item() / scale
    limit = LIMIT.get(dtype, LIMIT_16_BITS)
    if not difference <= limit:
        raise AccelerationError(
            f"accelerate(verify=True): {who} computes something else than a PiD network of its "
            f"geometry: relative difference {difference:.2g}, expected at most {limit:g}"
        )


def _inputs(config: PiDConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    # Whole latent cells, more than one patch, and not square: an exchanged axis shows.
    has_latent = config.lq_latent_channels is not None
    cell = math.lcm(config.patch_size, config.pixels_per_latent_cell if has_latent else 1)
    height, width = 2 * cell, 3 * cell
    given = {
        "x": draw(1, config.in_channels, height, width),
        "t": torch.tensor([500.0]),
        "y": draw(1, min(5, config.txt_max_length), config.txt_embed_dim),
    }
    if has_latent:
        per_cell = config.pixels_per_latent_cell
        latent = (1, config.lq_latent_channels, height // per_cell, width // per_cell)
        given |= {"lq_latent": draw(*latent), "degrade_sigma": torch.tensor([0.3])}
    return given
