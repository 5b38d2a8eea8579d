"""Measures the demo: 4x decoding against the autoencoder's own decode enlarged by bicubic."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn import functional as F

from pixeldiff.models.autoencoder import ConvAutoencoder
from pixeldiff.models.pid import PiDNet
from pixeldiff.text.tiny import TinyTextEmbedder

from .cache import HELD_OUT_SEED
from .pictures import draw_picture
from .train_pid import T_LIST, low_quality

# Photographs that scikit-image carries inside its package (nothing is downloaded).
NATURAL: dict[str, Callable[[], np.ndarray]] = {
    "astronaut": data.astronaut,
    "camera": data.camera,
    "chelsea": data.chelsea,
    "coffee": data.coffee,
    "rocket": data.rocket,
    "coins": data.coins,
    "motorcycle": lambda: data.stereo_motorcycle()[0],
    "hubble": data.hubble_deep_field,
    "retina": data.retina,
    "ihc": data.immunohistochemistry,
    "moon": data.moon,
    "clock": data.clock,
    "brick": data.brick,
    "grass": data.grass,
    "gravel": data.gravel,
}
GENERATED = 12


def natural_picture(name: str) -> np.ndarray:
    """(H, W, 3) uint8, the middle of the photograph, sides at most 1024 and multiples of 32."""
    picture = np.asarray(NATURAL[name]())
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, axis=-1)
    height, width = (min(side // 32 * 32, 1024) for side in picture.shape[:2])
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return np.ascontiguousarray(picture[top : top + height, left : left + width, :3])


def to_tensor(picture: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) fp32 in [-1, 1]."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float().div(127.5).sub(1)


def to_picture(image: Tensor) -> np.ndarray:
    """(1, 3, H, W) in [-1, 1] -> (H, W, 3) uint8, clamped and rounded."""
    scaled = image[0].clamp(-1, 1).add(1).mul(127.5).round()
    return scaled.byte().permute(1, 2, 0).numpy()


class Decoder:
    """The demo, end to end: picture -> latent -> picture, by both ways that are compared."""

    def __init__(self, net: PiDNet, autoencoder: ConvAutoencoder) -> None:
        self.net, self.autoencoder = net, autoencoder
        self.embed = TinyTextEmbedder(net.config.txt_embed_dim, net.config.txt_max_length)

    @torch.inference_mode()
    def latent(self, target: Tensor) -> Tensor:
        """Latent of the target at a quarter of its size, rounded to bf16 as decoding rounds it."""
        return self.autoencoder.encode(low_quality(target)).bfloat16().float()

    @torch.inference_mode()
    def baseline(self, latent: Tensor) -> Tensor:
        """The autoencoder's decode enlarged 4x by bicubic interpolation."""
        small = self.autoencoder.decode(latent).clamp(-1, 1)
        return F.interpolate(small, scale_factor=4, mode="bicubic", align_corners=False)

    @torch.inference_mode()
    def decode(
        self, latent: Tensor, caption: str = "", *, sigma: float = 0.0, seed: int = 0
    ) -> Tensor:
        """Four steps of the SDE sampler; (1, 3, H, W), not clamped."""
        generator = torch.Generator().manual_seed(seed)
        size = (latent.shape[2] * 32, latent.shape[3] * 32)
        condition = self.net.prepare(
            latent, self.embed.encode(caption), torch.full((1,), sigma), size=size
        )
        x = torch.randn(1, 3, *size, generator=generator)
        for t, following in pairwise(T_LIST):
            x0 = x - t * self.net.step(x, torch.full((1,), 1000 * t), condition)
            noise = torch.randn(x.shape, generator=generator) if following else 0.0
            x = (1 - following) * x0 + following * noise
        return x


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB between two uint8 pictures."""
    return 10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean structural similarity of two (H, W, 3) uint8 pictures."""
    return float(structural_similarity(a, b, channel_axis=-1, data_range=255))


def sharpness(picture: np.ndarray, original: np.ndarray) -> float:
    """Gradient energy of the luma relative to the original's; 1 is as sharp as the original."""

    def energy(p: np.ndarray) -> float:
        luma = p @ np.array([0.299, 0.587, 0.114])
        return float(np.mean(np.diff(luma, axis=0) ** 2) + np.mean(np.diff(luma, axis=1) ** 2))

    return energy(picture) / max(energy(original), 1e-9)


@dataclass(frozen=True)
class Row:
    """Figures of one picture."""

    name: str
    group: str
    size: str
    psnr_bicubic: float
    psnr_pid: float
    ssim_bicubic: float
    ssim_pid: float
    sharpness_bicubic: float
    sharpness_pid: float
    saturated: float
    seconds: float


def measure(
    decoder: Decoder, name: str, group: str, original: np.ndarray, caption: str
) -> tuple[Row, np.ndarray, np.ndarray]:
    """(figures, baseline picture, decoded picture).

    Raises:
        FloatingPointError: the decode is not finite.
    """
    target = to_tensor(original)
    latent = decoder.latent(target)
    bicubic = to_picture(decoder.baseline(latent))
    started = time.perf_counter()
    image = decoder.decode(latent, caption)
    seconds = time.perf_counter() - started
    if not torch.isfinite(image).all():
        raise FloatingPointError(f"measure: the decode of {name} is not finite")
    decoded = to_picture(image)
    row = Row(
        name=name,
        group=group,
        size=f"{original.shape[1]}x{original.shape[0]}",
        psnr_bicubic=psnr(bicubic, original),
        psnr_pid=psnr(decoded, original),
        ssim_bicubic=ssim(bicubic, original),
        ssim_pid=ssim(decoded, original),
        sharpness_bicubic=sharpness(bicubic, original),
        sharpness_pid=sharpness(decoded, original),
        saturated=float((image.abs() > 1).float().mean()),
        seconds=seconds,
    )
    return row, bicubic, decoded


