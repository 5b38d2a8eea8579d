"""The picture generator: seeded, captioned, and with the statistics it claims."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy", reason="the training extra is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.pictures import blur, colour_name, draw_picture, power_noise, texture

SIZE = (160, 192)


def test_same_number_same_picture_another_number_another():
    first, caption = draw_picture(3, SIZE)
    again, same_caption = draw_picture(3, SIZE)
    other, _ = draw_picture(4, SIZE)
    assert first.shape == (160, 192, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert caption == same_caption
    assert np.abs(first.astype(int) - other).mean() > 5


def test_caption_names_the_background_and_more():
    for seed in range(6):
        _, caption = draw_picture(seed, (96, 96))
        words = caption.split(", ")
        assert words[0].endswith("background")
        assert len(words) >= 3


def test_size_under_64_is_an_error():
    with pytest.raises(ValueError, match=r"at least 64 on each side, got \(63, 64\)"):
        draw_picture(0, (63, 64))


def test_spectrum_falls_like_a_photograph():
    # Photographs have a power spectrum near 1/f^2; flat (noise) or steep (blobs) would not do.
    size, slopes = 192, []
    window = np.outer(np.hanning(size), np.hanning(size))
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None]
    radius = np.hypot(fy, fx)
    for seed in range(8):
        picture, _ = draw_picture(seed, (size, size))
        luma = picture.mean(-1)
        power = np.abs(np.fft.fft2((luma - luma.mean()) * window)) ** 2
        edges = np.geomspace(0.02, 0.4, 9)
        rings = [(radius >= a) & (radius < b) for a, b in pairwise(edges)]
        bins = [power[ring].mean() for ring in rings]
        centres = np.sqrt(edges[:-1] * edges[1:])
        slopes.append(np.polyfit(np.log(centres), np.log(bins), 1)[0])
    assert -3.6 < np.mean(slopes) < -1.5, slopes


def test_power_noise_is_normalised_and_follows_its_exponent():
    rng = np.random.default_rng(0)
    rough, smooth = (power_noise(rng, 128, 128, beta) for beta in (1.0, 4.0))
    for field in (rough, smooth):
        assert abs(field.mean()) < 1e-4
        assert abs(field.std() - 1) < 1e-3
    steps = [np.abs(np.diff(field, axis=1)).mean() for field in (rough, smooth)]
    assert steps[0] > 4 * steps[1]


def test_power_noise_stretches_along_its_angle():
    rng = np.random.default_rng(0)
    field = power_noise(rng, 128, 128, 2.0, stretch=10, angle=0.0)
    along, across = (np.abs(np.diff(field, axis=axis)).mean() for axis in (1, 0))
    assert across > 2 * along


def test_blur_keeps_the_mean_and_a_constant_border():
    image = np.zeros((64, 48, 3), np.float32)
    image[20:30, 10:20] = 1
    out = blur(image, 3.0)
    assert out.shape == image.shape
    assert abs(out.mean() - image.mean()) < 1e-4
    assert out.max() < 0.95
    np.testing.assert_allclose(blur(np.full((40, 40), 0.7, np.float32), 5.0), 0.7, atol=1e-5)


def test_every_kind_of_texture_is_normalised():
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(40):
        field, word = texture(rng, 64, 80)
        seen.add(word)
        assert field.shape == (64, 80)
        assert np.isfinite(field).all()
        assert abs(field.mean()) < 1e-3
    assert len(seen) >= 8, seen


@pytest.mark.parametrize(
    ("rgb", "name"), [((0.9, 0.1, 0.1), "red"), ((0, 0, 0), "black"), ((0.2, 0.3, 0.8), "blue")]
)
def test_colour_words(rgb, name):
    assert colour_name(np.array(rgb)) == name
