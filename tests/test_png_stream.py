"""PNG files written band by band: what Pillow reads in them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pixeldiff.png_stream import write_png


def picture(height: int, width: int, kind: str = "noise") -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "noise":
        return noise
    rows, columns = np.indices((height, width))
    smooth = np.stack((rows * 3, columns * 2, rows + columns), 2) % 256
    return smooth.astype(np.uint8) if kind == "ramps" else (smooth + noise % 4).astype(np.uint8)


@pytest.mark.parametrize("kind", ["noise", "ramps", "both"])
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (13, 17), (64, 33)])
def test_pillow_reads_what_was_written(size, rows, kind):
    want, file = picture(*size, kind), io.BytesIO()
    bands = [want[i : i + rows] for i in range(0, size[0], rows)]
    write_png(file, size, bands, {"key": "value"})
    with Image.open(file) as image:
        image.load()
        assert (image.mode, image.info) == ("RGB", {"key": "value"})
        assert np.array_equal(np.asarray(image), want)
    with Image.open(file) as image:
        image.verify()  # every chunk's sum


def test_it_is_as_small_as_pillow_makes_it():
    for kind in ("noise", "ramps", "both"):
        want, ours, theirs = picture(200, 300, kind), io.BytesIO(), io.BytesIO()
        write_png(ours, (200, 300), [want], {})
        Image.fromarray(want).save(theirs, "PNG")
        assert ours.tell() < 1.05 * theirs.tell() + 100


def test_bands_of_other_shapes():
    for bands, words in (
        ([np.zeros((2, 5, 3), np.uint8)], "the bands must have 3 rows, got 2"),
        ([np.zeros((4, 5, 3), np.uint8)], r"3 more rows, got \(4, 5, 3\) uint8"),
        ([np.zeros((3, 4, 3), np.uint8)], r"must be \(rows, 5, 3\) uint8"),
        ([np.zeros((3, 5, 3))], "got .* float64"),
    ):
        with pytest.raises(ValueError, match=words):
            write_png(io.BytesIO(), (3, 5), bands, {})
