"""Conversion: what is copied, drawn and dropped; interruption; memory; every refusal."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_l2p_checkpoint import fused
from test_l2p_released import MANIFESTS
from tiny_l2p import LATENT, config, network
from torch import Tensor

from pixeldiff import cli, errors
from pixeldiff.models.l2p import (
    VARIANTS,
    conversion,
    read_checkpoint,
    resumable_file,
    stored_tensors,
)
from pixeldiff.models.l2p.checkpoint_geometry import network_shapes
from pixeldiff.models.l2p.config import DECODERS
from pixeldiff.models.l2p.conversion import RESOLUTIONS, convert, new_tensor, planned
from pixeldiff.models.l2p.stored_tensors import StoredTensor, stored_files

HERE = Path("model.safetensors")
TARGET = config("1k")
STATED = {"config": json.dumps(LATENT.to_dict())}


@pytest.fixture(scope="module")
def latent() -> dict[str, Tensor]:
    """Z-Image in small, mixed types: some blocks in fp32."""
    state = {k: v.bfloat16() for k, v in network(LATENT).state_dict().items()}
    return {k: v.float() if k.startswith("layers.1.") else v for k, v in state.items()}


@pytest.fixture
def source(latent, tmp_path) -> Path:
    save_file(latent, tmp_path / "source.safetensors", metadata=STATED)
    return tmp_path / "source.safetensors"


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out.safetensors"


def sharded(state: dict[str, Tensor], folder: Path, *, index: bool, count: int = 3) -> Path:
    folder.mkdir(parents=True)
    table = {}
    for i in range(count):
        name = f"diffusion_pytorch_model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(state.items())[i::count])
        table.update(dict.fromkeys(part, name))
        save_file(part, folder / name, metadata=STATED)
    if index:
        file = folder / "diffusion_pytorch_model.safetensors.index.json"
        file.write_text(json.dumps({"weight_map": table}))
    return folder


def assert_converted(out: Path, latent: dict[str, Tensor], c=TARGET) -> dict[str, Tensor]:
    state, expected = load_file(out), network_shapes(c)
    assert {n: tuple(t.shape) for n, t in state.items()} == expected
    for name in expected:
        if name in latent and tuple(latent[name].shape) == expected[name]:
            assert state[name].dtype == latent[name].dtype, name
            assert torch.equal(state[name], latent[name]), name
        else:
            assert name.startswith(("all_x_embedder.", "local_decoder.")), name
    return state


def leftovers(out: Path) -> list[str]:
    return sorted(p.name for p in out.parent.iterdir() if p.name.startswith(out.name + "."))


# ---- What goes where ---------------------------------------------------------------------------


def places(shapes) -> dict[str, StoredTensor]:
    return {n: StoredTensor(HERE, 0, "BF16", s, 2 * math.prod(s)) for n, s in shapes.items()}


@pytest.mark.parametrize(
    ("form", "new", "decoder"),
    [("1k", 30, 28), ("4k", 42, 40), ("8k", 48, 46), ("10k", 42, 40)],
)
def test_released_networks_from_the_released_source(form, new, decoder):
    """The counts of the published conversion, and the target's manifest."""
    shapes = network_shapes(VARIANTS["z-image"].config)
    expected = network_shapes(VARIANTS[form].config)
    plan = planned(places(shapes), expected, HERE)
    assert (len(plan.copied), len(plan.new), len(plan.dropped)) == (515, new, 6)
    assert sum(n.startswith("local_decoder.") for n in plan.new) == decoder
    assert len(plan.copied) + len(plan.new) == MANIFESTS[form]["num_tensors"]
    assert {n.split(".")[0] for n in plan.dropped} == {"all_x_embedder", "all_final_layer"}


@pytest.mark.parametrize(
    ("start", "end", "copied", "redrawn"),
    [
        ("1k", "4k", 539, ["dec1.0.bias", "dec1.0.weight", "enc1.0.weight", "out_conv.weight"]),
        ("4k", "8k", 555, []),
        ("8k", "4k", 555, []),
        ("4k", "10k", 547, ["bottleneck.0.weight", "up3.1.weight"]),
    ],
)
def test_between_pixel_networks_the_rule_is_per_tensor(start, end, copied, redrawn):
    """4K to 10K: two weights do not fit while their biases do. The published transfer table."""
    shapes, expected = (network_shapes(VARIANTS[v].config) for v in (start, end))
    plan = planned(places(shapes), expected, HERE)
    assert len(plan.copied) == copied
    # What has a name in both and another shape is in the report on either side.
    assert set(plan.dropped) == set(shapes) - set(plan.copied)
    both = [n.removeprefix("local_decoder.") for n in plan.new if n in shapes]
    assert sorted(both) == redrawn


