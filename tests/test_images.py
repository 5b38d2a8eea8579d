"""Images between tensors, arrays and Pillow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pixeldiff import images
from pixeldiff.images import convert, from_pil, picture_bands, to_picture, to_uint8, uint8_bands

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


# --- bands of rows


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bands_are_the_picture_cut(monkeypatch, rounded, dtype):
    x = (torch.randn(3, 13, 17, generator=torch.Generator().manual_seed(0)) * 0.7).to(dtype)
    x[0, 0, :6] = torch.tensor([-1, 1, -9, 9, float("inf"), 0])
    whole = to_uint8(x[None], rounded=rounded)[0]
    monkeypatch.setattr(images, "_BAND", 4 * 17)
    bands = list(uint8_bands(x, rounded=rounded))
    assert [len(b) for b in bands] == [4, 4, 4, 1]
    assert np.array_equal(np.concatenate(bands), whole)
    assert np.array_equal(to_uint8(x[None], rounded=rounded)[0], whole)
    assert np.array_equal(np.asarray(to_picture(x, rounded=rounded)), whole)


def test_bands_of_a_picture_are_the_picture_cut(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (13, 17, 4), dtype=np.uint8)
    monkeypatch.setattr(images, "_BAND", 4 * 17)
    bands = list(picture_bands(Image.fromarray(noise[..., :3])))
    assert [len(b) for b in bands] == [4, 4, 4, 1]
    assert np.array_equal(np.concatenate(bands), noise[..., :3])
    [clear] = {tuple(pixel) for b in picture_bands(Image.new("RGBA", (5, 9))) for pixel in b[0]}
    assert clear == (255, 255, 255)


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
