"""Training of L2P's shallow layers: what learns, the loss, resuming, interruption, errors."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_l2p
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pixeldiff import cli
from pixeldiff.errors import CheckpointFormatError, SizeError
from pixeldiff.models.l2p import VARIANTS, L2PNet, read_checkpoint, train_loop
from pixeldiff.models.l2p.train_checkpoints import checkpoints, read_facts
from pixeldiff.models.l2p.train_data import PictureFolder, pictures_of
from pixeldiff.models.l2p.train_loop import Schedule, Trainer, TrainSettings, epoch_order
from pixeldiff.models.l2p.training import (
    TRAINABLE_SETS,
    NoiseLevels,
    TrainableSet,
    default_shift,
    generator_for,
    noised,
    set_trainable,
    training_loss,
)
from pixeldiff.verify import verify_file

CONFIG = tiny_l2p.config(n_layers=3)
ENDS = TrainableSet(1, 1, False)  # of three main blocks the middle one stays
SETTINGS = TrainSettings((32, 48), ENDS, NoiseLevels(), lr=1e-3, precision="fp32", recompute=False)
# Parameters that learn, of each set, by the published rules.
TRAINABLE = {
    "1k": (2_548_257_795, 1_460_320_771),
    "4k": (2_592_504_771, 1_504_567_747),
    "8k": (2_734_067_687, 1_646_130_663),
    "10k": (2_834_795_239, 1_746_858_215),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    net = tiny_l2p.network(CONFIG)
    save_file(net.state_dict(), path, {"config": json.dumps(CONFIG.to_dict())})
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Four smooth pictures of other sizes than the examples, with embeddings."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        colours = tiny_l2p.draw(3, 2, 3, seed=i).sigmoid().mul(255).byte().permute(1, 2, 0)
        Image.fromarray(colours.numpy()).resize((60 + 8 * i, 40), 2).save(folder / f"{i}.png")
        embedding = tiny_l2p.draw(1, 3 + 10 * i, CONFIG.cap_feat_dim, seed=50 + i)
        save_file({"embedding": embedding}, folder / f"{i}.safetensors")
    return folder


@pytest.fixture
def own(pictures, tmp_path) -> Path:
    """A copy of the pictures to spoil."""
    return Path(shutil.copytree(pictures, tmp_path / "own"))


def trainer(base, pictures, out, *, processes=None, **changes) -> Trainer:
    settings = SETTINGS.__class__(**{**vars(SETTINGS), **changes})
    out.mkdir(exist_ok=True)
    data = PictureFolder(pictures_of(pictures, CONFIG), settings.size)
    return Trainer(read_checkpoint(base, dtype=None), data, settings, out, processes)


def weights(one: Trainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in one.net.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- One step ----------------------------------------------------------------------------------


def test_golden(golden_dir):
    report = verify_file(golden_dir / "l2p" / "train_step_p16_A.safetensors")
    assert [row.key for row in report.rows if not row.ok] == []
    assert sum(row.key.startswith("out.grad.") for row in report.rows) == 19


@pytest.mark.parametrize("form", TRAINABLE)
def test_trainable_sets_are_those_published(form):
    net = L2PNet(VARIANTS[form].config, device="meta")
    counts = {}
    for name, chosen in TRAINABLE_SETS.items():
        learning = set_trainable(net, chosen)
        assert learning.keys() == {k for k, p in net.named_parameters() if p.requires_grad}
        counts[name] = sum(p.numel() for p in learning.values())
        blocks = {int(k.split(".")[1]) for k in learning if k.startswith("layers.")}
        middle = range(5, 25) if name == "default" else range(4, 26)
        assert blocks == set(range(30)) - set(middle)
        assert ("x_pad_token" in learning) == (name == "default")
    assert (counts["default"], counts["strict"]) == TRAINABLE[form]


def test_recomputation_changes_no_gradient_and_the_frozen_have_none(base, pictures, tmp_path):
    grads = []
    for recompute in (False, True):
        one = trainer(base, pictures, tmp_path, recompute=recompute, batch=2)
        one._examples(0)[0].backward()
        grads.append({k: p.grad for k, p in one.net.named_parameters() if p.grad is not None})
    assert same(*grads)
    assert {k for k in grads[0] if k.startswith("layers.1.")} == set()
    assert grads[0].keys() == one.learning.keys()
    assert one.net.local_decoder.recompute


def test_recomputation_keeps_less():
    def kept(recompute: bool) -> int:
        net, total = tiny_l2p.network(CONFIG).requires_grad_(), 0
        if recompute:
            from pixeldiff.models.l2p.training import recompute_blocks

            recompute_blocks(net)

        def pack(x):
            nonlocal total
            total += x.numel()
            return x

        x, one = tiny_l2p.draw(1, 3, 32, 48), torch.ones(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            training_loss(net, x, x, one / 2, one / 2, tiny_l2p.captions(9))
        return total

    assert kept(True) < kept(False) / 3


def test_recomputation_keeps_less_of_the_decoder():
    """Whose activations are those of full resolution."""
    net, kept, grads = tiny_l2p.network(CONFIG).local_decoder.requires_grad_(), [], []
    x, features = tiny_l2p.draw(1, 3, 64, 64), tiny_l2p.draw(1, 4, 4, CONFIG.dim)
    for net.recompute in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            loss = net(x, features).square().mean()
        grads.append(torch.autograd.grad(loss, net.parameters()))
        kept.append(sum(sizes))
    assert all(map(torch.equal, *grads))
    assert kept[1] < 0.6 * kept[0]


def test_noise_levels():
    levels = NoiseLevels()
    assert levels.at(0) == (1.0, 0.0)
    sigma, t = levels.at(413)
    assert sigma == pytest.approx(0.8100276589, abs=1e-7)
    assert t == pytest.approx(1 - sigma, abs=1e-6)
    draws = [levels.draw(generator_for(0, "n", i)) for i in range(3000)]
    assert min(draws) < 5
    assert max(draws) > 994
    assert abs(np.mean(draws) - 499.5) < 25
    noisy = NoiseLevels(rule="noisy")
    draws = [noisy.draw(generator_for(0, "n", i)) for i in range(3000)]
    assert draws.count(0) / 3000 == pytest.approx(101 / 900, abs=0.02)
    assert max(draws) == 799
    assert noisy.at(799)[0] == pytest.approx(0.430, abs=1e-3)
    rounded = NoiseLevels(time_dtype="bf16")
    grid = {levels.at(i)[0] for i in range(1000)}
    assert rounded.at(413)[0] != sigma
    assert any(math.isclose(rounded.at(413)[0], s, abs_tol=1e-6) for s in grid)
    assert abs(rounded.at(413)[0] + rounded.at(413)[1] - 1) < 0.002
    assert [default_shift(v.config) for v in VARIANTS.values() if v.name != "z-image"] == [
        3,
        5,
        5,
        5,
    ]
    x0, noise = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    assert noised(x0, noise, torch.tensor([0.25, 1.0]))[:, 0, 0, 0].tolist() == [0.25, 1]
    with pytest.raises(ValueError, match="rule must be one of uniform, noisy, got 'x'"):
        NoiseLevels(rule="x")


# ---- A run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_falls_and_the_frozen_stay(base, pictures, tmp_path, precision):
    one = trainer(base, pictures, tmp_path, precision=precision, batch=2, lr=1e-2, clip=1.0)
    before, losses = weights(one), []
    assert one.run(Schedule(50, save_every=0), lambda info: losses.append(info.loss))
    assert np.mean(losses[-8:]) < 0.6 * np.mean(losses[:8])
    after = weights(one)
    for name in before:
        if name in one.learning:
            assert not torch.equal(before[name], after[name]), name
        else:
            assert torch.equal(before[name], after[name]), name
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 51))
    assert [line["loss"] for line in lines] == losses
    assert [line["lr"] for line in lines[:6]] == pytest.approx([1e-2 / 3] * 5 + [1e-2])
    (folder,) = checkpoints(tmp_path)
    delta = load_file(folder / "delta.safetensors")
    assert same(delta, {k: after[k] for k in one.learning})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_equals_uninterrupted(base, pictures, tmp_path, precision):
    changes = {"precision": precision, "accumulate": 2, "trainable": TrainableSet(1, 1, True)}
    whole = trainer(base, pictures, tmp_path / "a", **changes)
    whole.run(Schedule(7, save_every=0))
    out = tmp_path / "b"
    trainer(base, pictures, out, **changes).run(Schedule(5, save_every=3))
    shutil.rmtree(out / "step-00000005")  # as if killed in step 4 or 5: those are logged
    torch.manual_seed(123)  # nothing takes its randomness from here
    part = trainer(base, pictures, out, **changes)
    assert part.resume() == 3
    part.run(Schedule(7, save_every=0))
    assert same(weights(part), weights(whole))
    assert same(part.masters, whole.masters)
    logs = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "log.jsonl").open()] for run in "ab"
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 7


def test_only_the_newest_are_kept_and_pictures_are_sampled(base, pictures, tmp_path):
    one = trainer(base, pictures, tmp_path)
    plan = Schedule(4, save_every=1, sample_every=2, keep=2, sample_count=2, sample_steps=2)
    one.run(plan)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    size = sum(p.stat().st_size for p in checkpoints(tmp_path)[-1].iterdir())
    assert one.checkpoint_bytes() < size < 1.2 * one.checkpoint_bytes() + 50_000
    names = sorted(p.name for p in (tmp_path / "samples").iterdir())
    assert names == [f"{i}-step-0000000{step}.png" for i in range(2) for step in (2, 4)]
    assert Image.open(tmp_path / "samples" / names[0]).size == (48, 32)
    plain = trainer(base, pictures, tmp_path / "plain")
    plain.run(Schedule(4, save_every=0))
    assert same(weights(one), weights(plain))  # sampling disturbs nothing


def test_each_epoch_shows_every_picture_in_another_order():
    epochs = [epoch_order(0, e, 4) for e in range(6)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs)
    assert len(set(epochs)) > 2
    assert epoch_order(1, 0, 50) != epoch_order(0, 0, 50)


def test_an_examples_noise_is_its_own_at_any_step(base, pictures, tmp_path):
    one = trainer(base, pictures, tmp_path)
    noise = [one._loaded(k)[1] for k in range(6)]
    assert len({n.sum().item() for n in noise}) == 6
    one.steps_done = 3
    assert torch.equal(one._loaded(5)[1], noise[5])


def test_pictures_cover_the_size_and_keep_their_middle(tmp_path):
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 10:30] = 255
    Image.fromarray(wide).save(tmp_path / "a.png")
    save_file({"y": torch.ones(1, 2, 20)}, tmp_path / "a.safetensors")
    folder = PictureFolder(pictures_of(tmp_path, CONFIG), (20, 20))
    x = folder.image(0)
    assert x.shape == (3, 20, 20)
    assert x.min() == x.max() == 1.0  # the middle half, twice as large
    assert folder.caption(0).shape == (2, 20)


def test_texts_are_encoded_once(own, tmp_path):
    for path in own.glob("*.safetensors"):
        path.unlink()
    for path in own.glob("*.png"):
        path.with_suffix(".txt").write_text(f"picture {path.stem}\n")

    class Encoder:
        texts: list[str] = []  # noqa: RUF012

        def encode(self, texts):
            self.texts += texts
            return [tiny_l2p.draw(len(t), 20, seed=len(t)) for t in texts]

    encoded = tmp_path / "encoded"
    for _ in range(2):
        found = pictures_of(own, CONFIG, encoder=Encoder, encoded=encoded)
        assert Encoder.texts == [f"picture {i}" for i in range(4)]
    assert PictureFolder(found, (32, 32)).caption(2).shape == (9, 20)
    (own / "2.txt").write_text("another")
    pictures_of(own, CONFIG, encoder=Encoder, encoded=encoded)
    assert Encoder.texts[4:] == ["another"]


# ---- The command -------------------------------------------------------------------------------


def stated(settings: TrainSettings) -> dict[str, object]:
    """As a checkpoint's facts have it: recomputation changes no number and is not among them."""
    values = json.loads(json.dumps(dataclasses.asdict(settings)))
    del values["recompute"]
    return values


