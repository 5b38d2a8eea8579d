"""Checkpoint reading: what is accepted, and the text of every refusal."""

import ctypes
import dataclasses
import gc
import json
import os
import pickle
import struct
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pixeldiff import errors
from pixeldiff.models.pid.checkpoint import load_net, read_checkpoint
from pixeldiff.models.pid.checkpoint_geometry import geometry, network_shapes
from pixeldiff.models.pid.checkpoint_identity import identify, released_with
from pixeldiff.models.pid.checkpoint_location import resolve
from pixeldiff.models.pid.config import PiDConfig
from pixeldiff.models.pid.network import PiDNet
from pixeldiff.models.pid.variants import variant, variants

TINY = PiDConfig(
    hidden_size=32,
    num_groups=2,
    patch_depth=3,
    pixel_depth=1,
    patch_size=8,
    pixel_hidden_size=4,
    pixel_attn_hidden_size=24,
    pixel_num_groups=3,
    txt_embed_dim=12,
    txt_max_length=5,
    lq_hidden_dim=8,
    lq_num_res_blocks=1,
    lq_gate_type="sigma_aware_per_token",
    pit_lq_inject=True,
)
TINY_WITH_HEAD = dataclasses.replace(TINY, lq_aux_rgb_head=True)
AUX = "lq_proj.lq_aux_rgb_head."
METADATA = {"config": json.dumps(TINY.to_dict()), "backbone": "demo"}


