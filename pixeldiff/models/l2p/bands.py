"""The local decoder a piece at a time, exactly, in memory that a budget bounds.

Nearly all that the decoder holds lies in its levels of high resolution, and these see only a few
pixels far. So the outer levels run tile by tile and those below, a small picture, as a whole:

    1. every tile's way down; the outer levels' result, in low resolution, is kept, nothing else
    2. the levels below, the transformer's features joined in, whole
    3. every tile's way down again (cheap beside the way up), up, and out to pixels

A tile is computed with a margin as wide as its pixels depend on their surroundings, and the margin
is thrown away: what a tile's edge does to a convolution never reaches the result. Zeros are padded
at the borders of the image only, where a tile ends with it. The result is that of the whole decoder
up to rounding: a convolution may add in another order for another shape.

Source: tiled decoding of L2P (arXiv 2605.12013); cutting some levels only is ours.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops.registry import upcast
from .config import Level, LocalDecoderConfig
from .local_decoder import LocalDecoder

DECODER_MEMORY = 4_000_000_000
Span = tuple[int, int]  # first, and one beyond the last


@dataclass(frozen=True)
class Tiling:
    """How a decoder is cut.

    Args:
        levels: of high resolution that run tile by tile; none is the whole decoder at once.
        height, width: pixels of a tile without its margin, multiples of 2^levels. The last ones
            may be smaller.
    """

    levels: int
    height: int
    width: int


# ---- What a span of the result depends on -------------------------------------------------------


def needed_below(levels: int, span: Span) -> tuple[Span, Span]:
    """On the way up: rows of the image, through skip tensors, and of the level below.

    Args:
        levels: how many outer levels, at least 1.
        span: rows of the result. Columns are alike. Spans may leave the image.
    """
    image, (first, end) = span, span
    for level in range(levels):
        first, end = first - 1, end + 1  # the convolution behind the concatenation
        image = _hull(image, needed_above(level, (first - 1, end + 1)))  # enc's own convolution
        first, end = (first - 1) // 2, -(-(end + 1) // 2)  # the one behind the doubling
    return image, (first, end)


def needed_above(levels: int, span: Span) -> Span:
    """On the way down: the rows of the image that rows `span`, `levels` levels down, depend on."""
    first, end = span
    for _ in range(levels):
        first, end = 2 * first - 1, 2 * end + 1  # pooling, and the convolution before it
    return first, end


def margin_down(levels: int) -> int:
    """Pixels around a tile whose way down is right within it; a multiple of 2^levels."""
    return _outward(levels, needed_above(levels, (0, 1)))


def margin_up(levels: int) -> int:
    """Pixels around a tile whose way down and up are right within it; a multiple of 2^levels."""
    image, below = needed_below(levels, (0, 1 << levels))
    return _outward(levels, _hull(image, (below[0] << levels, below[1] << levels)))


def radius(config: LocalDecoderConfig) -> tuple[int, int]:
    """How far from itself, along an axis, a pixel depends on the image and on the features.

    Returns:
        pixels of the image, through all levels, and cells of the bottleneck.
    """
    levels, pixels, cells = len(config.levels), 0, 0
    for pixel in range(config.pixels_per_cell):
        direct, below = needed_below(levels, (pixel, pixel + 1))
        first, end = _hull(direct, needed_above(levels, below))
        pixels = max(pixels, pixel - first, end - 1 - pixel)
        cells = max(cells, -below[0], below[1] - 1)
    return pixels, cells


def _hull(a: Span, b: Span) -> Span:
    return min(a[0], b[0]), max(a[1], b[1])


def _outward(levels: int, span: Span) -> int:
    """Whole cells between a cell's span and what it needs, the larger side, in pixels."""
    cell = 1 << levels
    return max(-(span[0] // cell), -(-span[1] // cell) - 1) << levels


# ---- What it takes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """What a decoder is asked for; sizes of all that it holds follow.

    Args:
        config: of the decoder. channels: of the image.
        size: (H, W) of the image.
        images, batch: S images and B features.
        itemsize: bytes of a weight.
    """

    config: LocalDecoderConfig
    channels: int
    size: tuple[int, int]
    images: int
    batch: int
    itemsize: int

    def memory(self, tiling: Tiling) -> int:
        """Bytes at the peak, beside the image, the features and the result.

        Of the ops' definitions in plain PyTorch, whichever backend runs: fused ops hold less, and
        the choice of a tiling is the same with them. What a convolution library takes as its
        workspace is not in it.
        """
        k, all_levels = tiling.levels, self.config.levels
        area = self.size[0] * self.size[1]
        outer, inner = all_levels[:k], all_levels[k:]
        if k == 0:
            return self._inner(inner, area, True)
        from_image = self.images * (area >> 2 * k) * outer[-1].skip * self.itemsize
        above = inner[0].out if inner else self.config.bottleneck
        below = self.batch * (area >> 2 * k) * above * self.itemsize
        first, last = self._largest(tiling, margin_down(k)), self._largest(tiling, margin_up(k))
        tile = min(tiling.height, self.size[0]) * min(tiling.width, self.size[1])
        peaks = (
            from_image + self._down(outer, first, True, False)[0],
            from_image + self._inner(inner, area >> 2 * k, False),
            below + self._down(outer, last, True, True)[0],
            below + self._up(outer, last, above, False),
            below + self._pixels(last, tile, outer[0].out),
        )
        return max(peaks)

    def work(self, tiling: Tiling) -> int:
        """Multiply-adds, those on margins included."""
        k, levels = tiling.levels, self.config.levels
        area = self.size[0] * self.size[1]
        down = [self.images * 9 * self._before(i) * v.skip for i, v in enumerate(levels)]
        up = [
            self.batch * 9 * (self._below(i) * v.up + v.up * v.out)
            + self.images * 9 * v.skip * v.out
            for i, v in enumerate(levels)
        ]
        both = list(zip(down, up, strict=True))
        if k == 0:
            return sum((a + b) * (area >> 2 * i) for i, (a, b) in enumerate(both))
        first, second = (self._area(tiling, margin(k)) for margin in (margin_down, margin_up))
        total = 0
        for i, (a, b) in enumerate(both):
            total += (a * first + (a + b) * second) >> 2 * i if i < k else (a + b) * (area >> 2 * i)
        return total

    def _before(self, i: int) -> int:
        return self.config.levels[i - 1].skip if i else self.channels

    def _below(self, i: int) -> int:
        levels = self.config.levels
        return levels[i + 1].out if i + 1 < len(levels) else self.config.bottleneck

    def _down(
        self, levels: tuple[Level, ...], area: int, image: bool, kept: bool
    ) -> tuple[int, int]:
        """Bytes at the peak of the way down and, where they are kept, of the skips after it."""
        unit, held, peak, h = self.images * self.itemsize, 0, 0, 0
        for i, level in enumerate(levels):
            here = (area >> 2 * i) * unit
            copy = self.channels * here if image and i == 0 else 0
            peak = max(peak, held + h + copy + 2 * level.skip * here)
            h = level.skip * here // 4
            held += level.skip * here if kept else 0
        return peak, held

    def _up(self, levels: tuple[Level, ...], area: int, below: int, all_kept: bool) -> int:
        """Bytes at the peak of the way up; what it starts from is not counted."""
        skips = [(area >> 2 * i) * v.skip * self.images for i, v in enumerate(levels)]
        peak, h = 0, 0
        for i in reversed(range(len(levels))):
            level, here = levels[i], area >> 2 * i
            doubled = self.batch * (below + level.up)
            joined = self.batch * (level.up + 2 * level.out) + self.images * level.out
            held = sum(skips) if all_kept else sum(skips[: i + 1])
            peak = max(peak, held + h + here * max(doubled, joined))
            below, h = level.out, self.batch * here * level.out
        return peak * self.itemsize

    def _pixels(self, area: int, kept: int, channels: int) -> int:
        """Of the last convolution, from `area` pixels, margin included, to `kept` ones."""
        # A product of rows: those of a piece are copied, and other types than fp32 in any case.
        wide = max(self.itemsize, 4)
        copied = 0 if wide == self.itemsize and area == kept else channels * wide
        out = wide * self.channels
        return self.batch * (area * channels * self.itemsize + kept * (copied + out))

    def _inner(self, levels: tuple[Level, ...], area: int, image: bool) -> int:
        """Of levels that run whole, the bottleneck included."""
        unit, config = self.itemsize, self.config
        cells = area >> 2 * len(levels)
        down, skips = self._down(levels, area, image, True)
        join = cells * config.bottleneck * (self.images + 3 * self.batch) * unit
        narrow = cells * config.bottleneck * (self.images if image else 0) * unit
        peaks = [down, skips + join]
        if levels:
            start = cells * config.bottleneck * self.batch * unit
            peaks.append(start + narrow + self._up(levels, area, config.bottleneck, image))
        if image:
            channels = levels[0].out
            peaks.append(skips + narrow + self._pixels(area, area, channels))
        return max(peaks)

    def _largest(self, tiling: Tiling, margin: int) -> int:
        """Pixels of the largest tile and its margin."""
        return max(b - a for _, (a, b) in spans(self.size[0], tiling.height, margin)) * max(
            b - a for _, (a, b) in spans(self.size[1], tiling.width, margin)
        )

    def _area(self, tiling: Tiling, margin: int) -> int:
        """Pixels of all tiles and their margins."""
        return sum(b - a for _, (a, b) in spans(self.size[0], tiling.height, margin)) * sum(
            b - a for _, (a, b) in spans(self.size[1], tiling.width, margin)
        )


@functools.lru_cache(maxsize=64)
def plan(load: Load, budget: int) -> Tiling:
    """Of the tilings within the budget the one of least work; bands of full width where equal.

    The same for the same arguments, on every machine. Whole, where that is within the budget.

    Raises:
        ValueError: nothing is; names the least budget there is for this size.
    """
    whole = Tiling(0, *load.size)
    if load.memory(whole) <= budget:
        return whole
    best, least, cell = None, None, load.config.pixels_per_cell
    rows, columns = (side // cell for side in load.size)
    for levels in range(1, len(load.config.levels) + 1):
        for across in _parts(columns):
            width = -(-columns // across) * cell
            needed = load.memory(Tiling(levels, cell, width))
            least = needed if least is None else min(least, needed)
            if needed > budget:
                continue
            low, high = 1, rows  # the tallest tile within the budget
            while low < high:
                middle = (low + high + 1) // 2
                fits = load.memory(Tiling(levels, middle * cell, width)) <= budget
                low, high = (middle, high) if fits else (low, middle - 1)
            even = -(-rows // -(-rows // low))  # the same number of them, equally tall
            tiling = Tiling(levels, even * cell, width)
            if best is None or load.work(tiling) < load.work(best):
                best = tiling
    if best is None:
        raise ValueError(
            f"L2PNet: decoder_memory must be at least {least} bytes for {load.batch} images of "
            f"{load.size[0]}x{load.size[1]}, got {budget}; None sets no bound"
        )
    return best


def plan_for(
    decoder: LocalDecoder,
    size: tuple[int, int],
    images: int,
    batch: int,
    itemsize: int,
    budget: int,
) -> Tiling:
    """`plan` for a decoder and S images, B features of the given size."""
    config = decoder.config
    levels = tuple((v.name, v.skip, v.up, v.out) for v in config.levels)
    channels = decoder.out_conv.out_channels
    sizes = (channels, size[0], size[1], images, batch, itemsize)
    return Tiling(*_answer(levels, config.bottleneck, sizes, budget))


@torch.compiler.assume_constant_result
def _answer(levels: tuple, bottleneck: int, sizes: tuple, budget: int) -> tuple[int, int, int]:
    # The compiler takes what this returns; it would trace the search otherwise. It hands over
    # plain numbers only.
    channels, height, width, images, batch, itemsize = sizes
    config = LocalDecoderConfig(tuple(Level(*level) for level in levels), bottleneck)
    load = Load(config, channels, (height, width), images, batch, itemsize)
    tiling = plan(load, budget)
    return tiling.levels, tiling.height, tiling.width


def _parts(cells: int) -> list[int]:
    """Numbers of columns to try, growing by half: a few for any width, one cell wide the last."""
    parts = [1]
    while parts[-1] < cells:
        parts.append(min(cells, max(parts[-1] + 1, parts[-1] * 3 // 2)))
    return parts


# ---- Running it ---------------------------------------------------------------------------------


def spans(side: int, step: int, margin: int) -> Iterator[tuple[Span, Span]]:
    """Pieces of an axis, each without and with its margin, which ends with the image."""
    for first in range(0, side, step):
        end = min(first + step, side)
        yield (first, end), (max(0, first - margin), min(side, end + margin))


def decode(
    decoder: LocalDecoder,
    x: Tensor,
    features: Tensor,
    tiling: Tiling,
    guidance: Tensor | None = None,
) -> Tensor:
    """`decoder(x, features, guidance)`, cut as `tiling` says. Inference only.

    Args:
        x: (S, 3, H, W), any float dtype. H and W are multiples of 2^levels of the decoder.
        features: (B, h, w, D), S a divisor of B.

    Returns:
        (B, 3, H, W), fp32; half as many under guidance.

    Raises:
        ValueError: a tile whose sides are not positive multiples of 2^(levels of the tiling).
    """
    k, all_levels = tiling.levels, decoder.config.levels
    if k == 0:
        return decoder(x, features, guidance)
    _check(tiling, len(all_levels))
    outer, inner = all_levels[:k], all_levels[k:]
    image = x.permute(0, 2, 3, 1)
    _, height, width, _ = image.shape
    weight = decoder.out_conv.weight
    results = len(features) if guidance is None else len(features) // 2
    u = upcast(weight.new_empty(0)).new_empty((results, weight.shape[0], height, width))
    h = weight.new_empty((len(x), height >> k, width >> k, outer[-1].skip))
    for own, seen in _tiles(height, width, tiling, margin_down(k)):
        piece = _cut(image, seen)
        for level in outer:
            piece = decoder.down(level, piece)[1]
        _cut(h, own, k).copy_(_inside(piece, own, seen, k))
        del piece
    skips = []
    for level in inner:
        skip, h = decoder.down(level, h)
        skips.append(skip)
        del skip
    h = decoder.join(decoder.narrowed(h), features)
    for level in reversed(inner):
        h = decoder.up(level, h, skips.pop())
    for own, seen in _tiles(height, width, tiling, margin_up(k)):
        piece = _outer(decoder, outer, _cut(image, seen), _cut(h, seen, k))
        piece = decoder.pixels(_inside(piece, own, seen), guidance)
        _cut(u, own, axis=2).copy_(piece)
        del piece
    return u


def _outer(
    decoder: LocalDecoder, levels: tuple[Level, ...], image: Tensor, below: Tensor
) -> Tensor:
    """The outer levels down and up on one tile, margin included."""
    h, skips = image, []
    for level in levels:
        skip, h = decoder.down(level, h)
        skips.append(skip)
        del skip
    h = below
    for level in reversed(levels):
        h = decoder.up(level, h, skips.pop())
    return h


Window = tuple[Span, Span]  # rows and columns


def _tiles(height: int, width: int, tiling: Tiling, margin: int) -> Iterator[tuple[Window, Window]]:
    for own_rows, seen_rows in spans(height, tiling.height, margin):
        for own_columns, seen_columns in spans(width, tiling.width, margin):
            yield (own_rows, own_columns), (seen_rows, seen_columns)


def _cut(x: Tensor, window: Window, levels: int = 0, axis: int = 1) -> Tensor:
    """The window, stated in pixels, of a tensor `levels` levels down."""
    for i, (first, end) in enumerate(window, axis):
        x = x.narrow(i, first >> levels, (end - first) >> levels)
    return x


def _inside(piece: Tensor, own: Window, seen: Window, levels: int = 0) -> Tensor:
    """A tile without its margin."""
    window = tuple((a - start, b - start) for (a, b), (start, _) in zip(own, seen, strict=True))
    return _cut(piece, window, levels)


def _check(tiling: Tiling, most: int) -> None:
    cell = 1 << tiling.levels
    if not 0 < tiling.levels <= most:
        raise ValueError(f"Tiling: levels must be 0 to {most}, got {tiling.levels}")
    for name in ("height", "width"):
        value = getattr(tiling, name)
        if value < cell or value % cell:
            raise ValueError(
                f"Tiling: {name} must be a positive multiple of {cell} pixels, got {value}"
            )
