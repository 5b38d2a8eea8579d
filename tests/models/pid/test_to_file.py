"""A decode that writes its picture as it goes: the same bytes, and few rows held."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pid import CONFIG, tiny_caption, tiny_latent, tiny_net

from pixeldiff import picture_files
from pixeldiff.jobs import Stages
from pixeldiff.memory.live import LiveMemory
from pixeldiff.models.noise import NoiseSource
from pixeldiff.models.pid import tiling
from pixeldiff.models.pid.captions import CaptionSource
from pixeldiff.models.pid.decoder import Interrupted, PiDDecoder
from pixeldiff.models.tiles import cut
from pixeldiff.picture_files import read_picture_metadata, save_picture, save_rows
from pixeldiff.row_bands import rebanded

TILES = {"tile": (4, 6), "overlap": 1, "seed": 0, "tile_mode": "independent"}
every_format = pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])


@pytest.fixture(autouse=True)
def needs_tifffile(request):
    if getattr(request.node, "callspec", None) and ".tif" in request.node.callspec.params.values():
        pytest.importorskip("tifffile")


@pytest.fixture
def decoder():
    captions = CaptionSource(CONFIG.txt_embed_dim, null_caption=tiny_caption())
    return PiDDecoder(tiny_net(), captions=captions)


@every_format
@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("small", [1 << 20, 0], ids=["small", "large"])
def test_the_bytes_are_those_of_the_picture_at_once(
    decoder, tmp_path, monkeypatch, suffix, together, small
):
    monkeypatch.setattr(picture_files, "_SMALL", small)  # with libvips a PNG is written in bands
    latent, options = tiny_latent(1, 13, 9), {**TILES, "tile_batch": together}
    whole = decoder.decode(latent, output="pt", **options)
    expected = save_picture(tmp_path / f"a{suffix}", whole.images[0], whole.metadata)
    path = tmp_path / f"b{suffix}"
    told = []
    result = decoder.decode(latent, output=path, tile_callback=told.append, **options)
    assert result.images == [path]
    assert result.metadata == whole.metadata == read_picture_metadata(path)
    assert path.read_bytes() == expected.read_bytes()
    assert told[-1].tile == told[-1].tiles
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("options", [{}, {"tile": (4, 6), "tile_mode": "sync"}, {"tile": (9, 9)}])
def test_other_decodes_are_written_too(decoder, tmp_path, options):
    latent = tiny_latent(1, 7, 9)
    whole = decoder.decode(latent, output="pt", seed=0, **options)
    expected = save_picture(tmp_path / "a.png", whole.images[0], whole.metadata)
    decoder.decode(latent, output=tmp_path / "b.png", seed=0, **options)
    assert (tmp_path / "b.png").read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("small", [1 << 20, 0], ids=["small", "large"])
def test_it_goes_on_after_an_interruption(decoder, tmp_path, monkeypatch, small):
    monkeypatch.setattr(picture_files, "_SMALL", small)
    latent, folder = tiny_latent(1, 13, 9), tmp_path / "job"
    expected = decoder.decode(latent, output=tmp_path / "a.png", **TILES).images[0].read_bytes()
    for after in (1, 3, 7, 8):
        told = []

        def stop(info, told=told, after=after):
            told.append(info)
            return len(told) < after

        path = tmp_path / "b.png"
        with pytest.raises(Interrupted):
            decoder.decode(latent, output=path, resume=folder, tile_callback=stop, **TILES)
        assert sorted(os.listdir(tmp_path)) == ["a.png", "job"]
        assert not list(folder.glob(".*"))
        decoder.decode(latent, output=path, resume=folder, **TILES)
        assert path.read_bytes() == expected
        path.unlink()
        assert os.listdir(tmp_path) == ["a.png"]


class Stub:
    """Tiles of noise in place of a network's."""

    def __init__(self, rows: int, columns: int, together: int = 1) -> None:
        self.layout = cut((rows, columns), (16, 16), 4, step=1, pixels=8, unit="cells")
        self.what = SimpleNamespace(latent=torch.zeros(1, 4, rows, columns), together=together)
        self.net = SimpleNamespace(config=SimpleNamespace(in_channels=3))
        self.stages = Stages(None, NoiseSource(torch.Generator(), "cpu"), "cpu")

        self.one_by_one = False

    def at(self, *_: int) -> None:
        pass

    def report(self, *_: int) -> None:
        pass


