"""The rows of a TIFF a strip at a time: a picture may be larger than memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tifffile import COMPRESSION, PREDICTOR, TiffFile


def rows(path: Path) -> Iterator[np.ndarray]:
    """(rows, W, 3) uint8 from top to bottom, of a TIFF as `pixeldiff.tiff_stream` writes it.

    tifffile finds the strips; what undoes their compression is not what made them.
    """
    with TiffFile(path) as tiff:
        page = tiff.pages[0]
        if (page.compression, page.predictor) != (
            COMPRESSION.ADOBE_DEFLATE,
            PREDICTOR.HORIZONTAL,
        ):
            raise ValueError(f"{path.name}: not a TIFF with deflated differences")
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            tiff.filehandle.seek(offset)
            strip = np.frombuffer(zlib.decompress(tiff.filehandle.read(count)), np.uint8)
            yield strip.reshape(-1, page.imagewidth, 3).cumsum(1, dtype=np.uint8)
