"""Decodes and pictures that go on after a kill: the same pixels, and nothing made twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from samplings import SAMPLINGS, Calls, independent, l2p, sync, whole

import pixeldiff
from pixeldiff.errors import ResumeError
from pixeldiff.jobs import JobStore
from pixeldiff.models.steps import Interrupted

every = pytest.mark.parametrize("name", SAMPLINGS)
tiled = pytest.mark.parametrize("name", ["sync", "independent", "teacher", "l2p"])


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "a.job"


def stopped(name: str, folder: Path, after: int, **options) -> None:
    """A run that ends after so many tiles (steps, in one piece)."""
    told = []

    def stop(info) -> bool:
        told.append(info)
        return len(told) < after

    with pytest.raises(Interrupted):
        SAMPLINGS[name](resume=folder, tile_callback=stop, **options)
    assert len(told) == after


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@every
def test_nothing_finished_is_made_again(name, folder):
    with Calls() as calls:
        expected = SAMPLINGS[name]()
    tiles = 4 if name in ("sync", "independent", "teacher", "l2p") else 1
    # What follows the last state is kept of tiles only.
    for after in {"independent": (1, 2, 3)}.get(name, (1, 2) if tiles == 1 else (1, 2, 5, 6)):
        with Calls() as before:
            stopped(name, folder, after)
        with Calls() as rest:
            got = SAMPLINGS[name](resume=folder)
        assert torch.equal(got, expected)
        assert before.count + rest.count == calls.count
        assert not folder.exists()


@pytest.mark.slow
@every
def test_killed_anywhere(name, tmp_path):
    """By SIGKILL, twice, in lines drawn from all that keep work."""
    script = [sys.executable, Path(__file__).with_name("killed.py"), name, tmp_path / "job", 0, 2]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(Path(pixeldiff.__file__).parents[1])
    done = subprocess.run(
        list(map(str, script)), capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kept"]["pixels"] == told["plain"]["pixels"]
    assert any(row["killed"][0] for row in told["rows"])
    for row in told["rows"]:
        assert row["pixels"] == told["plain"]["pixels"], row
        assert not row["left"], row
    assert os.listdir(tmp_path) == []


@tiled
def test_a_tile_is_counted_when_it_is_on_the_disk(name, folder):
    seen = []

    def look(info) -> None:
        step = f"step-{info.step:06d}-"
        seen.append(sum(n.startswith(step) and "negative" not in n for n in names(folder)))

    SAMPLINGS[name](resume=folder, tile_callback=look)
    assert seen == [1, 2, 3, 4] * (len(seen) // 4)


@pytest.mark.parametrize("name", ["sync", "teacher", "l2p"])
def test_a_state_replaces_what_was_before_it(name, folder):
    most = []
    SAMPLINGS[name](resume=folder, tile_callback=lambda info: most.append(names(folder)))
    assert max(map(len, most)) == 1 + 1 + 4  # job.json, a state, a step's tiles
    for found in most:
        steps = {n.split("-")[1] for n in found if n.startswith("step-")}
        states = [n for n in found if n.startswith("state-")]
        assert len(steps) == 1
        assert [int(n[6:12]) + 1 for n in states] == [int(s) for s in steps if s != "000001"]


@pytest.mark.parametrize("kind", ["cut", "flipped", "header", "empty", "foreign", "renamed"])
@pytest.mark.parametrize("name", ["sync", "independent"])
def test_damaged_and_foreign_parts_are_made_again(name, folder, tmp_path, kind):
    expected = SAMPLINGS[name]()
    stopped(name, folder, 3)
    part, other = sorted(folder.glob("step-000001-*"))[:2]
    data = bytearray(part.read_bytes())
    if kind == "cut":
        del data[-40:]
    elif kind == "flipped":
        data[len(data) // 2] ^= 1
    elif kind == "header":
        data[30] ^= 1
    elif kind == "empty":
        data.clear()
    elif kind == "renamed":
        data = other.read_bytes()
    else:
        stopped(name, tmp_path / "other", 3, seed=9)
        data = (tmp_path / "other" / part.name).read_bytes()
    part.write_bytes(data)
    with Calls() as all_calls:
        SAMPLINGS[name]()
    with Calls() as calls:
        got = SAMPLINGS[name](resume=folder)
    assert torch.equal(got, expected)
    per_tile = 4 if name == "independent" else 1
    assert calls.count == all_calls.count - 2 * per_tile


@pytest.mark.parametrize("name", ["sync", "whole", "l2p"])
def test_a_damaged_state_costs_the_steps_before_it(name, folder):
    expected = SAMPLINGS[name]()
    stopped(name, folder, 6 if name != "whole" else 2)
    (state,) = folder.glob("state-*")
    data = bytearray(state.read_bytes())
    data[-100] ^= 1
    state.write_bytes(data)
    assert torch.equal(SAMPLINGS[name](resume=folder), expected)


def test_a_damaged_description_costs_nothing(folder):
    expected = sync()
    stopped("sync", folder, 3)
    (folder / "job.json").write_text("{")
    with Calls() as calls:
        assert torch.equal(sync(resume=folder), expected)
    assert calls.count == 16 - 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "noise"),
        ({"seed": 1}, r"seed \(0 there, 1 here\)"),
        ({"steps": 3}, "times"),
        ({"sigma": 0.25}, r"sigma \(0.0 there, 0.25 here\)"),
        ({"tile": (4, 8)}, "tile"),
        ({"overlap": 0}, "tile"),
        ({"tile": None, "overlap": None}, "tile"),
        ({"tile_mode": "independent"}, r"tile_mode \(sync there, independent here\)"),
        ({"tile_batch": 2}, "tile_batch"),
        ({"sample_type": "ode"}, r"sampler \(sde there, ode here\)"),
        ({"state_dtype": "fp32"}, "state"),
        ({"caption": torch.ones(1, 6, 16)}, "caption"),
        ({"batch": 2}, "latent"),
        ({"generator": torch.Generator().manual_seed(7), "seed": None}, "noise"),
    ],
)
def test_another_job_is_refused(folder, changes, named):
    stopped("sync", folder, 3)
    kept = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ResumeError, match=f"holds an unfinished job that differs in .*{named}"):
        sync(resume=folder, **changes)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == kept


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_inference_steps": 4}, "sigmas"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"guidance_scale": 1.0}, "negative prompt"),
        ({"prompt_embeds": torch.ones(4, 20)}, "prompt"),
        ({"guidance_together": False}, "guidance_together"),
        ({"shift": 2.0}, "sigmas"),
        ({"image": torch.zeros(1, 3, 80, 112)}, "image"),
        ({"overlap": 0}, "tile"),
    ],
)
def test_another_picture_is_refused(folder, changes, named):
    stopped("l2p", folder, 5)
    with pytest.raises(ResumeError, match=f"differs in .*{named}"):
        l2p(resume=folder, **changes)


@pytest.mark.parametrize("name", ["sync", "l2p"])
def test_other_weights_are_refused(name, folder, monkeypatch):
    stopped(name, folder, 3)
    module = sys.modules["samplings"]
    maker = "tiny_net" if name == "sync" else "network"
    made = getattr(module, maker)

    def changed(*args):
        net = made(*args)
        with torch.no_grad():
            next(net.parameters()).view(-1)[0] += 1e-3
        return net

    monkeypatch.setattr(module, maker, changed)
    with pytest.raises(ResumeError, match=r"differs in weights \("):
        SAMPLINGS[name](resume=folder)


@pytest.mark.parametrize("what", ["version", "torch", "backend"])
def test_another_version_is_refused(folder, monkeypatch, what):
    stopped("sync", folder, 3)
    if what == "version":
        monkeypatch.setattr("pixeldiff.models.pid.decoder.__version__", "9.9")
        named = r"pixeldiff \(.* there, 9.9 here\)"
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
        named = r"torch \(.* there, 9.9 here\)"
    else:
        named = "arithmetic"
    how = pixeldiff.backend("reference" if what == "backend" else None)
    with how, pytest.raises(ResumeError, match=f"differs in .*{named}"):
        sync(resume=folder)


def test_the_seed_of_a_job_begun_without_one(folder):
    stopped("sync", folder, 5, seed=None)
    seed = json.loads((folder / "job.json").read_text())["job"]["seed"]
    expected = sync(seed=seed)
    assert torch.equal(sync(seed=None, resume=folder), expected)


def test_generators_end_where_they_would_have(folder):
    def run(**options):
        generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
        image = whole(generator=generators, **options)
        return image, [g.get_state() for g in generators]

    expected, ends = run()
    stopped("whole", folder, 2)
    got, found = run(resume=folder)
    assert torch.equal(got, expected)
    assert all(map(torch.equal, found, ends))


def test_a_store_lasts_until_its_block_ends(folder):
    with JobStore(folder) as store:
        first = sync(resume=store)
        assert len(store.names("step-")) == 4
        with Calls() as calls:
            assert torch.equal(sync(resume=store), first)
        assert calls.count == 0
        with pytest.raises(ResumeError, match="differs in"):
            independent(resume=store)
    assert not folder.exists()


def test_callbacks_that_change_the_state_are_refused(folder):
    with pytest.raises(ValueError, match="resume and callback_on_step_end exclude each other"):
        l2p(resume=folder, callback_on_step_end=lambda *_: None)
    assert not folder.exists()


def test_errors_before_the_work_leave_no_folder(folder):
    with pytest.raises(ValueError, match="steps must be"):
        sync(resume=folder, steps=9)
    with pytest.raises(TypeError, match="resume must be a folder or an open JobStore, got int"):
        sync(resume=3)
    assert not folder.exists()


def test_a_state_that_cannot_be_written_loses_nothing(folder, monkeypatch):
    expected, put = sync(), JobStore.put

    def full(self, name, tensors):
        if name == "state-000002":
            raise OSError(28, "No space left on device")
        put(self, name, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(JobStore, "put", full)
        with pytest.raises(OSError, match="No space"):
            sync(resume=folder)
    steps = [f"step-000002-tile-{i:06d}.piece" for i in range(1, 5)]
    assert names(folder) == ["job.json", "state-000001.piece", *steps]
    with Calls() as calls:
        assert torch.equal(sync(resume=folder), expected)
    assert calls.count == 16 - 8


@tiled
def test_a_disk_that_is_too_small_is_said_before_the_work(name, folder, monkeypatch):
    usage = shutil.disk_usage(folder.parent)
    tiles, image = 4 * 128 * 192, 224 * 288
    if name == "l2p":
        tiles, image = 4 * 48 * 64, 80 * 112
    states = {"independent": 0, "teacher": 4}.get(name, 2)
    needed = 12 * (tiles * (2 if name == "teacher" else 1) + states * image)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with Calls() as calls, pytest.raises(OSError, match="for finished work and there are"):
        SAMPLINGS[name](resume=folder)
    assert calls.count == 0
    assert not folder.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    SAMPLINGS[name](resume=folder)
