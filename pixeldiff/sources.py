"""Latents from files: a latent tensor, or a picture through an autoencoder."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .images import from_pil
from .models.autoencoder import ConvAutoencoder


def demo_asset(name: str) -> Path:
    """Path of a file shipped with the package's demo model."""
    return Path(str(resources.files("pixeldiff") / "assets" / "demo" / name))


def demo_autoencoder() -> ConvAutoencoder:
    return ConvAutoencoder.load(demo_asset("autoencoder.safetensors"))


def latent_from(path: str | Path, *, encoder: str | None) -> Tensor:
    """(B, C, h, w) latent of a file.

    Args:
        path: a .safetensors file with one tensor (or one named "latent" or "latents"), or a
            picture, whose sides are cropped to multiples of 8 around the centre.
        encoder: "demo" to encode pictures with the demo autoencoder, None to take latents only.

    Raises:
        FileNotFoundError: no such file. ValueError: not a latent, not a picture, or a picture
        without an encoder for it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix == ".safetensors":
        return _latent(path)
    image = read_picture(path)
    if encoder != "demo":
        raise ValueError(
            f"{path.name} is a picture; only the demo model brings its encoder. Encode it with the "
            f"generator's own VAE and pass the normalised latent as .safetensors"
        )
    return encode_picture(demo_autoencoder(), image)


def read_picture(path: str | Path) -> Image.Image:
    """An RGB picture, its EXIF rotation applied.

    Raises:
        ValueError: not a readable picture.
    """
    from PIL import ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise ValueError(f"{path} is neither a .safetensors latent nor a picture: {e}") from e


def encode_picture(autoencoder: ConvAutoencoder, image: Image.Image) -> Tensor:
    """(1, C, h, w) latent of a picture cropped to multiples of the autoencoder's factor."""
    factor = autoencoder.config.factor
    width, height = (side - side % factor for side in image.size)
    if not width or not height:
        raise ValueError(
            f"the picture must be at least {factor} pixels wide and high, got {image.size}"
        )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    with torch.no_grad():
        return autoencoder.encode(from_pil(image))


def _latent(path: Path) -> Tensor:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as e:
        raise ValueError(f"{path} is not a readable safetensors file: {e}") from e
    names = [n for n in ("latent", "latents") if n in tensors] or list(tensors)
    if len(names) != 1:
        raise ValueError(
            f'{path} must hold one tensor, or one named "latent"; it holds {len(tensors)}: '
            f"{', '.join(sorted(tensors)[:5])}"
        )
    latent = tensors[names[0]]
    if latent.dim() == 3:
        latent = latent[None]
    if latent.dim() != 4:
        raise ValueError(
            f"{path}: {names[0]} must be (B, C, h, w) or (C, h, w), got {tuple(latent.shape)}"
        )
    return latent