def test_what_the_command_is_told_is_what_it_does(base, pictures, tmp_path, monkeypatch):
    recomputed = []
    monkeypatch.setattr(train_loop, "recompute_blocks", recomputed.append)
    out = tmp_path / "run"
    options = "--steps 3 --trainable strict --shift 4 --noise-levels noisy --batch 2 --accumulate 3"
    options += " --lr 0.01 --weight-decay 0.2 --clip 0.5 --average 0.9 --seed 9 --precision bf16"
    options += " --save-every 1 --keep 3 --sample-every 3 --samples 2 --sample-steps 1"
    run(base, pictures, out, *options.split(), "--no-recompute")
    assert recomputed == []
    settings = TrainSettings(
        *((32, 48), TrainableSet(1, 1, False), NoiseLevels(4.0, "noisy")),
        **{"batch": 2, "accumulate": 3, "lr": 0.01, "weight_decay": 0.2, "clip": 0.5},
        **{"average": 0.9, "seed": 9, "precision": "bf16"},
    )
    assert [p.name for p in checkpoints(out)] == [f"step-0000000{i}" for i in (1, 2, 3)]
    assert stated(settings).items() <= read_facts(checkpoints(out)[-1]).items()
    names = sorted(p.name for p in (out / "samples").iterdir())
    assert names == ["0-step-00000003.png", "1-step-00000003.png"]


