"""A JPEG for looking at: quality 95, colour at full resolution."""

from __future__ import annotations

from typing import BinaryIO

from PIL import ExifTags, Image

LONGEST_SIDE = 65500  # libjpeg's limit
QUALITY = 95
_LONGEST_DESCRIPTION = 65000  # EXIF is one segment: 65533 bytes with what surrounds the text


def why_not_size(size: tuple[int, int]) -> str | None:
    """Why a picture of this (H, W) cannot be a JPEG, or None."""
    if max(size) <= LONGEST_SIDE:
        return None
    return (
        f"a JPEG has at most {LONGEST_SIDE} pixels a side, got {size[0]} x {size[1]} (H x W); "
        "write a .png or .tif"
    )


def write_jpeg(file: BinaryIO, picture: Image.Image, description: str | None) -> None:
    """Write an RGB picture, 4:4:4.

    Args:
        file: open for writing.
        picture: whole, as Pillow's encoder wants it.
        description: EXIF's ImageDescription, in ASCII.

    Raises:
        ValueError: the picture or the description is too large. OSError: as `file` raises; the file
        is then incomplete.
    """
    reason = why_not_size((picture.height, picture.width))
    if reason is not None:
        raise ValueError(f"write_jpeg: {reason}")
    exif = Image.Exif()
    if description is not None:
        if len(description) > _LONGEST_DESCRIPTION:
            raise ValueError(
                f"write_jpeg: the metadata of a JPEG must be at most {_LONGEST_DESCRIPTION} "
                f"characters of JSON, got {len(description)}; write a .png or .tif"
            )
        exif[ExifTags.Base.ImageDescription] = description
    picture.save(_Written(file), "JPEG", quality=QUALITY, subsampling=0, exif=exif)


class _Written:
    """A file without a descriptor. Pillow's encoder writes to that where there is one, and takes
    what a full disk cuts off for written."""

    def __init__(self, file: BinaryIO) -> None:
        self.write, self.flush = file.write, file.flush
