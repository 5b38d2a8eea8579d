"""A TIFF written strip by strip: what is held is a band of rows, not the picture.

tifffile writes the tags and the offsets, for a file past 4 GB those of BigTIFF. The strips come to
it compressed: given pixels, it holds a whole frame.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np

from .row_bands import CHANNELS, checked

LEVEL = 6  # zlib's own choice
# Offsets of a classic TIFF have 32 bits. The compressed size is not known when the first byte is
# written: noise does not shrink, and zlib, the tags and the table of strips add less than 1%.
_CLASSIC = 0.99 * 2**32


def why_not() -> str | None:
    """Why no TIFF can be written here, or None."""
    try:
        import tifffile  # noqa: F401
    except ImportError:
        return (
            "writing TIFF needs tifffile, which is not installed; install the extra "
            "pixeldiff[tiff], or write a .png"
        )
    return None


def write_tiff(
    file: BinaryIO,
    size: tuple[int, int],
    bands: Iterable[np.ndarray],
    description: str | None,
    *,
    compressed: bool = True,
) -> None:
    """Write an 8-bit RGB picture, compressed with deflate after a horizontal difference.

    Args:
        file: open for writing, seekable.
        size: (H, W).
        bands: (rows, W, 3) uint8 from top to bottom, H rows in all. Each is a strip, so all have
            the same number of rows, except that the last may have fewer.
        description: the ImageDescription, in ASCII.
        compressed: False leaves the pixels as they are.

    Raises:
        ValueError: other rows than `size` says. ImportError: no tifffile. What `bands` and `file`
        raise passes through; the file is then incomplete.
    """
    reason = why_not()
    if reason is not None:
        raise ImportError(f"write_tiff: {reason}")
    from tifffile import TiffWriter

    height, width = size
    rest = checked("write_tiff", size, bands)
    first = next(rest)
    strips = _strips(itertools.chain((first,), rest), len(first), compressed)
    with TiffWriter(file, bigtiff=height * width * CHANNELS > _CLASSIC) as tiff:
        tiff.write(
            strips,
            shape=(height, width, CHANNELS),
            dtype=np.uint8,
            photometric="rgb",
            rowsperstrip=len(first),
            compression="zlib" if compressed else None,
            predictor=compressed,
            description=description,
            metadata=None,  # else tifffile writes a description of its own
            software="pixeldiff",
        )
        next(strips, None)  # tifffile takes what it needs: a band too many shows here


def _strips(bands: Iterable[np.ndarray], rows: int, compressed: bool) -> Iterator[bytes]:
    whole = True
    for band in bands:
        if not whole or not 0 < len(band) <= rows:
            raise ValueError(
                f"write_tiff: every band but the last must have {rows} rows as the first, "
                f"got {len(band)}"
            )
        whole = len(band) == rows
        if not compressed:
            yield band.tobytes()
            continue
        difference = band.copy()
        difference[:, 1:] -= band[:, :-1]  # wraps, and so do readers
        yield zlib.compress(difference.tobytes(), LEVEL)
