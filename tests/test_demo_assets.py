"""The shipped demo model: small enough, complete, and better than enlarging its own decode."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import interpolate

from pixeldiff.models.autoencoder import ConvAutoencoder
from pixeldiff.models.pid import PiDConfig, PiDNet
from pixeldiff.text.tiny import TinyTextEmbedder

ASSETS = Path(__file__).resolve().parent.parent / "pixeldiff" / "assets" / "demo"


def _open(name: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    with safe_open(ASSETS / name, framework="pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def network() -> tuple[dict[str, str], PiDNet]:
    metadata, tensors = _open("pid.safetensors")
    net = PiDNet(PiDConfig.from_dict(json.loads(metadata["config"])), device="meta")
    net.load_state_dict({k: t.float() for k, t in tensors.items()}, strict=True, assign=True)
    return metadata, net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def autoencoder() -> ConvAutoencoder:
    return ConvAutoencoder.load(ASSETS / "autoencoder.safetensors")


@pytest.fixture(scope="module")
def astronaut() -> torch.Tensor:
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    picture = torch.from_numpy(data.astronaut()[:256, 96:352].copy())
    return picture.permute(2, 0, 1)[None].float() / 127.5 - 1


def _small(image: torch.Tensor) -> torch.Tensor:
    size = (image.shape[2] // 4, image.shape[3] // 4)
    return interpolate(image, size=size, mode="bicubic", antialias=True).clamp(-1, 1)


def _psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / (a.clamp(-1, 1) - b).square().mean()))


def _contrast(image: torch.Tensor) -> torch.Tensor:
    return image.diff(dim=2).square().mean() + image.diff(dim=3).square().mean()


@torch.no_grad()
def _decode(net, times, latent, caption=None, sigma=0.0, seed=0):
    """The four-step SDE sampler, written out."""
    generator = torch.Generator().manual_seed(seed)
    size = (latent.shape[2] * 32, latent.shape[3] * 32)
    embed = TinyTextEmbedder(net.config.txt_embed_dim, net.config.txt_max_length)
    text = embed.null() if caption is None else embed.encode(caption)
    condition = net.prepare(latent, text, torch.tensor([sigma]), size=size)
    x = torch.randn(1, 3, *size, generator=generator)
    for t, following in pairwise(times):
        x = x - t * net.step(x, torch.tensor([1000 * t]), condition)
        if following:
            noise = torch.randn(x.shape, generator=generator)
            x = (1 - following) * x + following * noise
    return x


def test_files_are_at_most_16_megabytes_nearly_all_bf16():
    names = ("pid.safetensors", "autoencoder.safetensors")
    assert sum((ASSETS / name).stat().st_size for name in names) <= 16 * 10**6
    for name in names:
        _, tensors = _open(name)
        exact = {key: t.numel() for key, t in tensors.items() if t.dtype != torch.bfloat16}
        assert sum(exact.values()) < 0.02 * sum(t.numel() for t in tensors.values()), exact
        assert all(torch.isfinite(t).all() for t in tensors.values())


def test_metadata_says_all_that_is_needed(network):
    metadata, net = network
    config = net.config
    assert metadata["backbone"] == "demo"
    assert (config.lq_latent_channels, config.latent_spatial_down_factor) == (16, 8)
    assert (config.lq_gate_type, config.pit_lq_inject) == ("sigma_aware_per_token", True)
    # The head widths of the released networks: the demo runs through the same kernels.
    assert (config.head_dim, config.pixel_head_dim) == (64, 72)
    sampling = json.loads(metadata["sampling"])
    assert sampling["t_list"] == [0.999, 0.866, 0.634, 0.342, 0.0]
    assert (sampling["type"], sampling["prediction"]) == ("sde", "velocity")
    assert "python -m training demo" in json.loads(metadata["training"])["command"]


def test_latent_is_normalised(autoencoder, astronaut):
    latent = autoencoder.encode(_small(astronaut))
    assert latent.shape == (1, 16, 8, 8)
    assert abs(latent.mean()) < 0.5
    assert 0.4 < latent.std() < 2.5


def test_autoencoder_reconstructs(autoencoder, astronaut):
    small = _small(astronaut)
    assert _psnr(autoencoder(small), small) > 24


def test_decoding_beats_bicubic_on_a_photograph(network, autoencoder, astronaut):
    metadata, net = network
    latent = autoencoder.encode(_small(astronaut)).bfloat16().float()
    small = autoencoder.decode(latent).clamp(-1, 1)
    bicubic = interpolate(small, scale_factor=4, mode="bicubic")
    decoded = _decode(net, json.loads(metadata["sampling"])["t_list"], latent)
    assert torch.isfinite(decoded).all()
    assert (decoded.abs() > 1.2).float().mean() < 0.01
    assert _psnr(decoded, astronaut) > _psnr(bicubic, astronaut) + 0.3
    assert _contrast(decoded) > 1.2 * _contrast(bicubic)  # sharper


def test_caption_reaches_the_picture(network, autoencoder, astronaut):
    metadata, net = network
    times = json.loads(metadata["sampling"])["t_list"]
    latent = autoencoder.encode(_small(astronaut))
    without = _decode(net, times, latent)
    assert not torch.equal(_decode(net, times, latent, ["an astronaut"]), without)


def test_noisy_latents_are_decoded_better_than_by_bicubic(network, autoencoder, astronaut):
    metadata, net = network
    times = json.loads(metadata["sampling"])["t_list"]
    latent = autoencoder.encode(_small(astronaut))
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    noisy = 0.7 * latent + 0.3 * noise
    decoded = _decode(net, times, noisy, sigma=0.3)
    bicubic = interpolate(autoencoder.decode(noisy).clamp(-1, 1), scale_factor=4, mode="bicubic")
    assert _psnr(decoded, astronaut) > _psnr(bicubic, astronaut) + 1


def test_tiny_embedder_is_the_same_on_every_machine():
    embed = TinyTextEmbedder(64, 16)
    out = embed.encode(["A red fox", ""])
    assert out.shape == (2, 16, 64)
    # Four tokens: the beginning and three words; the rest is zero.
    assert [int(row.any(-1).sum()) for row in out] == [4, 1]
    assert out[0, 1, :6].tolist() == pytest.approx([0, 0, 2**0.5, 0, -(2**0.5), 0])
    assert torch.equal(out[1:], embed.null())
    assert torch.equal(embed.encode("a RED fox!"), out[:1])


def test_tiny_embedder_spelling_order_and_length():
    embed = TinyTextEmbedder(64, 16)
    stripe, stripes, bricks = (embed.encode(word)[0, 1] for word in ("stripe", "stripes", "bricks"))
    assert stripe @ stripes > 2 * abs(stripe @ bricks)
    assert not torch.equal(embed.encode("red fox"), embed.encode("fox red"))
    long = " ".join(f"word{i}" for i in range(30))
    assert torch.equal(embed.encode(long), embed.encode(" ".join(long.split()[:15])))
    with pytest.raises(ValueError, match="must be positive, got 0 and 16"):
        TinyTextEmbedder(0, 16)


def test_tiny_embedder_does_not_depend_on_the_hash_seed():
    code = "from pixeldiff.text.tiny import TinyTextEmbedder as T; print(T().encode('cat').sum())"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ASSETS.parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
