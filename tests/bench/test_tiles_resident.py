"""The measurement of decoding in tiles, in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.__main__ import main

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


def test_it_reports_each_mode_and_fails_beyond_the_limit(tmp_path):
    out = tmp_path / "tiles.json"
    options = ["--size", 512, "--tile", "12x12", "--mode", "sync,whole", "--json", out]
    result = CliRunner().invoke(main, [str(a) for a in ("tiles", *options, "--limit", 1)])
    assert result.exit_code == 1
    assert "GB became resident, more than 0.00 GB" in result.output
    report = json.loads(out.read_text())
    sync, whole = report["runs"]
    assert (sync["mode"], sync["tile"], sync["overlap"]) == ("sync", [12, 12], [1, 1])
    assert (whole["mode"], whole["tile"]) == ("whole", None)
    for run in (sync, whole):
        # The result alone, and less than thirty images of fp32.
        assert 3 * 512**2 * 4 < run["above"] < 30 * 3 * 512**2 * 4
        assert run["before"] > run["weights"] > 1e6
    assert report["command"].startswith("python -m bench")
