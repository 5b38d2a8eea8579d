"""TIFF files written strip by strip: what other readers find in them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pixeldiff import tiff_stream
from pixeldiff.tiff_stream import write_tiff

tifffile = pytest.importorskip("tifffile")


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def cut(image: np.ndarray, rows: int) -> list[np.ndarray]:
    return [image[i : i + rows] for i in range(0, len(image), rows)]


def read_by_hand(page) -> np.ndarray:
    """What the tags say the pixels are, without a library that writes and reads alike."""
    import zlib

    height, width = page.imagelength, page.imagewidth
    file, rows = page.parent.filehandle, []
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        file.seek(offset)
        strip = np.frombuffer(zlib.decompress(file.read(count)), np.uint8).reshape(-1, width, 3)
        rows.append(strip.cumsum(1, dtype=np.uint8))
    assert all(len(r) == page.rowsperstrip for r in rows[:-1])
    return np.concatenate(rows).reshape(height, width, 3)


@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (13, 17), (64, 33)])
def test_others_read_what_was_written(monkeypatch, size, rows, bigtiff):
    if bigtiff:
        monkeypatch.setattr(tiff_stream, "_CLASSIC", 0)
    want, file = picture(*size), io.BytesIO()
    write_tiff(file, size, iter(cut(want, rows)), "about it")
    assert file.getvalue()[:3] in (b"II+" if bigtiff else b"II*", b"MM\0")
    with Image.open(file) as image:
        assert (image.mode, image.getexif()[270]) == ("RGB", "about it")
        assert np.array_equal(np.asarray(image), want)
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        [page] = tiff.pages
        assert tiff.is_bigtiff == bigtiff
        assert page.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
        assert page.predictor == tifffile.PREDICTOR.HORIZONTAL
        assert (page.description, page.software) == ("about it", "pixeldiff")
        assert np.array_equal(read_by_hand(page), want)


def test_only_what_could_pass_4_gb_is_a_bigtiff():
    sides = {10240: False, 37000: False, 38000: True}
    assert {n: n * n * 3 > tiff_stream._CLASSIC for n in sides} == sides


def test_no_description():
    file = io.BytesIO()
    write_tiff(file, (5, 4), [picture(5, 4)], None)
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        assert "ImageDescription" not in tiff.pages[0].tags


def test_smooth_pictures_shrink():
    rows, columns = np.indices((200, 300))
    smooth = (np.stack((rows * 3, columns * 2, rows + columns), 2) % 256).astype(np.uint8)
    file = io.BytesIO()
    write_tiff(file, (200, 300), cut(smooth, 50), None)
    assert len(file.getvalue()) < smooth.nbytes / 20


def test_bands_of_other_shapes():
    def zeros(rows, width=5, dtype=np.uint8):
        return np.zeros((rows, width, 3), dtype)

    for bands, words in (
        ([zeros(2)], "write_tiff: the bands must have 3 rows, got 2"),
        ([zeros(1), zeros(1)], "the bands must have 3 rows, got 2"),
        ([], "the bands must have 3 rows, got 0"),
        ([zeros(4)], r"3 more rows, got \(4, 5, 3\) uint8"),
        ([zeros(3), zeros(1)], r"0 more rows, got \(1, 5, 3\) uint8"),
        ([zeros(3, width=4)], r"must be \(rows, 5, 3\) uint8"),
        ([zeros(3, dtype=float)], "got .* float64"),
        ([zeros(1), zeros(2)], "every band but the last must have 1 rows as the first, got 2"),
        ([zeros(2), zeros(0), zeros(1)], "must have 2 rows as the first, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            write_tiff(io.BytesIO(), (3, 5), bands, None)
