"""The choice of tiles: which one wins, what is written, and a whole run in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bench import schema
from bench.resume import LOST
from bench.schema import Row
from bench.tune import best, update

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Tile:
    rows: int


A, B, C = Tile(1), Tile(2), Tile(3)


def test_the_tile_with_the_least_mean_slowdown_wins():
    # B is never the fastest, and the best over both sizes.
    runs = [{A: 1.0, B: 1.1, C: 3.0}, {A: 30.0, B: 11.0, C: 10.0}]
    assert best(runs, A) == B


def test_the_default_stays_unless_it_is_beaten_by_more_than_noise():
    assert best([{A: 1.01, B: 1.0}], A) == A
    assert best([{A: 1.05, B: 1.0}], A) == B


def test_a_tile_must_have_run_everywhere():
    assert best([{A: 2.0, B: 1.0}, {A: 2.0}], A) == A
    assert best([{B: 1.0}, {C: 1.0}], A) == A  # nothing ran everywhere
    assert best([{B: 1.0}, {B: 1.0}], A) == B  # the default does not fit this device


def test_a_table_keeps_what_other_devices_measured(tmp_path):
    path = tmp_path / "op.json"
    update(path, "9.0", {"bf16 d64": A, "bf16 d72": B})
    update(path, "8.0", {"bf16 d64": C})
    update(path, "9.0", {"bf16 d64": B})
    assert json.loads(path.read_text()) == {
        "8.0": {"bf16 d64": {"rows": 3}},
        "9.0": {"bf16 d64": {"rows": 2}, "bf16 d72": {"rows": 2}},
    }


def test_a_damaged_table_is_left_alone(tmp_path):
    path = tmp_path / "op.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"op\.json is not a table of tiles"):
        update(path, "9.0", {"bf16 d64": A})
    assert path.read_text() == "{"
    update(tmp_path / "none.json", "9.0", {})
    assert not (tmp_path / "none.json").exists()


def tune(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", "tune", "--tables", str(folder), *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_a_whole_run_and_that_a_launch_then_uses_the_table(tmp_path):
    done = tune(
        *(tmp_path, "--device", "cpu", "--op", "pixel_embed", "--sizes", "256"),
        *("--scale", "16", "--rounds", "3", "--seconds", "0", "--json", str(tmp_path / "r.json")),
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stderr
    rows = schema.load(tmp_path / "r.json")
    assert {r.kind for r in rows} == {"tile"}
    assert {r.site for r in rows} == {"pid/image"}
    assert all(r.accuracy.of_budget <= 1 for r in rows)
    table = json.loads((tmp_path / "pixel_embed.json").read_text())
    assert table.keys() == {"8.0"}
    assert len(table["8.0"]) == 1
    names = {" ".join(f"{k}={v}" for k, v in t.items()) for t in table["8.0"].values()}
    assert names <= {r.backend for r in rows}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """table(op, entries): the tables are read from a folder that holds this one."""
    from pixeldiff.triton_kernels import configs

    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    configs.table.cache_clear()
    yield lambda op, entries: (tmp_path / f"{op}.json").write_text(json.dumps(entries))
    configs.table.cache_clear()


def test_a_run_goes_on_where_one_was_short_of_time(tmp_path):
    """What was measured before counts as measured now: the table is the same."""
    result, folder = tmp_path / "r.json", tmp_path / "tables"
    folder.mkdir()
    given = (folder, "--device", "cpu", "--op", "pixel_embed", "--sizes", "256,512", "--resume")
    given += ("--scale", "16", "--rounds", "3", "--seconds", "0", "--json", str(result))
    done = tune(*given, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    whole, table = schema.load(result), (folder / "pixel_embed.json").read_text()
    assert {r.shape["size"] for r in whole} == {256, 512}
    (folder / "pixel_embed.json").unlink()
    command = json.loads(result.read_text())["command"]
    # As it was when its time was up after the first size.
    first = [r for r in whole if r.shape["size"] == 256]
    left = Row(**{**vars(first[0]), "status": "skipped", "reason": "late", "timing": None})
    schema.save(result, [*first, left], command)
    done = tune(*given, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    rows = schema.load(result)
    assert [r.timing for r in rows if r.shape["size"] == 256] == [r.timing for r in first]
    assert sorted(r.backend for r in rows) == sorted(r.backend for r in whole)
    assert json.loads((folder / "pixel_embed.json").read_text()).keys() == json.loads(table).keys()
    # What the device was lost with is not tried again, the other tiles are.
    lost = Row(**{**vars(first[0]), "status": "failed", "timing": None, "accuracy": None})
    lost.reason = f"{LOST}CUDA error"
    schema.save(result, [lost], command)
    assert tune(*given, TRITON_INTERPRET="1").returncode == 0
    rows = [r for r in schema.load(result) if r.shape["size"] == 256]
    assert [r.backend for r in rows].count(lost.backend) == 1
    assert sorted(r.backend for r in rows) == sorted(r.backend for r in first)
    assert lost.backend != " ".join(
        f"{k}={v}"
        for k, v in json.loads((folder / "pixel_embed.json").read_text())["8.0"]
        .popitem()[1]
        .items()
    )


def test_a_launch_takes_its_tile_from_the_table(table):
    from pixeldiff.triton_kernels import configs, rms_norm_modulate
    from pixeldiff.triton_kernels.launching import compiling_for

    table("rms_norm_modulate", {"9.0": {"bfloat16 D64": {"rows": 7, "num_warps": 2}}})

    def chosen(capability: tuple[int, int], d: int):
        x = torch.empty(1, 3, d, dtype=torch.bfloat16)
        m = rms_norm_modulate
        with compiling_for(capability):
            return configs.choose(m.OP, m.Config, m.heuristic, m.key, (x,))

    assert chosen((9, 0), 64).rows == 7
    assert chosen((9, 0), 128) == rms_norm_modulate.norm_rows.heuristic(128)  # another problem
    assert chosen((8, 0), 64) == rms_norm_modulate.norm_rows.heuristic(64)  # another device


def test_what_cannot_be_tuned(tmp_path):
    unknown = tune(tmp_path, "--device", "cpu", "--op", "patchify")
    assert unknown.returncode != 0
    assert "'patchify' has no tiles to choose" in unknown.stderr + unknown.stdout
    here = tune(tmp_path, "--device", "cpu", TRITON_INTERPRET="0")
    assert here.returncode != 0
    assert "a Triton kernel runs on cuda" in here.stderr + here.stdout
    assert not list(tmp_path.iterdir())