def _weights(config=TINY, seed=0, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(seed)
    shapes = network_shapes(config)
    return {k: torch.randn(s, generator=g).to(dtype) for k, s in shapes.items()}


def _same(loaded, expected):
    assert loaded.keys() == expected.keys()
    for key, tensor in loaded.items():
        assert tensor.dtype == expected[key].dtype, key
        assert torch.equal(tensor, expected[key]), key


def _hollow(path, shapes, *, prefix="net.", dtype="BF16", metadata=None):
    """A safetensors file of zeros that takes no disk space: the data is one hole."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * {"BF16": 2, "F32": 4}[dtype]
        header[prefix + name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    if metadata:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return path


def _released(tmp_path, name, **options):
    return _hollow(tmp_path / "model.safetensors", network_shapes(variant(name).config), **options)


# --- what is accepted -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    ["", "net.", "core.", "module.", "model.diffusion_model.", "module.net.", "_orig_mod.net."],
)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_prefixes_and_formats(tmp_path, prefix, suffix):
    weights = _weights()
    path = tmp_path / f"model{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save({prefix + k: t for k, t in weights.items()}, path)
    loaded = read_checkpoint(path, config=TINY)
    _same(loaded.state_dict, weights)
    assert (loaded.config, loaded.variant, loaded.backbone) == (TINY, None, None)
    assert loaded.info.prefix == prefix
    assert loaded.info.path == path
    assert loaded.info.stored_dtypes == {"bfloat16": len(weights)}
    assert loaded.info.parameters == sum(t.numel() for t in weights.values())


def test_old_pickle_format(tmp_path):
    weights = _weights()
    path = tmp_path / "old.pth"
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    _same(read_checkpoint(path, config=TINY).state_dict, weights)


@pytest.mark.parametrize("nest", ["state_dict", "model", "module", "net"])
def test_nested(tmp_path, nest):
    weights = _weights()
    content = {nest: weights, "step": 7, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}
    torch.save(content, tmp_path / "a.pt")
    _same(read_checkpoint(tmp_path / "a.pt", config=TINY).state_dict, weights)
    torch.save({"state_dict": content}, tmp_path / "b.pt")
    _same(read_checkpoint(tmp_path / "b.pt", config=TINY).state_dict, weights)


def _with_ema(tmp_path, layout):
    plain, ema = _weights(seed=1), _weights(seed=2)
    path = tmp_path / "model.pth"
    if layout == "nested":
        torch.save({"model": plain, "ema": ema}, path)
    else:
        flat = {f"net.{k}": t for k, t in plain.items()}
        flat |= {f"net_ema.{k}": t for k, t in ema.items()}
        torch.save(flat, path)
    return path, plain, ema


@pytest.mark.parametrize("layout", ["nested", "flat"])
def test_ema(tmp_path, layout):
    path, plain, ema = _with_ema(tmp_path, layout)
    for asked, expected in ((None, plain), (False, plain), (True, ema)):
        loaded = read_checkpoint(path, config=TINY, ema=asked)
        _same(loaded.state_dict, expected)
        assert loaded.info.ema is (asked is True)
    assert loaded.info.ignored == {"plain weights": len(plain)}


def test_ema_alone_is_taken(tmp_path):
    weights = _weights()
    torch.save({f"net_ema.{k}": t for k, t in weights.items()}, tmp_path / "m.pth")
    loaded = read_checkpoint(tmp_path / "m.pth", config=TINY)
    _same(loaded.state_dict, weights)
    assert loaded.info.ema
    with pytest.raises(errors.CheckpointError, match=r"ema=False: .* holds no plain weights"):
        read_checkpoint(tmp_path / "m.pth", config=TINY, ema=False)


def test_training_only_tensors_are_left_out(tmp_path):
    weights = _weights()
    extra = {
        "fake_score.net.y_pos_embedding": torch.zeros(2),
        "discriminator.head.0.weight": torch.zeros(2),
        "net.pos_embed": torch.full((2,), float("nan")),
        "net._repa_projector.0.weight": torch.zeros(2),
    }
    torch.save({f"net.{k}": t for k, t in weights.items()} | extra, tmp_path / "m.pth")
    loaded = read_checkpoint(tmp_path / "m.pth", config=TINY)
    _same(loaded.state_dict, weights)
    assert loaded.info.ignored == {"training only": 4}


def test_aux_head(tmp_path):
    weights = _weights(TINY_WITH_HEAD)
    path = tmp_path / "m.safetensors"
    save_file(weights, path)
    for config in (TINY, TINY_WITH_HEAD):
        loaded = read_checkpoint(path, config=config)
        _same(loaded.state_dict, {k: t for k, t in weights.items() if not k.startswith(AUX)})
        assert loaded.config == TINY
        assert loaded.info.ignored == {"training-only RGB head": 6}
    kept = read_checkpoint(path, config=TINY_WITH_HEAD, aux_head=True)
    _same(kept.state_dict, weights)
    assert kept.config == TINY_WITH_HEAD
    save_file(_weights(), path)
    assert read_checkpoint(path, config=TINY_WITH_HEAD, aux_head=True).config == TINY


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path, stored, dtype):
    weights = _weights(dtype=stored)
    save_file(weights, tmp_path / "m.safetensors")
    loaded = read_checkpoint(tmp_path / "m.safetensors", config=TINY, dtype=dtype)
    _same(loaded.state_dict, {k: t.to(dtype or stored) for k, t in weights.items()})


def test_metadata_decides(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(_weights(), path, metadata=METADATA)
    for options in ({}, {"config": TINY}, {"backbone": "demo"}):
        loaded = read_checkpoint(path, **options)
        assert (loaded.config, loaded.backbone, loaded.variant) == (TINY, "demo", None)
    other = dataclasses.replace(TINY, rope_ref_h=512)
    text = "config.rope_ref_h is 512, but .* states 1024; leave config= out"
    with pytest.raises(errors.BackboneMismatchError, match=text):
        read_checkpoint(path, config=other)
    text = "backbone='sd3', but .* states that it decodes the latents of 'demo'"
    with pytest.raises(errors.BackboneMismatchError, match=text):
        read_checkpoint(path, backbone="sd3")
    with pytest.raises(errors.UnknownNameError, match=r"unknown name 'dmeo'. Did you mean demo"):
        read_checkpoint(path, backbone="dmeo")


def test_metadata_may_name_a_backbone_of_its_own(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(_weights(), path, metadata=METADATA | {"backbone": "my-vae"})
    assert read_checkpoint(path).backbone == "my-vae"
    assert read_checkpoint(path, backbone="my-vae").backbone == "my-vae"
    save_file(_weights(), path, metadata={"backbone": "my-vae"})
    with pytest.raises(errors.UnknownGeometryError, match="'my-vae', which no released network"):
        read_checkpoint(path)


def test_bad_metadata(tmp_path):
    path = tmp_path / "m.safetensors"
    for config, text in (("{", "Expecting"), ('{"depth": 3}', "unknown field 'depth'"), ("[]", "")):
        save_file(_weights(), path, metadata={"config": config})
        with pytest.raises(
            errors.CheckpointFormatError, match=r"'config' of .*not a PiDC.*" + text
        ):
            read_checkpoint(path)


def test_sharded(tmp_path):
    weights = _weights()
    keys = list(weights)
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    halves = (keys[:20], keys[20:])
    for name, half in zip(names, halves, strict=True):
        save_file({k: weights[k] for k in half}, tmp_path / name)
    index = {"weight_map": {k: n for n, h in zip(names, halves, strict=True) for k in h}}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    _same(read_checkpoint(path, config=TINY).state_dict, weights)
    _same(read_checkpoint(tmp_path, config=TINY).state_dict, weights)

    save_file({k: weights[k] for k in halves[1][1:]}, tmp_path / names[1])
    with pytest.raises(errors.IncompleteCheckpointError, match=f"lacks 1 .*first {keys[20]}"):
        read_checkpoint(path, config=TINY)
    (tmp_path / names[1]).unlink()
    with pytest.raises(errors.IncompleteCheckpointError, match=f"shard {names[1]} of .* missing"):
        read_checkpoint(path, config=TINY)
    path.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(errors.CheckpointFormatError, match="shard outside its directory"):
        read_checkpoint(path, config=TINY)
    path.write_text("{}")
    with pytest.raises(errors.CheckpointFormatError, match="no safetensors index"):
        read_checkpoint(path, config=TINY)


def test_load_net(tmp_path):
    weights = _weights()
    save_file(weights, tmp_path / "m.safetensors")
    net = load_net(tmp_path / "m.safetensors", config=TINY, dtype=torch.float32)
    assert not net.training
    assert all(not p.requires_grad and p.dtype is torch.float32 for p in net.parameters())
    _same(dict(net.state_dict()), {k: t.float() for k, t in weights.items()})

    ours = PiDNet(TINY)
    ours.load_state_dict(weights)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(1, 3, 32, 32, generator=g), torch.randn(1, 4, 12, generator=g)
    z, t, sigma = torch.randn(1, 16, 1, 1, generator=g), torch.tensor([500.0]), torch.tensor([0.1])
    call = {"lq_latent": z, "degrade_sigma": sigma}
    with torch.no_grad():
        v = net(x, t, y, **call)
        assert torch.equal(v, ours(x, t, y, **call))
    assert v.isfinite().all()


# --- which network is it --------------------------------------------------------------------------


def test_geometry_reads_every_field_shapes_can_tell():
    facts = geometry(network_shapes(TINY))
    for field in dataclasses.fields(PiDConfig):
        if field.name in facts:
            assert facts.pop(field.name) == getattr(TINY, field.name), field.name
    assert facts == {"lq_conv_channels": 16, "num_injections": 2}
    assert "lq_hidden_dim" not in geometry(network_shapes(variant("pixeldit").config))


@pytest.mark.parametrize("name", ["sd3-2kto4k", "qwenimage-v1.5-undistilled"])
def test_a_file_in_the_folder_of_a_release(tmp_path, name):
    v = variant(name)
    folder = tmp_path / v.checkpoint
    folder.mkdir()
    kept = {k: s for k, s in network_shapes(v.config).items() if not k.startswith("patch_blocks.9")}
    path = _hollow(folder / "model_ema_bf16.safetensors", kept)
    # Left incomplete so that the answer comes before gigabytes of zeros are read.
    text = f"lacks 24 of {len(network_shapes(v.config))} tensors of {name}: patch_blocks.9.norm_x1"
    with pytest.raises(errors.IncompleteCheckpointError, match=text):
        read_checkpoint(path)


def _identify(tmp_path, name, folder="x", prefix="net.", drop_aux=False, **options):
    config = variant(name).inference_config if drop_aux else variant(name).config
    options = {"backbone": None, "variant": None} | options
    return identify(network_shapes(config), tmp_path / folder / "m.pth", prefix=prefix, **options)


@pytest.mark.parametrize("name", ["flux2-2k", "dinov2-2k", "siglip-2k", "sdxl-2kto4k", "pixeldit"])
def test_shapes_alone_tell(tmp_path, name):
    found = _identify(tmp_path, name)
    assert found.variant is variant(name)
    assert found.config == variant(name).inference_config
    assert found.backbone == variant(name).family
    assert found.also_fits == ()


def test_a_student_has_no_rgb_head(tmp_path):
    assert _identify(tmp_path, "flux2-v1.5", drop_aux=True).variant is variant("flux2-v1.5")
    with pytest.raises(errors.AmbiguousCheckpointError, match="distilled and undistilled"):
        _identify(tmp_path, "flux2-v1.5")
    teacher = _identify(tmp_path, "flux2-v1.5", drop_aux=True, variant="flux2-v1.5-undistilled")
    assert teacher.variant.kind == "undistilled"


@pytest.mark.parametrize(
    ("name", "backbone", "expected"),
    [
        ("flux-2k", "flux", "flux-2k"),
        ("sd3-2kto4k", "zimage-turbo", "flux-2k"),
        ("flux-v1.5", "qwenimage-2512", "qwenimage-v1.5"),
        ("qwenimage-v1.5", "zimage", "flux-v1.5"),
    ],
)
def test_the_backbone_tells(tmp_path, name, backbone, expected):
    found = _identify(tmp_path, name, drop_aux=True, backbone=backbone)
    assert found.variant is variant(expected)
    assert found.backbone == backbone


@pytest.mark.parametrize("v", variants(), ids=lambda v: v.name)
def test_the_folder_or_the_variant_tells(tmp_path, v):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _identify(tmp_path, v.name, folder=v.checkpoint).variant is v
        assert _identify(tmp_path, v.name, variant=v.name).variant is v


def test_ambiguity_lists_the_choices(tmp_path):
    text = (
        r'(?s)Pass backbone=\.\.\. or variant=\.\.\., one of:\n  backbone="flux" \(also zimage, '
        r'zimage-turbo\): variant="flux-2k"\n  backbone="sd3": variant="sd3-2k" or '
        r'variant="sd3-2kto4k"$'
    )
    with pytest.raises(errors.AmbiguousCheckpointError, match=text) as raised:
        read_checkpoint(_released(tmp_path, "flux-2k"))
    assert raised.value.choices == ("flux-2k", "sd3-2k", "sd3-2kto4k")
    with pytest.raises(errors.AmbiguousCheckpointError) as raised:
        _identify(tmp_path, "qwenimage-v1.5", drop_aux=True)
    assert raised.value.choices == ("flux-v1.5", "qwenimage-v1.5")


def test_one_network_at_two_sizes_is_a_warning(tmp_path):
    with pytest.warns(
        errors.CheckpointWarning, match=r"any of sd3-2k, sd3-2kto4k, .* sd3-2k; pass"
    ):
        found = _identify(tmp_path, "sd3-2k", backbone="sd3")
    assert (found.variant.name, found.also_fits) == ("sd3-2k", ("sd3-2kto4k",))


def test_a_contradicting_folder_is_a_warning(tmp_path):
    folder = variant("flux-2k").checkpoint
    with pytest.warns(errors.CheckpointWarning, match="names flux-2k, but you asked for another"):
        _identify(tmp_path, "sd3-2k", folder=folder, variant="sd3-2k")
    with pytest.warns(errors.CheckpointWarning, match=r"its tensors are those of another .*sdxl"):
        assert _identify(tmp_path, "sdxl-2kto4k", folder=folder).backbone == "sdxl"


def test_a_contradicting_backbone_names_both(tmp_path):
    text = (
        r"backbone='sdxl' does not fit .*lq_proj.latent_proj.0.weight is \(512, 16, 3, 3\), which "
        r"is backbone flux or sd3 \(flux-2k, sd3-2k, sd3-2kto4k\)"
    )
    with pytest.raises(errors.BackboneMismatchError, match=text):
        _identify(tmp_path, "flux-2k", backbone="sdxl")
    with pytest.raises(errors.BackboneMismatchError, match=r"variant='flux-v1.5' does not fit"):
        _identify(tmp_path, "flux-2k", variant="flux-v1.5")
    with pytest.raises(errors.BackboneMismatchError, match="flux-2k does not decode backbone='sd3"):
        _identify(tmp_path, "flux-2k", variant="flux-2k", backbone="sd3")
    with pytest.raises(
        errors.BackboneMismatchError, match=r"'flux' does not fit .* no lq_proj.*none"
    ):
        _identify(tmp_path, "pixeldit", backbone="flux")


def test_a_contradicting_config_names_both(tmp_path):
    save_file(_weights(), tmp_path / "m.safetensors")
    with pytest.raises(errors.BackboneMismatchError, match="flux-2k has another geometry"):
        read_checkpoint(tmp_path / "m.safetensors", variant="flux-2k", config=TINY)
    text = r"'sdxl' has \(channels, pixels per cell\) = \(4, 8\), but .* has \(16, 8\)"
    with pytest.raises(errors.BackboneMismatchError, match=text):
        read_checkpoint(tmp_path / "m.safetensors", config=TINY, backbone="sdxl")


def test_original_pixeldit_has_other_rotary_settings(tmp_path):
    with pytest.raises(errors.UnknownGeometryError, match=r"prefix core\.\).* rotary"):
        _identify(tmp_path, "pixeldit", prefix="core.")
    found = _identify(tmp_path, "pixeldit", prefix="core.", variant="pixeldit")
    assert (found.variant.name, found.backbone) == ("pixeldit", None)


def test_geometry_that_was_never_released(tmp_path):
    save_file(_weights(), tmp_path / "m.safetensors")
    text = (
        r"never released. Nearest .*hidden_size 32 \(1536\).*; y_pos_embedding is \(1, 5, .*config="
    )
    with pytest.raises(errors.UnknownGeometryError, match=text):
        read_checkpoint(tmp_path / "m.safetensors")


def test_a_backbone_that_was_never_released(tmp_path):
    config = dataclasses.replace(variant("flux-v1.5").inference_config, lq_latent_channels=48)
    text = r"is flux-v1.5; what differs \(released value\): lq_conv_channels 48 \(16\); lq_proj.l"
    with pytest.raises(errors.UnknownGeometryError, match=text):
        identify(network_shapes(config), tmp_path, prefix="", backbone=None, variant=None)


def test_a_config_of_a_release_finds_its_name(tmp_path):
    v = variant("sdxl-2kto4k")
    assert released_with(v.config, tmp_path, None) is v
    students = variant("flux-v1.5").config
    assert released_with(students, tmp_path, "flux") is None  # or its teacher
    assert released_with(students, tmp_path / variant("flux-v1.5").checkpoint, "flux").name == (
        "flux-v1.5"
    )
    assert released_with(TINY, tmp_path, "demo") is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_loading_costs_no_memory_beyond_the_file(tmp_path):
    def anonymous():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

    config = dataclasses.replace(
        variant("flux-v1.5").inference_config, patch_depth=1, pixel_depth=1
    )
    path = _hollow(tmp_path / "m.safetensors", network_shapes(config))
    size = path.stat().st_size / 2**20
    assert size > 300
    # What earlier tests freed would be used again, and not be seen to grow.
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    before = anonymous()
    net = load_net(path, config=config)
    grown = anonymous() - before
    assert net.dtype is torch.bfloat16
    assert grown < 40, f"{grown:.0f} MB beside a mapped file of {size:.0f} MB"
    net = load_net(path, config=config, dtype=torch.float32)
    grown = anonymous() - before
    assert 2 * size - 40 < grown < 2 * size + 40, f"{grown:.0f} MB for twice {size:.0f} MB"
    del net


# --- refusals -------------------------------------------------------------------------------------


def test_missing(tmp_path):
    with pytest.raises(errors.CheckpointNotFoundError, match=r"no file or directory .*none.pth"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match='"org/name" or "org/name:path/in/it"'):
        read_checkpoint("weights/none.pth")
    with pytest.raises(ValueError, match=r"no checkpoint .*.safetensors, .pth, .pt"):
        read_checkpoint(tmp_path)


def test_directories(tmp_path):
    weights = _weights()
    one, two = tmp_path / "flux" / "a.pth", tmp_path / "sd3" / "b.safetensors"
    for path in (one, two):
        path.parent.mkdir()
    torch.save(weights, one)
    (tmp_path / "README.md").write_text("hello")
    assert resolve(tmp_path) == one
    _same(read_checkpoint(tmp_path, config=TINY).state_dict, weights)
    save_file(weights, two)
    with pytest.raises(errors.CheckpointNotFoundError, match=r"(?s)2 checkpoints.*a\.pth.*b\.saf"):
        resolve(tmp_path)
    assert resolve(tmp_path, prefer=["/sd3/"]) == two
    assert resolve(two.parent) == two


def test_a_variant_finds_its_folder_in_a_release(tmp_path):
    for name in ("flux-2k", "sd3-2k"):
        folder = tmp_path / "checkpoints" / variant(name).checkpoint
        folder.mkdir(parents=True)
        torch.save({"x": torch.zeros(1)}, folder / "model_ema_bf16.pth")
    with pytest.raises(errors.ForeignCheckpointError, match=variant("sd3-2k").checkpoint):
        read_checkpoint(tmp_path, variant="sd3-2k")


def test_training_directories_say_how_to_convert(tmp_path):
    (tmp_path / "__0_0.distcp").touch()
    with pytest.raises(errors.CheckpointNotFoundError, match="dcp_to_torch_save"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("m.gguf", b"GGUF", r"must end in \.safetensors, \.pth, \.pt"),
        ("m.pth", b"", "is empty"),
        ("m.pth", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("m.safetensors", b"<!DOCTYPE html><html>", "web page"),
        ("m.pth", b"not a pickle at all, just words", r"31 bytes\) is damaged or cut short"),
        ("m.safetensors", b"\xff" * 100, r"100 bytes\) is damaged or cut short"),
        ("m.safetensors", b"PK\x03\x04...", "PyTorch file; rename it to .pth"),
    ],
)
def test_not_a_checkpoint(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(errors.CheckpointFormatError, match=text):
        read_checkpoint(tmp_path / name, config=TINY)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0.02, 0.3, 0.999])
def test_truncated(tmp_path, suffix, keep):
    path = tmp_path / f"m{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(_weights(), path)
    size = path.stat().st_size
    os.truncate(path, int(size * keep))
    with pytest.raises(
        errors.CheckpointFormatError, match=r"damaged or cut short .*download it ag"
    ):
        read_checkpoint(path, config=TINY)


def test_truncated_old_pickle(tmp_path):
    path = tmp_path / "m.pth"
    torch.save(_weights(), path, _use_new_zipfile_serialization=False)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(errors.CheckpointFormatError, match="damaged or cut short"):
        read_checkpoint(path, config=TINY)


def test_safetensors_under_another_name(tmp_path):
    save_file(_weights(), tmp_path / "m.pth")
    with pytest.raises(errors.CheckpointFormatError, match=r"rename it to .safetensors"):
        read_checkpoint(tmp_path / "m.pth", config=TINY)


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_never_run(tmp_path, zipped):
    trap = tmp_path / "trap"
    content = {**_weights(), "bomb": _Bomb(str(trap))}
    path = tmp_path / "m.pth"
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"bomb": _Bomb(str(trap))}, protocol=2))
    with pytest.raises(errors.UnsafeCheckpointError, match=r"Python object \(\S*open\)"):
        read_checkpoint(path, config=TINY)
    assert not trap.exists()


def test_a_whole_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pth")
    with pytest.raises(errors.UnsafeCheckpointError, match=r"Linear.*Save its state dict alone"):
        read_checkpoint(tmp_path / "m.pth")


@pytest.mark.parametrize("content", [{"step": 3, "loss": 0.1}, [1, 2], {}, torch.zeros(3)])
def test_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(errors.ForeignCheckpointError, match="holds no state dict"):
        read_checkpoint(tmp_path / "m.pth")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("double_blocks.0.img_attn.qkv.weight", "final_layer.linear.weight"), "a FLUX-style tr"),
        (("decoder.conv_in.weight", "encoder.mid.block_1.conv1.weight"), "a VAE"),
        (("model.diffusion_model.input_blocks.0.0.weight", "a.b"), "a latent diffusion U-Net"),
        (("lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"), "a LoRA"),
        (("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"), "a text encoder"),
    ],
)
def test_foreign_models(tmp_path, names, kind):
    save_file({n: torch.zeros(2) for n in names}, tmp_path / "m.safetensors")
    text = f"not a PiD checkpoint but looks like {kind}.*unknown, first "
    with pytest.raises(errors.ForeignCheckpointError, match=text) as raised:
        read_checkpoint(tmp_path / "m.safetensors", config=TINY)
    assert any(n.removeprefix("model.").removeprefix("diffusion_model.") in str(raised.value)
               for n in names)  # fmt: skip


def test_partial(tmp_path):
    weights = _weights()
    gone = [k for k in weights if k.startswith("patch_blocks.2.")]
    for key in gone:
        del weights[key]
    save_file(weights, tmp_path / "m.safetensors")
    text = (
        rf"lacks {len(gone)} of {len(network_shapes(TINY))} tensors: {gone[0]}, {gone[1]}, .*\.\."
    )
    with pytest.raises(errors.IncompleteCheckpointError, match=text) as raised:
        read_checkpoint(tmp_path / "m.safetensors", config=TINY)
    assert list(raised.value.missing) == gone


def test_partial_release_names_the_release(tmp_path):
    shapes = network_shapes(variant("sdxl-2kto4k").config)
    half = dict(list(shapes.items())[: len(shapes) // 2])
    half["lq_proj.latent_proj.0.weight"] = shapes["lq_proj.latent_proj.0.weight"]
    with pytest.raises(errors.IncompleteCheckpointError, match="tensors of sdxl-2kto4k: patch_b"):
        identify(half, tmp_path, prefix="", backbone="sdxl", variant=None)


def test_wrong_shape(tmp_path):
    weights = _weights()
    key = "patch_blocks.1.mlp_x.w1.weight"
    weights[key] = torch.zeros(7, 32)
    save_file(weights, tmp_path / "m.safetensors")
    text = rf"{key} must be \(85, 32\), got \(7, 32\)$"
    with pytest.raises(errors.CheckpointShapeError, match=text):
        read_checkpoint(tmp_path / "m.safetensors", config=TINY)


def test_unknown_tensors(tmp_path):
    weights = _weights() | {"lq_proj.image_conv.0.weight": torch.zeros(2)}
    save_file(weights, tmp_path / "m.safetensors")
    text = "1 tensors this network does not have, first lq_proj.image_conv.0.weight"
    with pytest.raises(errors.ForeignCheckpointError, match=text):
        read_checkpoint(tmp_path / "m.safetensors", config=TINY)


def test_one_name_under_two_prefixes(tmp_path):
    weights = _weights() | {"net.y_pos_embedding": torch.zeros(1, 5, 32)}
    save_file(weights, tmp_path / "m.safetensors")
    with pytest.raises(errors.CheckpointFormatError, match="two tensors named 'y_pos_embedding'"):
        read_checkpoint(tmp_path / "m.safetensors", config=TINY)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_not_finite(tmp_path, bad, stored, suffix):
    weights = _weights(dtype=stored)
    weights["patch_blocks.1.attn.qkv_x.weight"].view(-1)[1733] = bad
    path = tmp_path / f"m{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    text = "patch_blocks.1.attn.qkv_x.weight of .* holds NaN or infinity"
    with pytest.raises(errors.NonFiniteCheckpointError, match=text):
        read_checkpoint(path, config=TINY, dtype=torch.float32)


def test_every_tensor_is_checked_for_nan(tmp_path):
    path = tmp_path / "m.safetensors"
    weights = _weights()
    for key in ("y_pos_embedding", "lq_proj.gate_modules.0.log_alpha", "pit_lq_gate.log_alpha"):
        save_file(weights | {key: torch.full_like(weights[key], float("nan"))}, path)
        with pytest.raises(errors.NonFiniteCheckpointError, match=key):
            read_checkpoint(path, config=TINY)


def test_float16_overflow(tmp_path):
    weights = _weights(dtype=torch.float32)
    weights["final_layer.linear.bias"][0] = 1e6
    save_file(weights, tmp_path / "m.safetensors")
    text = "final_layer.linear.bias of .* does not fit into float16"
    with pytest.raises(errors.NonFiniteCheckpointError, match=text):
        read_checkpoint(tmp_path / "m.safetensors", config=TINY, dtype=torch.float16)
    read_checkpoint(tmp_path / "m.safetensors", config=TINY, dtype=torch.bfloat16)


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_quantised(tmp_path, stored):
    weights = _weights()
    weights["s_embedder.proj.weight"] = torch.zeros(32, 192).to(stored)
    save_file(weights, tmp_path / "m.safetensors")
    text = f"s_embedder.proj.weight of .* is {stored}; quantised weights are not read"
    with pytest.raises(errors.CheckpointFormatError, match=text):
        read_checkpoint(tmp_path / "m.safetensors", config=TINY)


def test_wrong_arguments(tmp_path):
    save_file(_weights(), tmp_path / "m.safetensors")
    with pytest.raises(
        errors.CheckpointError, match=r"dtype must be None or one of .*got torch.int"
    ):
        read_checkpoint(tmp_path / "m.safetensors", config=TINY, dtype=torch.int8)
    with pytest.raises(errors.UnknownNameError, match="Known: flux, "):
        read_checkpoint(tmp_path / "m.safetensors", config=TINY, backbone="fluxx")
    with pytest.raises(errors.UnknownNameError, match="Known: flux-2k"):
        read_checkpoint(tmp_path / "m.safetensors", variant="flux-3k")
    with pytest.raises(errors.CheckpointError, match=r"ema=True: .* no EMA weights, only plain"):
        read_checkpoint(tmp_path / "m.safetensors", config=TINY, ema=True)


# --- demo and hub ---------------------------------------------------------------------------------


def test_demo():
    try:
        loaded = read_checkpoint("demo")
    except errors.CheckpointNotFoundError as error:
        assert "reinstall pixeldiff" in str(error)  # noqa: PT017
        pytest.skip(str(error))
    assert (loaded.backbone, loaded.variant) == ("demo", None)
    assert loaded.config.lq_latent_channels == 16


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub client, offline, with an empty cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _cache_repository(cache, repo, files):
    root = cache / ("models--" + repo.replace("/", "--"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for name, weights in files.items():
        path = root / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(weights, path)
    return root / "snapshots" / commit


def test_hub_out_of_reach(hub):
    for name in ("someone/pid", "someone/pid:folder/model.pth"):
        text = "could not get .* of 'someone/pid' from the Hugging Face hub .*pass its path"
        with pytest.raises(errors.CheckpointNotFoundError, match=text):
            read_checkpoint(name)


def test_hub_cache(hub):
    weights = _weights()
    root = _cache_repository(hub, "someone/tiny", {"model.pth": weights})
    assert resolve("someone/tiny") == root / "model.pth"
    _same(read_checkpoint("someone/tiny:model.pth", config=TINY).state_dict, weights)


def test_hub_with_all_releases(hub):
    files = {variant(n).checkpoint_file: {"x": torch.zeros(1)} for n in ("flux-2k", "sd3-2k")}
    root = _cache_repository(hub, "someone/pid", files)
    text = r'(?s)2 checkpoints in \'someone/pid\'; name one as "someone/pid:FILE":.*flux.*sd3'
    with pytest.raises(errors.CheckpointNotFoundError, match=text):
        resolve("someone/pid")
    with pytest.raises(errors.ForeignCheckpointError, match=str(root / "checkpoints")):
        read_checkpoint("someone/pid", variant="sd3-2k")


def test_hub_client_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(errors.CheckpointNotFoundError, match="pip install huggingface_hub"):
        read_checkpoint("someone/pid")
