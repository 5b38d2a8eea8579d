"""A training step in numbers: against a loop written out, with what it draws and reads noted."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_l2p_training import (
    CONFIG,
    SETTINGS,
    base,
    own,
    pictures,
    same,
    trainer,
    weights,
)
from tiny_l2p import draw

from pixeldiff.models.l2p import L2PNet, train_checkpoints, train_loop
from pixeldiff.models.l2p.train_checkpoints import checkpoints, write_checkpoint
from pixeldiff.models.l2p.train_data import PictureFolder, pictures_of
from pixeldiff.models.l2p.train_loop import Schedule
from pixeldiff.models.l2p.training import NoiseLevels, TrainableSet

__all__ = ["base", "own", "pictures"]  # fixtures

LEARNING = ("all_x_embedder.", "local_decoder.", "layers.0.", "layers.2.")


@pytest.fixture
def given(monkeypatch) -> list[tuple]:
    """(images, noise, sigma, t, captions) of each batch that a trainer computes the loss of."""
    seen, real = [], train_loop.training_loss

    def noted(net, *example):
        seen.append(example)
        return real(net, *example)

    monkeypatch.setattr(train_loop, "training_loss", noted)
    return seen


def by_hand(base, batches, accumulate, dtype, *, lr, weight_decay, clip):
    """AdamW on the mean of (v - (noise - image))^2: one backward pass for each batch, summed.

    Yields (loss, norm of the gradient before it is clipped, weights in fp32) after each step.
    """
    stored = load_file(base)
    net = L2PNet(CONFIG).to(dtype).requires_grad_(False)
    for name, p in net.named_parameters():
        p.requires_grad_(name.startswith(LEARNING))
    masters = {n: stored[n].clone() for n in stored if n.startswith(LEARNING)}
    optimiser = torch.optim.AdamW(masters.values(), weight_decay=weight_decay)
    for step in range(len(batches) // accumulate):
        net.load_state_dict({**stored, **masters})
        total = 0.0
        for x0, noise, sigma, t, captions in batches[step * accumulate : (step + 1) * accumulate]:
            share = sigma[:, None, None, None]
            v = -net((1 - share) * x0 + share * noise, t, captions)
            loss = (v - (noise - x0)).square().mean() / accumulate
            loss.backward()
            total += loss.item()
            for name, master in masters.items():
                grad = net.get_parameter(name).grad
                master.grad = grad.float() + (0 if master.grad is None else master.grad)
            net.zero_grad()
        norm = torch.cat([m.grad.flatten() for m in masters.values()]).norm().item()
        for master in masters.values():
            master.grad *= min(1, clip / (norm + 1e-6))
        optimiser.param_groups[0]["lr"] = lr / 3 if step < 5 else lr
        optimiser.step()
        optimiser.zero_grad()
        yield total, norm, {n: m.detach().clone() for n, m in masters.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_is_what_is_written_out(base, pictures, tmp_path, given, precision):
    """Accumulated, clipped, decayed, across the end of the slow first steps."""
    settings = {"lr": 2e-3, "weight_decay": 0.5, "clip": 0.05}
    one = trainer(base, pictures, tmp_path, precision=precision, batch=2, accumulate=3, **settings)
    measured, states = [], []
    for _ in range(7):
        measured.append(one.step())
        states.append({n: m.detach().clone() for n, m in one.masters.items()})
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    start = load_file(base)
    assert len(given) == 21
    for got, state, want in zip(measured, states, by_hand(base, given, 3, dtype, **settings),
                                strict=True):  # fmt: skip
        loss, norm, masters = want
        assert got["loss"] == pytest.approx(loss, rel=1e-5)
        assert got["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert norm > 2 * settings["clip"]
        assert state.keys() == masters.keys()
        for name in state:
            moved = (masters[name] - start[name]).norm()
            assert (state[name] - masters[name]).norm() < 1e-3 * moved, name
    now = weights(one)
    for name, master in one.masters.items():
        assert torch.equal(now[name], master.to(dtype)), name
    if precision == "bf16":  # what bf16 cannot hold is not lost
        gap = {n: (m - now[n].float()).abs().max().item() for n, m in one.masters.items()}
        assert min(gap.values()) > 0
    rates = [m["lr"] for m in measured]
    assert rates == pytest.approx([2e-3 / 3] * 5 + [2e-3] * 2)
    sigmas = torch.stack([example[2] for example in given]).view(7, 6).mean(1)
    assert [m["sigma"] for m in measured] == pytest.approx(sigmas.tolist())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_kept_is_the_running_average(base, pictures, tmp_path, precision):
    """In checkpoints and sample pictures; the run itself is that without an average."""
    plain = trainer(base, pictures, tmp_path / "plain", precision=precision, lr=1e-2)
    one = trainer(base, pictures, tmp_path / "one", precision=precision, lr=1e-2, average=0.7)
    want = {n: m.detach().double() for n, m in one.masters.items()}
    for step in range(30):
        one.step()
        plain.step()
        decay = min(0.7, (step + 1) / (step + 10))
        for name, master in plain.masters.items():
            want[name] = decay * want[name] + (1 - decay) * master.detach().double()
    assert same(weights(one), weights(plain))
    one.save()
    (folder,) = checkpoints(one.out)
    delta, start = load_file(folder / "delta.safetensors"), load_file(base)
    assert delta.keys() == want.keys()
    for name, kept in delta.items():
        assert kept.dtype == one.learning[name].dtype
        slack = 1e-5 if precision == "fp32" else 2**-8
        assert torch.allclose(kept.double(), want[name], rtol=slack, atol=1e-6), name
        if precision == "fp32":
            assert (kept - plain.masters[name]).norm() > 0.02 * (kept - start[name]).norm(), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_with_an_average_resumes_bit_for_bit(base, pictures, tmp_path, precision):
    settings = {"precision": precision, "average": 0.9, "lr": 1e-3}
    whole = trainer(base, pictures, tmp_path / "whole", **settings)
    whole.run(Schedule(5, save_every=0))
    trainer(base, pictures, tmp_path / "cut", **settings).run(Schedule(2, save_every=0))
    again = trainer(base, pictures, tmp_path / "cut", **settings)
    assert again.resume() == 2
    again.run(Schedule(5, save_every=0, keep=1))
    files = [checkpoints(run.out)[-1] for run in (whole, again)]
    for name in ("delta.safetensors", "state.safetensors"):
        assert same(*(load_file(folder / name) for folder in files)), name


def test_sample_pictures_are_of_the_average(base, pictures, tmp_path):
    one = trainer(base, pictures, tmp_path / "one", lr=3e-2, average=0.99)
    for _ in range(4):
        one.step()
    before = weights(one)
    plan = Schedule(9, sample_every=1, sample_steps=2)
    (own,) = one.write_samples(plan)
    assert same(weights(one), before)
    plain = trainer(base, pictures, tmp_path / "plain")
    plain.net.load_state_dict(one.average.values, strict=False)
    plain.steps_done = one.steps_done
    (want,) = plain.write_samples(plan)
    assert np.array_equal(Image.open(own), Image.open(want))
    plain.net.load_state_dict(before)
    (other,) = plain.write_samples(plan)
    assert not np.array_equal(Image.open(own), Image.open(other))


@pytest.mark.parametrize("average", [0.0, 1.0, -0.5, math.nan])
def test_an_average_that_is_none(average):
    with pytest.raises(ValueError, match="average must be above 0 and below 1"):
        dataclasses.replace(SETTINGS, average=average)


def test_without_a_limit_nothing_is_clipped(base, pictures, tmp_path, given):
    one = trainer(base, pictures, tmp_path, weight_decay=0.0)
    one.step()
    settings = {"lr": 1e-3, "weight_decay": 0.0, "clip": math.inf}
    ((_, _, masters),) = by_hand(base, given, 1, torch.float32, **settings)
    for name, master in one.masters.items():
        torch.testing.assert_close(master, masters[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shift", [3.0, 5.0])
def test_examples_of_a_run(base, pictures, tmp_path, given, shift):
    """Each epoch all pictures with their own captions; each example noise and a level of its own,
    of the schedule that the settings name; another seed gives others."""
    levels = NoiseLevels(shift, rule="noisy")
    one = trainer(base, pictures, tmp_path, batch=2, accumulate=2, levels=levels)
    for _ in range(4):
        one.step()
    images = [one.data.image(i) for i in range(4)]
    shown, noises = [], []
    for x0, noise, sigma, t, captions in given:
        for b in range(2):
            (i,) = [i for i in range(4) if torch.equal(images[i], x0[b])]
            assert torch.equal(captions[b], one.data.caption(i))
            shown.append(i)
            noises.append(noise[b])
        torch.testing.assert_close(sigma, 1 - t, rtol=0, atol=1e-6)
        lowest = shift * 0.201 / (1 + (shift - 1) * 0.201)  # index 799
        assert (sigma >= lowest - 1e-6).all()
        level = sigma / (shift - (shift - 1) * sigma)  # the shift undone
        torch.testing.assert_close((1000 * level).round() / 1000, level, rtol=0, atol=2e-6)
    assert len(shown) == 16
    assert all(sorted(shown[e : e + 4]) == [0, 1, 2, 3] for e in range(0, 16, 4))
    assert len({tuple(shown[e : e + 4]) for e in range(0, 16, 4)}) > 1
    assert len({n.sum().item() for n in noises}) == 16
    assert torch.stack(noises).std().item() == pytest.approx(1, abs=0.02)
    assert len({s for example in given for s in example[2].tolist()}) > 10
    seen = list(given)
    given.clear()
    trainer(base, pictures, tmp_path / "b", batch=2, accumulate=2, levels=levels, seed=1).step()
    assert not any(torch.equal(n, m[1]) for n in noises for m in given)
    assert not torch.equal(seen[0][2], given[0][2])


def test_batches_are_loaded_ahead_and_each_once(base, pictures, tmp_path, monkeypatch):
    begun, real = [], train_loop.Trainer._loaded
    monkeypatch.setattr(
        train_loop.Trainer, "_loaded", lambda self, k: begun.append(k) or real(self, k)
    )
    one = trainer(base, pictures, tmp_path, accumulate=2)
    for _ in range(3):
        one.step()
    one._loader.shutdown()
    assert sorted(begun) == list(range(7))


# ---- Where a run must stop ---------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("damage", ["loss", "gradient"])
def test_a_step_that_is_not_finite_leaves_nothing(
    base, pictures, tmp_path, monkeypatch, damage, precision
):
    one = trainer(base, pictures, tmp_path / "a", precision=precision, accumulate=2)
    before, real = weights(one), train_loop.training_loss
    with monkeypatch.context() as patch:
        if damage == "loss":
            patch.setattr(train_loop, "training_loss", lambda *a: real(*a) + math.inf)
            hook = None
        else:
            p = one.learning["local_decoder.out_conv.bias"]
            hook = p.register_hook(lambda grad: grad * math.inf)
        with pytest.raises(ArithmeticError, match=r"in step 1: the run diverged.*lower --lr"):
            one.step()
        if hook:
            hook.remove()
    assert same(weights(one), before)
    assert one.steps_done == 0
    assert one.optimiser.state_dict()["state"] == {}
    fresh = trainer(base, pictures, tmp_path / "b", precision=precision, accumulate=2)
    assert one.step() == fresh.step()
    assert same(weights(one), weights(fresh))


def test_a_run_resumes_only_as_what_it_was(base, pictures, own, tmp_path):
    """Each fact that decides its numbers; what does not may change."""
    out = tmp_path / "run"
    trainer(base, pictures, out).run(Schedule(1))
    other = tmp_path / "other.safetensors"
    state = load_file(base)
    frozen = [n for n in state if not n.startswith(LEARNING)]
    save_file(
        {n: t + (n in frozen) for n, t in state.items()},
        other,
        {"config": json.dumps(CONFIG.to_dict())},
    )
    (own / "3.png").rename(own / "4.png")
    (own / "3.safetensors").rename(own / "4.safetensors")
    levels = NoiseLevels(5.0)
    for name, changes in {
        **{n: {n: v} for n, v in (("seed", 1), ("batch", 2), ("accumulate", 2), ("clip", 1.0),
                                  ("size", (32, 32)), ("weight_decay", 0.0), ("levels", levels),
                                  ("average", 0.5),
                                  ("trainable", TrainableSet(1, 1, True)),
                                  ("precision", "bf16"))},
        "base": {"base": other},
        "pictures": {"pictures": own},
    }.items():  # fmt: skip
        given = {"base": base, "pictures": pictures, "out": out, **changes}
        with pytest.raises(ValueError, match=f"was made with {name} = .*, now it is .*; resume"):
            trainer(**given).resume()
    several = trainer(base, pictures, out)
    several.processes.count = 2
    with pytest.raises(ValueError, match="was made with processes = 1, now it is 2"):
        several.resume()
    assert trainer(base, pictures, out, recompute=True).resume() == 1


def test_resuming_takes_the_newest_and_a_log_cut_off_is_mended(base, pictures, tmp_path):
    trainer(base, pictures, tmp_path).run(Schedule(3, save_every=1, keep=3))
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text()[:-20])
    one = trainer(base, pictures, tmp_path)
    assert one.resume() == 3
    assert len(log.read_text().splitlines()) == 2
    one.run(Schedule(4, save_every=0))
    assert [json.loads(line)["step"] for line in log.open()] == [1, 2, 4]


@pytest.mark.parametrize("file", ["delta", "state"])
def test_damaged_checkpoints_are_named(base, pictures, tmp_path, file):
    trainer(base, pictures, tmp_path).run(Schedule(1))
    path = checkpoints(tmp_path)[0] / f"{file}.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(train_checkpoints.CheckpointFormatError, match=f"{path} is damaged"):
        trainer(base, pictures, tmp_path).resume()


# ---- Checkpoints -------------------------------------------------------------------------------


def checkpoint(out: Path, step: int, keep: int = 9) -> Path:
    tensors = {"a": torch.full((3,), float(step))}
    return write_checkpoint(out, step, tensors, tensors, {"step": step}, keep=keep)


def test_what_is_a_checkpoint(tmp_path):
    """In a folder with other things in it: unfinished ones, files, names that only look alike."""
    checkpoint(tmp_path, 100)
    checkpoint(tmp_path, 7)
    (tmp_path / "step-00000200").write_text("a file")
    for name in (".step-00000300.part", "step-00000400.part", "step-00000500-old", "step-600",
                 "samples"):  # fmt: skip
        (tmp_path / name).mkdir()
    names = ["step-00000007", "step-00000100"]
    assert [p.name for p in checkpoints(tmp_path)] == names
    assert checkpoints(tmp_path / "absent") == []
    checkpoint(tmp_path, 101, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000100", "step-00000101"]
    assert not (tmp_path / ".step-00000300.part").exists()  # of a run that died
    assert (tmp_path / "step-00000500-old").is_dir()


def test_the_name_comes_last_and_the_old_go_after_it(tmp_path, monkeypatch):
    checkpoint(tmp_path, 1)
    done, real, sync = [], os.replace, os.fsync

    def replaced(source, target):
        done.append(("named", [p.name for p in checkpoints(tmp_path)]))
        real(source, target)

    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(
        os, "fsync", lambda f: (done.append(Path(os.readlink(f"/proc/self/fd/{f}")).name), sync(f))
    )
    checkpoint(tmp_path, 2, keep=1)
    files = ["delta.safetensors", "state.safetensors"]
    assert done == [*files, ("named", ["step-00000001"])]
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000002"]
    (tmp_path / "step-00000002" / "note").touch()
    checkpoint(tmp_path, 2)  # again: it replaces
    assert sorted(p.name for p in checkpoints(tmp_path)[0].iterdir()) == files


@pytest.mark.parametrize("average", [None, 0.9])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_room_for_the_checkpoints_of_a_run(
    base, pictures, tmp_path, monkeypatch, precision, average
):
    one = trainer(base, pictures, tmp_path, precision=precision, average=average)
    one.run(Schedule(1))
    size = sum(p.stat().st_size for p in checkpoints(tmp_path)[0].iterdir())
    assert one.checkpoint_bytes() < size < 1.2 * one.checkpoint_bytes() + 50_000
    asked = []
    monkeypatch.setattr(train_loop, "check_space", lambda out, needed: asked.append(needed))
    for plan in (Schedule(100, save_every=10, keep=3), Schedule(100, save_every=0), Schedule(2, 1)):
        train_loop.check_checkpoints_fit(one, plan)
    assert [n / one.checkpoint_bytes() for n in asked] == [3, 1, 1]  # one is there already


# ---- Pictures ----------------------------------------------------------------------------------


def example(folder: Path, picture: Image.Image, size, name: str = "a.png") -> torch.Tensor:
    picture.save(folder / name)
    save_file({"y": torch.ones(1, 2, 20)}, folder / "a.safetensors")
    return PictureFolder(pictures_of(folder, CONFIG), size).image(0)


def noise(height: int, width: int) -> np.ndarray:
    values = draw(height, width, 3).sigmoid().mul(255)
    return values.byte().numpy()


def test_a_picture_of_the_size_is_its_pixels(tmp_path):
    pixels = noise(16, 48)
    x = example(tmp_path, Image.fromarray(pixels), (16, 48))
    for channel in range(3):
        np.testing.assert_allclose(x[channel], pixels[..., channel] / 127.5 - 1.0, atol=1e-6)


@pytest.mark.parametrize("given", [(20, 90), (90, 20), (33, 47), (7, 5)])
def test_a_picture_is_covered_about_its_middle(tmp_path, given):
    """The same as cutting out the middle first and then resizing it, up to a pixel's rounding."""
    height, width = given
    rows, columns = np.mgrid[:height, :width]
    ramp = np.stack((255 * rows / (height - 1), 255 * columns / (width - 1), 0 * rows), -1)
    x = example(tmp_path, Image.fromarray(ramp.round().astype(np.uint8)), (32, 64))
    assert x.shape == (3, 32, 64)
    factor = max(32 / height, 64 / width)
    for channel, (side, shown) in enumerate(((height, 32), (width, 64))):
        line = (x[channel].mean(1 - channel) + 1) * 127.5
        assert line.mean() == pytest.approx(127.5, abs=4)  # the middle is the middle
        spread = 255 * min(1, (shown - 1) / (side * factor - 1))
        assert line[-1] - line[0] == pytest.approx(spread, abs=0.1 * 255)


