"""The trained latent branch, folded into the network, is what the sampler then shows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("scipy", reason="the training extra is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pixeldiff.models.pid import PiDConfig, PiDNet
from training.initialise import initialise
from training.latent_branch import fold, paint
from training.optimiser import MuonAdamW
from training.patch_stream import short_cut
from training.train_pid import (
    CONFIG,
    TIMES,
    gradient_energy,
    load_network,
    save_network,
    similarity,
)

SMALL = PiDConfig(
    **{
        **CONFIG.to_dict(),
        "hidden_size": 32,
        "num_groups": 2,
        "patch_depth": 2,
        "pixel_attn_hidden_size": 32,
        "lq_hidden_dim": 32,
        "lq_num_res_blocks": 1,
    }
)
SIZE = (64, 96)


@pytest.fixture
def painter() -> tuple[PiDNet, torch.Tensor, nn.Conv2d]:
    """A folded network, a latent and the head that was folded into it."""
    torch.manual_seed(0)
    net = PiDNet(SMALL).requires_grad_(False)
    initialise(net, 3)
    latent = torch.randn(2, 16, 2, 3)
    features = net.lq_proj.features(latent, (4, 6))
    # A head of low rank: the fold gives up the few feature directions of least variance.
    flat = features.transpose(0, 1).flatten(1)
    strong = torch.linalg.eigh(flat @ flat.T).eigenvectors[:, -12:]
    head = nn.Conv2d(32, 768, 1)
    with torch.no_grad():
        head.weight.copy_((torch.randn(768, 12) @ strong.T)[..., None, None] * 0.05)
    head.requires_grad_(False)
    fold(net, head, features, TIMES)
    return net, latent, head


@pytest.fixture
def folded(painter) -> tuple[PiDNet, torch.Tensor, torch.Tensor]:
    net, latent, head = painter
    return net, latent, paint(net, head, latent)


def _call(net: PiDNet, latent: torch.Tensor, x: torch.Tensor, t: float) -> torch.Tensor:
    v = net(x, torch.full((2,), 1000 * t), torch.zeros(2, 16, 64), lq_latent=latent)
    return x - t * v


@pytest.mark.parametrize("t", TIMES)
def test_every_call_shows_the_painting(folded, t):
    net, latent, painting = folded
    x = (1 - t) * painting + t * torch.randn(2, 3, *SIZE)
    error = (_call(net, latent, x, t) - painting).square().mean().sqrt()
    assert painting.std() > 0.1
    assert error < 0.02 * painting.std()


def test_noise_closes_the_gate_as_in_training(painter):
    net, latent, head = painter
    net.pit_lq_gate.log_alpha.fill_(0.5)
    sigma = torch.tensor([0.0, 0.6])
    clean, expected = paint(net, head, latent), paint(net, head, latent, sigma)
    x = 0.366 * expected + 0.634 * torch.randn(2, 3, *SIZE)
    v = net(
        x, torch.full((2,), 634.0), torch.zeros(2, 16, 64), lq_latent=latent, degrade_sigma=sigma
    )
    assert torch.allclose(clean[0], expected[0], atol=1e-5)
    assert (clean[1] - expected[1]).std() > 0.1 * clean.std()
    assert (x - 0.634 * v - expected).square().mean().sqrt() < 0.02 * clean.std()


def test_short_cut_is_the_call(folded):
    net, latent, painting = folded
    condition = net.prepare(latent, torch.zeros(2, 16, 64), None, size=SIZE)
    seen = short_cut(net, condition, 0.634, 2, torch.Generator().manual_seed(0))
    assert (seen - painting).square().mean().sqrt() < 0.02 * painting.std()


def test_bf16_file_shows_the_same(folded, tmp_path):
    from training.train_pid import Recipe

    net, latent, painting = folded
    save_network(net, tmp_path / "pid.safetensors", Recipe(), "test", 0)
    stored = load_network(tmp_path / "pid.safetensors")
    x = 0.658 * painting + 0.342 * torch.randn(2, 3, *SIZE)
    difference = _call(stored, latent, x, 0.342) - _call(net, latent, x, 0.342)
    assert difference.square().mean().sqrt() < 0.02 * painting.std()


def test_similarity_is_one_only_for_equals():
    a = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert similarity(a, a).item() == pytest.approx(1, abs=1e-5)
    assert similarity(a, a.flip(3)) < 0.2
    assert similarity(a, a + 0.02) > similarity(a, a + 0.2)


def test_gradient_energy_is_the_contrast_of_neighbours():
    steps = torch.arange(24.0).remainder(2)[None, None, None].expand(1, 3, 24, 24) * 0.5
    assert gradient_energy(steps).mean().item() == pytest.approx(0.5, rel=1e-3)
    assert gradient_energy(torch.zeros(1, 3, 24, 24)).max() < 0.011


def test_optimiser_orthogonalises_wide_convolutions_only():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 8, 1))
    net.to(memory_format=torch.channels_last)
    optimiser = MuonAdamW([(list(net.parameters()), 0.5)], 0.2)
    before = [p.detach().clone() for p in net.parameters()]
    hidden = net[0](torch.randn(8, 16, 8, 8))
    ((hidden * torch.randn(hidden.shape)).sum() + net[1](hidden).sum()).backward()
    optimiser.step(0.1)
    moved = [p.detach() - b for p, b in zip(net.parameters(), before, strict=True)]
    singular = torch.linalg.svdvals(moved[0].permute(0, 2, 3, 1).flatten(1))
    assert singular.min() > 0.4 * singular.max()
    # Adam's first step is the learning rate for every element; 0.2 * 0.1 * 0.5.
    assert moved[1].abs().mean().item() == pytest.approx(0.01, rel=1e-3)
    assert moved[2].abs().mean().item() == pytest.approx(0.01, rel=1e-3)


def test_optimiser_refuses_kernels_it_cannot_view():
    with pytest.raises(ValueError, match="channels-last"):
        MuonAdamW([(list(nn.Conv2d(16, 32, 3).parameters()), 1.0)], 0.1)