def test_a_trunk_is_never_made_up():
    shapes = network_shapes(LATENT)
    lacking = {n: s for n, s in shapes.items() if n != "layers.1.feed_forward.w2.weight"}
    with pytest.raises(errors.CheckpointFormatError, match=r"has no layers\.1\.feed_forward\.w2"):
        planned(places(lacking), network_shapes(TARGET), HERE)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_every_resolution(source, latent, out, resolution):
    form = RESOLUTIONS[resolution]
    report = convert(source, out, resolution)
    small = dataclasses.replace(
        LATENT, patch_size=form.config.patch_size, in_channels=3, local_decoder=DECODERS[form.name]
    )
    state = assert_converted(out, latent, small)
    assert set(report.copied) | set(report.new) == set(state)
    assert set(report.dropped) == set(latent) - set(report.copied)
    assert {state[n].dtype for n in report.new} == {torch.bfloat16}
    assert read_checkpoint(out).config == small  # strict, and the geometry is in the file
    assert leftovers(out) == []


def test_golden(golden_dir, tmp_path, out):
    """The reference's own classification, and its copies, through files."""
    folder = golden_dir / "l2p"
    given = load_file(folder / "convert_p16.safetensors")
    want = load_file(folder / "convert_p16_result.safetensors")
    with safe_open(folder / "convert_p16_result.safetensors", "pt") as file:
        kinds = json.loads(file.metadata()["case"])["kind"]
        geometry = json.loads(file.metadata()["config"])
    widths = {int(k): v for k, v in geometry["decoder_widths"].items()}
    names = ("dim", "n_heads", "n_layers", "n_refiner_layers", "cap_feat_dim", "axes_dims")
    trunk = {n: geometry[n] for n in names}
    pixels = config(**trunk, local_decoder=DECODERS["1k"].with_widths(widths))
    start = dataclasses.replace(pixels, patch_size=2, in_channels=16, local_decoder=None)
    state = {k.removeprefix("source."): t for k, t in given.items() if k.startswith("source.")}
    save_file(state, tmp_path / "source.safetensors")
    report = convert(tmp_path / "source.safetensors", out, pixels, source_config=start)
    assert {**dict.fromkeys(report.copied, "copied"), **dict.fromkeys(report.new, "new")} == kinds
    got = load_file(out)
    assert {f"result.{n}" for n in got} == set(want)
    for name in report.copied:
        assert torch.equal(got[name], want[f"result.{name}"]), name


@pytest.mark.parametrize("layout", ["file", "index", "shards", "pipeline", "fused", "prefixed"])
def test_every_layout_of_a_source_gives_the_same_tensors(latent, tmp_path, out, layout):
    folder, state = tmp_path / "given", latent
    if layout in ("index", "shards"):
        sharded(latent, folder, index=layout == "index")
    elif layout == "pipeline":
        sharded(latent, folder / "transformer", index=True)
        (folder / "vae").mkdir()
        save_file({"conv_in.weight": torch.zeros(3)}, folder / "vae" / "model.safetensors")
    else:
        if layout == "fused":
            state = {k: v for k, v in fused(latent).items() if "all_" not in k}
            for name, tensor in latent.items():
                if name.startswith("all_"):
                    state[name.replace("all_", "").replace("2-1.", "")] = tensor
            assert "x_embedder.weight" in state
            assert "layers.0.attention.qkv.weight" in state
        elif layout == "prefixed":
            state = {"model.diffusion_model." + k: v for k, v in latent.items()}
            state["vae.scale"] = torch.zeros(3, dtype=torch.int8)
        folder.mkdir()
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "a.safetensors", STATED)
    report = convert(folder, out, TARGET)
    assert_converted(out, latent)
    assert ("vae.scale" in report.dropped) == (layout == "prefixed")
    convert(sharded(latent, tmp_path / "again", index=True), out, TARGET, overwrite=True)
    assert_converted(out, latent)