@pytest.mark.parametrize(("form", "shift"), [("1k", 3.0), ("4k", 5.0)])
def test_what_the_command_does_where_it_is_told_nothing(
    pictures, tmp_path, monkeypatch, form, shift
):
    recomputed, c = [], tiny_l2p.config(form, n_layers=2)
    monkeypatch.setattr(train_loop, "recompute_blocks", recomputed.append)
    path, out = tmp_path / "base.safetensors", tmp_path / "run"
    save_file(tiny_l2p.network(c).state_dict(), path, {"config": json.dumps(c.to_dict())})
    run(path, pictures, out, "--steps", 1, "--size", "64x64")
    settings = TrainSettings(
        (64, 64), TrainableSet(1, 1, True), NoiseLevels(shift), precision="fp32"
    )
    (folder,) = checkpoints(out)
    assert stated(settings).items() <= read_facts(folder).items()
    assert len(recomputed) == 1
    assert not (out / "samples").exists()


# ---- Interruption, through the command line -----------------------------------------------------


def arguments(base, pictures, out, *more) -> list[str]:
    fixed = ["l2p", "train", "--model", base, "--data", pictures, "-o", out, "--size", "32x48"]
    return [str(a) for a in (*fixed, "--blocks", 1, "--device", "cpu", "--quiet", *more)]