def test_resizing_is_bilinear(tmp_path):
    """Between two flat halves a ramp: neither a step nor an overshoot."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, 4:] = 200
    x = (example(tmp_path, Image.fromarray(pixels), (32, 32))[0, 5] + 1) * 127.5
    line = x.round().int().tolist()
    assert line == sorted(line)
    assert line[:14] == [0] * 14
    assert line[18:] == [200] * 14
    assert line[14:18] == pytest.approx([25, 75, 125, 175], abs=1)


def test_pictures_of_every_kind_and_what_is_none(tmp_path):
    grey = Image.fromarray(noise(16, 16)[..., 0])
    assert example(tmp_path, grey, (16, 16), "a.PNG").shape == (3, 16, 16)
    (tmp_path / "inner").mkdir()
    grey.save(tmp_path / "inner" / "b.png")
    for name in ("notes.md", ".hidden", "list.csv", "z.safetensors"):
        (tmp_path / name).write_text("no picture")
    for name in ("c", "b"):
        grey.convert("RGBA").save(tmp_path / f"{name}.webp")
        shutil.copy(tmp_path / "a.safetensors", tmp_path / f"{name}.safetensors")
    found = pictures_of(tmp_path, CONFIG)
    assert [p.path.name for p in found] == ["a.PNG", "b.webp", "c.webp"]
    assert [p.embedding.name for p in found] == [f"{n}.safetensors" for n in "abc"]
    (tmp_path / "a.txt").write_text("the embedding beside it is taken, no encoder is needed")
    assert pictures_of(tmp_path, CONFIG) == found


def test_a_picture_damaged_later_is_named(tmp_path):
    example(tmp_path, Image.fromarray(noise(64, 64)), (16, 16))
    folder = PictureFolder(pictures_of(tmp_path, CONFIG), (16, 16))
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(OSError, match=r"^l2p train: .*a\.png cannot be read"):
        folder.image(0)


def test_a_damaged_embedding_of_a_text_is_made_again(tmp_path):
    Image.fromarray(noise(16, 16)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a fox")
    made = []

    class Encoder:
        def encode(self, texts):
            made.append(texts)
            return [draw(3, 20)]

    for _ in range(2):
        pictures_of(tmp_path, CONFIG, encoder=Encoder, encoded=tmp_path / "encoded")
        (tmp_path / "encoded" / "a.safetensors").write_bytes(b"cut")
    assert made == [["a fox"]] * 2


# ---- Several processes -------------------------------------------------------------------------

PROCESS = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_l2p_training import trainer
from pixeldiff.models.l2p.train_loop import Schedule
from pixeldiff.models.l2p.train_processes import Processes
from pixeldiff.models.l2p.training import TrainableSet

base, pictures, out = map(Path, sys.argv[2:5])
processes = Processes("cpu")
assert (processes.index, processes.count) == (int(os.environ["RANK"]), 2)
out = out / os.environ["RANK"]
settings = {"size": (64, 128), "trainable": TrainableSet(1, 1, True), "clip": 0.05}
one = trainer(base, pictures, out, processes=processes, **settings)
step, uneven = one.step, []

def noted():
    result = step()
    uneven.append(result["sigma"])
    return result

one.step = noted
told = []
one.run(Schedule(4, save_every=2, sample_every=2, sample_steps=1), told.append)
weights = {name: master.detach() for name, master in one.masters.items()}
torch.save((weights, [(t.loss, t.grad_norm) for t in told]), out / "result.pt")
calls = []

def stop():  # the second process is asked to stop
    calls.append(0)
    if len(calls) == 2 and processes.index == 1:
        import signal
        signal.raise_signal(signal.SIGTERM)
    return step()

one.step = stop
assert not one.run(Schedule(100, save_every=0))
assert one.steps_done == 6
caption = one.data.caption
if processes.index == 1:
    one.data.caption = lambda i: caption(i) * float("inf")
try:
    one._ahead.clear()
    one.step = step
    one.run(Schedule(100))
except ArithmeticError as error:
    assert "in step 7" in str(error), error
else:
    raise AssertionError("NaN in one process must stop both")
"""