def test_geometry_from_diffusers_config(latent, tmp_path, out):
    folder = tmp_path / "given"
    folder.mkdir()
    save_file(latent, folder / "model.safetensors")
    with pytest.raises(errors.UnknownGeometryError, match="never released"):
        convert(folder, out, TARGET)
    fields = LATENT.to_dict()
    names = ("in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "cap_feat_dim")
    kept = {n: fields[n] for n in (*names, "axes_dims", "axes_lens", "t_scale", "rope_theta")}
    kept |= {"_class_name": "ZImageTransformer2DModel", "all_patch_size": [2]}
    (folder / "config.json").write_text(json.dumps(kept))
    convert(folder, out, TARGET)
    assert_converted(out, latent)
    own = {"rope_theta": 100.0, "t_scale": 500.0, "norm_eps": 1e-6, "axes_lens": [512, 64, 64]}
    (folder / "config.json").write_text(json.dumps(kept | own))
    convert(folder, out, config("1k", **own), overwrite=True)  # else it were another trunk
    (folder / "config.json").write_text('{"_class_name": "AnotherModel", "dim": 48}')
    with pytest.raises(errors.UnknownGeometryError, match="never released"):
        convert(folder, out, TARGET, overwrite=True)


def test_a_geometry_that_is_given_counts_before_the_sources_own(source, out):
    with pytest.raises(errors.IncompleteCheckpointError, match=r"layers\.2\."):
        convert(source, out, TARGET, source_config=dataclasses.replace(LATENT, n_layers=3))


# ---- New layers --------------------------------------------------------------------------------


def test_new_layers_are_drawn_as_pytorch_draws_them(latent, source, out):
    big = config(local_decoder=DECODERS["1k"])
    convert(source, out, big)
    state = load_file(out)
    for layer in ("all_x_embedder.16-1", "local_decoder.up4.1", "local_decoder.dec2.0"):
        weight, bias = (state[f"{layer}.{p}"].double() for p in ("weight", "bias"))
        bound = weight[0].numel() ** -0.5
        assert 0.99 * bound < weight.abs().max() <= bound * (1 + 2**-8)
        assert abs(weight.mean()) < 0.02 * bound
        assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert 0.7 * bound < bias.abs().max() <= bound * (1 + 2**-8)


def test_seed_and_name_decide(source, tmp_path):
    def drawn(**options):
        path = tmp_path / "out.safetensors"
        convert(source, path, TARGET, overwrite=True, **options)
        return path.read_bytes(), load_file(path)

    default, state = drawn()
    assert drawn()[0] == default
    assert drawn(seed=42)[0] == default
    other = drawn(seed=43)[1]
    for name in state:
        fresh = name.startswith(("all_x_embedder.", "local_decoder."))
        assert torch.equal(state[name], other[name]) != fresh, name
    # Two biases of one length, each over its own range: other numbers, not the same ones scaled.
    a, b = (state[f"local_decoder.{n}.bias"].float() for n in ("up1.1", "enc1.0"))
    assert not torch.allclose(a * 72**0.5, b * 27**0.5, atol=0.02)


def test_a_large_layer_repeats_nothing():
    """It is drawn in pieces, of one stream."""
    name = "all_x_embedder.160-1.weight"  # of the released 10K form it has 295 million values
    drawn = new_tensor(name, {name: (3 << 19, 1)}, "F32", 0)
    pieces = [torch.frombuffer(bytearray(data), dtype=torch.float32) for data in drawn()]
    assert sum(map(len, pieces)) == 3 << 19
    assert len(pieces) > 1
    assert not torch.equal(pieces[1], pieces[0][: len(pieces[1])])


def test_a_decoder_as_narrow_as_its_trunk(latent, source, tmp_path, out):
    report = convert(source, out, 4096, decoder_width=0.125)
    loaded = read_checkpoint(out, dtype=None)
    assert loaded.config.local_decoder == DECODERS["4k"].scaled(0.125)
    assert loaded.config.local_decoder.bottleneck == DECODERS["4k"].bottleneck / 8
    assert (report.target, len(report.copied)) == ("own", 67)
    again = tmp_path / "again.safetensors"
    args = ("--source", source, "--resolution", 4096, "-o", again, "--decoder-width", 0.125)
    result = CliRunner().invoke(cli.main, ["l2p", "convert", *map(str, args)])
    assert result.exit_code == 0, result.output
    assert again.read_bytes() == out.read_bytes()
    with pytest.raises(ValueError, match="factor must be a positive number, got 0"):
        convert(source, tmp_path / "none.safetensors", 4096, decoder_width=0)
    with pytest.raises(ValueError, match="decoder_width is for a resolution; the target states"):
        convert(source, tmp_path / "none.safetensors", TARGET, decoder_width=0.5)


def test_what_the_file_says_of_itself(source, out):
    report = convert(source, out, 1024, seed=7)
    with safe_open(out, "pt") as file:
        said = json.loads(file.metadata()["conversion"])
    assert (said["seed"], said["new"]) == (7, list(report.new))
    text = str(report)
    assert "copied    67 tensors, bit for bit" in text
    assert "new       30 tensors, seed 7: all_x_embedder (2), local_decoder (28)" in text
    assert "dropped    6 tensors: all_final_layer (4), all_x_embedder (2)" in text
    assert json.loads(json.dumps(report.to_dict()))["copied"] == list(report.copied)


def test_saved_again_it_is_the_same(latent, source, tmp_path, out):
    convert(source, out, TARGET)
    read = read_checkpoint(out, config=TARGET, dtype=torch.float32).state_dict
    save_file(read, tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    for name, tensor in assert_converted(out, latent).items():
        assert torch.equal(again[name].to(tensor.dtype), tensor), name


# ---- Interruption ------------------------------------------------------------------------------

KILLED = """
import os, random, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from pixeldiff.models.l2p import conversion, resumable_file, stored_tensors
from tiny_l2p import config
stored_tensors.CHUNK = resumable_file.CHUNK = 5000
conversion._DRAWN_AT_ONCE = 3000
source, out = Path(sys.argv[2]), Path(sys.argv[3])
draw = random.Random(5)

def child(call):
    pid = os.fork()
    if not pid:
        call()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def attempt(phase, after):
    calls = 0
    def progress(now, done, total):
        nonlocal calls
        calls += now == phase
        if calls == after:
            os.kill(os.getpid(), signal.SIGKILL)
    conversion.convert(source, out, config("1k"), progress=progress)

killed = 0
for _ in range(12):
    killed += child(lambda: attempt("writing", draw.randrange(1, 40))) == -signal.SIGKILL
killed += child(lambda: attempt("checking", 3)) == -signal.SIGKILL
assert not out.exists()
report = conversion.convert(source, out, config("1k"))
print(killed, report.resumed_bytes, report.nbytes)
"""


def test_killed_at_any_moment_it_goes_on_and_gives_the_same_bytes(source, tmp_path, out):
    convert(source, tmp_path / "whole.safetensors", TARGET)
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(source), str(out)],
        capture_output=True,
        text=True,
        env=None,
    )
    assert run.returncode == 0, run.stderr
    killed, resumed, nbytes = map(int, run.stdout.split())
    assert killed == 13
    assert resumed == nbytes  # the last kill came while everything was there
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert leftovers(out) == []


