"""Images between tensors, arrays and Pillow; `picture_files` writes them.

A picture of 10240 x 10240 is 1.3 GB in fp32: whatever is made of it is made a band of rows at a
time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

OUTPUTS = ("pil", "pt", "np")
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
    for band in image.split(band_rows(image.shape[2]), dim=1):
        values = band.float()
        if rounded:
            values = (((values + 1) / 2).clamp_(0, 1) * 255).round_()
        else:
            values = (values.clamp(-1, 1) + 1) * 127.5
        yield values.to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def band_rows(width: int) -> int:
    """How many rows of a picture are converted at a time."""
    return max(1, _BAND // max(1, width))


def picture_bands(picture: Image.Image) -> Iterator[np.ndarray]:
    """A picture of any mode -> (rows, W, 3) uint8 from top to bottom; see `to_rgb`."""
    rows = band_rows(picture.width)
    for first in range(0, picture.height, rows):
        last = min(first + rows, picture.height)
        yield np.asarray(to_rgb(picture.crop((0, first, picture.width, last))))


def to_picture(image: Tensor, *, rounded: bool = False) -> Image.Image:
    """(3, H, W) in [-1, 1] -> an 8-bit RGB picture (Pillow: four bytes a pixel); see `to_uint8`."""
    picture, first = Image.new("RGB", (image.shape[2], image.shape[1])), 0
    for band in uint8_bands(image, rounded=rounded):
        picture.paste(Image.fromarray(band), (0, first))
        first += len(band)
    return picture


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
        return [to_picture(image, rounded=rounded) for image in images]
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
