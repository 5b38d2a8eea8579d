"""bench precision: its errors by a second way, and the page of this repository by its file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.precision import PARTS, Squares, _judge, at_released_width, load, psnr
from bench.precision_page import page

ROOT = Path(__file__).resolve().parents[2]
RAW = Path("bench/results/epyc-2core/precision.json")


@pytest.fixture
def report(monkeypatch):
    monkeypatch.chdir(ROOT)
    return load(RAW)


def test_the_page_of_this_repository_is_what_its_file_gives(report):
    assert (ROOT / "docs/precision.md").read_text() == page(report, RAW), (
        f"run python -m bench precision --from {RAW} -o docs/precision.md"
    )


def test_the_figures_make_sense(report):
    """What would be wrong if the table were of the wrong layers, or of the wrong direction."""
    for e in report.layers:
        assert 0.001 < e.bf16 < 0.005, e
        assert 0.02 < e.fp8 < 0.05, e
    for p in report.pictures:
        assert p.fp32["fp8"] <= p.fp32["bf16"] + 0.5
        assert abs(p.original["fp8"] - p.original["bf16"]) < 0.05
    assert set(report.parts) == set(PARTS)
    assert report.without < report.parts["all"] < report.bf16 + 0.5
    assert report.weights["fp8"] < report.weights["bf16"] == report.weights["fp32"] / 2


@torch.no_grad()
def test_the_error_of_a_layer():
    torch.manual_seed(0)
    layer, squares = nn.Linear(64, 32), {"bf16": Squares(), "fp8": Squares()}
    handle = _judge(layer, "it", squares)
    x = torch.randn(2, 50, 64)
    layer(x[:1])
    layer(x[1:])
    handle.remove()
    layer(x)  # no longer counted
    exact = layer.double()(x.double())
    low = layer.bfloat16()(x.bfloat16()).double()
    assert squares["bf16"].relative()["it"] == pytest.approx(
        ((low - exact).norm() / exact.norm()).item(), rel=1e-3
    )
    assert 0.02 < squares["fp8"].relative()["it"] < 0.05


def test_sums_of_squares():
    squares = Squares()
    squares.add("a", torch.tensor([3.0]), torch.tensor([0.0]))
    squares.add("a", torch.tensor([4.0]), torch.tensor([4.0]))
    assert squares.relative() == {"a": 0.75}


def test_psnr():
    assert psnr(torch.zeros(4), torch.full((4,), 0.2)) == pytest.approx(20)
    assert psnr(torch.zeros(4), torch.tensor([0.2, 0, 0, 0])) == pytest.approx(
        20 + 10 * math.log10(4)
    )


@torch.no_grad()
def test_a_block_of_another_width(monkeypatch):
    from pixeldiff.models.pid import PiDConfig

    monkeypatch.setattr(
        "bench.precision.PiDConfig", lambda: PiDConfig(hidden_size=128, num_groups=2)
    )
    errors = {e.name: e for e in at_released_width(torch.device("cpu"))}
    assert set(errors) == {
        *(f"attn.{layer}_{s}" for layer in ("qkv", "proj") for s in "xy"),
        *(f"mlp_{s}.{layer}" for layer in ("w1", "w2", "w3") for s in "xy"),
        "block, image",
        "block, text",
    }
    assert all(0 < e.bf16 < 0.2 * e.fp8 < 0.03 for e in errors.values())


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"schema": 1, "rows": []}))
    with pytest.raises(ValueError, match="is no precision report of schema 1"):
        load(path)
