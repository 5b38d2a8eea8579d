"""PNG, JPEG and TIFF files: pixels, metadata, what is held, and whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import sys
import tracemalloc
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from pixeldiff import images, jpeg_file, picture_files, png_stream, tiff_stream
from pixeldiff.images import to_uint8
from pixeldiff.memory.live import LiveMemory
from pixeldiff.picture_files import (
    check_picture_path,
    check_space,
    read_picture_metadata,
    save_picture,
    save_pictures,
    save_rows,
)

METADATA = {"model": "demo", "seed": [1, None], "sigma": 0.2, "caption": "Füchse 🦊 im Schnee"}
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".tif": "TIFF"}

every_format = pytest.mark.parametrize("suffix", FORMATS)
needs_libvips = pytest.mark.skipif(
    png_stream.why_not() is not None, reason=f"{png_stream.why_not()}"
)


@pytest.fixture(params=["at once", pytest.param("in bands", marks=needs_libvips)])
def png(request, monkeypatch):
    """Both ways of writing a PNG."""
    if request.param == "in bands":
        monkeypatch.setattr(picture_files, "_SMALL", 0)


@pytest.fixture(autouse=True)
def needs_tifffile(request):
    if getattr(request.node, "callspec", None) is not None:
        suffix = request.node.callspec.params.get("suffix", "")
        if suffix.lower().startswith(".tif"):
            pytest.importorskip("tifffile")


def picture(width=5, height=3, color=(10, 200, 30)):
    return Image.new("RGB", (width, height), color)


def tensor(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, height, width, generator=generator) * 0.7


def smooth(height: int, width: int) -> torch.Tensor:
    """As pictures are: JPEG is not made for noise."""
    rows, columns = torch.meshgrid(
        torch.linspace(-3, 3, height), torch.linspace(-3, 3, width), indexing="ij"
    )
    return torch.stack((rows.sin(), columns.cos(), (rows * columns).sin()))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.square(a.astype(float) - b).mean())


# --- pixels


@every_format
@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("size", [(64, 33), (5, 1), (1, 9)])
def test_pixels_of_a_tensor(tmp_path, monkeypatch, png, suffix, rounded, size):
    monkeypatch.setattr(images, "_BAND", 5 * size[1])
    x = tensor(*size) if suffix != ".jpg" else smooth(*size)
    path = save_picture(tmp_path / f"a{suffix}", x, METADATA, rounded=rounded)
    want = to_uint8(x[None], rounded=rounded)[0]
    got = pixels(path)
    assert got.shape == want.shape
    assert np.array_equal(got, want) if suffix != ".jpg" else psnr(got, want) > 40
    assert read_picture_metadata(path) == METADATA


@every_format
def test_a_picture_is_saved_as_its_tensor_is(tmp_path, png, suffix):
    x = tensor(64, 33)
    first = save_picture(tmp_path / f"a{suffix}", x)
    second = save_picture(tmp_path / f"b{suffix}", Image.fromarray(to_uint8(x[None])[0]))
    assert np.array_equal(pixels(first), pixels(second))


@every_format
def test_colours_keep_their_places(tmp_path, png, suffix):
    x = torch.full((3, 16, 24), -1.0)
    x[0, :8, 8:] = 1
    got = pixels(save_picture(tmp_path / f"a{suffix}", x)).astype(int)
    assert np.abs(got[:8, 8:] - (255, 0, 0)).max() <= 3  # 4:2:0 would bleed further
    assert max(got[8:].max(), got[:, :8].max()) <= 3


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK"])
def test_pictures_of_other_modes_are_written_in_rgb(tmp_path, suffix, mode):
    path = save_picture(tmp_path / f"a{suffix}", picture().convert(mode))
    with Image.open(path) as image:
        assert image.mode == "RGB"


# --- metadata


@every_format
def test_metadata_round_trip(tmp_path, suffix):
    path = tmp_path / f"Füchse 🦊{suffix}"
    assert save_picture(path, picture(), METADATA) == path
    assert read_picture_metadata(path) == METADATA
    assert read_picture_metadata(path.rename(tmp_path / "renamed")) == METADATA
    assert os.listdir(tmp_path) == ["renamed"]
    with Image.open(tmp_path / "renamed") as image:
        assert (image.format, image.size) == (FORMATS[suffix], (5, 3))
        assert np.abs(np.array(image.getpixel((0, 0))) - (10, 200, 30)).max() <= 2


@every_format
def test_no_metadata(tmp_path, suffix):
    assert read_picture_metadata(save_picture(tmp_path / f"a{suffix}", picture())) is None
    path = tmp_path / f"b{suffix}"
    picture().save(path)
    assert read_picture_metadata(path) is None
    assert read_picture_metadata(save_picture(path, picture(), {})) == {}


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
@pytest.mark.parametrize("text", ["a holiday", "{}", '{"shape": [3, 5]}', "[1]", '{"pixeldiff'])
def test_descriptions_by_others(tmp_path, suffix, text):
    exif = Image.Exif()
    exif[270] = text
    picture().save(tmp_path / f"a{suffix}", exif=exif)
    assert read_picture_metadata(tmp_path / f"a{suffix}") is None


@every_format
def test_damaged_metadata(tmp_path, suffix):
    if suffix == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_text("pixeldiff", "{")
        picture().save(tmp_path / "a.png", pnginfo=info)
    else:
        exif = Image.Exif()
        exif[270] = '{"pixeldiff": {'
        picture().save(tmp_path / f"a{suffix}", exif=exif)
    with pytest.raises(ValueError, match="line 1"):
        read_picture_metadata(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG", b"\xff\xd8", b"II*\0"])
def test_metadata_of_no_picture(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(OSError, match=r"not a readable PNG, JPEG or TIFF: .*a\.png"):
        read_picture_metadata(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError):
        read_picture_metadata(tmp_path / "b.png")


@every_format
def test_metadata_of_a_picture_that_pillow_takes_for_an_attack(tmp_path, monkeypatch, suffix):
    path = save_picture(tmp_path / f"a{suffix}", picture(), METADATA)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_picture_metadata(path) == METADATA


@every_format
def test_metadata_that_is_not_json_leaves_nothing(tmp_path, suffix):
    with pytest.raises(TypeError, match="JSON"):
        save_picture(tmp_path / f"a{suffix}", picture(), {"seed": torch.tensor(1)})
    assert os.listdir(tmp_path) == []


def test_long_metadata(tmp_path):
    pytest.importorskip("tifffile")
    long = {"caption": "a" * 64900}
    assert read_picture_metadata(save_picture(tmp_path / "a.jpg", picture(), long)) == long
    long["caption"] *= 2
    for name in ("a.png", "a.tif"):
        assert read_picture_metadata(save_picture(tmp_path / name, picture(), long)) == long
    with pytest.raises(ValueError, match="at most 65000 characters of JSON, got 1298"):
        save_picture(tmp_path / "b.jpg", picture(), long)
    assert not (tmp_path / "b.jpg").exists()


# --- what is held


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


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_writing_holds_a_few_bands(tmp_path, suffix):
    """Beside the tensor: here 75 MB, at 10240 x 10240 1.3 GB, and the bands no larger."""
    if suffix == ".png" and png_stream.why_not() is not None:
        pytest.skip(png_stream.why_not())
    save_picture(tmp_path / f"first{suffix}", picture())  # imports
    x = tensor(2048, 3072)
    band = 12 * images._BAND
    with Held() as held:
        save_picture(tmp_path / f"a{suffix}", x, rounded=True)
    assert held.bytes < 8 * band < 0.35 * x.nbytes
    with Held() as whole:  # the bound is one that whole copies break
        save_picture(tmp_path / f"b{suffix}", Image.fromarray(to_uint8(x[None], rounded=True)[0]))
    assert whole.bytes > x.nbytes // 4


def test_an_array_of_bytes_costs_itself_and_a_few_bands():
    x = tensor(2048, 3072)
    with Held() as held:
        result = to_uint8(x[None], rounded=True)
    assert held.bytes < result.nbytes + 4 * 12 * images._BAND


# --- large PNGs


def rows_of(x: torch.Tensor):
    return x.split(7, 1)


@needs_libvips
def test_a_large_png_is_written_in_bands_and_a_small_one_at_once(tmp_path, monkeypatch):
    calls = []

    def told(file, size, *args, **options):
        calls.append(size)
        return png_stream.write_png(file, size, *args, **options)

    monkeypatch.setattr(picture_files, "write_png", told)
    monkeypatch.setattr(picture_files, "_SMALL", 40 * 30)
    for size, want in (((40, 30), 0), ((40, 31), 1)):
        x, calls[:] = tensor(*size), []
        a = save_picture(tmp_path / "a.png", x, METADATA)
        b = save_rows(tmp_path / "b.png", size, rows_of(x), METADATA)
        assert a.read_bytes() == b.read_bytes()
        assert calls == [size] * 2 * want
        assert read_picture_metadata(a) == METADATA
        assert np.array_equal(pixels(a), to_uint8(x[None])[0])
        save_picture(tmp_path / "c.png", Image.fromarray(pixels(a)))  # is at hand
        assert len(calls) == 2 * want


def test_a_large_png_without_libvips(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyvips", None)
    monkeypatch.setattr(picture_files, "_SMALL", 10)
    monkeypatch.setattr(picture_files, "_LARGEST_WHOLE", 40 * 30)
    x = tensor(40, 30)
    a = save_picture(tmp_path / "a.png", x, METADATA)
    b = save_rows(tmp_path / "b.png", (40, 30), rows_of(x), METADATA)
    assert a.read_bytes() == b.read_bytes()
    assert np.array_equal(pixels(a), to_uint8(x[None])[0])
    words = (
        r"c\.png: 40 x 31 pixels are more .* install the extra pixeldiff\[png\], or write a \.tif"
    )
    with pytest.raises(ImportError, match=words):
        check_picture_path(tmp_path / "c.png", (40, 31))
    with pytest.raises(ImportError, match=words):
        save_picture(tmp_path / "c.png", tensor(40, 31))
    with pytest.raises(ImportError, match=words):
        save_rows(tmp_path / "c.png", (40, 31), [])
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]


@needs_libvips
def test_a_large_png_needs_room_for_its_scratch_file(tmp_path, monkeypatch):
    size = (2000, 1000)
    usage = SimpleNamespace(free=int(1.5 * 2000 * 1000 * 3))
    monkeypatch.setattr(picture_files.shutil, "disk_usage", lambda _: usage)
    check_space(tmp_path / "a.tif", size)
    with pytest.raises(OSError, match=r"a\.png may take 0\.01 GB \(2000 x 1000 pixels\)"):
        check_space(tmp_path / "a.png", size)
    monkeypatch.setitem(sys.modules, "pyvips", None)
    check_space(tmp_path / "a.png", size)


# --- whole or not at all


@every_format
def test_an_existing_file_is_replaced(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"old")
    save_picture(str(path), picture(), METADATA)
    assert read_picture_metadata(path) == METADATA


@every_format
def test_files_have_the_permissions_of_any_new_file(tmp_path, suffix):
    (tmp_path / "plain").touch()
    path = save_picture(tmp_path / f"a{suffix}", picture())
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@every_format
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full"), MemoryError])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, png, suffix, error):
    def fails(image, *, rounded):
        yield np.zeros((4, 33, 3), np.uint8)
        assert len(os.listdir(tmp_path)) > expected  # it had begun
        raise error

    monkeypatch.setattr(images, "uint8_bands", fails)
    monkeypatch.setattr(picture_files, "uint8_bands", fails)
    path, expected = tmp_path / f"a{suffix}", 0
    with pytest.raises(error if isinstance(error, type) else type(error)):
        save_picture(path, tensor(64, 33))
    assert os.listdir(tmp_path) == []
    path.write_bytes(b"before")
    expected = 1
    with pytest.raises(error if isinstance(error, type) else type(error)):
        save_picture(path, tensor(64, 33))
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == b"before"


@contextlib.contextmanager
def files_of_at_most(size):
    """The system refuses to write more."""
    resource = pytest.importorskip("resource", reason="no limits on files here")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@every_format
@pytest.mark.parametrize("form", ["tensor", "picture"])
def test_a_disk_that_is_full(tmp_path, png, suffix, form):
    path, x = tmp_path / f"a{suffix}", tensor(300, 300)
    image = x if form == "tensor" else Image.fromarray(to_uint8(x[None])[0])
    path.write_bytes(b"old")
    with files_of_at_most(20000), pytest.raises(OSError) as caught:
        save_picture(path, image)
    assert caught.value.errno in (errno.EFBIG, None)  # Pillow's encoder may lose it
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


class DiskFills(Image.Image):
    """Writes half a picture, then there is no space left, or the user interrupts."""

    error: BaseException

    def save(self, file, *args, **kwargs):
        data = io.BytesIO()
        picture(64, 64).save(data, "PNG")
        file.write(data.getvalue()[: data.tell() // 2])
        raise self.error


def disk_fills(error):
    image = DiskFills()
    image.im, image._size, image._mode, image.error = picture().im, (5, 3), "RGB", error
    return image


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("error", [NO_SPACE, KeyboardInterrupt()], ids=["full", "interrupted"])
def test_an_encoder_that_is_interrupted(tmp_path, suffix, error):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"old")
    with pytest.raises(type(error)):
        save_picture(path, disk_fills(error))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", FORMATS)
def test_of_several_files_all_or_none_are_written(tmp_path, suffix):
    paths = [tmp_path / f"a-0{suffix}", tmp_path / "a-1.png"]
    files = [(paths[0], picture(), METADATA), (paths[1], disk_fills(NO_SPACE), None)]
    with pytest.raises(OSError, match="No space left"):
        save_pictures(files)
    assert os.listdir(tmp_path) == []
    save_pictures([(path, picture(), {"batch_index": i}) for i, path in enumerate(paths)])
    assert [read_picture_metadata(p)["batch_index"] for p in paths] == [0, 1]
    assert sorted(os.listdir(tmp_path)) == [p.name for p in paths]


# --- paths, checked before the work


@pytest.mark.parametrize("name", ["a.webp", "a", "png", "a.png.tmp", "a.safetensors", "a.tiff2"])
def test_other_suffixes(tmp_path, name):
    words = r"must be a \.png, \.jpg, \.jpeg, \.tif or \.tiff file, got '" + name
    with pytest.raises(ValueError, match=words):
        check_picture_path(tmp_path / name)
    with pytest.raises(ValueError, match=words):
        save_picture(tmp_path / name, picture())


@pytest.mark.parametrize("suffix", [".PNG", ".JPG", ".jpeg", ".Jpeg", ".TIF", ".tiff"])
def test_suffix_in_any_case(tmp_path, suffix):
    assert check_picture_path(tmp_path / f"A{suffix}").name == f"A{suffix}"
    path = save_picture(tmp_path / f"A{suffix}", picture(), METADATA)
    with Image.open(path) as image:
        assert image.format == FORMATS[suffix.lower().replace("e", "").replace("ff", "f")]


def test_sides_a_jpeg_cannot_have(tmp_path, monkeypatch):
    for size in ((65501, 8), (8, 65501)):
        with pytest.raises(ValueError, match=rf"a.jpg: .*at most 65500 .* {size[0]} x {size[1]}"):
            check_picture_path(tmp_path / "a.jpg", size)
        check_picture_path(tmp_path / "a.png", size)
    check_picture_path(tmp_path / "a.jpg", (65500, 65500))
    assert pixels(save_picture(tmp_path / "a.jpg", picture(65500, 1))).shape == (1, 65500, 3)
    with pytest.raises(ValueError, match="at most 65500"):
        save_pictures(
            [(tmp_path / "b.png", picture(), None), (tmp_path / "b.jpg", picture(65501), None)]
        )
    assert os.listdir(tmp_path) == ["a.jpg"]
    with pytest.raises(ValueError, match=r"write_jpeg: .*at most 65500"):
        jpeg_file.write_jpeg(io.BytesIO(), picture(1, 65501), None)


@pytest.mark.parametrize("suffix", [".tif", ".tiff"])
def test_no_tifffile(tmp_path, monkeypatch, suffix):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    words = r"needs tifffile, .* install the extra pixeldiff\[tiff\], or write a \.png"
    with pytest.raises(ImportError, match=f"a{suffix}: .*{words}"):
        check_picture_path(tmp_path / f"a{suffix}")
    with pytest.raises(ImportError, match=words):
        save_picture(tmp_path / f"a{suffix}", picture())
    with pytest.raises(ImportError, match=f"write_tiff: .*{words}"):
        tiff_stream.write_tiff(io.BytesIO(), (3, 5), [], None)
    for name in ("a.png", "a.jpg"):
        save_picture(tmp_path / name, picture())
    assert sorted(os.listdir(tmp_path)) == ["a.jpg", "a.png"]


@every_format
def test_places_that_cannot_be_written(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match=r"directory does not exist.*nowhere"):
        check_picture_path(tmp_path / "nowhere" / f"a{suffix}")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check_picture_path(tmp_path / "file" / f"a{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(IsADirectoryError, match="is a directory"):
        check_picture_path(tmp_path / f"folder{suffix}")
    with pytest.raises(OSError, match="name too long"):
        check_picture_path(tmp_path / f"{'a' * 300}{suffix}")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc")
def test_a_file_system_without_files():
    """Its permission bits allow root to write; creating a file there fails all the same."""
    with pytest.raises(PermissionError, match="not writable"):
        check_picture_path("/proc/self/a.png")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="not writable"):
            check_picture_path(tmp_path / "a.png")
    finally:
        tmp_path.chmod(0o700)


def test_checking_leaves_nothing(tmp_path):
    check_picture_path(tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


@every_format
def test_the_longest_file_name_is_written(tmp_path, suffix):
    name = "a" * 251 + suffix
    save_picture(tmp_path / name, picture())
    assert os.listdir(tmp_path) == [name]
