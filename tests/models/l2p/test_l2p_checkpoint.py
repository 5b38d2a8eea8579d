"""Reading L2P checkpoints: what is accepted, what is recognised, and every refusal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_l2p import LATENT, captions, config, draw, network, relative
from torch import Tensor

from pixeldiff import errors
from pixeldiff.models.l2p import VARIANTS, L2PNet, L2PPipeline, load_net, read_checkpoint
from pixeldiff.models.l2p.checkpoint_geometry import identify, network_shapes
from pixeldiff.models.l2p.checkpoint_keys import split_names
from pixeldiff.models.l2p.config import Variant
from pixeldiff.models.l2p.pipeline import SAMPLING

TINY = config()
HERE = Path("model.safetensors")
PIXELS = [name for name in VARIANTS if name != "z-image"]


def weights(c=TINY) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in network(c).state_dict().items()}


def written(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=metadata or None)
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(L2PNet(TINY, device="meta").state_dict())
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The single-file naming, of which pad tokens are vectors."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block, _, part = name.partition(".attention.")
        if part in ("to_q.weight", "to_k.weight", "to_v.weight"):
            rows = [state[f"{block}.attention.to_{w}.weight"] for w in "qkv"]
            out[f"{block}.attention.qkv.weight"] = torch.cat(rows)
        elif part:
            other = {"to_out.0": "out", "norm_q": "q_norm", "norm_k": "k_norm"}
            out[f"{block}.attention.{other[part.removesuffix('.weight')]}.weight"] = tensor
        elif name.endswith("pad_token"):
            out[name] = tensor[0]
        else:
            out[name.replace("all_x_embedder.16-1", "x_embedder")] = tensor
    return out


# ---- What is read ------------------------------------------------------------------------------


def test_reads_what_was_saved(file):
    state = weights()
    loaded = read_checkpoint(written(file, state), config=TINY, dtype=None)
    same(loaded.state_dict, state)
    assert (loaded.config, loaded.variant) == (TINY, None)
    info = loaded.info
    assert (info.prefix, info.fused, info.ignored, info.rounded) == ("", False, {}, ())
    assert info.note == ""
    assert info.stored_dtypes == {"float32": len(state)}
    assert info.parameters == sum(t.numel() for t in state.values())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer.", "a.b.c.", "0."])
@pytest.mark.parametrize("naming", ["split", "fused"])
def test_prefixes_and_fused_names_give_the_same_network(file, prefix, naming):
    state = weights()
    stored = fused(state) if naming == "fused" else state
    stored = {prefix + k: v for k, v in stored.items()}
    if prefix:
        stored["vae.decoder.conv_in.weight"] = torch.zeros(3)
        stored["text_layers.0.attention_norm1.weight"] = torch.zeros(3)  # only looks like it
    loaded = read_checkpoint(written(file, stored), config=TINY, dtype=torch.float32)
    same(loaded.state_dict, state)
    assert (loaded.info.prefix, loaded.info.fused) == (prefix, naming == "fused")
    assert loaded.info.ignored == ({"outside the prefix": 2} if prefix else {})


def test_pickles_and_shards(tmp_path):
    state = weights()
    torch.save({"state_dict": state}, tmp_path / "model.pth")
    same(read_checkpoint(tmp_path / "model.pth", config=TINY, dtype=None).state_dict, state)
    names = list(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        written(tmp_path / shard, {k: state[k] for k in held})
    index = tmp_path / "m.safetensors.index.json"
    table = {k: shard for shard, held in shards.items() for k in held}
    index.write_text(json.dumps({"weight_map": table}))
    same(read_checkpoint(index, config=TINY, dtype=None).state_dict, state)


def test_geometry_from_metadata(file):
    state = weights()
    written(file, state, config=json.dumps(TINY.to_dict()))
    assert read_checkpoint(file).config == TINY
    written(file, state, config="{}x")
    with pytest.raises(
        errors.CheckpointFormatError, match=r"metadata 'config' of .* is not an L2P"
    ):
        read_checkpoint(file)


def test_the_latent_model_and_what_is_left_of_it(file):
    state = weights(LATENT)
    loaded = read_checkpoint(written(file, state), config=LATENT, dtype=torch.float32)
    assert loaded.state_dict.keys() == state.keys()
    pixels = weights()
    final = {k: v for k, v in state.items() if k.startswith("all_final_layer.")}
    assert len(final) == 4
    loaded = read_checkpoint(written(file, {**pixels, **final}), config=TINY, dtype=torch.float32)
    same(loaded.state_dict, pixels)
    assert loaded.info.ignored == {"final layer of the latent model": 4}


def test_mixed_types_become_bf16_and_losses_are_named(file):
    """Main blocks in fp32, the rest in bf16, as the 1K release: of the fp32 ones those that hold
    bf16 values lose nothing."""
    state = {k: v.bfloat16() for k, v in weights().items()}
    for name in state:
        if name.startswith("layers.1."):
            state[name] = state[name].float()
    exact = read_checkpoint(written(file, state), config=TINY)
    assert {t.dtype for t in exact.state_dict.values()} == {torch.bfloat16}
    assert exact.info.rounded == ()
    assert exact.info.stored_dtypes == {"bfloat16": len(state) - 15, "float32": 15}
    state["layers.1.ffn_norm1.weight"][3] += 1e-5
    state["layers.1.attention.to_q.weight"][3, 5] = 1 / 3
    lossy = read_checkpoint(written(file, state), config=TINY)
    assert set(lossy.info.rounded) == {
        "layers.1.ffn_norm1.weight",
        "layers.1.attention.to_q.weight",
    }
    assert lossy.info.note.startswith("2 tensors were stored more precisely than they are held")
    assert "layers.1.ffn_norm1.weight" in lossy.info.note


def test_load_net(file):
    state = weights()
    net = load_net(written(file, state), config=TINY, dtype=torch.float32)
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    x, y = draw(1, 3, 32, 48), captions(5)
    # Rounding apart: mapped weights are aligned otherwise than those in fresh memory.
    assert relative(net(x, 0.3, y), network(TINY)(x, 0.3, y)) < 1e-5


# ---- Which network it is -----------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_released_networks_are_recognised(name):
    assert identify(network_shapes(VARIANTS[name].config), HERE) is VARIANTS[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_fused_patch_embeddings_tell_their_patch(name):
    shapes = network_shapes(VARIANTS[name].config)
    patch = VARIANTS[name].config.patch_size
    meta = {k: torch.empty(v, device="meta") for k, v in shapes.items()}
    stored = {
        k.replace(f"all_x_embedder.{patch}-1", "x_embedder").replace(
            f"all_final_layer.{patch}-1", "final_layer"
        ): v
        for k, v in meta.items()
    }
    assert set(stored) != set(meta)
    assert {k: tuple(v.shape) for k, v in split_names(stored).items()} == shapes


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        *((name, lost) for name in VARIANTS for lost in ("layers.29.", "t_embedder.")),
        *((name, f"local_decoder.{lost}") for name in PIXELS for lost in ("out_conv", "enc1.")),
    ],
)
def test_incomplete_releases_name_what_they_lack(name, lost):
    shapes = network_shapes(VARIANTS[name].config)
    left = {k: v for k, v in shapes.items() if not k.startswith(lost)}
    with pytest.raises(errors.IncompleteCheckpointError, match=f"of the {name} network: ") as e:
        identify(left, HERE)
    assert set(e.value.missing) == set(shapes) - set(left)


def test_other_geometries_say_what_differs():
    changed = dataclasses.replace(VARIANTS["4k"].config, n_layers=28, cap_feat_dim=2048)
    with pytest.raises(errors.UnknownGeometryError) as e:
        identify(network_shapes(changed), HERE)
    text = str(e.value)
    assert "Nearest is 4k; what differs (released value): " in text
    assert "cap_feat_dim 2048 (2560)" in text
    assert "n_layers 28 (30)" in text
    assert "Pass config=L2PConfig(...)" in text


def test_a_released_network_is_named(file, monkeypatch):
    """By its shapes alone, and by a geometry that is stated."""
    monkeypatch.setitem(VARIANTS, "1k", Variant("1k", 64, TINY))
    written(file, weights())
    for given in (None, TINY):
        assert read_checkpoint(file, config=given).variant is VARIANTS["1k"]
    pipe = L2PPipeline.from_pretrained(file, device="cpu")
    assert (pipe.name, pipe.sampling) == ("L2P 1k", SAMPLING["1k"])
    assert pipe._size(None, None, None) == (64, 64)


def test_a_geometry_that_is_given_counts_before_the_files_own(file):
    written(file, weights(), config=json.dumps(config(n_layers=3).to_dict()))
    with pytest.raises(errors.IncompleteCheckpointError, match=r"layers\.2\."):
        read_checkpoint(file)
    assert read_checkpoint(file, config=TINY).config == TINY


# ---- What is refused ---------------------------------------------------------------------------


def test_other_models(file):
    with pytest.raises(errors.ForeignCheckpointError, match="is not a Z-Image or L2P checkpoint"):
        read_checkpoint(written(file, {"double_blocks.0.weight": torch.zeros(2)}))


def test_two_networks_in_a_file(file):
    state = weights()
    stored = {f"{p}.{k}": v.clone() for p in ("net", "ema") for k, v in state.items()}
    with pytest.raises(errors.CheckpointFormatError, match=r"holds 2 networks, .* ema., net."):
        read_checkpoint(written(file, stored), config=TINY)


def test_missing_wrong_and_unknown_tensors(file):
    state = weights()
    name = "layers.1.feed_forward.w2.weight"
    left = {k: v for k, v in state.items() if k != name}
    with pytest.raises(errors.IncompleteCheckpointError, match=f"lacks 1 of .* tensors: {name}"):
        read_checkpoint(written(file, left), config=TINY)
    wrong = {**state, name: state[name][:, :-1]}
    with pytest.raises(errors.CheckpointShapeError, match=rf"{name} must be \(48, 128\), got \(48"):
        read_checkpoint(written(file, wrong), config=TINY)
    with pytest.raises(errors.ForeignCheckpointError, match="1 tensors this network does not have"):
        read_checkpoint(written(file, {**state, "x.y": torch.zeros(1)}), config=TINY)
    with pytest.raises(errors.UnknownGeometryError, match=r"dim 48 \(3840\)"):
        read_checkpoint(written(file, state))


def test_values_it_refuses(file):
    state = weights()
    name = "layers.1.feed_forward.w2.weight"
    for bad in (torch.nan, torch.inf):
        broken = {**state, name: state[name].clone()}
        broken[name][3, 4] = bad
        with pytest.raises(errors.NonFiniteCheckpointError, match=f"{name} of .* holds NaN or inf"):
            read_checkpoint(written(file, broken), config=TINY)
    quantised = {**state, name: state[name].to(torch.int8)}
    with pytest.raises(errors.CheckpointFormatError, match=f"{name} of .* is torch.int8"):
        read_checkpoint(written(file, quantised), config=TINY)
    with pytest.raises(errors.CheckpointError, match=r"dtype must be None or one of"):
        read_checkpoint(written(file, state), config=TINY, dtype=torch.int8)


def test_damaged_and_absent_files(file, tmp_path):
    written(file, weights())
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(errors.CheckpointFormatError, match="is damaged or cut short"):
        read_checkpoint(file, config=TINY)
    with pytest.raises(errors.CheckpointNotFoundError):
        read_checkpoint(tmp_path / "none.safetensors")
