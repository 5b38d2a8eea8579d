"""Pictures of one shape on one background, with captions that say what is in them.

The vocabulary of the small text-to-image model: eight shapes, nine colours, four textures, two
sizes. Everything is measured in picture sides, so a picture of another size is the same picture,
sharper. Some combinations are held out: no picture of them is trained on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (0.85, 0.10, 0.10),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.90, 0.15),
    "green": (0.10, 0.60, 0.20),
    "blue": (0.10, 0.25, 0.85),
    "purple": (0.50, 0.15, 0.65),
    "pink": (1.00, 0.60, 0.75),
    "white": (0.97, 0.97, 0.97),
    "black": (0.05, 0.05, 0.05),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
TEXTURES = ("plain", "striped", "checkered", "dotted")
SMALL, LARGE = 0.295, 0.345  # radii below and above which a shape may be called so
RADII = (0.26, 0.38)
WANDER = 0.07  # of a side, how far a shape may be off the middle
MARGIN = 0.07  # of a side, which no shape touches
HELD_OUT_SHARE = 12  # one combination in so many
SUPERSAMPLING = 4
_RING = 0.58  # inner radius of a ring


@dataclass(frozen=True)
class Scene:
    """What a picture shows. Lengths are in picture sides.

    Args:
        shape, colour, background, texture: words of the vocabulary.
        radius, centre, turn: of the shape; turn in radians.
        period, angle, phase: of the texture: its repeat, direction, and place.
    """

    shape: str
    colour: str
    background: str
    texture: str
    radius: float
    centre: tuple[float, float]
    turn: float
    period: float
    angle: float
    phase: tuple[float, float]

    @property
    def combination(self) -> tuple[str, str, str, str]:
        return self.shape, self.colour, self.background, self.texture


def is_held_out(combination: tuple[str, str, str, str]) -> bool:
    """Whether no picture of these four words is trained on."""
    digest = hashlib.sha256(" ".join(combination).encode()).digest()
    return digest[0] % HELD_OUT_SHARE == 0


def random_scene(rng: np.random.Generator, *, held_out: bool = False) -> Scene:
    """A scene of the trained combinations, or of the held-out ones."""
    while True:
        shape, texture = str(rng.choice(SHAPES)), str(rng.choice(TEXTURES))
        colour, background = (str(c) for c in rng.choice(list(COLOURS), 2, replace=False))
        if is_held_out((shape, colour, background, texture)) == held_out:
            break
    radius = float(rng.uniform(*RADII))
    wander = min(WANDER, 0.5 - MARGIN - radius)
    angle = float(rng.choice([0.0, np.pi / 2, np.pi / 4])) if texture == "striped" else 0.0
    return Scene(
        shape=shape,
        colour=colour,
        background=background,
        texture=texture,
        radius=radius,
        centre=(float(0.5 + rng.uniform(-1, 1) * wander), float(0.5 + rng.uniform(-1, 1) * wander)),
        turn=float(rng.uniform(-0.04, 0.04)),
        period=float(rng.uniform(0.17, 0.27)),
        angle=angle,
        phase=(float(rng.uniform()), float(rng.uniform())),
    )


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Words for a scene; with `rng` in one of several forms, without in the plainest."""
    texture, size = scene.texture, ""
    if rng is None:
        ground = f"{scene.background} {texture} background"
        return f"{_a(scene.colour)} {scene.shape} on {_a(ground)}"
    if rng.random() < 0.5:
        size = "small " if scene.radius < SMALL else "large " if scene.radius > LARGE else ""
    ground = f"{scene.background} {texture}"
    if texture == "plain" and rng.random() < 0.5:
        ground = scene.background
    elif rng.random() < 0.3:
        ground = f"{texture} {scene.background}"
    what, ground = f"{size}{scene.colour} {scene.shape}", f"{ground} background"
    if rng.random() < 0.2:
        return f"{what} on {ground}"
    return f"{_a(what)} on {_a(ground)}"


def _a(words: str) -> str:
    return f"{'an' if words.startswith('orange') else 'a'} {words}"


