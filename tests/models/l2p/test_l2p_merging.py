"""Merging: what a trained delta replaces, in which type, and what it may not hold."""

from __future__ import annotations

import json
import math

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_l2p_checkpoint import fused
from tiny_l2p import LATENT, config, draw, network

from pixeldiff import cli, errors
from pixeldiff.models.l2p import read_checkpoint
from pixeldiff.models.l2p.merging import delta_tensors, merge, overlaid
from pixeldiff.models.l2p.resumable_file import Piece, write
from pixeldiff.models.l2p.stored_tensors import StoredTensor, read_header

TINY = config()
STATED = {"format": "pt", "config": json.dumps(TINY.to_dict())}


@pytest.fixture
def state():
    return {k: v.bfloat16() for k, v in network(TINY).state_dict().items()}


@pytest.fixture
def base(state, tmp_path):
    save_file(state, tmp_path / "base.safetensors", STATED)
    return tmp_path / "base.safetensors"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "merged.safetensors"


@pytest.fixture
def delta(tmp_path):
    def written(tensors):
        path = tmp_path / "delta.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
        return path

    return written


TRAINED = ("layers.0.attention.to_q.weight", "layers.1.ffn_norm1.weight", "x_pad_token",
           "all_x_embedder.16-1.weight", "local_decoder.enc1.0.bias")  # fmt: skip


@pytest.fixture
def trained(state):
    """As training leaves them: in fp32, the rest of the network in bf16."""
    return {n: draw(*state[n].shape, seed=i) for i, n in enumerate(TRAINED)}


