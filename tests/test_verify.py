"""Verification itself: it passes what is right, names what is not, and refuses the rest."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pixeldiff.verify import NotUnderstood, verify_file
from pixeldiff.verify.golden import compare, read_golden


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


def test_l2p_golden_of_another_sort(gates, rewritten, golden_dir):
    def as_l2p(metadata):
        metadata["case"] = {}
        metadata["tolerance"] = {"max_abs_rel_to_peak": 1e-5}

    refuses(rewritten(gates, metadata=as_l2p), "^an L2P golden file of an unknown sort; known are ")
    weights = golden_dir / "l2p" / "weights_p16_A.safetensors"
    refuses(weights, "^an L2P golden file of an unknown sort; known are .*network, local_decoder, ")


@pytest.mark.parametrize(
    ("name", "key", "want"),
    [
        ("comp_block_mod", "y", "out.y"),
        ("comp_rope", "real.sin", "out.real.sin"),
        ("dec_p16_thin", "cap.dec3", "mid.dec3"),
        ("net_p16_cap1_A", "net_out", "out.net_out"),
        ("naming_fused_qkv", "split.layers.0.attention.to_v.weight", None),
    ],
)
def test_l2p_golden_with_one_wrong_value(golden_dir, tmp_path, name, key, want):
    def change(tensors):
        tensors[key].view(-1)[3] += tensors[key].abs().max() * 1e-3 + 1e-2

    folder = golden_dir / "l2p"
    shutil.copy(folder / "weights_p16_A.safetensors", tmp_path)
    path = tmp_path / f"{name}.safetensors"
    with safe_open(folder / path.name, "pt") as f:
        metadata, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata=metadata)
    assert verify_file(path).ok
    change(tensors)
    save_file(tensors, path, metadata=metadata)
    assert [r.key for r in verify_file(path).rows if not r.ok] == [want or f"out.{key}"]


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