def test_two_processes_are_one_with_twice_the_examples(base, tmp_path):
    """Bit for bit: halves and sums of two are exact. One of them writes; either stops both."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    # Captions of 32 and 64 tokens need no padding: some steps have a gradient for its token in one
    # process only. Images of 4 x 8 patches need none: that token never has a gradient.
    for i, length in enumerate((32, 5, 64, 7)):
        Image.fromarray(noise(40, 70 + i)).save(folder / f"{i}.png")
        save_file({"y": draw(1, length, 20, seed=i)}, folder / f"{i}.safetensors")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    script = [sys.executable, "-c", PROCESS, str(Path(__file__).parent)]
    running = [
        subprocess.Popen(
            [*script, str(base), str(folder), str(tmp_path)],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [p.returncode for p in running] == [0, 0], errors
    settings = {"size": (64, 128), "trainable": TrainableSet(1, 1, True), "clip": 0.05}
    alone = trainer(base, folder, tmp_path / "alone", accumulate=2, **settings)
    told = []
    alone.run(Schedule(4), told.append)
    assert alone.masters["x_pad_token"] not in alone.optimiser.state
    for rank in "01":
        masters, measured = torch.load(tmp_path / rank / "result.pt")
        assert masters.keys() == alone.masters.keys()
        assert measured == [(pytest.approx(t.loss), pytest.approx(t.grad_norm)) for t in told]
        for name, master in alone.masters.items():
            assert torch.equal(masters[name], master), name
    names = {p.name for p in (tmp_path / "0").iterdir()}
    assert names == {"step-00000004", "step-00000006", "log.jsonl", "samples", "result.pt"}
    assert {p.name for p in (tmp_path / "1").iterdir()} == {"result.pt"}
