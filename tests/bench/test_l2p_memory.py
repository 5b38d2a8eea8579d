"""The measurements of L2P's memory, in small: what they report, and what they find."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bench import convert, local_decoder
from bench.__main__ import main
from bench.local_decoder import Plan
from pixeldiff.models.l2p import bands
from pixeldiff.models.l2p.checkpoint_geometry import network_shapes
from pixeldiff.models.l2p.config import SOURCE, L2PConfig
from pixeldiff.models.l2p.stored_tensors import read_header, stored_files

pytestmark = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="reads Linux's /proc")

SMALL = L2PConfig(patch_size=2, in_channels=16, dim=48, n_heads=2, n_layers=2, n_refiner_layers=1,
                  cap_feat_dim=20, axes_dims=(8, 8, 8), local_decoder=None)  # fmt: skip
STATED = {"config": json.dumps(SMALL.to_dict())}


def command(*args):
    result = CliRunner().invoke(main, [str(a) for a in args])
    return result.exit_code, result.output


# ---- The local decoder -------------------------------------------------------------------------


@pytest.fixture
def narrow(monkeypatch):
    """Sides at which a test is quick; features of 48 channels where 3840 are released."""
    monkeypatch.setattr(local_decoder, "WINDOW", 64)
    config = L2PConfig(patch_size=16, dim=48, n_heads=2, axes_dims=(8, 8, 8))
    variant = type("Variant", (), {"config": config})
    monkeypatch.setitem(local_decoder.VARIANTS, "1k", variant)
    return Plan("1k", 256, ("fp32",), 12_000_000, 1, whole_side=128)


def test_figures_of_a_tiled_decode(narrow):
    found = local_decoder.measure(narrow)
    assert found.tiling[0] > 0
    assert (found.image, found.result) == (12 * 256 * 256, 12 * 256 * 256)
    assert found.features == 4 * 16 * 16 * 48
    assert found.estimate <= narrow.budget
    assert found.backends.keys() == {"local_decoder_down", "local_decoder_up"}
    assert found.seam_error < 1e-5
    assert found.whole_error < 1e-5


def test_a_margin_too_narrow_shows(narrow, monkeypatch):
    monkeypatch.setattr(bands, "margin_up", lambda levels: 1 << levels)
    found = local_decoder.measure(narrow)
    assert found.seam_error > 1e-4
    assert found.whole_error > 1e-4


def test_the_command_of_the_decoder(tmp_path):
    path = tmp_path / "decoder.json"
    args = ("local-decoder", "--form", "1k", "--size", 64, "--dtype", "fp32", "--json", path)
    code, text = command(*args, "--limit", 10_000_000, "--whole-size", 64)
    assert code == 1
    assert "became resident, more than 0.01 GB" in text
    report = json.loads(path.read_text())
    assert report["plan"]["budget"] == 1_000_000_000
    (run,) = report["runs"]
    assert run["dtype"] == "fp32"
    # In a process of its own: no memory is left there from before.
    assert run["image"] + run["features"] + run["weights"] < run["held"] < run["peak"] + 1_000_000
    code, text = command("local-decoder", "--json", tmp_path / "a.txt")
    assert "must be a .json file" in text


# ---- The conversion ----------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path) -> Path:
    convert.sparse_source(tmp_path / "source", network_shapes(SMALL), 3, STATED)
    return tmp_path / "source"


def test_a_sparse_source_is_a_source(source):
    files = stored_files(source)
    shapes = {name: t.shape for name, t in files.tensors.items()}
    assert shapes == network_shapes(SMALL)
    assert len(list(source.glob("*.safetensors"))) == 3


def test_the_released_source_takes_no_room(tmp_path):
    convert.sparse_source(tmp_path / "source", network_shapes(SOURCE.config), 3)
    files = list((tmp_path / "source").glob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) > 12.3e9
    assert sum(512 * f.stat().st_blocks for f in files) < 20e6
    held = stored_files(tmp_path / "source").tensors
    assert sum(t.nbytes for t in held.values()) == 12_309_817_472


def test_figures_of_a_conversion(source, tmp_path):
    found = convert.conversion(source, tmp_path / "result.safetensors", 1024)
    assert found.copied + found.dropped == len(network_shapes(SMALL))
    assert found.new > 0
    assert found.before < found.peak < found.before + 100e6
    assert found.written > found.result
    assert found.read > 2 * 0.9 * found.source
    assert sorted(p.name for p in tmp_path.iterdir()) == ["result.json", "source"]


def test_a_tensor_of_another_source_shows(source, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: torch.ones(*shape))
    convert.sparse_source(tmp_path / "other", network_shapes(SMALL), 3, STATED)
    [first, *_], [result, *_] = (
        sorted((tmp_path / f).glob("*01-of*")) for f in ("source", "other")
    )
    names = list(read_header(first)[0])
    convert._check_ends([first], first, names)
    with pytest.raises(RuntimeError, match="of the result is not the source's"):
        convert._check_ends([first], result, names)


@pytest.mark.slow
@pytest.mark.skipif(
    "PIXELDIFF_FULL_SIZE" not in os.environ,
    reason="writes 12 GB for minutes; set PIXELDIFF_FULL_SIZE to run it",
)
def test_the_released_conversion_streams(tmp_path):
    [report] = convert.run((4096,), tmp_path, 3, "")
    [found] = report.runs
    assert (found.copied, found.new, found.dropped) == (515, 42, 6)
    assert found.peak < 6e9
    assert found.peak - found.before < 100e6
    assert list(tmp_path.iterdir()) == []
