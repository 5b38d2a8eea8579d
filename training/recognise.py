"""What a picture of a shape shows, told from its pixels: the score of a text-to-image model.

No learned parts: colours by distance, the shape by overlap with the drawn shapes, the texture by
how much of the background is dark and in how many directions it changes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from .shapes import COLOURS, SHAPES, coverage, tones

SIDE = 128  # pictures are looked at in this size
_BORDER = 7  # pixels at the edge that no shape reaches
_CELLS = 48  # along a side of the square that a shape is compared in
_AREA = 0.22  # of the square, that every shape is scaled to
LEAST_OVERLAP = 0.6  # intersection over union below which no shape is recognised
_TURNS = (-0.1, 0.0, 0.1)
_MATCHING_COLOUR = 0.25  # RGB distance to the nearest colour, beyond which it is none
_PLAIN = 0.07  # share of the background in its second tone, below which it has no texture
_DOTTED = 0.37  # and below which that are dots: stripes and checks take half
_ONE_DIRECTION = 0.6  # of 0 (changes in all directions) to 1 (in one)


@dataclass(frozen=True)
class Seen:
    """What is in a picture; None for what cannot be told."""

    shape: str | None
    colour: str | None
    background: str | None
    texture: str | None

    @property
    def combination(self) -> tuple[str | None, str | None, str | None, str | None]:
        return self.shape, self.colour, self.background, self.texture


def recognise(picture: np.ndarray | Image.Image) -> Seen:
    """What a square picture shows.

    Args:
        picture: (H, W, 3) uint8 or a Pillow image, of any size.
    """
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    border = np.ones((SIDE, SIDE), bool)
    border[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    away, darkness = {}, {}
    for name in COLOURS:
        away[name], darkness[name] = _from_tones(pixels, name)
    background = min(COLOURS, key=lambda name: np.minimum(away[name][border], 0.5).mean())
    if away[background][border].mean() > _MATCHING_COLOUR:
        return Seen(None, None, None, None)
    colour = _figure_colour(pixels, background, away[background])
    if colour is None:
        texture = _texture(darkness[background], np.ones((SIDE, SIDE), bool))
        return Seen(None, None, background, texture)
    mask = _distance(pixels, np.array(COLOURS[colour], np.float32)) < away[background]
    mask = _largest(mask & ~border)
    ground = ~ndimage.binary_dilation(mask, iterations=4)
    return Seen(_shape(mask), colour, background, _texture(darkness[background], ground))


def _distance(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    return np.sqrt(((pixels - colour) ** 2).sum(-1))


def _from_tones(pixels: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(distance to the mixtures of a background's two tones, share of the second one)."""
    bright, dark = tones(name)
    axis = dark - bright
    share = np.clip((pixels - bright) @ axis / (axis @ axis), 0, 1)
    return _distance(pixels, bright + share[..., None] * axis), share


def _figure_colour(pixels: np.ndarray, background: str, away: np.ndarray) -> str | None:
    """The colour of most pixels that are none of the background's."""
    names = [name for name in COLOURS if name != background]
    apart = np.stack([_distance(pixels, np.array(COLOURS[name], np.float32)) for name in names])
    nearest, least = apart.argmin(0), apart.min(0)
    clear = (least < _MATCHING_COLOUR) & (least < 0.7 * away)
    votes = np.bincount(nearest[clear], minlength=len(names))
    return names[int(votes.argmax())] if votes.max() > 0.01 * SIDE * SIDE else None


def _largest(mask: np.ndarray) -> np.ndarray:
    parts, count = ndimage.label(mask)
    if not count:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return parts == sizes.argmax()


def _shape(mask: np.ndarray) -> str | None:
    if not mask.any():
        return None
    normalised = _normalised(mask)
    overlaps = {
        name: max(_overlap(normalised, template) for template in _templates(name))
        for name in SHAPES
    }
    best = max(overlaps, key=overlaps.get)
    return best if overlaps[best] >= LEAST_OVERLAP else None


def _normalised(mask: np.ndarray) -> np.ndarray:
    """(_CELLS, _CELLS) bool: the mask scaled to an area of its own about its centre of mass."""
    middle = np.array(ndimage.center_of_mass(mask))
    step = np.sqrt(mask.sum() / _AREA) / _CELLS  # pixels from cell to cell
    cells = (np.mgrid[0:_CELLS, 0:_CELLS] + 0.5 - _CELLS / 2) * step
    places = middle[:, None, None] + cells
    return ndimage.map_coordinates(mask.astype(np.float32), places, order=1) > 0.5


@functools.cache
def _templates(shape: str) -> tuple[np.ndarray, ...]:
    return tuple(
        _normalised(coverage(shape, SIDE, (0.5, 0.5), 0.35, turn) > 0.5) for turn in _TURNS
    )


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def _texture(darkness: np.ndarray, ground: np.ndarray) -> str:
    dark = float((darkness[ground] > 0.5).mean())
    if dark < _PLAIN:
        return "plain"
    if dark < _DOTTED:
        return "dotted"
    smooth = ndimage.gaussian_filter(darkness, 1.5)
    dy, dx = np.gradient(smooth)
    xx, yy, xy = ((a * b)[ground].sum() for a, b in ((dx, dx), (dy, dy), (dx, dy)))
    one_way = np.hypot(xx - yy, 2 * xy) / (xx + yy + 1e-9)
    return "striped" if one_way > _ONE_DIRECTION else "checkered"
