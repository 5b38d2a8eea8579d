"""Picture files: PNG, JPEG or TIFF by their suffix, whole or none, with how they were made."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile, PngInfo
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from . import jpeg_file, png_stream, tiff_stream
from .images import band_rows, picture_bands, to_rgb, uint8_bands
from .jpeg_file import write_jpeg
from .json_text import loads
from .out_files import check_out_path, written_whole
from .png_stream import write_png
from .row_bands import checked, rebanded
from .tiff_stream import write_tiff

KEY = "pixeldiff"
_OURS = f'{{"{KEY}": '  # how the descriptions begin that were written here
PNG, JPEG, TIFF = (".png",), (".jpg", ".jpeg"), (".tif", ".tiff")
SUFFIXES = PNG + JPEG + TIFF
# Pixels of a PNG that Pillow writes, which holds four bytes of each: so many in any case, no more
# than bands of rows take; and without libvips so many.
_SMALL, _LARGEST_WHOLE = 1 << 20, 16384 * 16384


def save_picture(
    path: str | os.PathLike[str],
    image: Image.Image | Tensor,
    metadata: dict[str, Any] | None = None,
    *,
    rounded: bool = False,
    by_way_of: Path | None = None,
) -> Path:
    """Write a PNG, JPEG or TIFF whole or not at all, with how it was made in its metadata.

    PNG and TIFF hold the pixels exactly. JPEG is lossy (quality 95, 4:4:4) and at most 65500 pixels
    a side.

    Args:
        path: ends in .png, .jpg, .jpeg, .tif (or .tiff), which decides; its directory must exist.
        image: a picture, or (3, H, W) in [-1, 1] on any device, of which PNG and TIFF convert only
            bands of rows at a time. JPEG needs the whole picture in 8 bits: 315 MB at
            10240 x 10240, which are 420 MB in Pillow, at four bytes a pixel. So does PNG without
            the extra pixeldiff[png], where libvips writes it by way of a scratch file.
        metadata: JSON-able. In a PNG the text entry "pixeldiff", elsewhere the ImageDescription
            (of EXIF in a JPEG, where it has at most 65000 characters) {"pixeldiff": metadata}.
        rounded: of a tensor; see `images.to_uint8`.
        by_way_of: folder of the temporary file, on the same file system; default: beside `path`.

    Raises:
        ValueError: another suffix, or more than a JPEG can hold. ImportError: a TIFF, without the
        extra pixeldiff[tiff]; a PNG of more than 16384 x 16384 pixels, without pixeldiff[png].
        OSError: the file cannot be written. Nothing is left behind.
    """
    return save_pictures([(path, image, metadata)], rounded=rounded, by_way_of=by_way_of)[0]


def save_pictures(
    files: Sequence[tuple[str | os.PathLike[str], Image.Image | Tensor, dict[str, Any] | None]],
    *,
    rounded: bool = False,
    by_way_of: Path | None = None,
) -> list[Path]:
    """As `save_picture` for several (path, image, metadata): all of them are written or none."""
    paths = [check_picture_path(path, _size(image)) for path, image, _ in files]
    with written_whole(paths, by_way_of=by_way_of) as partial:
        for path, target, (_, image, metadata) in zip(paths, partial, files, strict=True):
            text = None if metadata is None else json.dumps(metadata)
            with target.open("wb") as file:
                _write(file, target, path.suffix.lower(), image, text, rounded)
    return paths


def save_rows(
    path: str | os.PathLike[str],
    size: tuple[int, int],
    rows: Iterable[Tensor],
    metadata: dict[str, Any] | None = None,
    *,
    rounded: bool = False,
    by_way_of: Path | None = None,
) -> Path:
    """As `save_picture`, and to the same bytes, for a picture that comes from top to bottom.

    Args:
        path, metadata, rounded, by_way_of: as for `save_picture`. TIFF, and PNG with the extra
            pixeldiff[png], hold a few bands of rows, JPEG the whole picture in 8 bits.
        size: (H, W).
        rows: (3, rows, W) in [-1, 1], H rows in all. What it raises leaves no file.
    """
    path = check_picture_path(path, size)
    text = None if metadata is None else json.dumps(metadata)
    pixels = (band for part in rows for band in uint8_bands(part, rounded=rounded))
    with written_whole([path], by_way_of=by_way_of) as (partial,), partial.open("wb") as file:
        suffix = path.suffix.lower()
        if _held_whole(suffix, size):
            _write_whole(file, suffix, _picture_of(path.name, size, pixels), text)
        else:
            bands = rebanded(pixels, band_rows(size[1]))
            _write_bands(file, partial, suffix, size, bands, text)
    return path


def check_space(path: str | os.PathLike[str], size: tuple[int, int]) -> None:
    """Raises OSError where a picture might not fit on its disk; call it before long work starts.

    What is asked for is what noise takes, 3 bytes a pixel and 1%: how far a picture shrinks is not
    known before; and as much again for the scratch file of a large PNG. Nothing is asked for a
    JPEG, which is a fraction of that.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    files = 0 if suffix in JPEG else 2 if suffix in PNG and not _held_whole(suffix, size) else 1
    needed = int(files * size[0] * size[1] * 3 * 1.01)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{path.name} may take {needed / 1e9:.2f} GB ({size[0]} x {size[1]} pixels) and "
            f"{path.parent} has {free / 1e9:.2f} GB free; make room or write to another disk",
        )


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
    if size is not None and suffix in PNG and size[0] * size[1] > _LARGEST_WHOLE:
        reason = png_stream.why_not()
        if reason is not None:
            raise ImportError(
                f"{path.name}: {size[0]} x {size[1]} pixels are more than are written at once; "
                f"{reason}"
            )
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
    text, within = _stored(path)
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


