"""Latents from files: what is a latent, what is a picture, and what is neither."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pixeldiff import sources
from pixeldiff.images import from_pil
from pixeldiff.models.autoencoder import ConvAutoencoder
from pixeldiff.sources import encode_picture, latent_from, read_picture

LATENT = torch.arange(2 * 16 * 2 * 3, dtype=torch.float32).reshape(2, 16, 2, 3)


@pytest.fixture
def autoencoder(tmp_path, monkeypatch):
    """A random autoencoder in place of the packaged one."""
    torch.manual_seed(0)
    path = tmp_path / "autoencoder.safetensors"
    ConvAutoencoder().save(path)
    monkeypatch.setattr(sources, "demo_asset", lambda name: tmp_path / name)
    return ConvAutoencoder.load(path)


def random_picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- latents


@pytest.mark.parametrize(
    ("tensors", "shape"),
    [
        ({"anything": LATENT}, (2, 16, 2, 3)),
        ({"latent": LATENT, "noise": LATENT + 1}, (2, 16, 2, 3)),
        ({"latents": LATENT[0], "noise": LATENT + 1}, (1, 16, 2, 3)),
    ],
)
@pytest.mark.parametrize("encoder", [None, "demo"])
def test_latents(tmp_path, tensors, shape, encoder):
    path = tmp_path / "Latent 🦊.safetensors"
    save_file(tensors, path)
    latent = latent_from(str(path), encoder=encoder)
    assert latent.shape == shape
    assert torch.equal(latent, LATENT[: shape[0]])


def test_suffix_in_any_case(tmp_path):
    save_file({"latent": LATENT}, tmp_path / "A.SafeTensors")
    assert torch.equal(latent_from(tmp_path / "A.SafeTensors", encoder=None), LATENT)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a": LATENT, "b": LATENT + 1}, r"must hold one tensor.*it holds 2: a, b"),
        ({"latent": LATENT, "latents": LATENT + 1}, "it holds 2"),
        ({}, "it holds 0"),
        ({"latent": LATENT[0, 0]}, r"latent must be \(B, C, h, w\) or \(C, h, w\), got \(2, 3\)"),
        ({"a": LATENT[None]}, "a must be"),
    ],
)
def test_what_is_no_latent(tmp_path, tensors, words):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match=words):
        latent_from(path, encoder=None)


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\xff" * 64])
def test_damaged_latents(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.safetensors is not a readable safetensors file"):
        latent_from(path, encoder=None)


def test_truncated_latent(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"latent": LATENT}, path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        latent_from(path, encoder=None)


def test_places_without_a_file(tmp_path):
    for name in ("nothing.png", "nothing.safetensors"):
        with pytest.raises(FileNotFoundError, match=f"no such file.*{name}"):
            latent_from(tmp_path / name, encoder="demo")
    for read in (read_picture, lambda path: latent_from(path, encoder="demo")):
        with pytest.raises(IsADirectoryError, match="this is a directory"):
            read(tmp_path)


# --- pictures


def test_picture_through_the_autoencoder(tmp_path, autoencoder):
    image = random_picture(40, 24)
    image.save(tmp_path / "Füchse 🦊.png")
    latent = latent_from(tmp_path / "Füchse 🦊.png", encoder="demo")
    assert latent.shape == (1, 16, 3, 5)
    assert torch.equal(latent, autoencoder.encode(from_pil(image)))


def test_sides_are_cropped_around_the_centre(autoencoder):
    image = random_picture(45, 22)
    middle = image.crop((2, 3, 42, 19))
    assert torch.equal(encode_picture(autoencoder, image), encode_picture(autoencoder, middle))


@pytest.mark.parametrize("size", [(7, 64), (64, 7), (1, 1)])
def test_tiny_pictures(autoencoder, size):
    with pytest.raises(ValueError, match=r"at least 8 pixels wide and high, got \("):
        encode_picture(autoencoder, Image.new("RGB", size))
    assert encode_picture(autoencoder, Image.new("RGB", (8, 8))).shape == (1, 16, 1, 1)


def test_pictures_need_the_demo_model(tmp_path):
    random_picture(16, 16).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is a picture; only the demo model brings"):
        latent_from(tmp_path / "a.png", encoder=None)


def test_huge_pictures_are_not_encoded(tmp_path, monkeypatch):
    """The autoencoder would take gigabytes, the network hours."""
    Image.new("L", (1025, 1024)).save(tmp_path / "a.png")
    monkeypatch.setattr(sources, "demo_autoencoder", lambda: pytest.fail("encoded"))
    with pytest.raises(ValueError, match=r"1025 x 1024 pixels.*scale it down"):
        latent_from(tmp_path / "a.png", encoder="demo")


def test_decompression_bombs(tmp_path, monkeypatch):
    random_picture(64, 64).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="exceeds limit"):
        read_picture(tmp_path / "a.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    """The eight orientations of a picture whose corner shows which way is up."""
    upright = Image.new("RGB", (32, 16), "black")
    upright.paste("white", (0, 0, 8, 8))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read_picture(tmp_path / "a.png")), np.asarray(upright))


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.fromarray(np.full((8, 8), 30000, np.uint16)), (117, 117, 117)),
        (Image.new("L", (8, 8), 9), (9, 9, 9)),
        (Image.new("RGB", (8, 8), (1, 2, 3)).convert("P"), None),
    ],
    ids=["RGBA", "I;16", "L", "P"],
)
def test_pictures_of_any_mode_come_as_rgb(tmp_path, image, pixel):
    image.save(tmp_path / "a.png")
    read = read_picture(tmp_path / "a.png")
    assert read.mode == "RGB"
    assert read.getpixel((0, 0)) == (pixel or image.convert("RGB").getpixel((0, 0)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "bmp", "gif"])
def test_truncated_pictures(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    random_picture(64, 64).save(path)
    data = path.read_bytes()
    read_picture(path)
    for length in (len(data) // 2, 20, 0):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=f"a.{suffix} is neither a .safetensors latent nor"):
            read_picture(path)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_rotation(tmp_path):
    exif = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff" + b"\xff" * 40
    random_picture(16, 24).save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg").size == (16, 24)


def test_what_is_no_picture(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"neither a \.safetensors latent nor a picture"):
        latent_from(tmp_path / "a.png", encoder="demo")


def test_out_of_memory_is_not_a_bad_picture(tmp_path, monkeypatch):
    random_picture(8, 8).save(tmp_path / "a.png")

    def exhausted(image):
        raise MemoryError

    monkeypatch.setattr(sources, "to_rgb", exhausted)
    with pytest.raises(MemoryError):
        read_picture(tmp_path / "a.png")
