"""Noise of an image that can be drawn a tile at a time: the same wherever a tile begins.

It is made of squares, each of which has a seed of its own. So tiles that overlap agree on what
they share, and nobody needs the noise of the whole image.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from .noise import NoiseSource

SQUARE = 256  # pixels a side: little is drawn in vain around a tile, and few generators are made


class SquareNoise:
    """Standard normals by place and step.

    Args:
        source: its generators give one number a sample, drawn here, which all seeds come from: with
            a generator for each sample, a sample does not depend on its batch.
        batch: samples.
        channels: of the image.
    """

    def __init__(self, source: NoiseSource, batch: int, channels: int) -> None:
        one = source.generators
        alone = isinstance(one, torch.Generator)
        self._seeds = [_number(one if alone else one[b]) for b in range(batch)]
        self._made_on = (one if alone else one[0]).device
        self._device = source.device
        self._channels = channels

    def __call__(self, step: int, top: int, left: int, size: tuple[int, int]) -> Tensor:
        """(B, C, *size) fp32 of the pixels from (top, left) on, in a step's noise."""
        h, w = size
        out = torch.empty(len(self._seeds), self._channels, h, w, device=self._made_on)
        for row in range(top // SQUARE, (top + h - 1) // SQUARE + 1):
            for column in range(left // SQUARE, (left + w - 1) // SQUARE + 1):
                # Rows and columns of the square, counted from the tile's first pixel.
                y, x = row * SQUARE - top, column * SQUARE - left
                target = out[:, :, max(y, 0) : y + SQUARE, max(x, 0) : x + SQUARE]
                inside = (slice(None), slice(max(-y, 0), h - y), slice(max(-x, 0), w - x))
                for b, seed in enumerate(self._seeds):
                    target[b] = self._square(seed, step, row, column)[inside]
        return out.to(self._device)

    def _square(self, seed: int, *place: int) -> Tensor:
        text = ":".join(map(str, (seed, *place)))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        generator = torch.Generator(self._made_on)
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        shape = (self._channels, SQUARE, SQUARE)
        return torch.randn(shape, generator=generator, device=self._made_on)


def _number(generator: torch.Generator) -> int:
    number = torch.randint(2**62, (), generator=generator, device=generator.device)
    return int(number.item())
