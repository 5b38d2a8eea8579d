"""A few rounds of every fuzzer, the same in every run; `make fuzz` runs them for minutes."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from campaign import one_round, run
from targets import TARGETS, Target

SEEDS = range(1000, 1025)


@pytest.mark.parametrize("name", TARGETS)
def test_good_files_are_taken(name, tmp_path):
    target = TARGETS[name]
    for data in target.seeds():
        path = tmp_path / f"a{target.suffixes[0]}"
        path.write_bytes(data)
        took = target.check(path)
    assert took or name in ("pid-safetensors", "pid-pickles", "latents")  # these end in part of one


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_read_or_refused(name, tmp_path):
    outcome = run(TARGETS[name], SEEDS.start, tmp_path, rounds=len(SEEDS))
    assert not outcome.faults, outcome.faults
    assert outcome.taken < outcome.rounds, "nothing was damaged"


def test_a_fault_is_kept_with_its_seed(tmp_path):
    def read(path):
        if len(path.read_bytes()) < 5:
            raise KeyError("short")
        raise ValueError

    target = Target("own", lambda: [b"abcdefgh"], (".bin",), read, (ValueError,))
    outcome = run(target, 7, tmp_path, rounds=60)
    assert outcome.rounds == 60
    told = [text for _, text in outcome.faults]
    assert any(text.startswith("KeyError: 'short'") for text in told)
    assert any("a refusal says nothing" in text for text in told)
    path, _ = outcome.faults[0]
    kept, seed = path.read_bytes(), int(path.stem.rpartition("-")[2])
    with pytest.raises((KeyError, AssertionError)):
        one_round(target, seed, tmp_path)
    assert (tmp_path / "fuzz.bin").read_bytes() == kept


def test_as_a_program(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    args = ["--only", "latents", "--rounds", "3", "--seed", "5", "--keep", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["tests.fuzz", *args])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(__file__).with_name("__main__.py")), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("latents: from seed 5\nlatents: 3 files, ")
