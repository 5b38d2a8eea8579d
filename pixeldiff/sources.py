"""Latents from files: a latent tensor, or a picture through an autoencoder."""

from __future__ import annotations

import warnings
from importlib import resources
from pathlib import Path

import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .images import from_pil, to_rgb
from .models.autoencoder import ConvAutoencoder

# Of a picture to encode. Its decode is 16 times as large, and attention grows with the square.
MAX_PIXELS = 1024 * 1024
# Of any picture: beyond the largest that the released networks make, 10240 x 10240.
LARGEST = 12288 * 12288


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
        OSError: no such file, or a directory. ValueError: not a latent, not a picture, a picture
        without an encoder for it, or one larger than `MAX_PIXELS`.
    """
    path = _file(path)
    if path.suffix.lower() == ".safetensors":
        return _latent(path)
    image = read_picture(
        path,
        most=MAX_PIXELS if encoder == "demo" else LARGEST,
        hint="its decode has 16 times as many; scale it down, or let the demo do that: python -m "
        f"pixeldiff.demo --image {path.name}",
    )
    if encoder != "demo":
        raise ValueError(
            f"{path.name} is a picture; only the demo model brings its encoder. Encode it with the "
            f"generator's own VAE and pass the normalised latent as .safetensors"
        )
    return encode_picture(demo_autoencoder(), image)


def read_picture(path: str | Path, *, most: int = LARGEST, hint: str = "") -> Image.Image:
    """An 8-bit RGB picture, its EXIF rotation applied, transparency over white.

    Args:
        most: pixels it may have; what its header says is looked at before anything is unpacked.
        hint: what to do with a larger one.

    Raises:
        OSError: no such file, or a directory. ValueError: not a readable picture, or a larger one.
    """
    path = _file(path)
    try:
        with _opened(path) as image:
            width, height = image.size
            if width * height <= most:
                return to_rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Exception as e:  # what Pillow's decoders raise on damaged files is not documented
        raise ValueError(f"{path} is neither a .safetensors latent nor a picture: {e}") from e
    raise ValueError(
        f"{path.name} has {width} x {height} pixels, {most} are read at most{hint and '; ' + hint}"
    )


def _opened(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        # Of a large picture that is no error yet; how many pixels are too many is said above.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path)


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


def _file(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"a file is needed, this is a directory: {path}")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    return path


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
