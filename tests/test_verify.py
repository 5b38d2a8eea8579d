"""Verification itself: it passes what is right, names what is not, and refuses the rest."""

from __future__ import annotations

import json
import shutil
import sys
from fnmatch import fnmatchcase

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pixeldiff.errors import IncompleteCheckpointError
from pixeldiff.images import to_uint8
from pixeldiff.models.l2p.conversion import ConversionPlan
from pixeldiff.models.l2p.sampler import guided
from pixeldiff.models.l2p.scheduler import schedule
from pixeldiff.models.l2p.training import noised
from pixeldiff.verify import NotUnderstood, l2p, l2p_checkpoints, l2p_networks, verify_file
from pixeldiff.verify.golden import L2P, compare, read_golden
from pixeldiff.verify.pid_components import COMPONENTS
from pixeldiff.verify.pid_networks import NETWORKS


@pytest.fixture
def gates(golden_dir):
    return golden_dir / "pid" / "comp_gates.safetensors"


def test_passes_and_reports_every_tensor(gates):
    report = verify_file(gates)
    assert report.ok
    assert report.name == "comp_gates"
    assert {row.key for row in report.rows} == {
        f"out.{gate}.{part}"
        for gate in ("per_token", "per_token_per_dim")
        for part in ("gate", "y")
    }
    assert all(0 <= row.error < row.tolerance == 1e-5 for row in report.rows)
    assert verify_file(str(gates)).ok


@pytest.mark.parametrize("value", [3e-5, float("nan"), float("inf")])
def test_one_wrong_value_is_a_miss_of_its_tensor(gates, rewritten, value):
    def change(tensors):
        tensors["out.per_token.y"][3, 8, 31] += value

    report = verify_file(rewritten(gates, tensors=change))
    assert not report.ok
    (miss,) = [row for row in report.rows if not row.ok]
    assert miss.key == "out.per_token.y"
    assert not miss.error <= 2e-5


def test_a_wrong_weight_is_a_miss(gates, rewritten):
    def change(tensors):
        tensors["w.per_token.log_alpha"].add_(0.5)

    keys = {row.key for row in verify_file(rewritten(gates, tensors=change)).rows if not row.ok}
    assert keys == {"out.per_token.y", "out.per_token.gate"}


def test_a_wrong_shape_is_a_miss(gates, rewritten):
    def change(tensors):
        tensors["out.per_token.y"] = tensors["out.per_token.y"][:, :8].contiguous()

    (miss,) = [row for row in verify_file(rewritten(gates, tensors=change)).rows if not row.ok]
    assert (miss.key, miss.error) == ("out.per_token.y", float("inf"))


def test_the_longest_prefix_sets_the_tolerance(gates, rewritten):
    def tighten(metadata):
        metadata["tolerance"] = {"out.": 1e-3, "out.per_token.": 1e-12, "out.per": 1e-2}

    rows = {row.key: row for row in verify_file(rewritten(gates, metadata=tighten)).rows}
    assert rows["out.per_token.y"].tolerance == 1e-12
    assert not rows["out.per_token.y"].ok
    assert rows["out.per_token_per_dim.y"].tolerance == 1e-2


@pytest.mark.parametrize("unit", ["relative", "relative_to_max"])
def test_relative_tolerances(gates, rewritten, unit):
    """The same errors over |reference|, element by element or at its maximum."""

    def relative(metadata):
        metadata["tolerance"] = {"out.": {unit: 1e-2}}

    def change(tensors):
        largest = tensors["out.per_token.y"].abs().argmax()
        tensors["out.per_token.y"].view(-1)[largest] *= 1.5

    assert verify_file(rewritten(gates, metadata=relative)).ok
    report = verify_file(rewritten(gates, metadata=relative, tensors=change))
    (miss,) = [row for row in report.rows if not row.ok]
    assert miss.unit == unit.replace("_", " ")
    assert miss.error == pytest.approx(0.5 / 1.5, rel=1e-2)


def test_sampler_golden_with_one_wrong_pixel(golden_dir, rewritten):
    def change(tensors):
        tensors["out.sde2.image"][1, 2, 5, 7] += 1e-3

    path = golden_dir / "pid" / "sample_student.safetensors"
    misses = [r.key for r in verify_file(rewritten(path, tensors=change)).rows if not r.ok]
    assert misses == ["out.sde2.image"]


