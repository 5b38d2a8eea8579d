"""Which tiles an image is cut in: as asked for, or as the network was trained."""

from __future__ import annotations

import math

from ...errors import SizeError
from ..tiles import Layout
from .config import PiDConfig
from .sizes import Size, is_trained_size, neighbours, output_size, trained_sizes
from .variants import Variant

Tiling = str | Size | None
_OVERLAP = 8  # one part in so many of a tile, where nothing is said


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
    step = cell_step(config)
    tile = tuple(min(t, n) for t, n in zip(_cells("tile", tile, step), latent_hw, strict=True))
    if tile == tuple(latent_hw):
        return None
    if overlap is None:
        both = [min(max(step, t // _OVERLAP), t // 3) // step * step for t in tile]
    else:
        both = [overlap if t < n else 0 for t, n in zip(tile, latent_hw, strict=True)]
        _check_overlap(overlap, min(t for t, n in zip(tile, latent_hw, strict=True) if t < n), step)
    pixels = config.pixels_per_latent_cell
    return Layout(tuple(latent_hw), tile, tuple(both), step, pixels)


def _cells(name: str, value: Size, step: int) -> Size:
    pair = tuple(value) if isinstance(value, tuple | list) else ()
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in pair):
        raise SizeError(f"{name} must be two positive integers (h, w) in latent cells, got {value}")
    if any(v % step for v in pair):
        nearest = f"{neighbours(pair[0], step)}, {neighbours(pair[1], step)}"
        raise SizeError(
            f"{name} (h, w) must be multiples of {step} latent cells, so that it consists of whole "
            f"patches, got {pair}; nearest: {nearest}"
        )
    return pair


def _check_overlap(overlap: int, tile: int, step: int) -> None:
    whole = isinstance(overlap, int) and not isinstance(overlap, bool)
    if not whole or not 0 <= 3 * overlap <= tile or overlap % step:
        among = f" and a multiple of {step}" if step > 1 else ""
        raise SizeError(
            f"overlap must be an integer of 0 to {tile // 3} latent cells, a third of the tile"
            f"{among}, got {overlap!r}"
        )