def interrupted(source, out, after: int, **options) -> None:
    """Stops while the tensor after the `after`-th is written."""
    calls = 0

    def progress(phase, done, total):
        nonlocal calls
        calls += 1
        if calls == after + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, TARGET, progress=progress, **options)
    assert not out.exists()
    assert leftovers(out) == [out.name + ".journal", out.name + ".part"]


def test_what_a_journal_claims_is_checked(source, tmp_path, out):
    """A lost page, a torn line, a foreign journal: what is not so is written again."""
    whole = tmp_path / "whole.safetensors"
    convert(source, whole, TARGET)
    part, journal = (out.with_name(out.name + end) for end in (".part", ".journal"))
    start = 8 + int.from_bytes(whole.read_bytes()[:8], "little")

    interrupted(source, out, 20)
    assert convert(source, out, TARGET).resumed_bytes > 0
    assert out.read_bytes() == whole.read_bytes()

    def flip():
        data = bytearray(part.read_bytes())
        data[start] ^= 1
        part.write_bytes(data)

    def lose_the_end():
        part.write_bytes(part.read_bytes()[: start + 10])

    def tear():
        journal.write_text(journal.read_text()[:-9])

    def other_header():
        part.write_bytes(b"\0" + part.read_bytes()[1:])

    for damage, kept in ((flip, 0), (lose_the_end, 0), (tear, 1), (other_header, 0),
                         (journal.unlink, 0), (part.unlink, 0)):  # fmt: skip
        out.unlink()
        interrupted(source, out, 20)
        damage()
        report = convert(source, out, TARGET)
        assert bool(report.resumed_bytes) == bool(kept), damage
        assert out.read_bytes() == whole.read_bytes(), damage


