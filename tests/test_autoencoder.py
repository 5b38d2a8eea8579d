"""The small autoencoder: geometry, normalised latent, files."""

from __future__ import annotations

import json
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pixeldiff.models.autoencoder import AutoencoderConfig, ConvAutoencoder

SMALL = AutoencoderConfig(widths=(4, 8, 8, 8), blocks=(0, 1, 1, 1))


@pytest.fixture
def model() -> ConvAutoencoder:
    torch.manual_seed(0)
    model = ConvAutoencoder(SMALL).eval().requires_grad_(False)
    model.latent_shift.uniform_(-1, 1)
    model.latent_scale.uniform_(0.5, 2)
    return model


def test_geometry_is_flux(model):
    latent = model.encode(torch.rand(2, 3, 40, 56))
    assert latent.shape == (2, 16, 5, 7)
    assert model.decode(latent).shape == (2, 3, 40, 56)
    assert ConvAutoencoder().config.factor == 8


def test_statistics_normalise_the_latent_and_decode_undoes_them(model):
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    latent, decoded = model.encode(image), model(image)
    shift, scale = model.latent_shift.clone(), model.latent_scale.clone()
    model.latent_shift.zero_()
    model.latent_scale.fill_(1)
    raw = model.encode(image)
    expected = (raw - shift[:, None, None]) / scale[:, None, None]
    torch.testing.assert_close(latent, expected)
    torch.testing.assert_close(model.decode(raw), decoded)


def test_a_block_of_the_picture_reaches_its_own_latent_cell(model):
    image = torch.zeros(1, 3, 64, 64)
    latent = model.encode(image)
    image[..., 40:48, 8:16] = 1
    change = (model.encode(image) - latent).abs().sum(1)[0]
    assert divmod(int(change.argmax()), 8) == (5, 1)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((3, 16, 16), r"must be \(B, 3, H, W\), got \(3, 16, 16\)"),
        ((1, 1, 16, 16), r"must be \(B, 3, H, W\)"),
        ((1, 3, 16, 20), "multiples of 8, got 16 x 20"),
    ],
)
def test_encode_names_a_bad_shape(model, shape, text):
    with pytest.raises(ValueError, match=text):
        model.encode(torch.zeros(shape))


def test_decode_names_a_bad_shape(model):
    with pytest.raises(ValueError, match=r"latent must be \(B, 16, h, w\), got \(1, 4, 2, 2\)"):
        model.decode(torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize(
    "values", [{"widths": (8,), "blocks": (1,)}, {"blocks": (1, 1)}, {"latent_channels": 0}]
)
def test_config_refuses(values):
    with pytest.raises(ValueError, match="AutoencoderConfig"):
        AutoencoderConfig(**values)


def test_file_round_trip(model, tmp_path):
    path = tmp_path / "autoencoder.safetensors"
    model.save(path, dtype=torch.float32, metadata={"training": {"steps": 3}})
    loaded = ConvAutoencoder.load(path)
    image = torch.rand(1, 3, 32, 24)
    assert loaded.config == SMALL
    assert torch.equal(loaded.encode(image), model.encode(image))
    assert torch.equal(loaded(image), model(image))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert list(tmp_path.iterdir()) == [path]


def test_bf16_file_keeps_statistics_in_fp32(model, tmp_path):
    path = tmp_path / "autoencoder.safetensors"
    model.save(path)
    stored = load_file(path)
    assert stored["encoder.0.weight"].dtype == torch.bfloat16
    assert torch.equal(stored["latent_scale"], model.latent_scale)
    image = torch.rand(1, 3, 32, 32)
    error = (ConvAutoencoder.load(path)(image) - model(image)).abs().max()
    assert 0 < error < 0.05


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        ConvAutoencoder.load(tmp_path / "none.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(1)}, foreign)
    with pytest.raises(ValueError, match="must have the metadata entry format"):
        ConvAutoencoder.load(foreign)
    foreign.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        ConvAutoencoder.load(foreign)


def test_wrong_tensors_are_named(model, tmp_path):
    path = tmp_path / "autoencoder.safetensors"
    model.save(path)
    tensors = load_file(path)
    tensors["decoder.0.bias"] = torch.zeros(5)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"decoder\.0\.bias, expected shape \(8,\), got \(5,\)"):
        ConvAutoencoder.load(path)


@pytest.mark.parametrize(
    "claimed",
    [
        {"widths": [8, 10**7], "blocks": [0, 1]},
        {"widths": [8, 10**12], "blocks": [0, 1]},
        {"widths": [8, 12], "blocks": [0, 10**12]},
        {"widths": [8] * 60, "blocks": [0] * 60},
        {"widths": [8, 12.5], "blocks": [0, 1]},
        {"widths": [8, 12], "blocks": [0, 1], "latent_channels": 10**9},
    ],
    ids=str,
)
def test_a_file_that_claims_to_be_large_takes_nothing(model, tmp_path, claimed):
    path = tmp_path / "autoencoder.safetensors"
    model.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, "config": json.dumps(claimed)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="does not fit its config"):
        ConvAutoencoder.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_statistics_only_rescale_the_latent():
    torch.manual_seed(0)
    model = ConvAutoencoder().eval().requires_grad_(False)
    for parameter in model.parameters():  # parts of a new one are zero and would hide a mistake
        parameter.normal_(0, 0.05)
    image = torch.rand(1, 3, 16, 24) * 2 - 1
    raw, picture = model.encode(image), model(image)
    model.latent_shift.copy_(torch.linspace(-3, 3, 16))
    model.latent_scale.copy_(torch.linspace(0.5, 2, 16))
    shift, scale = (t.view(1, -1, 1, 1) for t in (model.latent_shift, model.latent_scale))
    assert torch.allclose(model.encode(image), (raw - shift) / scale, atol=1e-5)
    assert torch.allclose(model.decode((raw - shift) / scale), picture, atol=1e-4)