@pytest.fixture
def noise_tiles(monkeypatch):
    def alone(tiles, group, _):
        seeds = [tile.row * 1000 + tile.column for tile in group]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = (1, 3, *tiles.layout.tile_pixels)
        return torch.cat([torch.randn(shape, generator=g) for g in generators])

    monkeypatch.setattr(tiling, "_sample_alone", alone)


@pytest.mark.parametrize("together", [1, 2, 5])
@pytest.mark.parametrize("rows", [16, 17, 40, 100])
def test_rows_are_blended_as_the_image_is(noise_tiles, rows, together):
    tiles = Stub(rows, 40, together)
    expected = torch.zeros(1, 3, *tiles.layout.image_pixels)
    for tile in tiles.layout.tiles:
        result = tiling._sample_alone(tiles, [tile], None)
        tiles.layout.crop(expected, tile).addcmul_(result, tiles.layout.window(tile))
    bands = [band.clone() for band in tiling.independent_rows(tiles, None)]
    assert torch.equal(torch.cat(bands, 2), expected)
    assert max(band.shape[2] for band in bands) <= tiles.layout.tile_pixels[0]


def test_few_rows_are_held(noise_tiles, tmp_path):
    peaks = []
    for rows in (60, 240):
        tiles = Stub(rows, 64)
        with LiveMemory() as memory:
            parts = (band[0].clamp_(-1, 1) for band in tiling.independent_rows(tiles, None))
            save_rows(tmp_path / "a.png", tiles.layout.image_pixels, parts)
        peaks.append(memory.peak)
    strip = 3 * 4 * 16 * 8 * 64 * 8
    image = 3 * 4 * 240 * 8 * 64 * 8
    assert peaks[1] <= peaks[0] * 1.01
    assert peaks[1] < 4 * strip < image / 3


def test_nan_leaves_no_file(decoder, tmp_path, monkeypatch):
    step, calls = type(decoder.net).student_step, []

    def broken(self, *args, **options):
        calls.append(1)
        x, x0 = step(self, *args, **options)
        return (x * torch.nan if len(calls) == 20 else x), x0

    monkeypatch.setattr(type(decoder.net), "student_step", broken)
    with pytest.raises(ArithmeticError, match="returned NaN at"):
        decoder.decode(tiny_latent(1, 13, 9), output=tmp_path / "a.png", **TILES)
    assert os.listdir(tmp_path) == []


def test_refused_before_the_work(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(type(decoder.net), "student_step", None)
    with pytest.raises(ValueError, match="a file holds one picture, got 2 latents"):
        decoder.decode(tiny_latent(2, 7, 9), output=tmp_path / "a.png", **TILES)
    with pytest.raises(ValueError, match="must be a"):
        decoder.decode(tiny_latent(1, 7, 9), output=tmp_path / "a.bmp", **TILES)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(picture_files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"a.png may take 0\.00 GB \(224 x 288 pixels\)") as caught:
        decoder.decode(tiny_latent(1, 7, 9), output=tmp_path / "a.png", **TILES)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=r"resume: .*job needs 0\.00 GB for finished work"):
        decoder.decode(tiny_latent(1, 7, 9), resume=tmp_path / "job", **TILES)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("rows", [1, 3, 4, 100])
def test_rebanded(rows):
    picture = np.random.default_rng(0).integers(0, 256, (11, 5, 3), dtype=np.uint8)
    bands = [picture[:2], picture[2:2], picture[2:3], picture[3:10], picture[10:]]
    found = list(rebanded(iter(bands), rows))
    assert np.array_equal(np.concatenate(found), picture)
    assert {len(band) for band in found[:-1]} <= {rows}
    assert len(found[-1]) <= rows


@every_format
def test_rows_that_are_too_few(tmp_path, suffix):
    with pytest.raises(ValueError, match="bands must have 8 rows, got 4"):
        save_rows(tmp_path / f"a{suffix}", (8, 6), iter([torch.zeros(3, 4, 6)]))
    assert os.listdir(tmp_path) == []


def test_past_four_gigabytes_it_is_a_bigtiff(tmp_path, monkeypatch):
    pytest.importorskip("tifffile")
    monkeypatch.setattr("pixeldiff.tiff_stream._CLASSIC", 1000)
    path = save_rows(tmp_path / "a.tif", (40, 30), iter(torch.zeros(2, 3, 20, 30)), {"seed": 3})
    assert path.read_bytes()[:4] == b"II+\0"
    assert read_picture_metadata(path) == {"seed": 3}
    assert np.asarray(Image.open(path)).shape == (40, 30, 3)
    assert isinstance(path, Path)
