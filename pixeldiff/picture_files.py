"""Picture files: PNG, JPEG or TIFF by their suffix, whole or none, with how they were made."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile, PngInfo
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from . import jpeg_file, tiff_stream
from .images import picture_bands, to_picture, to_rgb, uint8_bands
from .jpeg_file import write_jpeg
from .json_text import loads
from .out_files import check_out_path, written_whole
from .png_stream import write_png
from .tiff_stream import write_tiff

KEY = "pixeldiff"
_OURS = f'{{"{KEY}": '  # how the descriptions begin that were written here
PNG, JPEG, TIFF = (".png",), (".jpg", ".jpeg"), (".tif", ".tiff")
SUFFIXES = PNG + JPEG + TIFF


def save_picture(
    path: str | os.PathLike[str],
    image: Image.Image | Tensor,
    metadata: dict[str, Any] | None = None,
    *,
    rounded: bool = False,
) -> Path:
    """Write a PNG, JPEG or TIFF whole or not at all, with how it was made in its metadata.

    PNG and TIFF hold the pixels exactly. JPEG is lossy (quality 95, 4:4:4) and at most 65500 pixels
    a side.

    Args:
        path: ends in .png, .jpg, .jpeg, .tif (or .tiff), which decides; its directory must exist.
        image: a picture, or (3, H, W) in [-1, 1] on any device, of which PNG and TIFF convert only
            bands of rows at a time. JPEG needs the whole picture in 8 bits: 315 MB at
            10240 x 10240, which are 420 MB in Pillow, at four bytes a pixel.
        metadata: JSON-able. In a PNG the text entry "pixeldiff", elsewhere the ImageDescription
            (of EXIF in a JPEG, where it has at most 65000 characters) {"pixeldiff": metadata}.
        rounded: of a tensor; see `images.to_uint8`.

    Raises:
        ValueError: another suffix, or more than a JPEG can hold. ImportError: a TIFF, without the
        extra pixeldiff[tiff]. OSError: the file cannot be written. Nothing is left behind.
    """
    return save_pictures([(path, image, metadata)], rounded=rounded)[0]


def save_pictures(
    files: Sequence[tuple[str | os.PathLike[str], Image.Image | Tensor, dict[str, Any] | None]],
    *,
    rounded: bool = False,
) -> list[Path]:
    """As `save_picture` for several (path, image, metadata): all of them are written or none."""
    paths = [check_picture_path(path, _size(image)) for path, image, _ in files]
    with written_whole(paths) as partial:
        for path, target, (_, image, metadata) in zip(paths, partial, files, strict=True):
            text = None if metadata is None else json.dumps(metadata)
            with target.open("wb") as file:
                _write(file, path.suffix.lower(), image, text, rounded)
    return paths


def check_picture_path(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> Path:
    """The path, if a picture can be written there; call it before long work starts.

    Args:
        path: see `save_picture`.
        size: (H, W), where it is known.

    Raises:
        ValueError: an unknown suffix, or the format cannot hold the size. ImportError: the format's
        library is not installed. OSError: no such directory, or it is not writable.
    """
    path = check_out_path(path, *SUFFIXES)
    suffix = path.suffix.lower()
    reason = tiff_stream.why_not() if suffix in TIFF else None
    if reason is not None:
        raise ImportError(f"{path.name}: {reason}")
    if size is not None and suffix in JPEG:
        reason = jpeg_file.why_not_size(size)
        if reason is not None:
            raise ValueError(f"{path.name}: {reason}")
    return path


def read_picture_metadata(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What `save_picture` stored, or None. The format is read from the file, not from its name.

    Raises:
        ValueError: the entry is there but is not a JSON object. OSError: no such file, or not a
        readable PNG, JPEG or TIFF.
    """
    text, within = _description(path)
    if text is None:
        return None
    try:
        found = loads(text)[KEY] if within else loads(text)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: its entry {KEY!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise ValueError(f"{os.fspath(path)}: its entry {KEY!r} must be a JSON object, got {kind}")
    return found


def _description(path: str | os.PathLike[str]) -> tuple[str | None, bool]:
    """The JSON in a picture, or None; and whether the entry is within it."""
    try:
        with _opened(path) as image:
            if isinstance(image, PngImageFile):
                return image.info.get(KEY), False
            text = image.getexif().get(ExifTags.Base.ImageDescription)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what Pillow's readers raise on damaged files is not documented
        raise UnidentifiedImageError(f"not readable: {os.fspath(path)}: {error}") from error
    if not isinstance(text, str) or not text.startswith(_OURS):
        return None, True  # anybody may describe a picture
    return text, True


def _opened(path: str | os.PathLike[str]) -> Image.Image:
    if not Path(path).is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"no such file: {os.fspath(path)}")
    # Not Image.open: it takes pictures of this size for attacks, whose pixels are not even read.
    for kind in (PngImageFile, JpegImageFile, TiffImageFile):
        try:
            return kind(path)
        except SyntaxError:
            continue
    raise UnidentifiedImageError(f"not a readable PNG, JPEG or TIFF: {os.fspath(path)}")


def _write(
    file: BinaryIO, suffix: str, image: Image.Image | Tensor, text: str | None, rounded: bool
) -> None:
    is_tensor = isinstance(image, Tensor)
    if suffix in PNG:
        if is_tensor:
            texts = {} if text is None else {KEY: text}
            write_png(file, _size(image), uint8_bands(image, rounded=rounded), texts)
            return
        info = PngInfo()
        if text is not None:
            info.add_text(KEY, text)
        image.save(file, "PNG", pnginfo=info)
        return
    description = None if text is None else _OURS + text + "}"
    if suffix in TIFF:
        bands = uint8_bands(image, rounded=rounded) if is_tensor else picture_bands(image)
        write_tiff(file, _size(image), bands, description)
        return
    if is_tensor:
        image = to_picture(image, rounded=rounded)
    elif image.mode != "RGB":
        image = to_rgb(image)
    write_jpeg(file, image, description)


def _size(image: Image.Image | Tensor) -> tuple[int, int]:
    if isinstance(image, Tensor):
        return image.shape[1], image.shape[2]
    return image.height, image.width
