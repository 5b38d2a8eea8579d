"""Overlapping tiles of an image, and the windows that blend them back.

All tiles of an image are equally large, so that they can be computed together and share tables.
They lie as evenly as the grid allows; two neighbours fade into each other in the middle of what
they share, over a part of `overlap`, and beyond the fade one of them counts alone.

A fade averages what two tiles made. Where that is grain on which they do not agree, up to half of
its energy is lost, over all of the fade: so a fade is as short as hides a step. What of the overlap
lies outside it is context, the part of a tile that knows least of what surrounds it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SizeError
from .lengths import pair_of_multiples

OVERLAP = 8  # one part in so many of a tile, where nothing is said
# One part in so many of the overlap: a grey ramp in tiles of the trained size then keeps its
# gradients' energy within the overlap to 2 %, which it does not over all of it.
FADE = 4
# Windows are multiples of it: products of two are exact in fp32, and so is their sum, which is 1.
# A step of a fade is then off by 2e-4 of the difference between two tiles.
WINDOW_STEP = 2**-11


@dataclass(frozen=True)
class Tile:
    """A tile's place: its first row and column, in cells."""

    row: int
    column: int


@dataclass(frozen=True)
class Layout:
    """How an image is cut. All lengths but `pixels` are (rows, columns) of cells.

    Args:
        size: of the image.
        tile: of every tile, at most the size.
        overlap: what neighbours share at least, at most a third of the tile; they fade into each
            other over a quarter of it.
        step: tiles begin at multiples of it; the lengths are multiples of it too.
        pixels: of a cell, along each axis.

    Raises:
        ValueError: lengths that fit neither each other nor the step.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    overlap: tuple[int, int]
    step: int
    pixels: int

    def __post_init__(self) -> None:
        for size, tile, overlap in zip(self.size, self.tile, self.overlap, strict=True):
            if any(n % self.step for n in (size, tile, overlap)):
                raise ValueError(
                    f"tiles: size, tile and overlap must be multiples of {self.step} cells, got "
                    f"{size}, {tile}, {overlap}"
                )
            if not 0 < tile <= size:
                raise ValueError(f"tiles: a tile must be 1 to {size} cells long, got {tile}")
            if tile < size and not 0 <= 3 * overlap <= tile:
                raise ValueError(
                    f"tiles: the overlap must be at least 0 and at most a third of the tile's "
                    f"{tile} cells, got {overlap}"
                )

    @functools.cached_property
    def starts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """First rows and first columns of the tiles, in cells."""
        return tuple(
            _starts(*lengths, self.step)
            for lengths in zip(self.size, self.tile, self.overlap, strict=True)
        )

    @functools.cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """Row by row."""
        rows, columns = self.starts
        return tuple(Tile(row, column) for row in rows for column in columns)

    @property
    def tile_pixels(self) -> tuple[int, int]:
        """(H, W) of a tile."""
        return self.tile[0] * self.pixels, self.tile[1] * self.pixels

    @property
    def image_pixels(self) -> tuple[int, int]:
        """(H, W) of the image."""
        return self.size[0] * self.pixels, self.size[1] * self.pixels

    def cells(self, x: Tensor, tile: Tile) -> Tensor:
        """The tile of a tensor (..., rows, columns) of cells; shares its memory."""
        h, w = self.tile
        return x[..., tile.row : tile.row + h, tile.column : tile.column + w]

    def crop(self, x: Tensor, tile: Tile) -> Tensor:
        """The tile of an image (..., H, W) in pixels; shares its memory."""
        (h, w), top, left = self.tile_pixels, tile.row * self.pixels, tile.column * self.pixels
        return x[..., top : top + h, left : left + w]

    def window(self, tile: Tile, device: torch.device | str = "cpu") -> Tensor:
        """(H, W) fp32 of a tile: its share of each pixel. Those of all tiles sum to 1, exactly."""
        down, across = (
            _window(starts, starts.index(first), tile_cells, overlap, self.pixels)
            for starts, first, tile_cells, overlap in zip(
                self.starts, (tile.row, tile.column), self.tile, self.overlap, strict=True
            )
        )
        return (down[:, None] * across).to(device)

    def groups(self, together: int) -> Iterator[tuple[Tile, ...]]:
        """The tiles in order, up to so many at once."""
        for first in range(0, len(self.tiles), together):
            yield self.tiles[first : first + together]


def cut(
    size: tuple[int, int],
    tile: tuple[int, int],
    overlap: int | None,
    *,
    step: int,
    pixels: int,
    unit: str,
) -> Layout | None:
    """The tiles of an image as asked for, or None where one tile is all of it.

    Args:
        size: of the image. tile: as asked for; cut to the image's size where it is more.
        overlap: along both axes; None is an eighth of the tile's.
        step, pixels: as for `Layout`.
        unit: of all lengths, for errors.

    Raises:
        SizeError: tile or overlap that do not fit the grid or each other.
    """
    tile = tuple(map(min, pair_of_multiples("tile", tile, step, unit), size))
    if tile == tuple(size):
        return None
    cut_axes = [t < n for t, n in zip(tile, size, strict=True)]
    if overlap is None:
        both = [min(max(step, t // OVERLAP), t // 3) // step * step for t in tile]
    else:
        most = min(t for t, is_cut in zip(tile, cut_axes, strict=True) if is_cut) // 3
        whole = isinstance(overlap, int) and not isinstance(overlap, bool)
        if not whole or not 0 <= overlap <= most or overlap % step:
            among = f", in multiples of {step}" if step > 1 else ""
            raise SizeError(
                f"overlap must be an integer of 0 to {most} {unit}, a third of the tile{among}, "
                f"got {overlap!r}"
            )
        both = [overlap, overlap]
    both = tuple(o if is_cut else 0 for o, is_cut in zip(both, cut_axes, strict=True))
    return Layout(tuple(size), tile, both, step, pixels)


def _starts(size: int, tile: int, overlap: int, step: int) -> tuple[int, ...]:
    """As few tiles as share at least the overlap, spread evenly."""
    if tile == size:
        return (0,)
    count = math.ceil((size - overlap) / (tile - overlap))
    last = (size - tile) // step
    return tuple((2 * i * last + count - 1) // (2 * (count - 1)) * step for i in range(count))


@functools.lru_cache(maxsize=256)
def _window(starts: tuple[int, ...], index: int, tile: int, overlap: int, pixels: int) -> Tensor:
    """Of one tile along one axis: 0, a rising fade, 1, a falling one, 0."""
    window = torch.ones(tile * pixels)
    own = starts[index]
    if index > 0:
        first, fade = _fade(starts[index - 1], own, tile, overlap, pixels)
        first -= own * pixels
        window[:first] = 0
        window[first : first + len(fade)] = fade
    if index + 1 < len(starts):
        first, fade = _fade(own, starts[index + 1], tile, overlap, pixels)
        first -= own * pixels
        window[first : first + len(fade)] = 1 - fade
        window[first + len(fade) :] = 0
    return window


def _fade(before: int, after: int, tile: int, overlap: int, pixels: int) -> tuple[int, Tensor]:
    """The pixel where the tile from cell `after` on begins to count, and its shares from there."""
    length = math.ceil(overlap * pixels / FADE)
    first = (before + tile + after) * pixels // 2 - length // 2
    at = (torch.arange(length, dtype=torch.float64) + 0.5) / max(1, length)
    shares = (1 - torch.cos(math.pi * at)) / 2
    return first, ((shares / WINDOW_STEP).round() * WINDOW_STEP).float()
