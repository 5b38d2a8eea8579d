"""Images between tensors, arrays, Pillow and PNG files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

OUTPUTS = ("pil", "pt", "np")
PNG_KEY = "pixeldiff"


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8, truncated toward zero as released.

    Values outside [-1, 1] are clamped first.
    """
    scaled = (images.float().clamp(-1, 1) + 1) * 127.5
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def convert(images: Tensor, output: str) -> list[Image.Image] | Tensor | np.ndarray:
    """(B, 3, H, W) in [-1, 1] in the form a caller asked for.

    Args:
        output: "pil": list of B 8-bit RGB images. "pt": the tensor itself. "np": (B, H, W, 3) fp32
            array in [0, 1].

    Raises:
        ValueError: another output.
    """
    if output == "pt":
        return images
    if output == "pil":
        return [Image.fromarray(a) for a in to_uint8(images)]
    if output == "np":
        return ((images.float() + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()
    raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")


def from_pil(image: Image.Image) -> Tensor:
    """A picture of any mode -> (1, 3, H, W) fp32 in [-1, 1]; transparency is laid over white."""
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    array = np.asarray(image.convert("RGB"))
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def save_png(path: str | Path, image: Image.Image, metadata: dict[str, Any] | None = None) -> Path:
    """Write a PNG whole or not at all, with how it was made in its text metadata.

    Args:
        path: ends in .png; its directory must exist.
        metadata: JSON-able; stored as JSON under the key "pixeldiff".

    Raises:
        ValueError: another suffix. OSError: the file cannot be written; nothing is left behind.
    """
    path = check_png_path(path)
    info = PngImagePlugin.PngInfo()
    if metadata is not None:
        info.add_text(PNG_KEY, json.dumps(metadata))
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        image.save(partial, "PNG", pnginfo=info)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def check_png_path(path: str | Path) -> Path:
    """The path, if a PNG can be written there; call it before long work starts.

    Raises:
        ValueError: the suffix is not .png. OSError: no such directory, or it is not writable.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"the output must be a .png file, got {path.name!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the output directory does not exist: {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"the output is a directory: {path}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"the output directory is not writable: {path.parent}")
    return path


def read_png_metadata(path: str | Path) -> dict[str, Any] | None:
    """What `save_png` stored, or None."""
    with Image.open(path) as image:
        text = image.info.get(PNG_KEY)
    return None if text is None else json.loads(text)
