"""Training pictures drawn from nothing: seeded, captioned, with the statistics of photographs.

A picture is a stack of planes (background, middle, foreground), each with its own blur, as in a
photograph with limited depth of field. A plane is a map of shape numbers; every shape has a colour,
a shading (a quadratic in its own coordinates) and a texture, so a plane with ten thousand shapes is
coloured by a handful of array look-ups. Shape sizes follow a power law (dead leaves), textures and
illumination follow 1/f^b spectra: the two facts about natural pictures that matter most for
learning to enlarge them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import fft as sfft

SUPERSAMPLING = 2  # shapes are drawn at twice the size: their edges come out antialiased

_LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"))
_COLOUR_NAMES = (
    ("black", (0.05, 0.05, 0.05)),
    ("white", (0.95, 0.95, 0.95)),
    ("grey", (0.5, 0.5, 0.5)),
    ("red", (0.75, 0.15, 0.12)),
    ("orange", (0.9, 0.5, 0.15)),
    ("yellow", (0.9, 0.85, 0.25)),
    ("green", (0.25, 0.55, 0.2)),
    ("blue", (0.15, 0.3, 0.7)),
    ("purple", (0.45, 0.2, 0.55)),
    ("pink", (0.9, 0.6, 0.65)),
    ("brown", (0.4, 0.25, 0.15)),
)


def colour_name(rgb: np.ndarray) -> str:
    """The nearest of eleven colour words; rgb is (3,) in [0, 1]."""
    distance = [np.sum((np.asarray(value) - rgb) ** 2) for _, value in _COLOUR_NAMES]
    return _COLOUR_NAMES[int(np.argmin(distance))][0]


# --- fields -----------------------------------------------------------------------------------


def _frequencies(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    fy = np.fft.fftfreq(height).astype(np.float32)[:, None]
    fx = np.fft.rfftfreq(width).astype(np.float32)[None, :]
    return fy, fx


def _unit(values: np.ndarray) -> np.ndarray:
    values = values - values.mean()
    return (values / (values.std() + 1e-6)).astype(np.float32)


def power_noise(
    rng: np.random.Generator,
    height: int,
    width: int,
    beta: float,
    *,
    stretch: float = 1.0,
    angle: float = 0.0,
    low_cut: float = 0.0,
) -> np.ndarray:
    """Gaussian noise with amplitude spectrum 1/f^(beta/2), mean 0, standard deviation 1.

    Args:
        stretch, angle: the texture is `stretch` times longer along `angle` (radians).
        low_cut: spatial frequencies under it (cycles per pixel) are faded out.
    """
    fy, fx = _frequencies(height, width)
    along = fx * np.cos(angle) + fy * np.sin(angle)
    across = -fx * np.sin(angle) + fy * np.cos(angle)
    f2 = (along * stretch) ** 2 + across**2
    amplitude = (f2 + (0.7 / max(height, width)) ** 2) ** (-beta / 4)
    if low_cut:
        amplitude = amplitude * (f2 / (f2 + low_cut**2))
    white = sfft.rfft2(rng.standard_normal((height, width), dtype=np.float32))
    return _unit(sfft.irfft2(white * amplitude.astype(np.float32), s=(height, width)))


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of (H, W) or (H, W, C), mirrored at the border; sigma in pixels."""
    if sigma < 0.05:
        return image
    pad = int(min(3 * sigma + 1, image.shape[0] - 1, image.shape[1] - 1))
    padded = np.pad(image, [(pad, pad), (pad, pad)] + [(0, 0)] * (image.ndim - 2), "symmetric")
    fy, fx = _frequencies(*padded.shape[:2])
    kernel = np.exp(-2 * (np.pi * sigma) ** 2 * (fy**2 + fx**2)).astype(np.float32)
    kernel = kernel.reshape(kernel.shape + (1,) * (image.ndim - 2))
    out = sfft.irfft2(sfft.rfft2(padded, axes=(0, 1)) * kernel, s=padded.shape[:2], axes=(0, 1))
    return out[pad:-pad, pad:-pad].astype(np.float32)


