"""Which tiles an image is cut in: as asked for, or as the network was trained."""

from __future__ import annotations

import math

from ..tiles import Layout, cut
from .config import PiDConfig
from .sizes import Size, is_trained_size, output_size, trained_sizes
from .variants import Variant

Tiling = str | Size | None


def trained_tile(config: PiDConfig, variant: Variant | None) -> Size:
    """(zh, zw), cells of the largest square image that the network was trained at.

    For a network that was never released, of the size that its positions refer to.
    """
    if variant is None:
        pixels = (config.rope_ref_h, config.rope_ref_w)
    else:
        squares = [s for s in trained_sizes(variant) if s[0] == s[1]]
        pixels = max(squares or trained_sizes(variant))
    step = cell_step(config)
    rows, columns = (p // config.pixels_per_latent_cell // step * step for p in pixels)
    return max(rows, step), max(columns, step)


def cell_step(config: PiDConfig) -> int:
    """Tiles begin and end at multiples of so many cells, so that they consist of whole patches."""
    return config.patch_size // math.gcd(config.patch_size, config.pixels_per_latent_cell)


def tile_layout(
    config: PiDConfig,
    variant: Variant | None,
    latent_hw: Size,
    tile: Tiling,
    overlap: int | None,
) -> Layout | None:
    """The tiles of an image, or None where it is decoded in one piece.

    Args:
        latent_hw: (zh, zw), cells of the latent.
        tile: (h, w) of a tile in cells, cut to the latent's where they are more; "auto", none where
            the network was trained at the image's size, else `trained_tile`; or None.
        overlap: in cells, along both axes; None is an eighth of the tile's.

    Raises:
        SizeError: tile or overlap do not fit the grid or each other. ValueError: another word.
    """
    if tile is None:
        if overlap is not None:
            raise ValueError("overlap is of tiles; pass tile=(h, w) or tile='auto' with it")
        return None
    if isinstance(tile, str):
        if tile != "auto":
            raise ValueError(f"tile must be None, 'auto' or (h, w) in latent cells, got {tile!r}")
        if variant is not None and is_trained_size(variant, output_size(config, latent_hw)):
            return None
        tile = trained_tile(config, variant)
    pixels = config.pixels_per_latent_cell
    return cut(
        tuple(latent_hw), tile, overlap, step=cell_step(config), pixels=pixels, unit="latent cells"
    )