def held_out(generated: int) -> list[tuple[str, str, np.ndarray, str]]:
    """(name, group, picture, caption): held-out generated ones, then the photographs."""
    out = []
    for index in range(generated):
        picture, caption = draw_picture(HELD_OUT_SEED + index)
        out.append((f"generated-{index:02d}", "generated", picture, caption))
    return out + [(name, "natural", natural_picture(name), "") for name in NATURAL]


def means(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Mean of every figure for each group."""
    figures = [name for name, kind in Row.__annotations__.items() if kind == "float"]
    groups = {row.group: [r for r in rows if r.group == row.group] for row in rows}
    return {
        group: {f: float(np.mean([getattr(row, f) for row in members])) for f in figures}
        for group, members in groups.items()
    }


_LINE = "{:<16}{:>10}  {:>7} {:>7} {:>7}  {:>7} {:>7}  {:>6} {:>6}  {:>7}"


def _cells(label: str, size: str, r: dict[str, float]) -> str:
    gain = r["psnr_pid"] - r["psnr_bicubic"]
    return _LINE.format(
        label,
        size,
        f"{r['psnr_bicubic']:.2f}",
        f"{r['psnr_pid']:.2f}",
        f"{gain:+.2f}",
        f"{r['ssim_bicubic']:.4f}",
        f"{r['ssim_pid']:.4f}",
        f"{r['sharpness_bicubic']:.2f}",
        f"{r['sharpness_pid']:.2f}",
        f"{r['seconds']:.1f}",
    )


def table(rows: list[Row]) -> str:
    """The per-picture table and the means of both groups, as text."""
    head = ("picture", "size", "bicubic", "PiD", "dB", "bicubic", "PiD", "bicub.", "PiD", "seconds")
    lines = [
        _LINE.format("", "", "PSNR", "", "", "SSIM", "", "sharp", "", ""),
        _LINE.format(*head),
    ]
    lines += [_cells(row.name, row.size, vars(row)) for row in rows]
    for group, mean in means(rows).items():
        lines.append(_cells(f"mean {group}", "", mean))
    return "\n".join(lines)


def evaluate(decoder: Decoder, result: Path, pictures: Path, generated: int = GENERATED) -> None:
    """Prints the table, writes it as JSON to `result`, side-by-side PNGs to the folder `pictures`.

    A PNG shows, from left to right: bicubic, PiD, original.
    """
    pictures.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, group, original, caption in held_out(generated):
        row, bicubic, decoded = measure(decoder, name, group, original, caption)
        rows.append(row)
        side_by_side = np.concatenate([bicubic, decoded, original], axis=1)
        Image.fromarray(side_by_side).save(pictures / f"{name}.png")
        print(_cells(row.name, row.size, vars(row)), flush=True)
    print(table(rows))
    result.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"means": means(rows), "pictures": [vars(row) for row in rows]}, indent=1)
    result.write_text(text + "\n")


@functools.cache
def _monitored() -> dict[str, list[np.ndarray]]:
    names = ("astronaut", "coffee", "chelsea", "motorcycle")
    drawn = [draw_picture(HELD_OUT_SEED + index, (384, 384))[0] for index in range(4)]
    return {"natural": [natural_picture(n)[:320, :384] for n in names], "generated": drawn}


def monitor(decoder: Decoder) -> None:
    """One line of figures on a few small fixed pictures, to watch a training run by."""
    rows = [
        measure(decoder, "", group, picture, "")[0]
        for group, pictures in _monitored().items()
        for picture in pictures
    ]
    for group, mean in means(rows).items():
        print(
            f"  monitor {group:<10} PSNR {mean['psnr_bicubic']:.2f} -> {mean['psnr_pid']:.2f}  "
            f"SSIM {mean['ssim_bicubic']:.4f} -> {mean['ssim_pid']:.4f}  "
            f"sharpness {mean['sharpness_bicubic']:.2f} -> {mean['sharpness_pid']:.2f}  "
            f"saturated {mean['saturated']:.3f}",
            flush=True,
        )


def monitor_paint(paint: Callable[[Tensor], Tensor], autoencoder: ConvAutoencoder) -> None:
    """Mean figures of bicubic and of `paint(latent)` on the same pictures, a line for each kind."""
    decoder = Decoder.__new__(Decoder)
    decoder.autoencoder = autoencoder
    for group, pictures in _monitored().items():
        rows = []
        for picture in pictures:
            latent = decoder.latent(to_tensor(picture))
            with torch.no_grad():
                painted = to_picture(paint(latent.clone()))
            bicubic = to_picture(decoder.baseline(latent))
            rows.append(
                [f(p, picture) for f in (psnr, ssim, sharpness) for p in (bicubic, painted)]
            )
        figures = np.mean(rows, axis=0)
        print(
            f"  paint {group:<10} PSNR {figures[0]:.2f} -> {figures[1]:.2f}  "
            f"SSIM {figures[2]:.4f} -> {figures[3]:.4f}  "
            f"sharpness {figures[4]:.3f} -> {figures[5]:.3f}",
            flush=True,
        )