# ---- What it does not understand -------------------------------------------------------------


def refuses(path, message):
    with pytest.raises(NotUnderstood, match=message):
        verify_file(path)


def test_missing_file(tmp_path):
    refuses(tmp_path / "no.safetensors", "^no such file$")
    refuses(tmp_path, "^no such file$")


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated(gates, tmp_path, keep):
    path = tmp_path / gates.name
    path.write_bytes(gates.read_bytes()[:keep])
    refuses(path, "^not a readable safetensors file: ")


def test_other_file_formats(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.ones(2)}, path)
    refuses(path, "^not a readable safetensors file: ")


def test_foreign_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    refuses(path, "^not a golden file: its metadata has no name, kind, tolerance$")


def test_l2p_golden_of_another_sort(gates, rewritten):
    def as_l2p(metadata):
        metadata["case"] = {}
        metadata["tolerance"] = {"max_abs_rel_to_peak": 1e-5}

    known = "known are .*network, sampling, schedules, local_decoder, .*text_encoder, .*conversion"
    refuses(rewritten(gates, metadata=as_l2p), f"^an L2P golden file of an unknown sort; {known}, ")


def test_l2p_golden_without_the_file_it_needs(golden_dir, tmp_path):
    for name, needed in (
        ("net_p16_cap1_A", "weights_p16_A"),
        ("convert_p16_result", "convert_p16"),
        ("convert_p16", "convert_p16_result"),
    ):
        path = tmp_path / f"{name}.safetensors"
        shutil.copy(golden_dir / "l2p" / path.name, path)
        refuses(path, f"^it needs {needed}.safetensors beside it: no such file$")
        path.unlink()


# One value of one tensor, of every sort of file.
WRONG_VALUES = [
    ("comp_block_mod", "y", "out.y"),
    ("comp_patchify", "img_ids", "out.img_ids"),
    ("comp_rope", "real.sin", "out.real.sin"),
    ("comp_timestep", "freq_emb", "out.freq_emb"),
    ("dec_p16_thin", "cap.dec3", "mid.dec3"),
    ("net_p16_cap1_A", "net_out", "out.net_out"),
    ("sample_p16_1step_A", "sigmas", "out.sigmas"),
    ("sample_p16_1step_A", "image_uint8", "out.image_uint8"),
    ("sample_p16_4step_cfg4_shift5_A", "x.2", "out.x.2"),
    ("sample_p16_img2img_A", "x_start", "out.x_start"),
    ("sample_p64_3step_cfg", "v.0", "out.v.0"),
    ("sched_tables", "N6.shift5.strength0.6.timesteps", "out.N6.shift5.strength0.6.timesteps"),
    ("text_encoder_tiny", "embedding.1", "out.embedding.1"),
    ("naming_fused_qkv", "split.layers.0.attention.to_v.weight", None),
    ("convert_p16_result", "result.layers.0.feed_forward.w2.weight", None),
    ("merge_p16", "merged.local_decoder.out_conv.weight", None),
    ("train_step_p16_A", "grad.local_decoder.dec1.0.weight", None),
]


@pytest.mark.parametrize(("name", "key", "want"), WRONG_VALUES)
def test_l2p_golden_with_one_wrong_value(golden_dir, tmp_path, name, key, want):
    if name == "text_encoder_tiny":
        pytest.importorskip("transformers", minversion="4.51")

    def change(tensors):
        value = tensors[key].view(-1)[3 % tensors[key].numel()]
        if value.dtype.is_floating_point:
            value += tensors[key].abs().max() * 1e-3 + 1e-2
        else:
            value -= 1

    folder = golden_dir / "l2p"
    for other in ("weights_p16_A", "convert_p16"):
        shutil.copy(folder / f"{other}.safetensors", tmp_path)
    path = tmp_path / f"{name}.safetensors"
    with safe_open(folder / path.name, "pt") as f:
        metadata, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata=metadata)
    assert verify_file(path).ok
    change(tensors)
    save_file(tensors, path, metadata=metadata)
    assert [r.key for r in verify_file(path).rows if not r.ok] == [want or f"out.{key}"]


