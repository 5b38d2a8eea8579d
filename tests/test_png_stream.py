"""PNG files written band by band: what Pillow reads in them, what is held, what is left behind."""

from __future__ import annotations

import io
import os
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from bench.live_memory import LiveMemory
from pixeldiff import images
from pixeldiff.images import read_png_metadata, save_png, to_uint8, uint8_bands
from pixeldiff.png_stream import write_png

METADATA = {"seed": 3, "prompt": "ein Füchslein 🦊"}


def picture(height: int, width: int, kind: str = "noise") -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "noise":
        return noise
    rows, columns = np.indices((height, width))
    smooth = np.stack((rows * 3, columns * 2, rows + columns), 2) % 256
    return smooth.astype(np.uint8) if kind == "ramps" else (smooth + noise % 4).astype(np.uint8)


def tensor(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, height, width, generator=generator) * 0.7


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


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bands_are_the_picture_cut(monkeypatch, rounded, dtype):
    x = tensor(13, 17).to(dtype)
    x[0, 0, :6] = torch.tensor([-1, 1, -9, 9, float("inf"), 0])
    whole = to_uint8(x[None], rounded=rounded)[0]
    monkeypatch.setattr(images, "_BAND", 4 * 17)
    bands = list(uint8_bands(x, rounded=rounded))
    assert [len(b) for b in bands] == [4, 4, 4, 1]
    assert np.array_equal(np.concatenate(bands), whole)
    assert np.array_equal(to_uint8(x[None], rounded=rounded)[0], whole)


@pytest.mark.parametrize("rounded", [True, False])
def test_a_tensor_is_saved_as_its_picture_is(tmp_path, monkeypatch, rounded):
    monkeypatch.setattr(images, "_BAND", 5 * 33)
    x = tensor(64, 33)
    path = save_png(tmp_path / "a.png", x, METADATA, rounded=rounded)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), to_uint8(x[None], rounded=rounded)[0])
    assert read_png_metadata(path) == METADATA
    assert read_png_metadata(save_png(path, x)) is None


class Held:
    """Bytes at the peak inside a block: of tensors made in it, and of arrays and objects."""

    def __enter__(self):
        self.tensors = LiveMemory()
        tracemalloc.start()
        self.tensors.__enter__()
        return self

    def __exit__(self, *error):
        self.tensors.__exit__(*error)
        self.bytes = self.tensors.peak + tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


def test_writing_holds_a_few_bands(tmp_path):
    """Beside the tensor: here 75 MB, at 10240 x 10240 1.3 GB, and the bands no larger."""
    x = tensor(2048, 3072)
    band = 12 * images._BAND
    with Held() as held:
        save_png(tmp_path / "a.png", x, rounded=True)
    assert held.bytes < 8 * band < 0.35 * x.nbytes
    with Held() as whole:  # the bound is one that whole copies break
        save_png(tmp_path / "b.png", Image.fromarray(to_uint8(x[None], rounded=True)[0]))
    assert whole.bytes > x.nbytes // 4


def test_an_array_of_bytes_costs_itself_and_a_few_bands():
    x = tensor(2048, 3072)
    with Held() as held:
        result = to_uint8(x[None], rounded=True)
    assert held.bytes < result.nbytes + 4 * 12 * images._BAND


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full"), MemoryError])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, error):
    def fails(image, *, rounded):
        yield picture(4, 33)
        assert len(os.listdir(tmp_path)) == expected + 1  # it had begun
        raise error

    monkeypatch.setattr(images, "uint8_bands", fails)
    path, expected = tmp_path / "a.png", 0
    with pytest.raises(error if isinstance(error, type) else type(error)):
        save_png(path, tensor(64, 33))
    assert os.listdir(tmp_path) == []
    path.write_bytes(b"before")
    expected = 1
    with pytest.raises(error if isinstance(error, type) else type(error)):
        save_png(path, tensor(64, 33))
    assert os.listdir(tmp_path) == ["a.png"]
    assert path.read_bytes() == b"before"
