"""Scores the demo's source and its L2P on held-out combinations, and times them side by side."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from pixeldiff.images import convert
from pixeldiff.models.l2p import L2PPipeline
from pixeldiff.models.l2p.scheduler import SHIFT
from pixeldiff.out_files import written_whole

from .recognise import recognise
from .shapes import Scene, caption, draw, random_scene
from .source_model import SourceModel

ATTRIBUTES = ("shape", "colour", "background", "texture")
_SEED = 5_000_000  # of evaluation pictures: no training picture starts from their noise
_TOGETHER = 16

Make = Callable[[list[str], list[int]], Tensor]


def held_out_scenes(count: int) -> list[Scene]:
    """Scenes of combinations that neither model was trained on."""
    rng = np.random.default_rng([20260523, 1])
    return [random_scene(rng, held_out=True) for _ in range(count)]


def makers(source: SourceModel, l2p: L2PPipeline, side: int) -> dict[str, Make]:
    """By name, (captions, seeds) -> pictures (B, 3, side, side), with L2P's steps and guidance."""
    steps, guidance = l2p.sampling.steps, l2p.sampling.guidance_scale

    def of_source(texts: list[str], seeds: list[int]) -> Tensor:
        return source.pictures(texts, seeds, side, steps=steps, guidance=guidance)

    def of_l2p(texts: list[str], seeds: list[int]) -> Tensor:
        generators = [torch.Generator(l2p.device).manual_seed(seed) for seed in seeds]
        return l2p(texts, height=side, width=side, generator=generators, output_type="pt").images

    return {"source": of_source, "l2p": of_l2p}


def score(make: Make, scenes: list[Scene]) -> dict[str, float]:
    """Share of pictures in which each word of the caption is recognised, and all four."""
    right = []
    for i in range(0, len(scenes), _TOGETHER):
        some = scenes[i : i + _TOGETHER]
        pictures = make([caption(s) for s in some], [_SEED + i + k for k in range(len(some))])
        for scene, picture in zip(some, convert(pictures.cpu(), "pil"), strict=True):
            seen = recognise(picture).combination
            right.append([a == b for a, b in zip(seen, scene.combination, strict=True)])
    table = np.array(right)
    shares = {name: float(table[:, i].mean()) for i, name in enumerate(ATTRIBUTES)}
    return {**shares, "all": float(table.all(1).mean())}


@torch.no_grad()
def ceilings(source: SourceModel, scenes: list[Scene], side: int) -> dict[str, dict[str, float]]:
    """Scores of pictures that are right: as drawn, and after the autoencoder."""

    def drawn(_: list[str], seeds: list[int]) -> Tensor:
        pixels = np.stack([draw(scenes[seed - _SEED], side) for seed in seeds])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() * 2 / 255 - 1

    def coded(texts: list[str], seeds: list[int]) -> Tensor:
        images = drawn(texts, seeds).to(source.net.dtype)
        return source.autoencoder(images).float().clamp(-1, 1)

    return {"drawn": score(drawn, scenes), "autoencoder": score(coded, scenes)}


def times(makes: dict[str, Make], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of one picture, by name: median and range of runs that take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in makes}
    for turn in range(repeats + 1):
        for name, make in makes.items():
            begun = time.perf_counter()
            make(["a red circle on a blue striped background"], [turn])
            if turn:  # the first one of each warms up
                seconds[name].append(time.perf_counter() - begun)
    return {
        name: {"median": statistics.median(s), "least": min(s), "most": max(s)}
        for name, s in seconds.items()
    }


def sheet(makes: dict[str, Make], scenes: list[Scene], path: Path) -> None:
    """A column a caption: the picture of each model, one above the other, from the same seed."""
    texts = [caption(scene) for scene in scenes]
    rows = [convert(make(texts, list(range(len(texts)))).cpu(), "pil") for make in makes.values()]
    side, label, left = 192, 34, 60
    size = (left + side * len(texts), label + side * len(rows))
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for i, text in enumerate(texts):
        what, _, ground = text.partition(" on ")
        pen.text((left + i * side + 6, 4), f"{what}\non {ground}", fill="black")
    for k, (name, row) in enumerate(zip(makes, rows, strict=True)):
        pen.text((8, label + k * side + side // 2), {"l2p": "L2P"}.get(name, name), fill="black")
        for i, picture in enumerate(row):
            small = picture.resize((side - 4, side - 4), Image.Resampling.LANCZOS)
            canvas.paste(small, (left + i * side, label + k * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, optimize=True)


def evaluate(
    source: SourceModel,
    l2p: L2PPipeline,
    result: Path,
    picture: Path,
    *,
    count: int,
    repeats: int,
    side: int,
) -> dict:
    """Writes the scores and times as JSON, and a sheet of the first scenes' pictures.

    Args:
        source, l2p: the models.
        result, picture: files to write.
        count: held-out scenes to score on.
        repeats: timed pictures of each model.
        side: of the pictures, in pixels.
    """
    makes = makers(source, l2p, side)
    scenes = held_out_scenes(count)
    parameters = {"source": source.net, "l2p": l2p.net, "autoencoder": source.autoencoder}
    facts = {
        "device": f"{_processor()}, {torch.get_num_threads()} threads, fp32",
        "side": side,
        "steps": l2p.sampling.steps,
        "guidance": l2p.sampling.guidance_scale,
        "shift": {"source": SHIFT, "l2p": l2p.sampling.shift},
        "captions": count,
        "parameters": {k: sum(p.numel() for p in m.parameters()) for k, m in parameters.items()},
        "score": {name: score(make, scenes) for name, make in makes.items()},
        "ceiling": ceilings(source, scenes, side),
        "seconds": {"repeats": repeats, **times(makes, repeats)},
    }
    sheet(makes, scenes[:6], picture)
    with written_whole([result]) as (partial,):
        partial.write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))
    return facts


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