def _warped_coordinates(
    rng: np.random.Generator, height: int, width: int, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, np.pi) if rng.random() < 0.6 else rng.choice([0, np.pi / 2])
    u, v = x * np.cos(angle) + y * np.sin(angle), -x * np.sin(angle) + y * np.cos(angle)
    if strength > 0:
        u = u + strength * power_noise(rng, height, width, 4.0)
        v = v + strength * power_noise(rng, height, width, 4.0)
    return u.astype(np.float32), v.astype(np.float32)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def texture(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, str]:
    """One scalar texture, mean 0 and standard deviation 1, and the word for it."""
    kind = rng.choice(
        ["clouds", "grain", "marble", "fibres", "ridges", "stripes", "bricks", "tiles", "cells"],
        p=[0.2, 0.14, 0.1, 0.16, 0.1, 0.1, 0.07, 0.06, 0.07],
    )
    if kind == "clouds":
        return power_noise(rng, height, width, rng.uniform(1.4, 3.2)), "clouds"
    if kind == "grain":
        cut = _log_uniform(rng, 0.01, 0.15)
        field_ = power_noise(rng, height, width, rng.uniform(0.8, 2.5), low_cut=cut)
        if rng.random() < 0.5:
            field_ = _unit(np.tanh(rng.uniform(1, 4) * (field_ - rng.uniform(-1, 1))))
        return field_, "grain"
    if kind == "marble":
        u, _ = _warped_coordinates(rng, height, width, rng.uniform(5, 60))
        return _unit(np.sin(2 * np.pi * u / _log_uniform(rng, 8, 150))), "marble"
    if kind == "fibres":
        angle = rng.uniform(0, np.pi)
        field_ = sum(
            power_noise(
                rng,
                height,
                width,
                rng.uniform(0.8, 2.2),
                stretch=_log_uniform(rng, 4, 30),
                angle=angle + rng.uniform(-0.3, 0.3),
                low_cut=_log_uniform(rng, 0.004, 0.05),
            )
            for _ in range(2)
        )
        return _unit(field_), "fibres"
    if kind == "ridges":
        field_ = np.abs(power_noise(rng, height, width, rng.uniform(2.0, 3.5)))
        return _unit(-np.sqrt(field_ + 0.01)), "ridges"
    if kind == "cells":
        step = _log_uniform(rng, 6, 60)
        u, v = _warped_coordinates(rng, height, width, step * rng.uniform(0.1, 0.6))
        dots = np.cos(2 * np.pi * u / step) + np.cos(2 * np.pi * v / step)
        return _unit(np.tanh(rng.uniform(0.5, 4) * (dots - rng.uniform(-1, 1)))), "spots"
    u, v = _warped_coordinates(rng, height, width, rng.choice([0.0, 0.0, 2.0, 10.0]))
    period = _log_uniform(rng, 5, 120)
    if kind == "stripes":
        wave = np.sin(2 * np.pi * u / period)
        if rng.random() < 0.6:  # an antialiased square wave
            wave = np.clip(wave * period / np.pi / 1.5, -1, 1)
        return _unit(wave), "stripes"
    joint = rng.uniform(0.06, 0.2)
    if kind == "bricks":
        high, wide = period, period * rng.uniform(1.5, 3)
        row = np.floor(v / high)
        shifted = u + (row % 2) * wide / 2
    else:
        high = wide = period
        row, shifted = np.floor(v / high), u
    column = np.floor(shifted / wide)
    edge = np.minimum(
        np.minimum(v / high - row, 1 - (v / high - row)) * high,
        np.minimum(shifted / wide - column, 1 - (shifted / wide - column)) * wide,
    )
    mortar = np.clip(edge - joint * period / 2 + 0.5, 0, 1)
    tone = np.sin(row * 12.9898 + column * 78.233) * 43758.5453
    tone = tone - np.floor(tone)
    surface = 0.15 * power_noise(rng, height, width, 1.6)
    return _unit(mortar * (0.5 + 0.5 * tone + surface)), kind


