"""PNG files written by libvips in bands: what Pillow reads in them, and what is left behind."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixeldiff import png_stream, tiff_stream
from pixeldiff.images import band_rows
from pixeldiff.png_stream import write_png
from pixeldiff.sources import demo_asset, read_picture

pytestmark = pytest.mark.skipif(png_stream.why_not() is not None, reason=f"{png_stream.why_not()}")
KINDS = ("noise", "ramps", "both")


def picture(height: int, width: int, kind: str = "noise") -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "noise":
        return noise
    rows, columns = np.indices((height, width))
    smooth = np.stack((rows * 3, columns * 2, rows + columns), 2) % 256
    return smooth.astype(np.uint8) if kind == "ramps" else (smooth + noise % 4).astype(np.uint8)


def cut(image: np.ndarray, rows: int) -> list[np.ndarray]:
    return [image[i : i + rows] for i in range(0, len(image), rows)]


def written(image: np.ndarray, rows: int, texts: dict[str, str], folder: Path) -> io.BytesIO:
    file = io.BytesIO()
    write_png(file, image.shape[:2], iter(cut(image, rows)), texts, scratch=folder / "scratch")
    assert os.listdir(folder) == []
    return file


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (13, 17), (64, 33)])
def test_pillow_reads_what_was_written(tmp_path, size, rows, kind):
    want = picture(*size, kind)
    file = written(want, rows, {"key": "value", "other": "x" * 70000}, tmp_path)
    with Image.open(file) as image:
        image.load()
        assert image.mode == "RGB"
        assert image.text == {"key": "value", "other": "x" * 70000}
        assert image.info.keys() == {"key", "other", "dpi"}
        assert np.abs(np.array(image.info["dpi"]) - 72).max() < 0.1
        assert np.array_equal(np.asarray(image), want)
    with Image.open(file) as image:
        image.verify()  # every chunk's sum


def test_bands_do_not_show(tmp_path):
    """As many bytes, and the same ones, however the rows come and whoever runs beside."""
    want = picture(90, 70, "both")
    first = written(want, 1, {"a": "b"}, tmp_path).getvalue()
    assert written(want, 90, {"a": "b"}, tmp_path).getvalue() == first
    found = []

    def write(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        found.append(written(want, 7, {"a": "b"}, folder).getvalue())

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert found == [first] * 4


def test_it_is_as_small_as_pillow_makes_it(tmp_path):
    want, theirs = np.asarray(read_picture(demo_asset("picture.png"))), io.BytesIO()
    ours = written(want, 50, {}, tmp_path)
    Image.fromarray(want).save(theirs, "PNG")
    assert len(ours.getvalue()) < 1.03 * theirs.tell()
    plain = len(zlib.compress(want.tobytes()))  # without PNG's filters
    assert plain > 1.2 * theirs.tell()


def test_bands_of_other_shapes(tmp_path):
    def zeros(rows, width=5, dtype=np.uint8):
        return np.zeros((rows, width, 3), dtype)

    for bands, words in (
        ([zeros(2)], "write_png: the bands must have 3 rows, got 2"),
        ([], "the bands must have 3 rows, got 0"),
        ([zeros(4)], r"3 more rows, got \(4, 5, 3\) uint8"),
        ([zeros(3), zeros(1)], r"0 more rows, got \(1, 5, 3\) uint8"),
        ([zeros(3, width=4)], r"must be \(rows, 5, 3\) uint8"),
        ([zeros(3, dtype=float)], "got .* float64"),
        ([zeros(1), zeros(2)], "every band but the last must have 1 rows as the first, got 2"),
    ):
        with pytest.raises(ValueError, match=words):
            write_png(io.BytesIO(), (3, 5), iter(bands), {}, scratch=tmp_path / "scratch")
        assert os.listdir(tmp_path) == []


class Full(io.BytesIO):
    """Fails at the write of that number."""

    def __init__(self, number: int, error: BaseException) -> None:
        super().__init__()
        self.left, self.error = number, error

    def write(self, data):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(data)


@pytest.mark.parametrize(
    "error", [OSError(28, "no space left"), MemoryError(), KeyboardInterrupt()]
)
@pytest.mark.parametrize("number", [0, 1, 5])
def test_what_the_file_raises_passes_through(tmp_path, capfd, number, error):
    want = picture(300, 200)
    with pytest.raises(type(error)) as caught:
        write_png(Full(number, error), (300, 200), cut(want, 9), {}, scratch=tmp_path / "scratch")
    assert caught.value is error
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr().err == ""  # a traceback that nobody catches


def test_a_scratch_file_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_png(io.BytesIO(), (3, 5), cut(picture(3, 5), 1), {}, scratch=tmp_path / "a" / "b")


def test_what_libvips_says(tmp_path, monkeypatch):
    """The scratch file is damaged behind our back."""
    made = tiff_stream.write_tiff

    def damaged(file, *args, **options):
        made(file, *args, **options)
        file.seek(0)
        file.write(bytes(100))

    monkeypatch.setattr(tiff_stream, "write_tiff", damaged)
    with pytest.raises(OSError, match="write_png: libvips failed: "):
        write_png(io.BytesIO(), (3, 5), cut(picture(3, 5), 1), {}, scratch=tmp_path / "scratch")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interruption_does_not_wait_for_the_end(tmp_path):
    class Slow(io.BytesIO):
        def write(self, data):
            if not self.tell():
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            return super().write(data)

    file, want = Slow(), picture(1500, 1000)
    with pytest.raises(KeyboardInterrupt):
        write_png(file, (1500, 1000), cut(want, 100), {}, scratch=tmp_path / "scratch")
    assert 0 < file.tell() < want.nbytes / 4
    assert os.listdir(tmp_path) == []


def test_few_rows_are_held(tmp_path):
    """Resident, since libvips allocates where tracemalloc does not see it."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("reads /proc")

    def peak() -> int:
        [line] = [w for w in status.read_text().splitlines() if w.startswith("VmHWM")]
        return int(line.split()[1]) * 1024

    def write(height: int) -> None:
        rows = band_rows(2048)
        band = np.random.default_rng(0).integers(0, 256, (rows, 2048, 3), dtype=np.uint8)
        bands = (band[: min(rows, height - i)] for i in range(0, height, rows))
        with (tmp_path / "a.png").open("wb") as file:
            write_png(file, (height, 2048), bands, {}, scratch=tmp_path / "scratch")

    write(256)  # threads and their buffers
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    write(8192)
    assert peak() - before < 16e6 < 8192 * 2048 * 3 / 3


def test_an_old_libvips(monkeypatch):
    pyvips = pytest.importorskip("pyvips")
    monkeypatch.setattr(pyvips, "at_least_libvips", lambda *version: version < (8, 14))
    monkeypatch.setattr(pyvips, "version", lambda part: (8, 14, 0)[part])
    assert "needs pyvips, libvips 8.15 and tifffile (this libvips is 8.14)" in png_stream.why_not()


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyvips", None)
    reason = png_stream.why_not()
    assert "install the extra pixeldiff[png], or write a .tif" in reason
    with pytest.raises(ImportError, match="write_png: writing a PNG row by row needs pyvips"):
        write_png(io.BytesIO(), (3, 5), [], {}, scratch=tmp_path / "scratch")
