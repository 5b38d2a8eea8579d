"""The demo's picture: a lake under mountains at dusk, drawn from noise. Not a training picture.

python -m training.scene pixeldiff/assets/demo/picture.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from .pictures import blur, power_noise

SIZE = 1024
HORIZON = 0.60  # of the height


def _ramp(stops: list[tuple[float, tuple[int, int, int]]], at: np.ndarray) -> np.ndarray:
    """Colours at positions `at`, interpolated between (position, RGB) stops."""
    positions = [p for p, _ in stops]
    channels = [np.interp(at, positions, [c[i] for _, c in stops]) for i in range(3)]
    return np.stack(channels, -1).astype(np.float32) / 255


def _ridge(rng: np.random.Generator, width: int, level: float, rise: float) -> np.ndarray:
    """Height of a mountain crest over each column, as a fraction of the picture."""
    x = np.arange(width)
    crest = np.zeros(width)
    for octave in range(1, 9):
        count = 3 * 2**octave // 2 + 1
        points = rng.standard_normal(count)
        crest += np.interp(x, np.linspace(0, width - 1, count), points) / 1.9**octave
    crest = (crest - crest.min()) / np.ptp(crest)
    return level - rise * crest


def _sky(rng: np.random.Generator, n: int) -> np.ndarray:
    y = np.linspace(0, 1, n)[:, None].repeat(n, 1)
    stops = [
        (0.0, (38, 58, 104)),
        (0.25, (92, 108, 150)),
        (0.45, (214, 150, 132)),
        (0.58, (250, 206, 146)),
        (1.0, (250, 206, 146)),
    ]
    sky = _ramp(stops, y + 0.01 * power_noise(rng, n, n, 3.0))
    x = np.linspace(0, 1, n)[None]
    glow = np.exp(-(((x - 0.66) / 0.22) ** 2) - ((y - 0.52) / 0.16) ** 2)
    sky += glow[..., None] * np.array([0.22, 0.13, 0.02], np.float32)
    for scale, strength in ((3.0, 0.55), (2.4, 0.35)):
        streaks = power_noise(rng, n, n, scale)
        # Clouds lie flat: the noise is read five times as fast downwards.
        rows = (np.arange(n) * 5) % n
        cover = 1 / (1 + np.exp(-3.0 * (streaks[rows] - 0.5)))
        cover *= strength * np.clip(1.25 - 1.6 * y, 0, 1)
        lit = _ramp([(0, (226, 204, 208)), (0.4, (255, 196, 150)), (1, (255, 214, 160))], y)
        sky += cover[..., None] * (lit - sky)
    return sky


def _mountains(rng: np.random.Generator, picture: np.ndarray) -> None:
    n = picture.shape[0]
    y = np.arange(n)[:, None] / n
    layers = [
        (0.55, 0.26, (146, 140, 172), 0.10, 0.5),
        (0.58, 0.19, (96, 98, 132), 0.16, 0.8),
        (0.60, 0.11, (52, 62, 84), 0.24, 1.0),
    ]
    for level, rise, colour, contrast, snow in layers:
        crest = _ridge(rng, n, level, rise)
        inside = np.clip((y - crest) * n + 0.5, 0, 1)[..., None]
        rock = power_noise(rng, n, n, 2.2)
        slope = np.gradient(blur(rock[..., None], 5.0)[..., 0], axis=1)
        light = 1 + contrast * np.clip(slope / slope.std(), -2.5, 2.5)
        face = np.array(colour, np.float32) / 255 * light[..., None]
        depth = np.clip((y - crest) / rise, 0, 1)
        white = np.clip((0.34 - depth + 0.09 * rock) * 9, 0, 1) * snow
        white *= np.clip(0.5 + 1.5 * slope / slope.std(), 0, 1)
        face += white[..., None] * (np.array([0.93, 0.86, 0.88], np.float32) - face) * 0.8
        mist = np.clip((depth - 0.45) * 1.5, 0, 1)[..., None] * 0.55
        face += mist * (np.array([0.86, 0.72, 0.68], np.float32) - face)
        picture += inside * (face - picture)


def _firs(rng: np.random.Generator, picture: np.ndarray, base: float, height: float, count: int):
    """A row of conifers, darker towards the viewer."""
    n = picture.shape[0]
    yy, xx = np.mgrid[0:n, 0:n].astype(np.float32)
    for centre in np.sort(rng.uniform(0, n, count)):
        tall = n * height * rng.uniform(0.45, 1.0)
        foot = n * (base + rng.normal(0, 0.004))
        top = foot - tall
        rows = slice(max(int(top), 0), min(int(foot) + 1, n))
        down = (yy[rows] - top) / tall
        tiers = 0.55 + 0.45 * np.abs(np.sin(down * np.pi * rng.uniform(7, 10)))
        ragged = 1 + 0.18 * rng.standard_normal(down.shape)
        half = 0.20 * tall * down * tiers * ragged + 0.6
        inside = np.clip(half - np.abs(xx[rows] - centre) + 0.5, 0, 1)[..., None]
        tone = np.array([0.075, 0.11, 0.105], np.float32) * rng.uniform(0.7, 1.6)
        lit = np.clip((xx[rows] - centre) / (half + 1), -1, 1)[..., None]
        shade = tone * (1 + 0.5 * lit * rng.uniform(0.4, 1.0))
        shade = shade * (1 + 0.25 * rng.standard_normal((*down.shape, 1)))
        picture[rows] += inside * (shade - picture[rows])


def _lake(rng: np.random.Generator, picture: np.ndarray) -> None:
    """Everything below the horizon mirrors what is above it, rippled."""
    n = picture.shape[0]
    line = int(HORIZON * n)
    below = np.arange(n - line)
    depth = below / (n - line)
    ripple = power_noise(rng, n, n, 2.0)[: n - line]
    fast = np.sin(below / (2.0 + 26 * depth) + 2.2 * ripple.T).T
    source = line - 1 - below[:, None] - (fast + ripple) * (1 + 13 * depth[:, None])
    source = np.clip(source, 0, line - 1).astype(int)
    columns = np.arange(n)[None] + (3 * ripple * depth[:, None]).astype(int)
    mirrored = picture[source, np.clip(columns, 0, n - 1)]
    water = np.array([0.07, 0.12, 0.19], np.float32)
    strength = (0.84 - 0.44 * depth)[:, None, None]
    glint = np.clip(fast - 0.82, 0, 1)[..., None] * 0.5 * depth[:, None, None]
    picture[line:] = water + strength * (mirrored - water) + glint


def _stones(rng: np.random.Generator, picture: np.ndarray) -> None:
    n = picture.shape[0]
    yy, xx = np.mgrid[0:n, 0:n].astype(np.float32)
    grain = power_noise(rng, n, n, 1.6)
    for _ in range(70):
        v = rng.uniform(0.90, 1.02)
        cx, cy, r = rng.uniform(0, n), v * n, rng.uniform(6, 46) * (0.4 + 4.0 * (v - 0.86))
        wide = rng.uniform(1.2, 2.0)
        dx, dy = (xx - cx) / (wide * r), (yy - cy) / r
        radius = np.sqrt(dx * dx + dy * dy) * (1 + 0.07 * grain)
        inside = np.clip((1 - radius) * r * 0.8 + 0.5, 0, 1)[..., None]
        light = 0.30 + 0.22 * (dx * 0.6 - dy) + 0.05 * grain
        tint = np.array([1.0, 0.93, 0.88], np.float32) * rng.uniform(0.5, 1.1)
        picture += inside * (np.clip(light, 0.03, 1)[..., None] * tint - picture)


def draw_scene(size: int = SIZE, seed: int = 7) -> np.ndarray:
    """(size, size, 3) uint8 RGB."""
    rng = np.random.default_rng([20260524, seed])
    picture = _sky(rng, size)
    _mountains(rng, picture)
    _firs(rng, picture, HORIZON + 0.004, 0.055, 150)
    _lake(rng, picture)
    _stones(rng, picture)
    picture = picture + rng.normal(0, 0.006, picture.shape)
    return np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)


def main() -> None:
    path = Path(sys.argv[1])
    Image.fromarray(draw_scene()).save(path, optimize=True)


if __name__ == "__main__":
    main()