# --- planes -----------------------------------------------------------------------------------


@dataclass
class _Shapes:
    """Everything that is known of the shapes of one plane, one list entry per shape."""

    centre: list[tuple[float, float]] = field(default_factory=list)
    radius: list[float] = field(default_factory=list)
    colour: list[np.ndarray] = field(default_factory=list)
    flat: list[float] = field(default_factory=list)

    def add(self, x: float, y: float, radius: float, colour: np.ndarray, flat: float = 0.0) -> int:
        """Registers a shape and returns its number (0 is "nothing drawn here")."""
        self.centre.append((x, y))
        self.radius.append(max(radius, 1.0))
        self.colour.append(colour)
        self.flat.append(flat)
        return len(self.radius)


class _Palette:
    """Colours with correlated chroma, as within one photograph."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.spread = 0.0 if rng.random() < 0.07 else _log_uniform(rng, 0.02, 0.16)
        self.axis = rng.standard_normal(2) * self.spread
        self.tint = rng.standard_normal(2) * 0.3 * self.spread
        self.low, self.high = sorted(rng.uniform(0.0, 1.0, 2))
        if self.high - self.low < 0.4:
            self.low, self.high = max(self.low - 0.25, 0.0), min(self.high + 0.25, 1.0)

    def colour(self) -> np.ndarray:
        rng = self.rng
        luma = rng.uniform(self.low, self.high)
        chroma = self.tint + rng.standard_normal() * self.axis
        chroma = chroma + rng.standard_normal(2) * 0.35 * self.spread
        if self.spread and rng.random() < 0.06:
            chroma = chroma * 3
        cb, cr = chroma * (0.3 + 2.2 * luma * (1 - luma))
        rgb = (luma + 1.402 * cr, luma - 0.344 * cb - 0.714 * cr, luma + 1.772 * cb)
        return np.clip(np.array(rgb, dtype=np.float32), 0.0, 1.0)


def _blob(
    rng: np.random.Generator, x: float, y: float, radius: float, corners: int = 0
) -> list[tuple[float, float]]:
    """A closed curve: smooth for corners = 0, a polygon otherwise."""
    if corners:
        angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
        reach = radius * rng.uniform(0.6, 1.2, corners)
    else:
        angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        reach = np.ones_like(angle)
        for order in range(1, 6):
            size = rng.normal() * 0.35 / order
            reach = reach + size * np.sin(order * angle + rng.uniform(0, 2 * np.pi))
        reach = radius * np.maximum(reach, 0.15)
    squeeze, turn = rng.uniform(0.4, 1.0), rng.uniform(0, np.pi)
    px, py = reach * np.cos(angle), squeeze * reach * np.sin(angle)
    c, s = np.cos(turn), np.sin(turn)
    return list(zip((x + c * px - s * py).tolist(), (y + s * px + c * py).tolist(), strict=True))


class _Plane:
    """A supersampled map of shape numbers with the drawing verbs that fill it."""

    def __init__(
        self, rng: np.random.Generator, height: int, width: int, palette: _Palette
    ) -> None:
        self.rng, self.height, self.width, self.palette = rng, height, width, palette
        self.canvas = Image.new("I", (width * SUPERSAMPLING, height * SUPERSAMPLING), 0)
        self.draw = ImageDraw.Draw(self.canvas)
        self.shapes = _Shapes()
        self.words: list[str] = []

    def _scaled(self, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(SUPERSAMPLING * x, SUPERSAMPLING * y) for x, y in points]

    def _new(self, x: float, y: float, radius: float, flat: float = 0.0) -> int:
        return self.shapes.add(x, y, radius, self.palette.colour(), flat)

    def backdrop(self) -> None:
        number = self._new(self.width / 2, self.height / 2, max(self.width, self.height) * 0.7)
        self.draw.rectangle([0, 0, *self.canvas.size], fill=number)
        self.words.append(f"{colour_name(self.shapes.colour[-1])} background")

    def leaves(self) -> None:
        """Occluding shapes with a power law of sizes (dead leaves)."""
        rng = self.rng
        small = _log_uniform(rng, 3, 30)
        large = min(_log_uniform(rng, 60, 420), 0.45 * min(self.height, self.width))
        count = self.height * self.width / (small * large) * rng.uniform(0.3, 2)
        count = int(np.clip(count, 12, 5000))
        # Density of radii r^-3 between the two limits, by inversion.
        u = rng.random(count)
        radii = (small**-2 + u * (large**-2 - small**-2)) ** -0.5
        kind = rng.choice(["ellipses", "blobs", "polygons", "boxes", "leaves"])
        for radius in radii:
            x, y = rng.uniform(-0.05, 1.05) * self.width, rng.uniform(-0.05, 1.05) * self.height
            this = kind if kind != "leaves" else rng.choice(["ellipses", "blobs", "polygons"])
            number = self._new(x, y, radius)
            if this == "boxes":
                w, h = radius * rng.uniform(0.3, 1.2, 2)
                points = [(x - w, y - h), (x + w, y - h), (x + w, y + h), (x - w, y + h)]
            elif this == "polygons":
                points = _blob(rng, x, y, radius, corners=int(rng.integers(3, 8)))
            else:
                points = _blob(rng, x, y, radius)
            self.draw.polygon(self._scaled(points), fill=number)
        self.words.append(f"many {colour_name(self.shapes.colour[-1])} {kind}")

    def strokes(self) -> None:
        """Fur, grass or hair: many thin curved lines that follow a slowly turning field."""
        rng = self.rng
        count = int(_log_uniform(rng, 150, 2500))
        length, thick = _log_uniform(rng, 20, 250), _log_uniform(rng, 0.6, 7)
        base, turn = rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 1.2)
        px, py = rng.uniform(0, 2 * np.pi, 2)
        x0, y0, x1, y1 = 0.0, 0.0, float(self.width), float(self.height)
        if rng.random() < 0.6:
            cx, cy = rng.uniform(0, self.width), rng.uniform(0, self.height)
            reach = _log_uniform(rng, 120, 600)
            x0, x1, y0, y1 = cx - reach, cx + reach, cy - reach, cy + reach
        numbers = [self._new(self.width / 2, self.height / 2, 1e6, 0.7) for _ in range(24)]
        for _ in range(count):
            x, y = rng.uniform(x0, x1), rng.uniform(y0, y1)
            angle = base + turn * (
                np.sin(3 * x / self.width + px) + np.sin(3 * y / self.height + py)
            )
            angle += rng.normal() * 0.12
            bend, reach = rng.normal() * 0.5, length * rng.uniform(0.4, 1.2)
            along = np.linspace(0, 1, 6)
            angles = angle + bend * along
            xs = x + np.concatenate([[0], np.cumsum(np.cos(angles[1:]))]) * reach / 5
            ys = y + np.concatenate([[0], np.cumsum(np.sin(angles[1:]))]) * reach / 5
            points = self._scaled(list(zip(xs.tolist(), ys.tolist(), strict=True)))
            wide = max(1, round(SUPERSAMPLING * thick * rng.uniform(0.5, 1.3)))
            self.draw.line(points, fill=numbers[int(rng.integers(24))], width=wide, joint="curve")
        self.words.append(rng.choice(["fur", "grass", "hair"]))

    def hills(self) -> None:
        """Silhouettes one behind the other."""
        rng = self.rng
        xs = np.arange(0, self.width + 4, 3)
        for level in np.sort(rng.uniform(0.25, 0.95, int(rng.integers(1, 5)))):
            profile = power_noise(rng, 4, len(xs), rng.uniform(1.6, 3.2))[0]
            ys = self.height * (level + rng.uniform(0.01, 0.1) * profile)
            points = list(zip(xs.tolist(), ys.tolist(), strict=True))
            points += [(self.width + 5, self.height + 5), (-5, self.height + 5)]
            number = self._new(self.width / 2, self.height * level, self.height * 0.5)
            self.draw.polygon(self._scaled(points), fill=number)
        self.words.append("hills")

    def objects(self) -> None:
        """A few large shaded things with small parts on them."""
        rng = self.rng
        for _ in range(int(rng.integers(1, 5))):
            radius = _log_uniform(rng, 60, 380)
            x, y = rng.uniform(0.1, 0.9) * self.width, rng.uniform(0.1, 0.9) * self.height
            number = self._new(x, y, radius)
            corners = 0 if rng.random() < 0.7 else int(rng.integers(4, 9))
            self.draw.polygon(self._scaled(_blob(rng, x, y, radius, corners)), fill=number)
            for _ in range(int(rng.integers(0, 14))):
                px, py = x + rng.normal() * radius * 0.5, y + rng.normal() * radius * 0.5
                part = radius * _log_uniform(rng, 0.02, 0.35)
                points = self._scaled(_blob(rng, px, py, part))
                if rng.random() < 0.35:
                    wide = max(1, int(SUPERSAMPLING * _log_uniform(rng, 0.7, 8)))
                    self.draw.line([*points, points[0]], fill=self._new(px, py, part), width=wide)
                else:
                    self.draw.polygon(points, fill=self._new(px, py, part))
        self.words.append(f"{colour_name(self.shapes.colour[-1])} objects")

    def facade(self) -> None:
        """A sheared regular grid of panes, railings or keys, each with a frame."""
        rng = self.rng
        step_x, step_y = _log_uniform(rng, 14, 160), _log_uniform(rng, 14, 160)
        left, top = rng.uniform(-0.2, 0.6) * self.width, rng.uniform(-0.2, 0.6) * self.height
        columns = int(min(rng.integers(3, 30), 2 + self.width / step_x))
        rows = int(min(rng.integers(2, 30), 2 + self.height / step_y))
        shear_x, shear_y = rng.normal(size=2) * 0.12
        fill, frame = rng.uniform(0.3, 0.85), rng.uniform(0.03, 0.15)

        def box(c: float, r: float, half: float) -> list[tuple[float, float]]:
            corners = [(-half, -half), (half, -half), (half, half), (-half, half)]
            out = []
            for dx, dy in corners:
                gx, gy = (c + dx) * step_x, (r + dy) * step_y
                out.append((left + gx + shear_x * gy, top + gy + shear_y * gx))
            return self._scaled(out)

        centre_x, centre_y = left + columns * step_x / 2, top + rows * step_y / 2
        wall = self._new(centre_x, centre_y, columns * step_x)
        hull = [box(0, 0, 0.7)[0], box(columns - 1, 0, 0.7)[1]]
        hull += [box(columns - 1, rows - 1, 0.7)[2], box(0, rows - 1, 0.7)[3]]
        self.draw.polygon(hull, fill=wall)
        rims = self._new(centre_x, centre_y, columns * step_x, 0.5)
        panes = [self._new(centre_x, centre_y, columns * step_x) for _ in range(5)]
        for r in range(rows):
            for c in range(columns):
                self.draw.polygon(box(c, r, fill / 2), fill=rims)
                self.draw.polygon(box(c, r, fill / 2 - frame / 2), fill=panes[int(rng.integers(5))])
        self.words.append("windows")

    def wires(self) -> None:
        """Straight lines and circles of various thickness."""
        rng = self.rng
        for _ in range(int(rng.integers(3, 60))):
            number = self._new(self.width / 2, self.height / 2, 1e6, 0.8)
            wide = max(1, int(SUPERSAMPLING * _log_uniform(rng, 0.5, 14)))
            x, y = rng.uniform(-0.1, 1.1) * self.width, rng.uniform(-0.1, 1.1) * self.height
            if rng.random() < 0.75:
                angle, reach = rng.uniform(0, np.pi), _log_uniform(rng, 40, 1500)
                ends = [(x, y), (x + reach * np.cos(angle), y + reach * np.sin(angle))]
                self.draw.line(self._scaled(ends), fill=number, width=wide)
            else:
                r = _log_uniform(rng, 8, 250)
                box = self._scaled([(x - r, y - r), (x + r, y + r)])
                self.draw.ellipse([*box[0], *box[1]], outline=number, width=wide)
        self.words.append("lines")

    def writing(self) -> None:
        """Lines of random words, upright or turned."""
        rng = self.rng
        written = ""
        for _ in range(int(rng.integers(1, 6))):
            size = _log_uniform(rng, 12, 150)
            font = ImageFont.load_default(size=SUPERSAMPLING * size)
            rows = []
            for _ in range(int(rng.integers(1, 9 if size < 40 else 3))):
                lengths = rng.integers(2, 9, int(rng.integers(1, 6)))
                rows.append(" ".join("".join(rng.choice(_LETTERS, n)) for n in lengths))
            written = rows[0].split()[0]
            text = "\n".join(rows)
            box = self.draw.multiline_textbbox((0, 0), text, font=font)
            stamp = Image.new("L", (int(box[2]) + 4, int(box[3]) + 4), 0)
            ImageDraw.Draw(stamp).multiline_text((2, 2), text, fill=255, font=font)
            if rng.random() < 0.4:
                stamp = stamp.rotate(rng.uniform(-40, 40), expand=True, resample=Image.BILINEAR)
            x, y = rng.uniform(-0.1, 0.8) * self.width, rng.uniform(-0.05, 0.9) * self.height
            where = (int(SUPERSAMPLING * x), int(SUPERSAMPLING * y))
            mask = stamp.point(lambda value: 255 if value > 127 else 0).convert("1")
            self.canvas.paste(self._new(x, y, 300, 0.8), where, mask)
        self.words.append(f'text "{written}"')

    def render(self) -> tuple[np.ndarray, np.ndarray]:
        """(colour (H, W, 3) premultiplied by coverage, coverage (H, W, 1)), both in [0, 1]."""
        rng, s = self.rng, SUPERSAMPLING
        bank = [texture(rng, self.height, self.width) for _ in range(4)]
        for _, word in bank[:2]:
            self.words.append(word)
        fields = np.stack([values for values, _ in bank])
        n = len(self.shapes.radius) + 1  # entry 0 is the hole
        centre = np.array([(0.0, 0.0), *self.shapes.centre], dtype=np.float32)
        inverse_radius = 1 / np.array([1.0, *self.shapes.radius], dtype=np.float32)
        colour = np.stack([np.zeros(3, np.float32), *self.shapes.colour])
        keep = 1 - np.array([1.0, *self.shapes.flat], dtype=np.float32)
        slope = rng.standard_normal((n, 2), dtype=np.float32) * 0.12 * keep[:, None]
        slope += rng.normal(size=2) * 0.1 * keep[:, None]  # one light for the whole plane
        bulge = np.abs(rng.standard_normal(n, dtype=np.float32)) * 0.12 * keep
        which = rng.integers(0, len(bank), n)
        strong = np.exp(rng.normal(-2.9, 0.8, n)).astype(np.float32) * keep
        tone = strong[:, None] * (
            1 + 0.35 * rng.standard_normal((n, 3), dtype=np.float32) * (self.palette.spread > 0)
        )
        offset = rng.integers(0, max(self.height, self.width), (n, 2))
        ids = np.asarray(self.canvas)
        y, x = np.mgrid[0 : self.height, 0 : self.width]
        total = np.zeros((self.height, self.width, 3), np.float32)
        cover = np.zeros((self.height, self.width, 1), np.float32)
        for dy in range(s):
            for dx in range(s):
                k = ids[dy::s, dx::s]
                u = (x - centre[k, 0]) * inverse_radius[k]
                v = (y - centre[k, 1]) * inverse_radius[k]
                shade = slope[k, 0] * u + slope[k, 1] * v
                shade -= bulge[k] * np.minimum(u * u + v * v, 2.0)
                grain = fields[
                    which[k], (y + offset[k, 0]) % self.height, (x + offset[k, 1]) % self.width
                ]
                value = colour[k] * (1 + shade[..., None]) + grain[..., None] * tone[k]
                there = (k > 0)[..., None].astype(np.float32)
                total += np.clip(value, 0, 1) * there
                cover += there
        return total / (s * s), cover / (s * s)


_VERBS = ("leaves", "strokes", "hills", "objects", "facade", "wires", "writing")
_VERB_ODDS = (0.3, 0.16, 0.09, 0.2, 0.09, 0.08, 0.08)


def draw_picture(seed: int, size: tuple[int, int] = (1024, 1024)) -> tuple[np.ndarray, str]:
    """Draws picture number `seed`.

    Args:
        seed: picture number; the same number and size give the same picture.
        size: (height, width) in pixels, each at least 64.

    Returns:
        ((H, W, 3) uint8 RGB, caption of at most about a dozen words naming what was drawn).

    Raises:
        ValueError: a side under 64 pixels.
    """
    height, width = size
    if min(size) < 64:
        raise ValueError(f"draw_picture: size must be at least 64 on each side, got {size}")
    rng = np.random.default_rng([20260523, seed])
    palette = _Palette(rng)
    image = np.zeros((height, width, 3), np.float32)
    words: list[str] = []
    planes = int(rng.choice([1, 2, 3], p=[0.45, 0.4, 0.15]))
    focused = int(rng.integers(planes))
    for index in range(planes):
        plane = _Plane(rng, height, width, palette)
        if index == 0:
            plane.backdrop()
        for verb in rng.choice(_VERBS, size=int(rng.integers(1, 3)), p=_VERB_ODDS):
            getattr(plane, str(verb))()
        colour, cover = plane.render()
        sigma = 0.0 if index == focused or rng.random() < 0.3 else _log_uniform(rng, 0.6, 8)
        if sigma:
            colour, cover = blur(colour, sigma), blur(cover, sigma)
        if index and rng.random() < 0.6:  # a soft shadow under what stands in front
            shift = rng.integers(-20, 21, 2)
            shadow = blur(np.roll(cover, shift, (0, 1)), _log_uniform(rng, 3, 25))
            image *= 1 - rng.uniform(0.2, 0.7) * np.clip(shadow, 0, 1)
        image = image * (1 - cover) + colour
        words += plane.words
    if rng.random() < 0.7:  # uneven illumination
        light = power_noise(rng, height, width, rng.uniform(3.0, 5.0))
        image *= np.exp(rng.uniform(0.03, 0.3) * light)[..., None]
    if rng.random() < 0.25:  # an area out of focus
        mask = 1 / (1 + np.exp(-4 * power_noise(rng, height, width, 5.0)))[..., None]
        image += mask * (blur(image, _log_uniform(rng, 0.8, 6)) - image)
    image = np.clip(image, 0, 1) ** _log_uniform(rng, 0.7, 1.5)
    image = blur(image, rng.uniform(0.0, 0.9))
    if rng.random() < 0.4:
        image += rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(0, 0.012)
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8), ", ".join(words)


def enlarged_detail(picture: np.ndarray, factor: float) -> np.ndarray:
    """The picture shrunk by `factor` >= 1 with an antialiasing filter, detail packed denser."""
    height, width = picture.shape[:2]
    small = (max(64, round(width / factor)), max(64, round(height / factor)))
    return np.asarray(Image.fromarray(picture).resize(small, Image.LANCZOS))