def test_another_plan_starts_from_nothing(latent, source, out):
    interrupted(source, out, 20)
    assert convert(source, out, TARGET, seed=5).resumed_bytes == 0
    out.unlink()
    interrupted(source, out, 20)
    changed = {k: v + 1 for k, v in latent.items()}  # the same header, other values
    save_file(changed, source, metadata=STATED)
    assert convert(source, out, TARGET).resumed_bytes == 0
    assert_converted(out, changed)


def test_what_makes_a_source_another_one(latent, tmp_path, out):
    """Values of the same size, a size at the same time, a name; and so of every shard."""
    given = sharded(latent, tmp_path / "given", index=False)
    seen = {stored_files(given).identity}

    def changed() -> bool:
        identity = stored_files(given).identity
        new = identity not in seen
        seen.add(identity)
        return new

    assert not changed()
    for shard in sorted(given.iterdir()):
        times = shard.stat().st_atime_ns, shard.stat().st_mtime_ns
        os.utime(shard, ns=(times[0], times[1] + 1))
        assert changed()
        save_file(load_file(shard), shard, {**STATED, "longer": ""})
        os.utime(shard, ns=times)
        assert changed()
    for shard in sorted(given.iterdir()):
        shard.rename(given / shard.name.replace("diffusion", "fusion"))
    assert changed()


# ---- Memory ------------------------------------------------------------------------------------

