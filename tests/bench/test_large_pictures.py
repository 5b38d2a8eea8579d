"""The measurements of pictures larger than memory, in small."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from bench import huge, large_files
from bench.__main__ import main
from pixeldiff import png_stream
from pixeldiff.picture_files import save_picture, save_rows

pytest.importorskip("tifffile")
reads_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.mark.slow
@reads_proc
def test_a_decode_is_killed_and_goes_on(tmp_path):
    pytest.importorskip("scipy")
    out, found = tmp_path / "a.tif", tmp_path / "huge.json"
    options = ["--size", 768, "--tile", "8x8", "--kill", "0.2", "-o", out, "--json", found]
    result = run("huge", *options)
    assert result.exit_code == 0, result.output
    report = json.loads(found.read_text())
    first, last = report["processes"]
    assert (first["killed"], last["killed"]) == (True, False)
    assert first["found"] == 0 < first["kept"]
    assert first["kept"] <= last["found"] + 1
    for process in (first, last):
        assert 0 < process["above"] < 60 * report["image_bytes"]
        assert process["before"] > 1e6
    assert report["image_bytes"] == 768 * 768 * 12
    assert report["file_bytes"] == out.stat().st_size
    assert report["likeness"]["squares"] == 4
    assert 20 < report["likeness"]["least"] <= report["likeness"]["median"]
    assert Image.open(out).size == (768, 768)
    assert sorted(os.listdir(tmp_path)) == ["a.tif", "huge.json"]


def test_a_square_that_is_wrong_is_seen(tmp_path):
    scene = np.random.default_rng(0).integers(0, 256, (256, 300, 3), dtype=np.uint8)
    picture = scene.repeat(huge.SCALE, 0).repeat(huge.SCALE, 1)
    save_picture(tmp_path / "a.tif", Image.fromarray(picture))
    with np.errstate(divide="ignore"):
        assert huge.likeness(tmp_path / "a.tif", scene).least == np.inf
        picture[:512, 600:1000] += 100
        save_picture(tmp_path / "b.tif", Image.fromarray(picture))
        found = huge.likeness(tmp_path / "b.tif", scene)
    assert found.squares == 6
    assert found.least < 12 < found.median


@reads_proc
@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_a_file_is_written_and_read_back(tmp_path, suffix):
    if png_stream.why_not() is not None:  # what it is read back with, too
        pytest.skip(png_stream.why_not())
    side, found = 1100, tmp_path / "files.json"
    result = run("files", "--case", f"{suffix}:{side}", "--folder", tmp_path, "--json", found)
    assert result.exit_code == 0, result.output
    [file] = json.loads(found.read_text())["files"]
    assert (file["suffix"], file["side"], file["bigtiff"]) == (f".{suffix}", side, False)
    assert file["same"]
    assert 0.9 * side**2 * 3 < file["file_bytes"] < 1.1 * side**2 * 3
    assert 0 < file["above"] < 60e6
    assert os.listdir(tmp_path) == ["files.json"]


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_a_pixel_that_is_wrong_is_seen(tmp_path, suffix):
    side, path = 70, tmp_path / f"a{suffix}"
    parts = [part.clone() for part in large_files.noise(side)]
    save_rows(path, (side, side), parts, large_files.METADATA)
    assert large_files._same(path, side)
    save_rows(path, (side, side), parts, {"seed": 4})
    assert not large_files._same(path, side)
    parts[-1][2, -1, -1] = -parts[-1][2, -1, -1]
    save_rows(path, (side, side), parts, large_files.METADATA)
    assert not large_files._same(path, side)


def test_wrong_usage(tmp_path):
    for options, words in (
        (("huge", "-o", tmp_path / "a.tif", "--size", 1000), "must be a multiple of 32, got 1000"),
        (("huge", "-o", tmp_path / "a.tif", "--tile", "auto"), "--tile must be HEIGHTxWIDTH"),
        (("files", "--case", "jpg:100"), "got jpg:100"),
    ):
        result = run(*options)
        assert result.exit_code == 2
        assert words in result.output
    result = run("huge", "-o", tmp_path / "a.png")
    assert (result.exit_code, "must be a .tif file" in result.output) == (1, True)
