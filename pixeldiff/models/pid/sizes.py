"""Output sizes: what the network can produce, and what it was trained to produce.

Source: PiD, arXiv 2605.23902, and the size buckets of its published training configurations.
"""

from __future__ import annotations

import functools
import math
import warnings

from ...errors import SizeError, UntrainedSizeWarning
from ..lengths import neighbours
from .backbones import BACKBONES
from .config import PiDConfig
from .variants import Variant

Size = tuple[int, int]

# (height, width), landscape and square; portrait sizes are their transposes.
_BUCKETS_2K = ((2048, 2048), (1728, 2304), (1536, 2688), (1792, 2688))
# Aspect ratio (width, height) -> largest sizes of the two trainings beyond 2k.
_LARGEST = {
    (1, 1): ((3584, 3584), (4096, 4096)),
    (4, 3): ((2816, 4096), (3072, 4096)),
    (16, 9): ((2176, 4096), (2304, 4096)),
    (3, 2): ((2688, 4096), (2688, 4096)),
}
_LEVELS = range(2048, 3841, 256)
_LEVEL_STEP = 64
# How far beyond the trained areas and aspect ratios a size still counts as trained.
_SLACK = 1.1


def output_size(config: PiDConfig, latent_hw: Size) -> Size:
    """(H, W) of a latent's own image: latent x spatial factor x sr_scale, per axis."""
    cell = config.pixels_per_latent_cell
    return latent_hw[0] * cell, latent_hw[1] * cell


@functools.cache
def trained_sizes(variant: Variant) -> tuple[Size, ...]:
    """(H, W) of every size bucket a released network was trained at, smallest area first."""
    family = BACKBONES.get(variant.family or "")
    if family is not None and family.grid is not None:
        return (output_size(variant.config, family.grid),)
    if variant.resolution == "2k":
        landscape = set(_BUCKETS_2K)
    else:
        landscape = {size for largest in _LARGEST.values() for size in largest}
        for (w, h), (clip, _) in _LARGEST.items():
            for level in _LEVELS:
                size = (_round(level * math.sqrt(h / w)), _round(level * math.sqrt(w / h)))
                landscape.add((min(size[0], clip[0]), min(size[1], clip[1])))
    both = landscape | {(w, h) for h, w in landscape}
    return tuple(sorted(both, key=lambda s: (s[0] * s[1], s)))


def is_trained_size(variant: Variant, size: Size) -> bool:
    """Whether (H, W) lies among the trained sizes, or within 10 % of their areas and aspects.

    Networks whose generator has one latent grid (dinov2, siglip) have one size only.
    """
    trained = trained_sizes(variant)
    if len(trained) == 1:
        return tuple(size) == trained[0]
    areas = [h * w for h, w in trained]
    longest = max(max(s) / min(s) for s in trained)
    area, aspect = size[0] * size[1], max(size) / min(size)
    return min(areas) / _SLACK <= area <= max(areas) * _SLACK and aspect <= longest * _SLACK


def nearest_trained_sizes(variant: Variant, size: Size, count: int = 3) -> tuple[Size, ...]:
    """The trained sizes nearest to (H, W), nearest first."""

    def distance(other: Size) -> float:
        area = math.log(size[0] * size[1] / (other[0] * other[1]))
        aspect = math.log(size[0] / size[1] * other[1] / other[0])
        # Another aspect ratio changes the picture, another area only its resolution.
        return math.hypot(area, 4 * aspect)

    return tuple(sorted(trained_sizes(variant), key=distance)[:count])


def check_size(
    config: PiDConfig, latent_hw: Size, size: Size | None = None, variant: Variant | None = None
) -> Size:
    """The output size (H, W) in pixels for a latent, checked.

    Args:
        config: geometry of the network.
        latent_hw: (zh, zw), cells of the latent as PiD takes it.
        size: (H, W) asked for; None is the latent's own, see `output_size`.
        variant: released network, whose trained sizes are then compared.

    Warns:
        UntrainedSizeWarning: `size` is not the latent's own, or `variant` was not trained near it;
            names the nearest sizes that are.

    Raises:
        SizeError: a size that is not a multiple of the patch size; names the nearest legal ones.
    """
    zh, zw = _pair("latent_hw", latent_hw)
    own = output_size(config, (zh, zw))
    patch = config.patch_size
    if size is None:
        size = own
        if own[0] % patch or own[1] % patch:
            # Only where several latent cells make up one patch.
            step = patch // math.gcd(patch, config.pixels_per_latent_cell)
            raise SizeError(
                f"check_size: a latent of {zh} x {zw} cells makes {own[0]} x {own[1]} pixels, no "
                f"multiple of patch_size {patch}; its height and width must be multiples of {step}"
                f": {neighbours(zh, step)} x {neighbours(zw, step)}"
            )
    else:
        size = _pair("size", size)
        if size[0] % patch or size[1] % patch:
            raise SizeError(
                f"check_size: size (H, W) must be multiples of patch_size {patch}, got {size}; "
                f"nearest: H {neighbours(size[0], patch)}, W {neighbours(size[1], patch)}"
            )
    if size != own:
        _warn(
            f"{_text(size)} is not the latent's own size {_text(own)}: the latent is stretched to "
            "it, which blurs or distorts; decode the own size and resize the image instead"
        )
    if variant is not None and not is_trained_size(variant, size):
        nearest = ", ".join(_text(s) for s in nearest_trained_sizes(variant, size))
        _warn(
            f"{variant.name} was not trained near {_text(size)} (H x W); expect colour bands, "
            f"blocks or blur. Nearest trained sizes: {nearest}"
        )
    return size


def _warn(message: str) -> None:
    warnings.warn(f"check_size: {message}", UntrainedSizeWarning, stacklevel=3)


def _pair(name: str, value: Size) -> Size:
    pair = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in pair):
        raise SizeError(f"check_size: {name} must be two positive integers (H, W), got {value!r}")
    return pair


def _round(value: float) -> int:
    return round(value / _LEVEL_STEP) * _LEVEL_STEP


def _text(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
