"""Noise by place: a tile's is that of the image, whatever tile it is drawn for."""

from __future__ import annotations

import pytest
import torch

from pixeldiff.models.noise import NoiseSource
from pixeldiff.models.tile_noise import SQUARE, SquareNoise

WHOLE = (SQUARE + 70, 2 * SQUARE + 30)


def seeded(*seeds: int) -> NoiseSource:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return NoiseSource(generators if len(seeds) > 1 else generators[0], "cpu")


@pytest.mark.parametrize(
    ("top", "left", "size"),
    [
        (0, 0, (10, 12)),
        (SQUARE - 1, SQUARE - 1, (2, 2)),
        (3, SQUARE, (60, SQUARE)),
        (SQUARE, 2 * SQUARE, (70, 30)),
        (17, 5, (SQUARE + 20, 2 * SQUARE)),
    ],
)
def test_a_tile_is_cut_out_of_the_image(top, left, size):
    whole = SquareNoise(seeded(3), 2, 3)(1, 0, 0, WHOLE)
    part = SquareNoise(seeded(3), 2, 3)(1, top, left, size)
    assert torch.equal(part, whole[:, :, top : top + size[0], left : left + size[1]])


def test_it_is_standard_normal_and_nothing_repeats():
    noise = SquareNoise(seeded(3), 2, 3)
    first, second = (noise(step, 0, 0, (2 * SQUARE, 2 * SQUARE)) for step in (0, 1))
    other = SquareNoise(seeded(4), 2, 3)(0, 0, 0, (2 * SQUARE, 2 * SQUARE))
    both = torch.cat((first, second, other))
    assert both.mean().abs() < 5e-3
    assert (both.std() - 1).abs() < 5e-3
    squares = both.unflatten(2, (2, SQUARE)).unflatten(4, (2, SQUARE)).transpose(3, 4)
    planes = squares.reshape(-1, SQUARE * SQUARE)
    likeness = planes @ planes.T / SQUARE**2 - torch.eye(len(planes))
    assert likeness.abs().max() < 0.03


def test_with_a_generator_each_a_sample_does_not_depend_on_its_batch():
    together = SquareNoise(seeded(5, 6), 2, 3)(0, 9, 9, (40, 50))
    alone = SquareNoise(seeded(6), 1, 3)(0, 9, 9, (40, 50))
    assert torch.equal(together[1:], alone)


def test_the_callers_generator_moves_by_one_number_a_sample():
    source, plain = seeded(7), torch.Generator().manual_seed(7)
    SquareNoise(source, 2, 3)(0, 0, 0, (5, 5))
    for _ in range(2):
        torch.randint(2**62, (), generator=plain)
    assert torch.equal(source.generators.get_state(), plain.get_state())