MEASURED = """
import resource, sys
from pixeldiff.models.l2p.conversion import convert
from pixeldiff.models.l2p.checkpoint_geometry import network_shapes
from pixeldiff.models.l2p import VARIANTS
import torch
torch.empty(1000).uniform_(generator=torch.Generator())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(sys.argv[1], sys.argv[2], 10240)
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_depend_on_the_source(tmp_path, out):
    """200 MB in four shards, of which one tensor alone is 40 MB; measured in its own process."""
    big = config(patch_size=2, in_channels=16, local_decoder=None, dim=768, n_heads=6, n_layers=10,
                 axes_dims=(32, 48, 48), cap_feat_dim=26_000)  # fmt: skip
    state = {n: torch.full(s, 0.5, dtype=torch.bfloat16) for n, s in network_shapes(big).items()}
    folder = sharded(state, tmp_path / "given", index=True, count=4)
    shards = [f.stat().st_size for f in folder.glob("*.safetensors")]
    assert sum(shards) > 200e6
    args = [str(folder), str(out)]
    (folder / "config.json").unlink(missing_ok=True)
    for file in folder.glob("*.safetensors"):  # the metadata of the tiny source is not this one's
        save_file(load_file(file), file, metadata={"config": json.dumps(big.to_dict())})
    del state
    run = subprocess.run([sys.executable, "-c", MEASURED, *args], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before, after = (1024 * int(v) for v in run.stdout.split())
    assert after - before < 40e6 < max(shards)


# ---- Refusals ----------------------------------------------------------------------------------


def refuses(error, match, *args, **options):
    with pytest.raises(error, match=match):
        convert(*args, **options)


def test_resolution_and_output(source, out, tmp_path):
    refuses(errors.UnknownNameError, r"^convert: resolution must be one of 1024, 4096, 8192, 10240,"
            r" got 2048$", source, out, 2048)  # fmt: skip
    refuses(ValueError, r"^the output must be a \.safetensors file, got 'a.pth'", source, "a.pth")
    refuses(
        FileNotFoundError, "output directory does not exist", source, tmp_path / "no" / out.name
    )
    out.write_bytes(b"precious")
    refuses(FileExistsError, r"^convert: .*out\.safetensors exists; .*--force", source, out)
    assert out.read_bytes() == b"precious"
    convert(source, out, TARGET, overwrite=True)


def test_sources_that_are_no_source(latent, source, tmp_path, out):
    folder = tmp_path / "given"
    refuses(errors.CheckpointNotFoundError, "^no file or directory", folder, out)
    folder.mkdir()
    refuses(errors.CheckpointNotFoundError, "^no .safetensors file in", folder, out)
    save_file({"conv.weight": torch.zeros(2)}, folder / "a.safetensors")
    refuses(errors.ForeignCheckpointError, "is not a Z-Image or L2P checkpoint", folder, out)
    save_file(latent, folder / "b.safetensors", STATED)
    refuses(errors.CheckpointFormatError, "name one of them: a.safetensors, b.saf", folder, out)
    torch.save(latent, tmp_path / "a.pth")
    refuses(errors.CheckpointFormatError, "cannot be streamed", tmp_path / "a.pth", out)
    convert(source, out, TARGET)
    other = out.with_name("other.safetensors")
    refuses(errors.ForeignCheckpointError, "is the pixel network asked for already", out, other,
            TARGET)  # fmt: skip
    assert convert(out, other, config("4k")).target == "own"  # from pixels to pixels


def test_damaged_and_incomplete_sources(latent, source, tmp_path, out):
    whole = source.read_bytes()
    source.write_bytes(whole[:-5])
    refuses(errors.CheckpointFormatError, r"damaged or cut short .*download it again", source, out)
    lacking = {k: v for k, v in latent.items() if k != "layers.1.ffn_norm2.weight"}
    save_file(lacking, source, STATED)
    with pytest.raises(errors.IncompleteCheckpointError, match=r"layers\.1\.ffn_norm2\.") as caught:
        convert(source, out, 1024)
    assert caught.value.missing == ("layers.1.ffn_norm2.weight",)
    save_file({**latent, "x_pad_token": torch.zeros(1, 7)}, source, STATED)
    refuses(errors.CheckpointShapeError, "x_pad_token", source, out)
    twice = {**latent, "layers.1.attention.qkv.weight": torch.zeros(144, 48)}
    save_file(twice, source, STATED)
    refuses(errors.CheckpointFormatError, "under its split and its fused name", source, out)
    quantised = {**latent, "cap_pad_token": torch.zeros(1, 48, dtype=torch.int8)}
    save_file(quantised, source, STATED)
    refuses(errors.CheckpointFormatError, "cap_pad_token .* is I8; quantised", source, out)
    save_file(latent, source, {"config": "{"})
    refuses(errors.CheckpointFormatError, "metadata 'config' .* is not an L2PConfig", source, out)
    for index in (True, False):
        folder = sharded(latent, tmp_path / f"shards{index}", index=index)
        next(folder.glob("*-00002-*")).unlink()
        refuses(errors.IncompleteCheckpointError, "^shard .*00002-of-00003.* missing", folder, out)
    assert not out.exists()
    assert leftovers(out) == []


def test_a_target_with_another_trunk(source, out):
    refuses(ValueError, r"^convert: n_layers of the target must be the source's 2, got 3; only",
            source, out, config("1k", n_layers=3))  # fmt: skip
    refuses(ValueError, "^convert: the target has no local decoder", source, out,
            dataclasses.replace(LATENT, patch_size=4))  # fmt: skip


def test_disk_too_small_and_disk_full(source, out, monkeypatch):
    usage = resumable_file.shutil.disk_usage(out.parent)
    monkeypatch.setattr(resumable_file.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refuses(OSError, r"needs 0\.02 GB more and .* has 0\.00 GB free; make room", source, out)
    assert leftovers(out) == []
    monkeypatch.undo()
    real, calls = StoredTensor.chunks, 0

    def full(self):
        nonlocal calls
        calls += 1
        if calls > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        yield from real(self)

    monkeypatch.setattr(StoredTensor, "chunks", full)
    refuses(OSError, r"is full; make room and run the same command again", source, out, TARGET)
    monkeypatch.undo()
    assert convert(source, out, TARGET).resumed_bytes > 0


def test_a_wrong_byte_is_found_before_the_file_gets_its_name(source, out, monkeypatch):
    """The digest of what was written is right, so only the comparison with the source sees it."""
    real = stored_tensors.StoredTensor.chunks

    def wrong(self):
        for data in real(self):
            flip = self.file == source and leftovers(out) != [] and armed[0]
            armed[0] = armed[0] and not flip
            yield bytes([data[0] ^ 1]) + data[1:] if flip else data

    armed = [True]
    monkeypatch.setattr(StoredTensor, "chunks", wrong)
    refuses(errors.CheckpointError, r"differs from .*source.safetensors; the file was deleted",
            source, out, TARGET)  # fmt: skip
    assert not out.exists()
    assert leftovers(out) == []


@pytest.fixture
def checked(latent, source, tmp_path, monkeypatch):
    """checked(tensors): `verified` of a file with these tensors, as a copy of the source."""
    monkeypatch.setattr(stored_tensors, "CHUNK", 64)
    origin = stored_files(source).tensors
    shapes = {n: tuple(t.shape) for n, t in latent.items()}

    def check(tensors: dict[str, Tensor]) -> None:
        save_file(tensors, tmp_path / "written.safetensors")
        conversion.verified(tmp_path / "written.safetensors", shapes, origin)

    return check


def test_a_written_file_is_its_network(latent, checked):
    checked(latent)
    name = "layers.0.feed_forward.w2.weight"
    lacking = {n: t for n, t in latent.items() if n != name}
    turned = {**lacking, name: latent[name].T.contiguous()}
    for other in (lacking, {**latent, "more": latent[name].clone()}, turned):
        with pytest.raises(errors.CheckpointError, match="does not hold the tensors of its netw"):
            checked(other)


def test_copies_have_the_type_and_every_byte_of_the_source(latent, checked):
    name = "layers.0.feed_forward.w2.weight"
    for other in (torch.float16, torch.float32):  # the same bytes, the same values
        other = latent[name].view(other) if other.itemsize == 2 else latent[name].to(other)
        with pytest.raises(errors.CheckpointError, match=f"^{name} in .* differs from .*source"):
            checked({**latent, name: other})
    count = latent[name].numel()
    for place in (0, 31, 32, count // 2, count - 1):  # in the first, a middle and the last chunk
        wrong = latent[name].clone()
        wrong.view(torch.int16).view(-1)[place] ^= 256
        with pytest.raises(errors.CheckpointError, match=f"^{name} in .* differs from .*source"):
            checked({**latent, name: wrong})


def test_a_disk_that_forgets(source, out, monkeypatch):
    real = resumable_file._check_bytes

    def forget(part, start, *rest):
        data = bytearray(part.read_bytes())
        data[start + 3] ^= 4
        part.write_bytes(data)
        real(part, start, *rest)

    monkeypatch.setattr(resumable_file, "_check_bytes", forget)
    refuses(errors.CheckpointError, "reads back from .* otherwise than it was written", source, out,
            TARGET)  # fmt: skip
    assert not out.exists()
    assert leftovers(out) == []


def test_two_runs_at_once(source, out):
    def progress(*_):
        refuses(errors.CheckpointError, "^another process is writing", source, out, TARGET)

    convert(source, out, TARGET, progress=progress)
    assert leftovers(out) == []


# ---- Command -----------------------------------------------------------------------------------


def run(*args, code=0):
    result = CliRunner().invoke(cli.main, ["l2p", *map(str, args)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_command(source, latent, tmp_path, out):
    args = ("convert", "--source", source, "--resolution", 1024, "-o", out)
    result = run(*args, "--report", tmp_path / "report.json", "--quiet")
    assert "copied    67 tensors" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["copied"]) == 67
    assert len(report["new"]) == 30
    before = hashlib.sha256(out.read_bytes()).digest()
    failed = run(*args, code=1)
    assert failed.stderr.startswith("error: convert: ")
    assert "--force" in failed.stderr
    run(*args, "--force")
    assert hashlib.sha256(out.read_bytes()).digest() == before
    assert "must be one of" in run(*args[:4], 512, "-o", tmp_path / "x.safetensors", code=1).stderr


def test_interrupted_command_says_how_to_go_on(source, out, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "convert", stop)
    args = ("convert", "--source", source, "--resolution", 1024, "-o", out)
    assert "run the same command again" in run(*args, code=130).stderr