def run(*args, code=0):
    result = CliRunner().invoke(cli.main, arguments(*args))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_it_saves_and_says_so(base, pictures, tmp_path, monkeypatch, number):
    step, before = Trainer.step, signal.getsignal(number)

    def interrupted_step(self):
        if self.steps_done == 2:
            signal.raise_signal(number)
        return step(self)

    monkeypatch.setattr(Trainer, "step", interrupted_step)
    output = run(base, pictures, tmp_path / "run", "--steps", 9, code=130)
    assert "stopped after step 3; go on with --resume" in output
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-00000003"]
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    assert "step-00000005" in run(base, pictures, tmp_path / "run", "--resume", "--steps", 5)


def test_an_average_on_request(base, pictures, tmp_path):
    out = tmp_path / "run"
    run(base, pictures, out, "--steps", 2, "--average", 0.5)
    (folder,) = checkpoints(out)
    with safe_open(folder / "state.safetensors", "pt") as file:
        assert any(key.startswith("average.layers.0.") for key in file.keys())  # noqa: SIM118
    said = run(base, pictures, out, "--resume", "--steps", 3, code=1)
    assert "was made with average = 0.5, now it is None" in said
    said = run(base, pictures, tmp_path / "other", "--steps", 1, "--average", 1, code=1)
    assert "average must be above 0 and below 1, such as 0.999, got 1.0" in said
    assert not list((tmp_path / "other").glob("step-*"))


def test_killed_in_the_middle_leaves_a_checkpoint_to_go_on_from(base, pictures, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "pixeldiff.cli"]
    command += arguments(base, pictures, out, "--steps", 100_000, "--save-every", 1)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not checkpoints(out) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL, process.stderr.read()
    process.stderr.close()
    for folder in checkpoints(out):
        for name in ("delta", "state"):
            with safe_open(folder / f"{name}.safetensors", "pt") as file:
                assert len(list(file.keys())) > 10
    one = trainer(base, pictures, out, lr=5e-5, recompute=True, trainable=TrainableSet(1, 1, True))
    step = one.resume()
    assert one.run(Schedule(step + 1))
    assert not list(out.glob(".step*"))