def test_l2p_weights_are_complete_and_read_as_they_are(golden_dir, rewritten, monkeypatch):
    path = golden_dir / "l2p" / "weights_p16_A.safetensors"
    report = verify_file(path)
    with safe_open(path, "pt") as f:
        assert {r.key for r in report.rows} == {f"out.{k}" for k in f.keys()}  # noqa: SIM118
    assert all(r.error == 0 for r in report.rows)
    broken = rewritten(path, tensors=lambda tensors: tensors.pop("layers.1.ffn_norm2.weight"))
    with pytest.raises(IncompleteCheckpointError, match=r"layers\.1\.ffn_norm2\.weight"):
        verify_file(broken)


def test_the_inputs_of_a_conversion_are_held_against_its_result(golden_dir):
    folder = golden_dir / "l2p"
    both = [verify_file(folder / f"convert_p16{end}.safetensors") for end in ("", "_result")]
    assert both[0] == both[1]
    assert both[0].ok


def _truncated(images, *, rounded):
    return to_uint8(images)


def _unshifted(steps, **options):
    return schedule(steps, **{**options, "shift": 1.0})


def _from_noise(noise, plan, image=None):
    return noise


def _unguided(net, positive, negative, size, **options):
    return guided(net, positive, None, size, times=options["times"])


def _reversed(x0, noise, sigma):
    return noised(noise, x0, sigma)


def _all_new(source, shapes, path):
    return ConversionPlan({}, tuple(shapes), tuple(source))


def _as_before(base, delta, path, **options):
    return base, tuple(delta)


# A mistake in the program, and the file and the first tensor that show it.
MISTAKES = [
    ("sched_tables", l2p_networks, "schedule", _unshifted, "N2.shift3.strength0.6.sigmas"),
    ("sample_p16_1step_A", l2p_networks, "to_uint8", _truncated, "image_uint8"),
    ("sample_p16_img2img_A", l2p_networks, "start", _from_noise, "x_start"),
    ("sample_p64_3step_cfg", l2p_networks, "guided", _unguided, "v.0"),
    ("train_step_p16_A", l2p_networks, "noised", _reversed, "x_t"),
    ("convert_p16", l2p_checkpoints, "planned", _all_new, "result.layers.0.ffn_norm1.weight"),
    ("merge_p16", l2p_checkpoints, "overlaid", _as_before, "merged.local_decoder.out_conv.bias"),
]


@pytest.mark.parametrize(("name", "module", "part", "wrong", "shows"), MISTAKES)
def test_l2p_golden_shows_a_mistake(golden_dir, monkeypatch, name, module, part, wrong, shows):
    path = golden_dir / "l2p" / f"{name}.safetensors"
    monkeypatch.setattr(module, part, wrong)
    assert f"out.{shows}" in [r.key for r in verify_file(path).rows if not r.ok]


def test_text_encoder_golden_shows_another_layer(golden_dir, monkeypatch):
    transformers = pytest.importorskip("transformers", minversion="4.51")
    forward = transformers.Qwen3Model.forward

    def one_further(*args, **options):
        states = forward(*args, **options)
        states.hidden_states = (*states.hidden_states, None)
        return states

    monkeypatch.setattr(transformers.Qwen3Model, "forward", one_further)
    report = verify_file(golden_dir / "l2p" / "text_encoder_tiny.safetensors")
    assert [r.ok for r in report.rows] == [False, False]


def test_text_encoder_golden_without_transformers(golden_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"transformers >= 4.51 is needed; .*pixeldiff\[text\]"):
        verify_file(golden_dir / "l2p" / "text_encoder_tiny.safetensors")


# What L2P goldens hold beside their results. Whatever else a file holds must be a result, so that
# no part of it goes unchecked.
L2P_INPUTS = (
    *("w.*", "cw.*", "x", "t", "t_emb", "feat", "ids", "mask", "input_ids", "caption*", "noise"),
    *("x0", "image", "init_image", "real.ids", "real.q", "tiny.ids", "tiny.q", "fused.*", "base.*"),
    *("delta.*", "split.*_norm[12].weight", "last_hidden_normed.0"),
)
NOT_RUN = {"training_step", "training_components"}  # PiD's training is not part of the package


