"""A PNG written row band by row band: what is held is a band, not the picture.

Pillow's encoder wants the whole picture, four bytes a pixel. Here zlib compresses what comes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np

from .row_bands import CHANNELS, checked

LEVEL = 6  # zlib's own choice


def write_png(
    file: BinaryIO, size: tuple[int, int], bands: Iterable[np.ndarray], texts: dict[str, str]
) -> None:
    """Write an 8-bit RGB picture.

    Args:
        file: open for writing.
        size: (H, W).
        bands: (rows, W, 3) uint8 from top to bottom, H rows in all, any number at once.
        texts: text entries, in ASCII.

    Raises:
        ValueError: other rows than `size` says. What `bands` and `file` raise passes through; the
        file is then incomplete.
    """
    height, width = size
    file.write(b"\x89PNG\r\n\x1a\n")
    _chunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    for key, text in texts.items():
        _chunk(file, b"tEXt", key.encode("ascii") + b"\0" + text.encode("ascii"))
    pack = zlib.compressobj(LEVEL, zlib.DEFLATED, 15, 9, zlib.Z_FILTERED)  # Pillow's settings
    above = np.zeros(width * CHANNELS, np.uint8)
    for band in checked("write_png", size, bands):
        rows = np.ascontiguousarray(band).reshape(len(band), -1)
        if len(rows):
            _chunk(file, b"IDAT", pack.compress(_filtered(rows, above)))
            above = rows[-1].copy()
    _chunk(file, b"IDAT", pack.flush())
    _chunk(file, b"IEND", b"")


def _chunk(file: BinaryIO, kind: bytes, data: bytes) -> None:
    if kind == b"IDAT" and not data:
        return  # zlib keeps it for later
    file.write(struct.pack(">I", len(data)) + kind)
    file.write(data)
    file.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))))


def _filtered(rows: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Each row behind the number of the filter whose result is smallest: the usual rule of thumb.

    Args:
        rows: (n, bytes) uint8. above: the row before the first, zeros at the top.
    """
    up = np.concatenate((above[None], rows[:-1]))
    left, corner = (np.pad(a[:, :-CHANNELS], ((0, 0), (CHANNELS, 0))) for a in (rows, up))
    out = np.empty((len(rows), 1 + rows.shape[1]), np.uint8)
    least = np.full(len(rows), np.iinfo(np.int64).max)
    for number, predicted in enumerate((None, left, up, None, None)):
        if number == 3:
            predicted = ((left.astype(np.uint16) + up) >> 1).astype(np.uint8)
        elif number == 4:
            predicted = _nearest(left, up, corner)
        residual = rows if predicted is None else rows - predicted
        # Residuals wrap: as signed numbers they are small either side of zero.
        cost = np.abs(residual.view(np.int8).astype(np.int16)).sum(1, dtype=np.int64)
        better = cost < least
        least[better] = cost[better]
        out[better, 0] = number
        out[better, 1:] = residual[better]
    return out


def _nearest(left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Paeth's predictor: of the three neighbours the one nearest to left + up - corner."""
    from_left = np.abs(up.astype(np.int16) - corner)
    from_up = np.abs(left.astype(np.int16) - corner)
    from_corner = np.abs(left.astype(np.int16) + up - 2 * corner.astype(np.int16))
    near_left = (from_left <= from_up) & (from_left <= from_corner)
    return np.where(near_left, left, np.where(from_up <= from_corner, up, corner))
