"""Latents and noise levels that cannot be right: said so, with what is; and no false alarm."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from tiny_pid import tiny_caption, tiny_latent, tiny_net

from pixeldiff.errors import LatentWarning
from pixeldiff.models.pid import PiDDecoder, from_pid_latent, to_pid_latent
from pixeldiff.models.pid.latent_checks import channels_hint, sigma_hint, warn_unnormalised

CHANNELS = {"flux": 16, "sdxl": 4, "qwenimage": 16, "sd3": 16, "zimage": 16}


def picture(channels: int, side: int = 32, seed: int = 0) -> torch.Tensor:
    """Of the statistics of a normalised latent: smooth parts and texture, std 1 in all."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, channels, side // 8, side // 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    x = smooth + 0.5 * torch.randn(1, channels, side, side, generator=generator)
    return x / x.std()


def told(latent, name) -> str | None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_unnormalised(latent, name, stacklevel=2)
    assert all(issubclass(w.category, LatentWarning) for w in caught)
    return str(caught[0].message) if caught else None


@pytest.mark.parametrize("name", ["flux", "zimage", "sdxl", "qwenimage"])
@pytest.mark.parametrize("seed", range(5))
def test_raw_latents_are_told(name, seed):
    z = picture(CHANNELS[name], seed=seed)
    raw = from_pid_latent(z, name, raw=True)
    text = told(raw, name)
    assert f'to_pid_latent(latent, "{name}", raw=True)' in text
    assert "about 1" in text
    assert told(to_pid_latent(raw, name, raw=True), name) is None
    batch = torch.cat((z, raw, z))
    assert told(batch, name) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_any_type(dtype):
    raw = from_pid_latent(picture(16), "flux", raw=True)
    assert told(raw.to(dtype), "flux") is not None
    assert told(picture(16).to(dtype), "flux") is None


def test_what_no_scaling_explains():
    assert "no scaling of its VAE explains that" in told(picture(16) * 100, "flux")


@pytest.mark.parametrize("name", CHANNELS)
def test_no_false_alarm(name):
    channels = CHANNELS[name]
    generator = torch.Generator().manual_seed(1)

    def noise(*size):
        return torch.randn(*size, generator=generator)

    for _ in range(20):
        assert told(noise(2, channels, 16, 16), name) is None  # sigma 1
        assert told(noise(1, channels, 8, 8), name) is None
    for side in (1, 2, 3, 7):
        assert told(100 * noise(1, channels, side, side), name) is None  # too small to say
    for seed in range(5):
        z = picture(channels, seed=seed)
        assert told(z, name) is None
        assert told(1.4 * z, name) is None
        for sigma in (0.1, 0.5, 0.9):
            assert told((1 - sigma) * z + sigma * noise(*z.shape), name) is None
    flat = noise(1, channels, 1, 1).expand(1, channels, 32, 32) * 3  # one colour, any mean
    assert told(flat, name) is None
    assert told(flat + 0.1 * noise(*flat.shape), name) is None
    half = flat.clone()
    half[..., 16:] *= -0.3  # two colours
    assert told(half / half.abs().amax() * 2, name) is None
    lines = torch.ones(1, channels, 32, 32)
    lines[..., ::2] = -1
    assert told(1.5 * lines, name) is None  # as much texture as there can be


def test_unknown_backbones_are_not_judged():
    for name in (None, "demo", "mine", "flux2", "dinov2", "siglip"):
        assert told(picture(16) * 50, name) is None


@pytest.mark.parametrize("options", [{}, {"memory": "4GB"}], ids=["plain", "budget"])
def test_the_decoder_warns_once_and_points_at_the_caller(options):
    decoder = PiDDecoder(tiny_net(), backbone="flux")
    raw = from_pid_latent(tiny_latent(1, 8, 8), "flux", raw=True)
    with pytest.warns(LatentWarning, match=r"to_pid_latent\(latent, .flux., raw=True\)") as caught:
        decoder.decode(raw, caption=tiny_caption(), steps=1, output="pt", **options)
    (warning,) = (w for w in caught if issubclass(w.category, LatentWarning))
    assert warning.filename == __file__


@pytest.mark.parametrize(
    ("channels", "words"),
    [
        (4, "4 channels are those of sdxl: load"),
        (128, "128 channels are those of flux2, flux2-klein-4b, flux2-klein-9b: load"),
        (768, "768 channels are those of dinov2: load"),
        (1152, "1152 channels are those of siglip: load"),
        (32, "raw flux2 latents, which pixeldiff.models.pid.to_pid_latent(raw=True)"),
        (64, "64 channels are those of packed tokens of flux, qwenimage, qwenimage-2512, which"),
        (3, ""),
    ],
)
def test_wrong_numbers_of_channels(channels, words):
    assert words in channels_hint(channels)
    assert bool(channels_hint(channels)) == bool(words)
    decoder = PiDDecoder(tiny_net())
    with pytest.raises(ValueError, match=r"latent must be \(B, 16, zh, zw\)") as caught:
        decoder.decode(torch.zeros(1, channels, 2, 2), caption=tiny_caption())
    assert words in str(caught.value)


def test_sixteen_channels_are_many():
    text = channels_hint(16)
    assert all(name in text for name in ("flux", "zimage", "sd3", "qwenimage"))
    assert "demo" not in text


@pytest.mark.parametrize(
    ("sigma", "words"),
    [
        (500, "if 500 is a timestep of 0 to 1000, sigma is 0.5"),
        (30.0, "if 30 is a percentage, sigma is 0.3"),
        (4.0, "sigma is 0.8 here; if it is a percentage, 0.04"),
        ([0.5, 999], "if 999 is a timestep of 0 to 1000, sigma is 0.999"),
        (5000, ""),
        (-0.1, ""),
        (math.nan, ""),
        (math.inf, ""),
    ],
)
def test_noise_levels_out_of_range(sigma, words):
    decoder = PiDDecoder(tiny_net())
    with pytest.raises(ValueError, match=r"sigma must be in \[0, 1\]") as caught:
        decoder.decode(tiny_latent(2), caption=tiny_caption(), sigma=sigma)
    assert words in str(caught.value)
    assert (";" in str(caught.value)) == bool(words)


def test_hints_begin_behind_one():
    assert sigma_hint(1.0) == ""
    assert "Karras" in sigma_hint(1.5)
