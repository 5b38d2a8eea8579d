"""Images between tensors, arrays, Pillow and PNG files.

A picture of 10240 x 10240 is 1.3 GB in fp32: whatever is made of it is made a band of rows at a
time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from .out_files import check_out_path, written_whole
from .png_stream import write_png

OUTPUTS = ("pil", "pt", "np")
PNG_KEY = "pixeldiff"
_BAND = 1 << 18  # pixels of a band of rows: 3 MB in fp32


def to_uint8(images: Tensor, *, rounded: bool = False) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8.

    Values outside [-1, 1] are clamped first. Truncated toward zero, as PiD was released; `rounded`
    to the nearest, ties to even, as L2P was.
    """
    batch, channels, height, width = images.shape
    out = np.empty((batch, height, width, channels), np.uint8)
    for picture, image in zip(out, images, strict=True):
        first = 0
        for band in uint8_bands(image, rounded=rounded):
            picture[first : first + len(band)] = band
            first += len(band)
    return out


def uint8_bands(image: Tensor, *, rounded: bool = False) -> Iterator[np.ndarray]:
    """(3, H, W) in [-1, 1] -> (rows, W, 3) uint8 from top to bottom; see `to_uint8`."""
    for band in image.split(max(1, _BAND // max(1, image.shape[2])), dim=1):
        values = band.float()
        if rounded:
            values = (((values + 1) / 2).clamp_(0, 1) * 255).round_()
        else:
            values = (values.clamp(-1, 1) + 1) * 127.5
        yield values.to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def check_output(output: str) -> None:
    """Raises ValueError unless `convert` knows the form."""
    if output not in OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")


def convert(
    images: Tensor, output: str, *, rounded: bool = False
) -> list[Image.Image] | Tensor | np.ndarray:
    """(B, 3, H, W) in [-1, 1] in the form a caller asked for.

    Args:
        output: "pil": list of B 8-bit RGB images. "pt": the tensor itself. "np": (B, H, W, 3) fp32
            array in [0, 1].
        rounded: see `to_uint8`.

    Raises:
        ValueError: another output.
    """
    check_output(output)
    if output == "pt":
        return images
    if output == "pil":
        return [Image.fromarray(a) for a in to_uint8(images, rounded=rounded)]
    return ((images.float() + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB: transparency over white, 16 bits rounded to 8.

    Raises:
        ValueError: a mode without a fixed range (floating point), or one Pillow cannot convert.
    """
    if image.mode == "F":
        raise ValueError("floating-point pictures have no fixed range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255 instead of scaling. Mode I holds 16-bit greys too.
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def from_pil(image: Image.Image) -> Tensor:
    """A picture of any mode -> (1, 3, H, W) fp32 in [-1, 1]; see `to_rgb`."""
    array = np.asarray(to_rgb(image))
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def save_png(
    path: str | os.PathLike[str],
    image: Image.Image | Tensor,
    metadata: dict[str, Any] | None = None,
    *,
    rounded: bool = False,
) -> Path:
    """Write a PNG whole or not at all, with how it was made in its text metadata.

    Args:
        path: ends in .png; its directory must exist.
        image: a picture, or (3, H, W) in [-1, 1] on any device, of which only bands of rows are
            converted at a time.
        metadata: JSON-able; stored as JSON under the key "pixeldiff".
        rounded: of a tensor; see `to_uint8`.

    Raises:
        ValueError: another suffix. OSError: the file cannot be written; nothing is left behind.
    """
    return save_pngs([(path, image, metadata)], rounded=rounded)[0]


def save_pngs(
    files: Sequence[tuple[str | os.PathLike[str], Image.Image | Tensor, dict[str, Any] | None]],
    *,
    rounded: bool = False,
) -> list[Path]:
    """As `save_png` for several (path, image, metadata): either all of them are written or none."""
    paths = [check_png_path(path) for path, _, _ in files]
    with written_whole(paths) as partial:
        for target, (_, image, metadata) in zip(partial, files, strict=True):
            texts = {} if metadata is None else {PNG_KEY: json.dumps(metadata)}
            if isinstance(image, Tensor):
                with target.open("wb") as file:
                    size = image.shape[1], image.shape[2]
                    write_png(file, size, uint8_bands(image, rounded=rounded), texts)
                continue
            info = PngImagePlugin.PngInfo()
            for key, text in texts.items():
                info.add_text(key, text)
            image.save(target, "PNG", pnginfo=info)
    return paths


def check_png_path(path: str | os.PathLike[str]) -> Path:
    """The path, if a PNG can be written there; call it before long work starts.

    Raises:
        ValueError: the suffix is not .png. OSError: no such directory, or it is not writable.
    """
    return check_out_path(path, ".png")


def read_png_metadata(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What `save_png` stored, or None.

    Raises:
        ValueError: the entry is there but is not JSON. OSError: not a readable picture.
    """
    with Image.open(path) as image:
        text = image.info.get(PNG_KEY)
    return None if text is None else json.loads(text)