def test_dying_while_it_saves_keeps_the_checkpoint_before(base, pictures, tmp_path, monkeypatch):
    one, written = trainer(base, pictures, tmp_path), []

    def save(tensors, path, metadata):
        written.append(path)
        if len(written) == 4:
            raise KeyboardInterrupt
        return save_file(tensors, path, metadata)

    monkeypatch.setattr("pixeldiff.models.l2p.train_checkpoints.save_file", save)
    with pytest.raises(KeyboardInterrupt):
        one.run(Schedule(5, save_every=1, keep=1))
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["step-00000001"]
    assert trainer(base, pictures, tmp_path).resume() == 1


# ---- Errors --------------------------------------------------------------------------------------


def test_errors_before_work(base, pictures, own, tmp_path, monkeypatch):
    def error(folder=pictures, out=tmp_path / "new", *more, model=base):
        return run(model, folder, out, *more, code=1)

    assert "no such folder of pictures" in error(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in error(tmp_path / "empty")
    assert "multiples of 16, got (33, 48); nearest: H 32 or 48" in error(
        pictures, tmp_path / "new", "--size", "33x48"
    )
    (own / "1.safetensors").unlink()
    (own / "3.safetensors").unlink()
    message = error(own)
    assert f"2 pictures have no caption: {own / '1.png'}, {own / '3.png'}; each needs" in message
    (own / "1.txt").write_text("one")
    (own / "3.txt").write_text("three")
    assert "pass --text-encoder" in error(own)
    shutil.copy(pictures / "1.safetensors", own)
    save_file({"y": torch.ones(1, 3, 21)}, own / "3.safetensors")
    assert f"{own / '3.safetensors'} must hold embeddings of width 20, got 21" in error(own)
    save_file({"y": torch.ones(2, 3, 20)}, own / "3.safetensors")
    assert "must hold the embedding of one caption, (1, T, 20), got (2, 3, 20)" in error(own)
    save_file({"y": torch.ones(1, 1100, 20)}, own / "3.safetensors")
    assert "must hold at most 992 tokens" in error(own)
    shutil.copy(pictures / "3.safetensors", own)
    data = (own / "2.png").read_bytes()
    (own / "2.png").write_bytes(data[: len(data) // 2])
    assert f"1 pictures cannot be read: {own / '2.png'}; remove or replace" in error(own)
    (own / "2.png").write_bytes(data)
    shutil.copy(own / "2.png", own / "2.jpg")
    assert "2 pictures share one caption" in error(own)
    assert "holds no checkpoint to resume" in error(pictures, tmp_path / "new", "--resume")
    full = shutil._ntuple_diskusage(10, 9, 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    assert "the checkpoints need 0.0" in error()
    assert not list((tmp_path / "new").glob("step-*"))


def test_errors_of_a_run_that_exists(base, pictures, tmp_path):
    run(base, pictures, tmp_path, "--steps", 1)
    assert "holds a run (step-00000001); go on with --resume" in run(
        base, pictures, tmp_path, code=1
    )
    message = run(base, pictures, tmp_path, "--resume", "--lr", "0.5", code=1)
    assert "was made with lr = 5e-05, now it is 0.5; resume with the same" in message
    state = tmp_path / "step-00000001" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    one = trainer(base, pictures, tmp_path)
    with pytest.raises(CheckpointFormatError, match=r"state.safetensors is damaged .*; remove"):
        one.resume()


def test_other_errors(base, pictures, tmp_path):
    with pytest.raises(ValueError, match="the model is a latent one; convert it first"):
        set_trainable(L2PNet(tiny_l2p.LATENT, device="meta"), ENDS)
    with pytest.raises(ValueError, match=r"TrainableSet: first must be an integer >= 0, got -1"):
        TrainableSet(-1, 1, True)
    with pytest.raises(ValueError, match="lr must be a positive number, got 0"):
        TrainSettings((32, 32), ENDS, NoiseLevels(), lr=0)
    for name, wrong in (("steps", 0), ("save_every", -1), ("keep", 0), ("sample_steps", 0)):
        with pytest.raises(ValueError, match=f"l2p train: {name} must be an integer >= .* {wrong}"):
            Schedule(**{"steps": 5, name: wrong})
    with pytest.raises(SizeError, match="multiples of 16"):
        trainer(base, pictures, tmp_path, size=(8, 8))
    one = trainer(base, pictures, tmp_path)
    before = weights(one)
    one.data.caption = lambda i: torch.full((3, 20), math.inf)
    with pytest.raises(ArithmeticError, match=r"in step 1: the run diverged"):
        one.step()
    assert same(before, weights(one))