def outline(shape: str, radius: float = 1.0, turn: float = 0.0) -> np.ndarray:
    """(n, 2) corners x, y of a shape about the origin, y downwards; a ring's outer edge."""
    if shape in ("circle", "ring"):
        a = np.linspace(0, 2 * np.pi, 72, endpoint=False)
        points = np.stack([np.cos(a), np.sin(a)], 1)
    elif shape == "square":
        points = 0.84 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    elif shape == "diamond":
        points = np.array([(0, -1.0), (0.78, 0), (0, 1), (-0.78, 0)])
    elif shape == "triangle":
        points = np.array([(0, -0.95), (1, 0.8), (-1, 0.8)])
    elif shape == "star":
        a = np.arange(10) * np.pi / 5 - np.pi / 2
        r = np.where(np.arange(10) % 2, 0.42, 1.0)
        points = np.stack([r * np.cos(a), r * np.sin(a)], 1)
    elif shape == "cross":
        w = 0.34
        arm = [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w)]
        points = np.array([*arm, *((-x, -y) for x, y in arm)])
    elif shape == "heart":
        a = np.linspace(0, 2 * np.pi, 96, endpoint=False)
        x = 16 * np.sin(a) ** 3
        y = 13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)
        points = np.stack([x / 16.5, (-y - 2.5) / 15.5], 1)
    else:
        raise ValueError(f"outline: shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    cos, sin = np.cos(turn), np.sin(turn)
    return radius * points @ np.array([(cos, sin), (-sin, cos)])


def coverage(shape: str, side: int, centre: tuple[float, float], radius: float, turn: float):
    """(side, side) fp32 in [0, 1]: how much of each pixel the shape covers."""
    fine = side * SUPERSAMPLING
    canvas = Image.new("L", (fine, fine), 0)
    draw = ImageDraw.Draw(canvas)
    middle = np.array(centre)
    edges = [(1.0, 255), (_RING, 0)] if shape == "ring" else [(1.0, 255)]
    for share, fill in edges:
        points = (outline(shape, radius * share, turn) + middle) * fine
        draw.polygon([tuple(p) for p in points], fill=fill)
    return np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) / 255


def tones(colour: str) -> tuple[np.ndarray, np.ndarray]:
    """A background's two colours (3,): the colour itself and a darker shade (of black a grey)."""
    base = np.array(COLOURS[colour], dtype=np.float32)
    return base, base * 0.58 if colour != "black" else np.full(3, 0.32, np.float32)


def shading(scene: Scene, side: int) -> np.ndarray:
    """(side, side) fp32 in [0, 1]: share of the darker shade in each pixel's background."""
    if scene.texture == "plain":
        return np.zeros((side, side), np.float32)
    y, x = ((np.mgrid[0:side, 0:side] + 0.5) / side).astype(np.float32)
    period, pixel = scene.period, 1 / side
    cos, sin = np.cos(scene.angle), np.sin(scene.angle)
    u = (x * cos + y * sin) / period + scene.phase[0]
    v = (y * cos - x * sin) / period + scene.phase[1]
    if scene.texture == "dotted":
        away = np.hypot(u - np.floor(u) - 0.5, v - np.floor(v) - 0.5)
        return np.clip((0.28 - away) * period / pixel + 0.5, 0, 1)
    across = _wave(u, period / pixel)
    if scene.texture == "striped":
        return (1 + across) / 2
    return (1 + across * _wave(v, period / pixel)) / 2


def _wave(phase: np.ndarray, pixels: float) -> np.ndarray:
    """A square wave of -1 and 1, one pixel wide at its edges, of a period of so many pixels."""
    triangle = np.abs(phase - np.floor(phase) - 0.5) - 0.25
    return np.clip(triangle * 2 * pixels, -1, 1)


def draw(scene: Scene, side: int) -> np.ndarray:
    """(side, side, 3) uint8 RGB."""
    bright, dark = tones(scene.background)
    share = shading(scene, side)[..., None]
    picture = bright * (1 - share) + dark * share
    inside = coverage(scene.shape, side, scene.centre, scene.radius, scene.turn)[..., None]
    picture = picture * (1 - inside) + np.array(COLOURS[scene.colour], np.float32) * inside
    return np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)