def test_no_golden_is_without_a_check(golden_dir):
    files = sorted(golden_dir.glob("*/*.safetensors"))
    assert {path.parent.name for path in files} == {"pid", "l2p"}
    for path in files:
        golden = read_golden(path)
        if golden.kind != L2P:
            known = golden.name in COMPONENTS or golden.kind in {*NETWORKS, *NOT_RUN}
            assert known, path.name
        elif l2p.CONVERTED not in golden.tensors:
            kind = l2p.kind_of(golden)
            held = {n for n in golden.tensors if not kind.states(n)}
            unchecked = {n for n in held if not any(fnmatchcase(n, i) for i in L2P_INPUTS)}
            assert not unchecked, path.name
            assert held != set(golden.tensors), path.name


def test_l2p_rows_beyond_a_caption_do_not_count(golden_dir, tmp_path):
    """They hold garbage; the last row of a caption's own does count."""
    folder, name = golden_dir / "l2p", "net_p16_batch2_A.safetensors"
    shutil.copy(folder / "weights_p16_A.safetensors", tmp_path)
    with safe_open(folder / name, "pt") as f:
        metadata, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    for row, misses in ((96, []), (95, ["mid.layers.1[0]"])):
        changed = {k: v.clone() for k, v in tensors.items()}
        changed["cap.layers.1"][0, row] += 1
        save_file(changed, tmp_path / name, metadata=metadata)
        assert [r.key for r in verify_file(tmp_path / name).rows if not r.ok] == misses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "training_step"}, r"^kind 'training_step' \(name 'comp_gates'\) is not implemen"),
        ({"name": "comp_new"}, r"^kind 'component' \(name 'comp_new'\) is not implemented; known"),
        ({"tolerance": "0.1"}, "^not a golden file: its tolerance is not a map of prefixes$"),
        ({"config": "text"}, "^not a golden file: its config is not a map$"),
        ({"tolerance": {"mid.": 1}}, "^no tolerance is stated for out.per_token.gate$"),
        ({"tolerance": {"out.": {"ulp": 1}}}, r"^unknown tolerance \{'ulp': 1\}$"),
    ],
)
def test_metadata_it_cannot_use(gates, rewritten, change, message):
    refuses(rewritten(gates, metadata=lambda metadata: metadata.update(change)), message)


@pytest.mark.parametrize(
    "missing", ["in.per_token.sigma", "w.per_token.log_alpha", "in.per_token_per_dim.x"]
)
def test_incomplete(gates, rewritten, missing):
    path = rewritten(gates, tensors=lambda tensors: tensors.pop(missing))
    refuses(path, missing.removeprefix("w.per_token."))


def test_states_what_is_not_computed(gates, rewritten):
    def change(tensors):
        tensors["out.per_token.z"] = torch.ones(1)

    refuses(rewritten(gates, tensors=change), "^it states out.per_token.z, which this version ")


def test_states_nothing(gates, rewritten):
    def change(tensors):
        for key in [k for k in tensors if k.startswith("out.")]:
            del tensors[key]

    refuses(rewritten(gates, tensors=change), "^it states no output$")


@pytest.mark.parametrize("config", [{"hidden_size": 31}, {"new_field": 1}])
def test_network_that_cannot_be_built(golden_dir, rewritten, config):
    def change(metadata):
        given = json.loads(metadata["config"])
        metadata["config"] = {**given, **config}

    path = rewritten(golden_dir / "pid" / "t2i_pixeldit.safetensors", metadata=change)
    refuses(path, "^its network cannot be built: ")


def test_reading_leaves_the_file_alone(gates, tmp_path):
    copy = shutil.copy(gates, tmp_path)
    before = gates.read_bytes()
    verify_file(copy)
    assert (tmp_path / gates.name).read_bytes() == before


def test_output_of_another_shape_is_a_miss(golden_dir):
    golden = read_golden(golden_dir / "pid" / "comp_small.safetensors")
    key = "out.swiglu.y"
    assert compare(golden, key, golden.tensors[key]).ok
    assert not compare(golden, key, golden.tensors[key][None]).ok
