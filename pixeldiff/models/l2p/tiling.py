"""Denoising an image in overlapping tiles, for sizes beyond what a network was trained at.

In every step each tile is predicted as an image of its own, with positions of its own and the whole
prompt, and the predictions are blended before the step is made. All tiles share what `guided`
prepares, since it depends on size and prompt alone.

Source: tiled sampling of overlapping windows, MultiDiffusion (arXiv 2302.08113).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...jobs import Stages
from ...jobs.store import PLACES
from ..lengths import pair_of_multiples
from ..steps import TileCallback, TileInfo, report_tile
from ..tiles import Layout, Tile, cut
from .config import L2PConfig, Variant
from .sampler import Prediction
from .sizes import check_size

Tiling = str | tuple[int, int] | None


def tile_layout(
    config: L2PConfig,
    variant: Variant | None,
    size: tuple[int, int],
    tile: Tiling,
    overlap: int | None,
) -> Layout | None:
    """The tiles of an image, or None where it is made in one piece.

    Args:
        size: (H, W) of the image in pixels.
        tile: (h, w) in pixels, cut to the image's where they are more; "auto", squares of the
            variant's own size; or None.
        overlap: in pixels, along both axes; None is an eighth of the tile's.

    Raises:
        SizeError: size, tile or overlap do not fit the patches or each other. ValueError: another
            word, or "auto" of a network that was never released.
    """
    if tile is None:
        if overlap is not None:
            raise ValueError("overlap is of tiles; pass tile=(h, w) or tile='auto' with it")
        return None
    if isinstance(tile, str):
        if tile != "auto" or variant is None:
            known = "" if variant else "; 'auto' is for released networks"
            raise ValueError(f"tile must be None, 'auto' or (h, w) in pixels, got {tile!r}{known}")
        tile = (variant.native_size,) * 2
    step = config.size_multiple
    size = pair_of_multiples("size", size, step, "pixels")
    layout = cut(size, tile, overlap, step=step, pixels=1, unit="pixels")
    if layout is not None:
        check_size(config, layout.tile)
    return layout


class TiledPrediction:
    """predict(x, t) -> u of a whole image, tile by tile, for the steps of one image.

    Args:
        tile: the prediction at a tile's size.
        layout: of the image.
        steps: how many calls are to come.
        stages: where finished tiles are kept; its first steps are not made again.
        callback: told after each tile; returning False stops.
    """

    def __init__(
        self,
        tile: Prediction,
        layout: Layout,
        steps: int,
        stages: Stages,
        callback: TileCallback | None = None,
    ) -> None:
        self._tile, self._layout, self._callback = tile, layout, callback
        self._stages, self._step, self._steps = stages, stages.first, steps

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """u (B, 3, H, W) fp32, the negative velocity, at x (B, 3, H, W)."""
        out, tiles, layout = torch.zeros_like(x), self._layout.tiles, self._layout
        self._step += 1
        for i, tile in enumerate(tiles):
            call = partial(self._call, x, t, tile)
            u = self._stages.part(self._step, f"tile-{i + 1:0{PLACES}d}", call)
            layout.crop(out, tile).addcmul_(u, layout.window(tile, x.device))
            report_tile(self._callback, TileInfo(self._step, self._steps, i + 1, len(tiles)))
        return out

    def _call(self, x: Tensor, t: float, tile: Tile) -> Tensor:
        return self._tile(self._layout.crop(x, tile).contiguous(), t)