def _stored(path: str | os.PathLike[str]) -> tuple[str | None, bool]:
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
    file: BinaryIO,
    target: Path,
    suffix: str,
    image: Image.Image | Tensor,
    text: str | None,
    rounded: bool,
) -> None:
    """Into `target`, which is open as `file`."""
    is_tensor, size = isinstance(image, Tensor), _size(image)
    if suffix in TIFF or (is_tensor and not _held_whole(suffix, size)):
        bands = uint8_bands(image, rounded=rounded) if is_tensor else picture_bands(image)
        _write_bands(file, target, suffix, size, bands, text)
        return
    if is_tensor:
        image = _picture_of(target.name, size, uint8_bands(image, rounded=rounded))
    elif suffix in JPEG and image.mode != "RGB":
        image = to_rgb(image)
    _write_whole(file, suffix, image, text)


def held_whole(path: Path, size: tuple[int, int]) -> bool:
    """Whether the whole picture, (H, W) pixels, is held in 8 bits while a file of it is written:
    four bytes a pixel."""
    return _held_whole(path.suffix.lower(), size)


def _held_whole(suffix: str, size: tuple[int, int]) -> bool:
    if suffix not in PNG:
        return suffix in JPEG
    pixels = size[0] * size[1]
    return pixels <= _SMALL or (pixels <= _LARGEST_WHOLE and png_stream.why_not() is not None)


def _picture_of(name: str, size: tuple[int, int], bands: Iterable[np.ndarray]) -> Image.Image:
    picture, first = Image.new("RGB", size[::-1]), 0
    for band in checked(name, size, bands):
        picture.paste(Image.fromarray(band), (0, first))
        first += len(band)
    return picture


def _write_whole(file: BinaryIO, suffix: str, image: Image.Image, text: str | None) -> None:
    if suffix in JPEG:
        write_jpeg(file, image, _description(text))
        return
    info = PngInfo()
    if text is not None:
        info.add_text(KEY, text)
    image.save(file, "PNG", pnginfo=info)


def _write_bands(
    file: BinaryIO,
    target: Path,
    suffix: str,
    size: tuple[int, int],
    bands: Iterable[np.ndarray],
    text: str | None,
) -> None:
    if suffix in PNG:
        texts = {} if text is None else {KEY: text}
        scratch = target.with_name(f".{secrets.token_hex(8)}.part")
        write_png(file, size, bands, texts, scratch=scratch)
    else:
        write_tiff(file, size, bands, _description(text))


def _description(text: str | None) -> str | None:
    return None if text is None else _OURS + text + "}"


def _size(image: Image.Image | Tensor) -> tuple[int, int]:
    if isinstance(image, Tensor):
        return image.shape[1], image.shape[2]
    return image.height, image.width
