"""Latent conventions: packing bit by bit, normalisation against the formulas, noise, capture."""

import math

import pytest
import torch

from pixeldiff.errors import LatentError, UnknownNameError
from pixeldiff.models.pid.backbones import BACKBONES
from pixeldiff.models.pid.latents import (
    BATCH_NORM_EPS,
    RAE_EPS,
    LatentStatistics,
    captured_sigma,
    from_capture,
    from_pid_latent,
    map_to_tokens,
    noise_latent,
    pack_2x2,
    patchify_2x2,
    rae_sigmas,
    round_to_bfloat16,
    to_pid_latent,
    tokens_to_map,
    unpack_2x2,
    unpatchify_2x2,
)


def _rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _flux2_statistics():
    g = torch.Generator().manual_seed(7)
    mean, var = torch.randn(128, generator=g), torch.rand(128, generator=g) + 0.1
    return mean, var, LatentStatistics.from_moments(mean, var, eps=BATCH_NORM_EPS)


# --- packing --------------------------------------------------------------------------------------


def test_2x2_packing_puts_every_cell_where_the_pipelines_do():
    z = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    tokens = pack_2x2(z)
    assert tokens.shape == (2, 2 * 3, 12)
    for c in range(3):
        for row in range(4):
            for col in range(6):
                token = (row // 2) * 3 + col // 2
                channel = c * 4 + (row % 2) * 2 + col % 2
                assert torch.equal(tokens[:, token, channel], z[:, c, row, col])
    assert torch.equal(unpack_2x2(tokens, (4, 6)), z)


def test_patchify_and_tokens_are_inverse_reshuffles():
    z = _rand(2, 32, 6, 4)
    packed = patchify_2x2(z)
    assert packed.shape == (2, 128, 3, 2)
    assert torch.equal(packed[:, 5 * 4 + 1 * 2 + 0, 2, 1], z[:, 5, 5, 2])
    assert torch.equal(unpatchify_2x2(packed), z)
    tokens = map_to_tokens(packed)
    assert torch.equal(tokens[:, 2 * 2 + 1], packed[:, :, 2, 1])
    assert torch.equal(tokens_to_map(tokens, (3, 2)), packed)


@pytest.mark.parametrize("packed", [None, True])
def test_packed_latents(packed):
    z = _rand(2, 16, 4, 6)
    for name in ("flux", "qwenimage", "qwenimage-2512"):
        assert torch.equal(to_pid_latent(pack_2x2(z), name, packed=packed, grid=(4, 6)), z)
        assert torch.equal(from_pid_latent(z, name, packed=True), pack_2x2(z))
    z2 = _rand(1, 128, 3, 5)
    for name in ("flux2", "flux2-klein-4b"):
        tokens = map_to_tokens(z2)
        assert torch.equal(to_pid_latent(tokens, name, packed=packed, grid=(3, 5)), z2)
        assert torch.equal(from_pid_latent(z2, name, packed=True), tokens)
    siglip = _rand(1, 1152, 16, 16)
    assert torch.equal(to_pid_latent(map_to_tokens(siglip), "siglip", packed=packed), siglip)


# --- normalisation --------------------------------------------------------------------------------

QWEN_MEAN_0, QWEN_STD_0, QWEN_MEAN_15, QWEN_STD_15 = -0.7571, 2.8184, -0.2921, 1.9160


@pytest.mark.parametrize(
    ("name", "channels", "formula"),
    [
        ("flux", 16, lambda z: 0.3611 * (z - 0.1159)),
        ("zimage-turbo", 16, lambda z: 0.3611 * (z - 0.1159)),
        ("sd3", 16, lambda z: 1.5305 * (z - 0.0609)),
        ("sdxl", 4, lambda z: 0.13025 * z),
    ],
)
def test_scale_and_shift(name, channels, formula):
    z = _rand(2, channels, 4, 6)
    ours = to_pid_latent(z, name, raw=True)
    torch.testing.assert_close(ours.double(), formula(z.double()), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(from_pid_latent(ours, name, raw=True), z)


def test_qwen_has_statistics_per_channel_and_a_time_axis():
    z = _rand(2, 16, 1, 4, 6)
    ours = to_pid_latent(z, "qwenimage", raw=True)
    assert ours.shape == (2, 16, 4, 6)
    torch.testing.assert_close(ours[:, 0], (z[:, 0, 0] - QWEN_MEAN_0) / QWEN_STD_0)
    torch.testing.assert_close(ours[:, 15], (z[:, 15, 0] - QWEN_MEAN_15) / QWEN_STD_15)
    torch.testing.assert_close(from_pid_latent(ours, "qwenimage", raw=True), z[:, :, 0])
    with pytest.raises(LatentError, match=r"\(B, 16, zh, zw\), got \(2, 16, 2, 4, 6\)"):
        to_pid_latent(_rand(2, 16, 2, 4, 6), "qwenimage")


def test_flux2_is_patchified_then_batch_normed():
    mean, var, statistics = _flux2_statistics()
    z = _rand(2, 32, 6, 4)
    for name in ("flux2", "flux2-klein-9b"):
        ours = to_pid_latent(z, name, raw=True, statistics=statistics)
        assert ours.shape == (2, 128, 3, 2)
        c, row, col = 9, 5, 2
        channel = c * 4 + (row % 2) * 2 + col % 2
        expected = (z[:, c, row, col] - mean[channel]) / (var[channel] + 1e-4).sqrt()
        torch.testing.assert_close(ours[:, channel, row // 2, col // 2], expected)
        back = from_pid_latent(ours, name, raw=True, statistics=statistics)
        torch.testing.assert_close(back, z)


def test_dinov2_has_statistics_per_element():
    mean, var = _rand(768, 32, 32), _rand(768, 32, 32, seed=1).square()
    statistics = LatentStatistics.from_moments(mean, var, eps=RAE_EPS)
    z = _rand(1, 768, 32, 32, seed=2)
    ours = to_pid_latent(z, "dinov2", raw=True, statistics=statistics)
    torch.testing.assert_close(ours, (z - mean) / (var + 1e-5).sqrt())
    back = from_pid_latent(ours, "dinov2", raw=True, statistics=statistics)
    torch.testing.assert_close(back, z, atol=1e-5, rtol=1e-5)


def test_siglip_is_layer_normed_over_channels():
    z = 3 * _rand(1, 1152, 16, 16) + 5
    ours = to_pid_latent(z, "siglip", raw=True)
    d = z.double()
    mean, var = d.mean(1, keepdim=True), d.var(1, keepdim=True, correction=0)
    torch.testing.assert_close(
        ours.double(), (d - mean) / (var + 1e-6).sqrt(), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(to_pid_latent(map_to_tokens(z), "siglip", raw=True), ours)
    with pytest.raises(LatentError, match="not recoverable"):
        from_pid_latent(ours, "siglip", raw=True)


@pytest.mark.parametrize("name", [n for n, b in BACKBONES.items() if b.grid is None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalised_latents_pass_unchanged_as_fp32(name, dtype):
    z = _rand(1, BACKBONES[name].channels, 4, 6).to(dtype)
    ours = to_pid_latent(z, name)
    assert ours.dtype is torch.float32
    assert torch.equal(ours, z.float())
    assert torch.equal(from_pid_latent(ours, name), ours)


def test_given_statistics_replace_the_published():
    z = _rand(1, 16, 2, 2)
    statistics = LatentStatistics.from_scale_shift(0.5, 2.0)
    assert torch.equal(to_pid_latent(z, "zimage", raw=True, statistics=statistics), (z - 2) * 0.5)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "name", "options", "text"),
    [
        ((1, 4, 8, 8), "flux", {}, r"normalised latent of flux is \(B, 16, zh, zw\), got \(1, 4"),
        ((16, 8, 8), "sd3", {}, "sd3 latents are never packed"),
        ((1, 32, 8, 8), "flux2", {}, "with 32 channels pass raw=True"),
        ((1, 128, 8, 8), "flux2", {"raw": True}, "with 128 channels pass raw=False"),
        ((1, 32, 7, 8), "flux2", {"raw": True}, r"even height and width, got \(7, 8\)"),
        ((1, 32, 8, 8), "flux2", {"raw": True}, "running_mean, vae.bn.running_var, eps=BATCH"),
        ((1, 768, 32, 32), "dinov2", {"raw": True}, "eps=RAE_EPS"),
        ((1, 768, 16, 32), "dinov2", {}, r"fixed grid \(32, 32\), got \(16, 32\)"),
        ((1, 24, 64), "flux", {}, "need grid=.*24 tokens do not tell"),
        ((1, 24, 64), "flux", {"grid": (8, 8)}, r"even numbers with zh \* zw = 96 for 24 flux"),
        ((1, 24, 64), "flux", {"grid": (3, 32)}, "even numbers"),
        ((1, 24, 60), "flux", {"grid": (8, 12)}, r"\(B, tokens, 64\), got \(1, 24, 60\)"),
        ((1, 6, 128), "flux2", {"grid": (2, 4)}, r"grid=.* with zh \* zw = 6 for 6 flux2 tokens"),
        ((1, 24, 64), "flux", {"raw": True, "grid": (8, 12)}, "always normalised"),
        ((1, 24, 64), "flux", {"packed": False}, "for tokens pass packed=True"),
        ((1, 16, 8, 8), "demo", {"raw": True}, "demo autoencoder's latents have no raw form"),
        ((0, 16, 8, 8), "flux", {}, r"empty, got shape \(0, 16, 8, 8\)"),
    ],
)
def test_wrong_latents(shape, name, options, text):
    with pytest.raises(LatentError, match=text):
        to_pid_latent(torch.zeros(shape), name, **options)


def test_wrong_values_and_names():
    z = torch.zeros(1, 16, 2, 2)
    with pytest.raises(UnknownNameError, match="Known: flux,"):
        to_pid_latent(z, "flux3000")
    with pytest.raises(LatentError, match=r"float32, float16 or bfloat16, got torch.float64"):
        to_pid_latent(z.double(), "flux")
    with pytest.raises(LatentError, match=r"must be a torch.Tensor, got list"):
        to_pid_latent([1], "flux")
    for bad in (math.nan, math.inf):
        z[0, 3, 1, 1] = bad
        with pytest.raises(LatentError, match=r"finite, got 1 .* channel 3, row 1, column 1"):
            to_pid_latent(z, "flux")
    with pytest.raises(LatentError, match="do not pack"):
        from_pid_latent(torch.zeros(1, 16, 2, 2), "sd3", packed=True)
    with pytest.raises(LatentError, match="must be even"):
        from_pid_latent(torch.zeros(1, 16, 3, 2), "flux", packed=True)
    with pytest.raises(LatentError, match="packed or raw"):
        from_pid_latent(torch.zeros(1, 16, 2, 2), "flux", packed=True, raw=True)


def test_wrong_statistics():
    mean, var, _ = _flux2_statistics()
    with pytest.raises(LatentError, match=r"got \(128,\) and \(64,\)"):
        LatentStatistics.from_moments(mean, var[:64], eps=BATCH_NORM_EPS)
    with pytest.raises(LatentError, match="finite and var >= 0"):
        LatentStatistics.from_moments(mean, -var, eps=BATCH_NORM_EPS)
    short = LatentStatistics.from_moments(mean[:64], var[:64], eps=BATCH_NORM_EPS)
    with pytest.raises(LatentError, match=r"statistics.shift must be one of .*got \(64, 1, 1\)"):
        to_pid_latent(torch.zeros(1, 32, 4, 4), "flux2", raw=True, statistics=short)
    with pytest.raises(LatentError, match="take no statistics"):
        to_pid_latent(torch.zeros(1, 1152, 16, 16), "siglip", raw=True, statistics=short)


# --- noise ----------------------------------------------------------------------------------------


def test_noise_formulas():
    s = 0.3
    for name, keep in (("flux", 1 - s), ("siglip", 1 - s), ("sdxl", math.sqrt(1 - s * s))):
        b = BACKBONES[name]
        z = _rand(2, b.channels, *(b.grid or (4, 6)))
        eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
        ours = noise_latent(z, s, name, torch.Generator().manual_seed(5))
        torch.testing.assert_close(ours, keep * z + s * eps)
        assert torch.equal(noise_latent(z, s, name, 5), ours)


def test_sigma_zero_is_the_latent_and_one_is_noise():
    z = _rand(1, 4, 4, 6)
    assert torch.equal(noise_latent(z, 0.0, "sdxl", 1), z)
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(noise_latent(z, 1.0, "sdxl", 1), eps)


def test_noise_per_image():
    z = _rand(2, 16, 4, 6)
    both = noise_latent(z, torch.tensor([0.2, 0.6]), "sd3", [3, 4])
    assert torch.equal(both[:1], noise_latent(z[:1], 0.2, "sd3", 3))
    assert torch.equal(both[1:], noise_latent(z[1:], 0.6, "sd3", 4))


def test_noise_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    noise_latent(_rand(1, 16, 2, 2), 0.5, "flux", 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_refusals():
    z = _rand(2, 16, 2, 2)
    for sigma in (-0.1, 1.1, math.nan):
        with pytest.raises(LatentError, match=r"sigma must be in \[0, 1\]"):
            noise_latent(z, sigma, "flux", 1)
    with pytest.raises(LatentError, match=r"number or \(B,\) = \(2,\), got \(3,\)"):
        noise_latent(z, torch.zeros(3), "flux", 1)
    with pytest.raises(LatentError, match=r"generator or 2 .* got 3"):
        noise_latent(z, 0.1, "flux", [1, 2, 3])
    with pytest.raises(LatentError, match="got NoneType"):
        noise_latent(z, 0.1, "flux", None)


def test_round_to_bfloat16():
    z = torch.tensor([1.0, 1.001, -3.14159])
    assert round_to_bfloat16(z).tolist() == [1.0, 1.0, -3.140625]


# --- capture --------------------------------------------------------------------------------------


def test_flow_matching_captures_pass_unchanged():
    sigmas = [1.0, 0.9, 0.5, 0.1]
    tokens = _rand(1, 6, 64).bfloat16()
    latent, sigma = from_capture(tokens, "flux", 2, sigmas=sigmas)
    assert sigma == 0.5
    assert torch.equal(latent, tokens.float())
    assert captured_sigma("flux", 3, sigmas=sigmas) == 0.0  # finished: clean, whatever is listed


def test_sdxl_captures_become_variance_preserving():
    sigmas = [14.6, 3.0, 0.75, 0.0]
    z = _rand(1, 4, 2, 2)
    latent, sigma = from_capture(z, "sdxl", 2, sigmas=sigmas)
    assert sigma == pytest.approx(0.6)
    torch.testing.assert_close(latent, z / 1.25)
    final, sigma = from_capture(z, "sdxl", 3, sigmas=sigmas)
    assert sigma == 0.0
    assert torch.equal(final, z)


def test_sdxl_capture_agrees_with_noising():
    """z + s_e eps, converted, is what noise_latent makes at the converted sigma."""
    z = _rand(1, 4, 2, 2)
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(9))
    latent, sigma = from_capture(z + 0.75 * eps, "sdxl", 1, sigmas=[3.0, 0.75, 0.1])
    torch.testing.assert_close(latent, noise_latent(z, sigma, "sdxl", 9))


def test_rae_schedule():
    sigmas = rae_sigmas(50)
    shift = 13.8564
    assert len(sigmas) == 51
    assert sigmas[0] == 1.0
    t = 1 - 0.999 * 44 / 50
    assert sigmas[44] == pytest.approx(shift * t / (1 + (shift - 1) * t), rel=1e-5)
    assert captured_sigma("dinov2", 44, steps=50) == sigmas[44]
    assert captured_sigma("dinov2", 50, steps=50) == 0.0


def test_capture_refusals():
    with pytest.raises(LatentError, match="flux needs sigmas=, the scheduler's steps"):
        captured_sigma("flux", 3, steps=28)
    with pytest.raises(LatentError, match="from 0 to 2, got 3"):
        captured_sigma("flux", 3, sigmas=[1, 0.5, 0])
    with pytest.raises(LatentError, match="5 steps have 6 sigmas, got 3"):
        captured_sigma("flux", 1, steps=5, sigmas=[1, 0.5, 0])
    with pytest.raises(LatentError, match=r"must lie in \[0, 1\], sigmas\[0\] is 14.6"):
        captured_sigma("flux", 0, sigmas=[14.6, 0])


def test_advised_capture_steps():
    advice = {n: (b.capture.steps, b.capture.after) for n, b in BACKBONES.items() if b.capture}
    assert advice["flux"] == advice["sd3"] == (28, (24, 24))
    assert advice["sdxl"] == (30, (26, 26))
    assert advice["flux2"] == advice["zimage"] == (50, (46, 46))
    assert advice["qwenimage-2512"] == (50, (44, 44))
    assert advice["siglip"] == (50, (44, 48))
    assert BACKBONES["zimage-turbo"].capture.final_only
    assert BACKBONES["flux2-klein-4b"].capture.final_only
    assert not BACKBONES["flux"].capture.final_only
