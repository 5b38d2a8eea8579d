"""Sampling an image in tiles of its latent, each at most as large as the network was trained for.

A tile is a whole image to the network, its positions are its own; but the latent's branch, whose
norms are taken over the whole picture, sees the latent in one piece, and each tile gets what of its
result lies under it. On its own a tile of sky would be normalised until it shows grain. Two ways:

    sync         every network call goes tile by tile, and the tiles' results are blended before
                 the sampler moves on: one image all the way, without seams
    independent  every tile is sampled to its end alone and blended once: nothing is exchanged
                 between them, so that workers can share an image

With windows that sum to 1, blending velocities is blending the estimates of the image that they
stand for, x - t v: all tiles have the same x.

Source: tiled sampling of overlapping windows, MultiDiffusion (arXiv 2302.08113); PiD itself
(arXiv 2605.23902) decodes images whole.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...errors import MemoryWarning
from ...jobs import Stages
from ...jobs.store import PLACES
from ...ops.pixel_head_step import update
from ...out_of_memory import is_out_of_memory
from ..devices import kind_of
from ..guards import Watch
from ..noise import NoiseSource
from ..steps import Callback, TileCallback, TileInfo, report_tile
from ..tile_noise import SquareNoise
from ..tiles import Layout, Tile
from .network import PiDCondition, PiDNet, Tables
from .samplers import Draw, network_time, run_student, sample_teacher

MODES = ("sync", "independent")
# Pixels of a band of the sampler's arithmetic, in fp64 8 MB a value and channel. A CPU gains
# nothing by so many, and glibc's heap would keep several of the blocks for each that lives.
_BAND, _BAND_ON_CPU = 1 << 20, 1 << 18


@dataclass(frozen=True)
class TiledSampling:
    """What is sampled, and how.

    Args:
        latent, caption, sigma: (B, Cz, zh, zw), (B, T, E), (B,), as for `PiDNet.prepare`.
        negative: (B, T', E) for guidance, or None.
        layout: tiles of the latent.
        together: tiles in one network call.
        times, tables: of the schedule, and of a tile's size.
        pixel_chunk: as for `PiDNet.prepare`.
        student: whether the network is a distilled one; `sample_type` and `state_dtype` are its
            sampler's, `cfg_scale` is the teacher's.
    """

    latent: Tensor
    caption: Tensor
    sigma: Tensor
    negative: Tensor | None
    layout: Layout
    together: int
    times: tuple[float, ...]
    tables: Tables
    student: bool
    sample_type: str
    prediction_type: str
    state_dtype: torch.dtype
    cfg_scale: float
    pixel_chunk: int | None = None


class Tiles:
    """The tiles of an image as a network's calls see them.

    Features of the latent are made where they are needed: kept for all tiles they would be as large
    as those of the whole image.
    """

    def __init__(
        self,
        net: PiDNet,
        what: TiledSampling,
        stages: Stages,
        callback: TileCallback | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.net, self.what, self.layout, self.stages = net, what, what.layout, stages
        self.watch = watch
        self._callback = callback
        self._steps_at = {network_time(t): i + 1 for i, t in enumerate(what.times[:-1])}
        image = what.layout.image_pixels
        self.one_by_one = False  # whatever is said of how many go together
        self._stack: Tensor | None = net.latent_stack(what.latent, image)
        self._conditions: list[tuple[tuple[Tile, ...], PiDCondition, PiDCondition | None]] = []

    def prepare(self, tiles: Sequence[Tile]) -> tuple[PiDCondition, PiDCondition | None]:
        """Conditions of the tiles, one after the other in the batch: with the caption, and with the
        negative one if there is one."""
        w, count = self.what, len(tiles)
        condition = self.net.prepare(
            None,
            w.caption.repeat(count, 1, 1),
            w.sigma.repeat(count),
            size=self.layout.tile_pixels,
            tables=w.tables,
            keep_features=False,
            pixel_chunk=w.pixel_chunk,
            stack=torch.cat([self._stack_under(tile) for tile in tiles]),
        )
        if w.negative is None:
            return condition, None
        return condition, self.net.recaption(condition, w.negative.repeat(count, 1, 1))

    def prepare_all(self) -> None:
        """Conditions of all tiles, in the groups that the calls take."""
        self._conditions = [
            (tiles, *self.prepare(tiles)) for tiles in self.layout.groups(self.what.together)
        ]
        self._stack = None  # every tile holds its own part

    def _stack_under(self, tile: Tile) -> Tensor:
        patch = self.net.config.patch_size
        top, left, h, w = (
            cells * self.layout.pixels // patch
            for cells in (tile.row, tile.column, *self.layout.tile)
        )
        return self._stack[..., top : top + h, left : left + w]

    def velocity(self, x: Tensor, tau: float, *, negative: bool = False) -> Tensor:
        """The blended output of a network call at x (B, 3, H, W)."""
        out = torch.zeros_like(x)
        step, done = self._steps_at[tau], 0
        for tiles, condition, other in self._conditions:
            self.at(done)
            name = f"{'negative' if negative else 'tile'}-{done + 1:0{PLACES}d}"
            call = partial(self._call, x, tau, tiles, other if negative else condition)
            self.add(out, tiles, self.stages.part(step, name, call))
            done += len(tiles)
            if not negative:
                self.report(step, len(self._steps_at), done)
        if self.watch is not None:
            self.watch.blended()
        return out

    def _call(self, x: Tensor, tau: float, tiles: Sequence[Tile], what: PiDCondition) -> Tensor:
        crops = torch.cat([self.layout.crop(x, tile) for tile in tiles])
        return self.net.step(crops, tau, what)

    def add(self, out: Tensor, tiles: Sequence[Tile], results: Tensor) -> None:
        """Adds the tiles' results, (n B, 3, h, w), with their windows."""
        for tile, result in zip(tiles, results.chunk(len(tiles)), strict=True):
            window = self.layout.window(tile, out.device)
            self.layout.crop(out, tile).addcmul_(result, window)

    def at(self, done: int) -> None:
        """Before the work on the tile after so many."""
        if self.watch is not None:
            self.watch.at_tile(done + 1, len(self.layout.tiles))

    def report(self, step: int, steps: int, done: int) -> None:
        """Raises Interrupted where the callback returns False."""
        report_tile(self._callback, TileInfo(step, steps, done, len(self.layout.tiles)))


def sample_tiled(
    net: PiDNet,
    what: TiledSampling,
    mode: str,
    source: NoiseSource,
    callback: Callback | None,
    tile_callback: TileCallback | None,
    stages: Stages,
    watch: Watch | None = None,
) -> Tensor:
    """(B, 3, H, W) fp32, unclamped.

    Raises:
        Interrupted: a callback returned False.
    """
    tiles = Tiles(net, what, stages, tile_callback, watch)
    if mode == "sync":
        return sample_sync(tiles, source, callback)
    noise = SquareNoise(source, what.latent.shape[0], net.config.in_channels)
    return sample_independent(tiles, noise)


def tiled_rows(
    net: PiDNet,
    what: TiledSampling,
    source: NoiseSource,
    tile_callback: TileCallback | None,
    stages: Stages,
    watch: Watch | None = None,
) -> Iterator[Tensor]:
    """The image of independent tiles in bands, see `independent_rows`; nothing runs before the
    first is asked for, but the latent's branch."""
    tiles = Tiles(net, what, stages, tile_callback, watch)
    noise = SquareNoise(source, what.latent.shape[0], net.config.in_channels)
    return independent_rows(tiles, noise)


def sample_sync(tiles: Tiles, draw: Draw, callback: Callback | None) -> Tensor:
    """(B, 3, H, W) fp32, unclamped; noise and callback as for an image in one piece."""
    w = tiles.what
    tiles.prepare_all()
    shape = (w.latent.shape[0], tiles.net.config.in_channels, *w.layout.image_pixels)
    if not w.student:
        return sample_teacher(
            tiles.velocity,
            partial(tiles.velocity, negative=True),
            tiles.stages.held("x", partial(draw, shape)),
            w.times,
            cfg_scale=w.cfg_scale,
            prediction_type=w.prediction_type,
            callback=callback,
            stages=tiles.stages,
            watch=tiles.watch,
        )

    def advance(
        x: Tensor, t: float, t_next: float, draw: Draw | None, want_x0: bool
    ) -> tuple[Tensor, Tensor | None]:
        out = tiles.velocity(x, network_time(t))
        noise = None if draw is None else draw(tuple(x.shape))
        # In bands and in place: the arithmetic's own fp64 would be larger than all the rest.
        pixels = _BAND_ON_CPU if kind_of(x.device) == "cpu" else _BAND
        rows = max(1, pixels // (x.shape[0] * x.shape[3]))
        for band in range(0, x.shape[2], rows):
            part = (..., slice(band, band + rows), slice(None))
            x[part], x0 = update(
                x[part],
                out[part],
                None if noise is None else noise[part],
                t,
                t_next,
                sample_type=w.sample_type,
                prediction_type=w.prediction_type,
                state_dtype=w.state_dtype,
            )
            if want_x0:
                out[part] = x0
        return x, out if want_x0 else None

    return run_student(
        advance,
        tiles.stages.held("x", partial(draw, shape)),
        w.times,
        draw,
        sample_type=w.sample_type,
        callback=callback,
        stages=tiles.stages,
        watch=tiles.watch,
    )


def sample_independent(tiles: Tiles, noise: SquareNoise) -> Tensor:
    """(B, 3, H, W) fp32, unclamped."""
    batch, channels = tiles.what.latent.shape[0], tiles.net.config.in_channels
    out = torch.zeros(batch, channels, *tiles.layout.image_pixels, device=tiles.what.latent.device)
    for tile, result in _sampled(tiles, noise):
        tiles.add(out, (tile,), result)
        del result  # it would last through the next tiles
    return out


def independent_rows(tiles: Tiles, noise: SquareNoise) -> Iterator[Tensor]:
    """(B, 3, rows, W) fp32, unclamped, from top to bottom: the rows that no tile to come touches.
    Bit for bit those of `sample_independent`.

    What is held of the image is as high as a tile. Each band is to be used before the next is asked
    for: its memory is used again.
    """
    layout, latent = tiles.layout, tiles.what.latent
    height, (_, width) = layout.tile_pixels[0], layout.image_pixels
    shape = (latent.shape[0], tiles.net.config.in_channels, height, width)
    strip, top = torch.zeros(shape, device=latent.device), 0
    for tile, result in _sampled(tiles, noise):
        if (final := tile.row * layout.pixels - top) > 0:
            yield strip[:, :, :final]
            unfinished = strip[:, :, final:].clone()
            strip[:, :, : height - final] = unfinished
            strip[:, :, height - final :] = 0
            top += final
        left = tile.column * layout.pixels
        under = strip[..., left : left + layout.tile_pixels[1]]
        under.addcmul_(result, layout.window(tile, strip.device))
        del result
    yield strip


def _sampled(tiles: Tiles, noise: SquareNoise) -> Iterator[tuple[Tile, Tensor]]:
    """Each tile with its result, (B, 3, h, w), row by row; told of once it has been used."""
    done = 0
    for group in tiles.layout.groups(tiles.what.together):
        tiles.at(done)
        make = partial(_sample_group, tiles, group, noise, done)
        results = tiles.stages.part(1, f"tile-{done + 1:0{PLACES}d}", make).chunk(len(group))
        yield from zip(group, results, strict=True)
        done += len(group)
        tiles.report(1, 1, done)
        del results


def _sample_group(tiles: Tiles, group: Sequence[Tile], noise: SquareNoise, done: int) -> Tensor:
    """The group's results, (n B, 3, h, w). Once memory did not suffice for several tiles together,
    these and all to come are sampled one by one; what is finished stays."""
    if not tiles.one_by_one:
        try:
            return _sample_alone(tiles, group, noise)
        except Exception as e:
            if len(group) == 1 or not is_out_of_memory(e):
                raise
            traceback.clear_frames(e.__traceback__)  # they hold the group's tensors
        tiles.one_by_one = True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(
            f"memory ran out at tiles {done + 1} to {done + len(group)} of "
            f"{len(tiles.layout.tiles)}, {len(group)} in a network call; these and all to come are "
            f"made one at a time",
            MemoryWarning,
            stacklevel=2,
        )
    return torch.cat([_sample_alone(tiles, (tile,), noise) for tile in group])


def _sample_alone(tiles: Tiles, group: Sequence[Tile], noise: SquareNoise) -> Tensor:
    w, layout, net = tiles.what, tiles.layout, tiles.net
    condition, negative = tiles.prepare(group)
    drawn = 0

    def draw(_: tuple[int, ...]) -> Tensor:
        nonlocal drawn
        places = [(tile.row * layout.pixels, tile.column * layout.pixels) for tile in group]
        parts = [noise(drawn, *place, layout.tile_pixels) for place in places]
        drawn += 1
        return torch.cat(parts)

    if not w.student:
        return sample_teacher(
            lambda x, tau: net.step(x, tau, condition),
            lambda x, tau: net.step(x, tau, negative),
            draw(()),
            w.times,
            cfg_scale=w.cfg_scale,
            prediction_type=w.prediction_type,
            watch=tiles.watch,
        )
    advance = partial(
        net.student_step,
        condition,
        sample_type=w.sample_type,
        prediction_type=w.prediction_type,
        state_dtype=w.state_dtype,
    )
    return run_student(
        advance, draw(()), w.times, draw, sample_type=w.sample_type, watch=tiles.watch
    )
