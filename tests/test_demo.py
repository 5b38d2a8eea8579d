"""The demo command: which picture goes in, what comes out, and what is measured."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tiny_pid import save_net, tiny_net

from pixeldiff import demo, sources
from pixeldiff.images import from_pil
from pixeldiff.models.autoencoder import ConvAutoencoder
from pixeldiff.models.pid import checkpoint_location
from pixeldiff.picture_files import read_picture_metadata


def picture(width, height, seed=0):
    """Smooth, so that scaling it down and up loses little."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Tiny random networks in place of the packaged ones."""
    files = tmp_path / "files"
    files.mkdir()
    save_net(files / "pid.safetensors", tiny_net())
    torch.manual_seed(0)
    ConvAutoencoder().save(files / "autoencoder.safetensors")
    picture(160, 128).save(files / "picture.png")
    monkeypatch.setattr(checkpoint_location, "_packaged_demo", lambda name: files / name)
    monkeypatch.setattr(sources, "demo_asset", lambda name: files / name)
    monkeypatch.setattr(demo, "demo_asset", lambda name: files / name)
    return tmp_path


def run(*args, code=0):
    result = CliRunner().invoke(demo.main, [str(a) for a in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result


# --- the command


def test_shipped_picture(folder):
    out = folder / "new" / "folder"
    result = run("--pixels", 64, "--out", out, "--seed", 3)
    assert sorted(os.listdir(out)) == ["picture-compare.png", "picture-pid.png"]
    with Image.open(out / "picture-pid.png") as image:
        assert image.size == (64, 64)
    with Image.open(out / "picture-compare.png") as image:
        assert image.size == (3 * 512, 2 * 512 + 24)
    metadata = read_picture_metadata(out / "picture-pid.png")
    assert (metadata["model"], metadata["seed"], metadata["size"]) == ("demo", 3, [64, 64])
    for words in ("16x16 -> latent (1, 16, 2, 2) -> 64x64", "PSNR dB", "SSIM", "peak memory"):
        assert words in result.stdout
    assert str(out / "picture-pid.png") in result.stdout.splitlines()


def test_a_picture_of_ones_own_smaller_than_the_output(folder):
    path = folder / "Füchse 🦊.jpg"
    picture(40, 24).save(path)
    result = run("--image", path, "--pixels", 128, "--out", folder)
    with Image.open(folder / "Füchse 🦊-pid.png") as image:
        assert image.size == (160, 96)
    with Image.open(folder / "Füchse 🦊-compare.png") as image:
        assert image.size == (2 * 512, 2 * 512 + 24)
    assert "nothing to measure against" in result.stdout
    assert "PSNR" not in result.stdout


def test_failures_write_nothing(folder):
    out = folder / "out"
    (folder / "text.png").write_text("no picture")
    (folder / "taken").touch()
    for args, words in [
        (("--image", folder / "nowhere.png"), "no such file"),
        (("--image", folder), "is a directory"),
        (("--image", folder / "text.png"), "nor a picture"),
        (("--out", folder / "taken"), "taken"),
    ]:
        stderr = run("--pixels", 64, "--out", out, *args, code=1).stderr
        assert stderr.startswith("error: ")
        assert words in stderr
        assert not out.exists()
    assert "--pixels" in run("--pixels", 0, code=2).stderr


def test_interruption(folder, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "compare", interrupted)
    out = folder / "out"
    assert "interrupted" in run("--pixels", 64, "--out", out, code=130).stderr
    assert os.listdir(out) == []


# --- its parts


@pytest.mark.parametrize(
    ("size", "pixels", "target", "low"),
    [
        ((512, 512), 128, (128, 128), (32, 32)),
        ((640, 480), 128, (160, 96), (40, 24)),  # 4:3 at 128 squared is 147.8 x 110.9
        ((128, 128), 128, (128, 128), (32, 32)),
        ((120, 120), 128, None, (32, 32)),
        ((20, 20), 128, None, (16, 16)),
        ((1, 1), 128, None, (8, 8)),
        ((400, 1), 128, None, (400, 8)),
    ],
)
def test_sizes(size, pixels, target, low):
    got_target, got_low = demo.prepare(picture(*size), pixels)
    assert got_low.shape == (1, 3, low[1], low[0])
    if target is None:
        assert got_target is None
    else:
        assert got_target.shape == (1, 3, target[1], target[0])


def test_the_picture_is_cropped_and_never_stretched():
    """A disc stays a disc."""
    y, x = np.mgrid[:300, :500]
    disc = ((x - 250) ** 2 + (y - 150) ** 2 < 100**2).astype(np.uint8) * 255
    target, low = demo.prepare(Image.fromarray(disc), 128)
    for image, tolerance in ((target, 2), (low, 1)):
        inside = image[0, 0] > 0
        height, width = inside.any(1).sum().item(), inside.any(0).sum().item()
        assert abs(height - width) <= tolerance
        assert 0.5 * image.shape[2] < height < 0.8 * image.shape[2]


def test_low_resolution_is_the_picture_itself_at_a_quarter():
    target, low = demo.prepare(picture(256, 256), 256)
    mean = torch.nn.functional.avg_pool2d(target, 4)
    assert (mean - low).abs().mean() < 0.01
    assert low.abs().max() <= 1


def test_transparent_and_16_bit_pictures():
    _, low = demo.prepare(Image.new("RGBA", (16, 16), (0, 0, 0, 0)), 64)
    assert torch.equal(low, torch.ones_like(low))
    _, low = demo.prepare(Image.fromarray(np.full((16, 16), 32768, np.uint16)), 64)
    assert low.abs().max() < 0.01


def test_psnr_of_a_known_difference():
    a = torch.zeros(1, 3, 16, 16)
    assert demo.psnr(a, a + 0.2) == pytest.approx(20.0, abs=1e-4)  # peak to peak 2
    assert demo.psnr(a, a) == float("inf")


def test_ssim_of_equal_and_of_noisy_pictures():
    pytest.importorskip("skimage")
    a = from_pil(picture(64, 48))
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(0))
    assert demo.ssim(a, a) == pytest.approx(1)
    assert demo.ssim(a, a + 0.05 * noise) > demo.ssim(a, a + 0.5 * noise) > 0


def test_comparison_shows_each_picture_in_its_column():
    colors = [torch.full((1, 3, 600, 400), v) for v in (-1.0, 0.0, 1.0)]
    sheet = demo.compare(colors[2], colors[0], colors[1])
    for column, value in enumerate((0, 127, 255)):
        for row in (200, 24 + 512 + 200):
            assert sheet.getpixel((column * 512 + 150, row)) == (value,) * 3
    assert demo.compare(None, colors[0], colors[1]).width == 2 * 512


def test_peak_memory_is_a_size():
    number, unit = demo.peak_memory().split(maxsplit=1)
    assert float(number) > 0
    assert unit.startswith("GiB")
