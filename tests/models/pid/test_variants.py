"""Released networks: names, settings, and the exact tensors of every published checkpoint."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest

from pixeldiff.errors import UnknownNameError
from pixeldiff.models.pid.backbones import BACKBONES, backbone
from pixeldiff.models.pid.config import PiDConfig
from pixeldiff.models.pid.network import PiDNet
from pixeldiff.models.pid.variants import (
    LICENCE_NOTE,
    variant,
    variant_in_path,
    variants,
    variants_for,
)

PACKED = Path(__file__).parents[2] / "golden" / "pid_manifests" / "released.json"


def _packed_manifests():
    stored = json.loads(PACKED.read_text())
    for entry in stored["released"]:
        tensors = [t for name in entry["components"] for t in stored["components"][name]]
        yield {**entry, "tensors": tensors + entry["other_tensors"]}


def _manifests():
    """The full set where one is at hand, else the packed one."""
    folder = os.environ.get("PIXELDIFF_MANIFEST_DIR")
    golden = os.environ.get("PIXELDIFF_GOLDEN_DIR")
    if not folder and golden:
        folder = Path(golden).parent / "spec" / "pid_manifests"
    if folder and Path(folder).is_dir():
        return [json.loads(p.read_text()) for p in sorted(Path(folder).glob("*.json"))]
    return list(_packed_manifests())


MANIFESTS = _manifests()
each_manifest = pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda m: m["name"])


def _tensors(config):
    state = PiDNet(config, device="meta").state_dict()
    return {name: list(t.shape) for name, t in state.items()}


def test_the_manifests_are_the_variants():
    assert len(MANIFESTS) == 14
    assert {m["name"] for m in MANIFESTS} == {v.checkpoint for v in variants()}


@each_manifest
def test_tensors(manifest):
    expected = dict(manifest["tensors"])
    config = variant(manifest["name"]).config
    assert _tensors(config) == expected
    assert len(expected) == manifest["num_tensors"]
    assert sum(math.prod(s) for s in expected.values()) == manifest["num_params"]


@each_manifest
def test_tensors_without_training_head(manifest):
    absent = set(manifest["may_be_absent_in_file"])
    expected = {name: shape for name, shape in manifest["tensors"] if name not in absent}
    assert _tensors(variant(manifest["name"]).inference_config) == expected


@each_manifest
def test_settings(manifest):
    v = variant(manifest["name"])
    assert v.config == PiDConfig.from_dict(manifest["config"])
    assert (v.kind, list(v.backbones)) == (manifest["kind"], manifest["backbones"])
    assert v.checkpoint_file == manifest["checkpoint_file"]
    published, ours = manifest["sampling"], v.sampling
    assert ours.timescale == published["timescale"]
    assert ours.prediction_type == published["prediction_type"]
    assert ours.shift == published["shift"]
    shift = published["dynamic_shift"]
    if shift is None:
        assert ours.dynamic_shift is None
    else:
        assert dataclasses.astuple(ours.dynamic_shift) == (
            shift["base_shift"],
            shift["base_image_size_for_shift_calc"],
        )
    if v.kind == "distilled":
        assert list(ours.times) == published["student_t_list"]
        assert ours.steps == published["student_sample_steps"] == len(ours.times) - 1
        assert ours.stochastic == (published["student_sample_type"] == "sde")
        assert ours.cfg_scale == 1  # a student has no guidance, whatever its file says
    else:
        assert ours.times is None
        assert not ours.stochastic
        assert ours.cfg_scale == published["cfg_scale"]


def test_packed_manifests_equal_the_full_ones():
    packed = {m["name"]: m for m in _packed_manifests()}
    for full in MANIFESTS:
        assert sorted(full["tensors"]) == sorted(packed[full["name"]]["tensors"])
        assert full["sampling"] == packed[full["name"]]["sampling"]


@pytest.mark.parametrize(
    ("name", "checkpoint"),
    [
        ("flux-2k", "PiD_res2k_sr4x_official_flux_distill_4step"),
        ("zimage-turbo-2k", "PiD_res2k_sr4x_official_flux_distill_4step"),
        ("SD3-2kto4k", "PiD_res2kto4k_sr4x_official_sd3_distill_4step"),
        ("siglip-2k", "PiD_res2k_sr8x_official_siglip_distill_4step"),
        ("flux2-klein-9b-v1.5", "PiD_v1pt5_res2kto4k_sr4x_official_flux2_distill_4step"),
        (
            "qwenimage-v1.5-undistilled",
            "PiD_v1pt5_res2kto4k_sr4x_official_qwenimage_undistilled",
        ),
        ("pixeldit", "PixelDiT_finetune_2kto4k"),
        ("pixeldit_FINETUNE_2kto4k", "PixelDiT_finetune_2kto4k"),
    ],
)
def test_names(name, checkpoint):
    assert variant(name).checkpoint == checkpoint


def test_short_names_are_unique_and_found():
    assert len({v.name for v in variants()}) == 14
    for v in variants():
        assert variant(v.name) is v
        assert variant(v.checkpoint) is v


def test_a_family_shares_its_weights():
    assert variants_for("zimage-turbo") == variants_for("flux")
    assert [v.name for v in variants_for("flux2_klein_4b")] == [
        "flux2-2k",
        "flux2-v1.5",
        "flux2-v1.5-undistilled",
    ]
    assert [v.name for v in variants_for("sd3")] == ["sd3-2k", "sd3-2kto4k"]
    assert variants_for("demo") == ()
    for v in variants():
        for name in v.backbones:
            assert BACKBONES[name].channels == v.config.lq_latent_channels
            assert BACKBONES[name].factor == v.config.latent_spatial_down_factor


def test_unknown_names_list_what_there_is():
    with pytest.raises(UnknownNameError, match=r"Did you mean .*flux2-2k.*Known: flux-2k, .*pixel"):
        variant("fluxx2-2k")
    with pytest.raises(UnknownNameError, match=r"is a backbone; .*: sd3-2k or sd3-2kto4k"):
        variant("sd3")
    with pytest.raises(UnknownNameError, match=r"'flx'\. Did you mean flux.*Known: .*siglip"):
        backbone("flx")
    with pytest.raises(UnknownNameError, match="must be a string, got 3"):
        variant(3)
    with pytest.raises(ValueError, match="must be a string, got None"):
        variants_for(None)


def test_variant_in_path():
    path = "/models/checkpoints/PiD_v1pt5_res2kto4k_sr4x_official_flux2_undistilled/x.pth"
    assert variant_in_path(path) is variant("flux2-v1.5-undistilled")
    assert variant_in_path("/models/flux/model.pth") is None


def test_licence_note_says_non_commercial():
    assert "non-commercial" in LICENCE_NOTE
    assert "NSCLv1" in LICENCE_NOTE
