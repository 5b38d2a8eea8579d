"""Images between tensors, arrays, Pillow and PNG; files are written whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import stat

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from pixeldiff import images
from pixeldiff.images import (
    check_png_path,
    convert,
    from_pil,
    read_png_metadata,
    save_png,
    save_pngs,
    to_uint8,
)

METADATA = {"model": "demo", "seed": [1, None], "sigma": 0.2, "caption": "Füchse 🦊 im Schnee"}


def picture(width=5, height=3, color=(10, 200, 30)):
    return Image.new("RGB", (width, height), color)


# --- tensors


def test_uint8_truncates_and_clamps():
    values = torch.tensor([-2.0, -1.0, -1 + 1.99 / 127.5, 0.0, 1 - 1e-6, 1.0, 3.0])
    got = to_uint8(values.expand(2, 3, 1, -1))
    assert got.shape == (2, 1, 7, 3)
    assert got[1, 0, :, 2].tolist() == [0, 0, 1, 127, 254, 255, 255]


def test_every_byte_survives_the_round_trip():
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, 2)
    image = Image.fromarray(ramp)
    tensor = from_pil(image)
    assert (tensor.min(), tensor.max()) == (-1, 1)
    # The released rule truncates, so a byte may lose one to rounding; never more, never gain.
    back = np.asarray(convert(tensor, "pil")[0]).astype(int)
    assert set((ramp - back).flatten()) <= {0, 1}


def test_channels_rows_and_columns_keep_their_places():
    tensor = torch.full((1, 3, 2, 4), -1.0)
    tensor[0, 0, 1, 3] = 1
    image = convert(tensor, "pil")[0]
    assert image.size == (4, 2)
    assert image.getpixel((3, 1)) == (255, 0, 0)
    assert image.getpixel((0, 0)) == (0, 0, 0)
    assert convert(tensor, "np")[0, 1, 3].tolist() == [1, 0, 0]
    assert convert(tensor, "pt") is tensor
    assert torch.equal(from_pil(image), tensor)


def test_half_precision_tensors():
    tensor = torch.tensor([0.5, -0.25]).expand(1, 3, 1, 2)
    for dtype in (torch.bfloat16, torch.float16):
        assert convert(tensor.to(dtype), "np").dtype == np.float32
        assert np.array_equal(to_uint8(tensor.to(dtype)), to_uint8(tensor))


@pytest.mark.parametrize("output", ["PIL", "", None, "png"])
def test_unknown_output(output):
    with pytest.raises(ValueError, match="output must be one of pil, pt, np"):
        convert(torch.zeros(1, 3, 1, 1), output)


# --- pictures of every mode


def rgb_of(image):
    return ((from_pil(image)[0].permute(1, 2, 0) + 1) * 127.5).round().int()[0, 0].tolist()


def palette_with_transparency():
    image = Image.new("P", (1, 1), 1)
    image.putpalette([0, 0, 0, 250, 100, 50])
    image.info["transparency"] = 1
    return image


def grey16(value):
    return Image.fromarray(np.array([[value]], dtype=np.uint16))


@pytest.mark.parametrize(
    ("image", "rgb"),
    [
        (Image.new("L", (1, 1), 77), [77, 77, 77]),
        (Image.new("1", (1, 1), 1), [255, 255, 255]),
        (Image.new("RGBA", (1, 1), (200, 0, 100, 255)), [200, 0, 100]),
        (Image.new("RGBA", (1, 1), (200, 0, 100, 0)), [255, 255, 255]),
        (Image.new("RGBA", (1, 1), (0, 0, 0, 128)), [127, 127, 127]),
        (Image.new("LA", (1, 1), (0, 128)), [127, 127, 127]),
        (Image.new("P", (1, 1), 0), [0, 0, 0]),
        (palette_with_transparency(), [255, 255, 255]),
        (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), [255, 0, 0]),
        (grey16(0), [0, 0, 0]),
        (grey16(30000), [117, 117, 117]),
        (grey16(65535), [255, 255, 255]),
        (Image.fromarray(np.array([[30000]], dtype=np.int32)), [117, 117, 117]),
    ],
    ids=lambda v: v.mode if isinstance(v, Image.Image) else None,
)
def test_modes(image, rgb):
    assert rgb_of(image) == rgb


def test_floating_point_picture():
    with pytest.raises(ValueError, match="floating-point pictures have no fixed range"):
        from_pil(Image.new("F", (1, 1), 0.5))


# --- PNG


def test_metadata_round_trip(tmp_path):
    path = tmp_path / "Füchse 🦊.png"
    assert save_png(path, picture(), METADATA) == path
    assert read_png_metadata(path) == METADATA
    with Image.open(path) as image:
        assert (image.format, image.size, image.getpixel((0, 0))) == ("PNG", (5, 3), (10, 200, 30))
    assert os.listdir(tmp_path) == [path.name]


def test_no_metadata(tmp_path):
    assert read_png_metadata(save_png(tmp_path / "a.png", picture())) is None
    picture().save(tmp_path / "b.jpg")
    assert read_png_metadata(tmp_path / "b.jpg") is None


def test_metadata_that_is_not_ours(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text(images.PNG_KEY, "{")
    picture().save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match="line 1"):
        read_png_metadata(tmp_path / "a.png")


def test_an_existing_file_is_replaced(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    save_png(str(path), picture(), METADATA)
    assert read_png_metadata(path) == METADATA


def test_files_have_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    save_png(tmp_path / "a.png", picture())
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "a.png")}
    assert len(modes) == 1


class DiskFills:
    """Writes half a picture, then there is no space left, or the user interrupts."""

    def __init__(self, error):
        self.error = error

    def save(self, path, *args, **kwargs):
        data = io.BytesIO()
        picture(64, 64).save(data, "PNG")
        path.write_bytes(data.getvalue()[: data.tell() // 2])
        raise self.error


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [NO_SPACE, KeyboardInterrupt()], ids=["full", "interrupted"])
def test_a_failed_write_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with pytest.raises(type(error)):
        save_png(path, DiskFills(error))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_of_several_files_all_or_none_are_written(tmp_path):
    paths = [tmp_path / "a-0.png", tmp_path / "a-1.png"]
    files = [(paths[0], picture(), METADATA), (paths[1], DiskFills(NO_SPACE), None)]
    with pytest.raises(OSError, match="No space left"):
        save_pngs(files)
    assert os.listdir(tmp_path) == []
    save_pngs([(path, picture(), {"batch_index": i}) for i, path in enumerate(paths)])
    assert [read_png_metadata(p)["batch_index"] for p in paths] == [0, 1]
    assert sorted(os.listdir(tmp_path)) == ["a-0.png", "a-1.png"]


def test_metadata_that_is_not_json_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        save_png(tmp_path / "a.png", picture(), {"seed": torch.tensor(1)})
    assert os.listdir(tmp_path) == []


# --- paths, checked before the work


@pytest.mark.parametrize("name", ["a.jpg", "a", "png", "a.png.tmp", "a.safetensors"])
def test_other_suffixes(tmp_path, name):
    with pytest.raises(ValueError, match=r"must be a \.png file"):
        check_png_path(tmp_path / name)


def test_suffix_in_any_case(tmp_path):
    assert check_png_path(tmp_path / "A.PNG").name == "A.PNG"


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"directory does not exist.*nowhere"):
        check_png_path(tmp_path / "nowhere" / "a.png")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check_png_path(tmp_path / "file" / "a.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(IsADirectoryError, match="is a directory"):
        check_png_path(tmp_path / "folder.png")
    with pytest.raises(OSError, match="name too long"):
        check_png_path(tmp_path / f"{'a' * 300}.png")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc")
def test_a_file_system_without_files(tmp_path):
    """Its permission bits allow root to write; creating a file there fails all the same."""
    with pytest.raises(PermissionError, match="not writable"):
        check_png_path("/proc/self/a.png")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="not writable"):
            check_png_path(tmp_path / "a.png")
    finally:
        tmp_path.chmod(0o700)


def test_checking_leaves_nothing(tmp_path):
    check_png_path(tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


def test_the_longest_file_name_is_written(tmp_path):
    name = "a" * 251 + ".png"
    save_png(tmp_path / name, picture())
    assert os.listdir(tmp_path) == [name]