def test_delta_replaces_in_its_own_type(base, delta, state, trained, out):
    report = merge(base, delta(trained), out)
    assert set(report.replaced) == set(TRAINED)
    assert (report.kept, report.ignored) == (len(state) - len(TRAINED), ())
    merged = load_file(out)
    assert merged.keys() == state.keys()
    for name, tensor in merged.items():
        want = trained.get(name, state[name])
        assert tensor.dtype == want.dtype, name
        assert torch.equal(tensor, want), name
    loaded = read_checkpoint(out, dtype=torch.float32)  # a mixed file, as the released 1K one is
    assert loaded.config == TINY
    assert loaded.info.stored_dtypes == {"bfloat16": report.kept, "float32": len(TRAINED)}
    tensors, _ = read_header(out)
    assert all(t.start % (t.nbytes // max(math.prod(t.shape), 1)) == 0 for t in tensors.values())
    assert "5 tensors of" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["replaced"] == list(report.replaced)


def test_empty_delta_is_the_identity(base, delta, state, out, tmp_path):
    report = merge(base, delta({}), out)
    assert report.replaced == ()
    merged = load_file(out)
    assert merged.keys() == state.keys()
    assert all(torch.equal(merged[n], state[n]) for n in state)
    again = tmp_path / "again.safetensors"
    merge(out, delta({}), again)
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", "pipe.dit."])
def test_prefixes_and_fused_names(base, delta, state, out, prefix):
    block = {k: v + 1 for k, v in state.items() if k.startswith("layers.1.attention.")}
    stored = {prefix + k: v for k, v in fused(block).items()}
    assert prefix + "layers.1.attention.qkv.weight" in stored
    assert set(merge(base, delta(stored), out).replaced) == set(block)
    merged = load_file(out)
    assert all(torch.equal(merged[n], block[n]) for n in block)


def test_golden(golden_dir, tmp_path, out):
    """The reference leaves out what does not fit; its base is a part of a network."""
    given = load_file(golden_dir / "l2p" / "merge_p16.safetensors")
    parts = {}
    for part in ("base", "delta", "merged"):
        start = part + "."
        tensors = {k.removeprefix(start): v for k, v in given.items() if k.startswith(start)}
        save_file(tensors, tmp_path / f"{part}.safetensors")
        parts[part] = read_header(tmp_path / f"{part}.safetensors")[0]
    changes = delta_tensors(parts["delta"], tmp_path)
    with pytest.raises(errors.CheckpointError, match=r"not\.in\.base|x_pad_token"):
        overlaid(parts["base"], changes, tmp_path)
    merged, ignored = overlaid(parts["base"], changes, tmp_path, ignore_misfits=True)
    assert sorted(ignored) == ["not.in.base", "x_pad_token"]
    pieces = [Piece(n, t.dtype, t.shape, t.chunks) for n, t in merged.items()]
    write(out, pieces, {}, identity="", check=lambda part: None)
    got, want = load_file(out), load_file(tmp_path / "merged.safetensors")
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        assert torch.equal(got[name], want[name]), name


def test_what_does_not_fit_is_an_error_or_left_out(base, delta, state, out):
    unknown = delta({"layers.0.lora_A.weight": torch.ones(2), "x_pad_token": torch.ones(1, 48)})
    with pytest.raises(
        errors.ForeignCheckpointError,
        match=r"^merge: .* has layers\.0\.lora_A\.weight, which the base does not have; .*--ignore",
    ):
        merge(base, unknown, out)
    with pytest.warns(errors.CheckpointWarning, match="^1 tensors of .* do not fit .*lora_A"):
        report = merge(base, unknown, out, ignore_misfits=True)
    assert (report.replaced, report.ignored) == (("x_pad_token",), ("layers.0.lora_A.weight",))
    shaped = delta({"x_pad_token": torch.ones(1, 47)})
    with pytest.raises(errors.CheckpointShapeError, match=r"x_pad_token of .* is \(1, 47\), the"):
        merge(base, shaped, out, overwrite=True)
    with pytest.warns(errors.CheckpointWarning, match="^1 tensors of .* do not fit"):
        report = merge(base, shaped, out, ignore_misfits=True, overwrite=True)
    assert (report.replaced, report.ignored) == ((), ("x_pad_token",))
    assert all(torch.equal(t, state[n]) for n, t in load_file(out).items())


def test_refusals(base, delta, state, trained, out, tmp_path):
    change = delta(trained)
    latent = network(LATENT)
    save_file(
        latent.state_dict(), tmp_path / "z.safetensors", {"config": json.dumps(LATENT.to_dict())}
    )
    with pytest.raises(errors.ForeignCheckpointError, match="latent model, without a local decod"):
        merge(tmp_path / "z.safetensors", change, out)
    with pytest.raises(ValueError, match="is one of the files to be merged"):
        merge(base, change, base, overwrite=True)
    with pytest.raises(ValueError, match="is one of the files to be merged"):
        merge(base, change, change, overwrite=True)
    lacking = {k: v for k, v in state.items() if k != "local_decoder.out_conv.bias"}
    save_file(lacking, tmp_path / "part.safetensors", STATED)
    with pytest.raises(errors.IncompleteCheckpointError, match=r"local_decoder\.out_conv\.bias"):
        merge(tmp_path / "part.safetensors", change, out)
    with pytest.raises(errors.CheckpointFormatError, match="quantised"):
        merge(base, delta({"x_pad_token": torch.ones(1, 48, dtype=torch.int8)}), out)
    both = {"layers.0.attention.qkv.weight": torch.ones(144, 48),
            "layers.0.attention.to_q.weight": torch.ones(48, 48)}  # fmt: skip
    with pytest.raises(errors.CheckpointFormatError, match="under its split and its fused name"):
        merge(base, delta(both), out)
    assert not out.exists()
    out.touch()
    with pytest.raises(FileExistsError, match=r"^merge: .*--force"):
        merge(base, delta(trained), out)


def test_names_that_only_some_have_are_no_prefix(base, delta, trained, out):
    """A delta of two kinds of names is not understood, rather than half."""
    mixed = delta({f"transformer.{n}" if i else n: t for i, (n, t) in enumerate(trained.items())})
    with pytest.raises(errors.ForeignCheckpointError, match=r"has transformer\..*\(and 3 more\)"):
        merge(base, mixed, out)


def test_what_the_base_says_of_itself_stays(base, delta, state, trained, out):
    said = {**STATED, "conversion": '{"seed": 7}'}
    save_file(state, base, said)
    merge(base, delta(trained), out)
    assert read_header(out)[1] == said


@pytest.mark.parametrize("which", ["base", "delta"])
def test_a_change_while_it_is_interrupted_starts_from_nothing(
    base, delta, state, trained, out, which
):
    def stop(phase, done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    given, calls = {"base": state, "delta": trained}, {"base": base, "delta": delta(trained)}
    for changed in (False, True):
        with pytest.raises(KeyboardInterrupt):
            merge(**calls, output=out, overwrite=True, progress=stop)
        if changed:
            given[which] = {k: v + 1 for k, v in given[which].items()}
            save_file(given[which], calls[which], STATED if which == "base" else None)
        report = merge(**calls, output=out, overwrite=True)
        assert (report.resumed_bytes == 0) == changed
    want = {**given["base"], **given["delta"]}
    merged = load_file(out)
    assert all(torch.equal(merged[n], want[n]) for n in want)


@pytest.mark.parametrize("which", ["base", "delta"])
def test_a_wrong_byte_of_either_is_found(base, delta, trained, out, monkeypatch, which):
    """What is written is not what is stored, once: its checksum is right, its value is not."""
    real, change = StoredTensor.chunks, delta(trained)
    wanted, armed = {"base": base, "delta": change}[which], [True]

    def wrong(self):
        for data in real(self):
            flip = self.file == wanted and bool(armed)
            if flip:
                armed.clear()
            yield bytes([data[0] ^ 1]) + data[1:] if flip else data

    monkeypatch.setattr(StoredTensor, "chunks", wrong)
    with pytest.raises(errors.CheckpointError, match=f"differs from {wanted}; the file was del"):
        merge(base, change, out)
    assert not out.exists()


def test_command(base, delta, trained, out, tmp_path):
    args = ["l2p", "merge", str(base), str(delta(trained)), "-o", str(out)]
    result = CliRunner().invoke(cli.main, [*args, "--report", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    assert set(json.loads((tmp_path / "r.json").read_text())["replaced"]) == set(TRAINED)
    assert CliRunner().invoke(cli.main, args).exit_code == 1
