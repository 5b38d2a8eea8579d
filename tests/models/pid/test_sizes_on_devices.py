"""One network call at many sizes: what is fused is as near to fp32 as plain PyTorch in bf16 is."""

from __future__ import annotations

import copy

import pytest
import torch
from devices import DEVICES

import pixeldiff
from bench import models
from pixeldiff.models.pid import PiDNet

CPU, CUDA = DEVICES
# 4096 and others between the released sizes, with odd numbers of patches among them.
CASES = [pytest.param(CPU, "demo", side, id=f"cpu-demo-{side}") for side in (32, 96, 224)] + [
    pytest.param("cuda", "flux-2k", side, id=f"cuda-flux-2k-{side}", marks=CUDA.marks)
    for side in (256, 544, 1024, 2048, 4096)
]


@pytest.fixture(scope="module")
def networks():
    """networks(device, config): in bf16, and in fp32 with the same weights."""
    made: dict[tuple[str, str], tuple[PiDNet, PiDNet]] = {}

    def of(device: str, config: str) -> tuple[PiDNet, PiDNet]:
        if (device, config) not in made:
            half = models.decoder(config, torch.device(device), "bf16").net
            made[device, config] = half, copy.deepcopy(half).float()
        return made[device, config]

    return of


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@torch.no_grad()
@pytest.mark.parametrize(("device", "config", "side"), CASES)
def test_as_near_to_fp32_as_plain_bf16(networks, device, config, side, record_property):
    half, whole = networks(device, config)
    given = models.inputs(half.config, side, 1, torch.device(device))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 3, side, side, generator=generator).to(device)
    kw = {"t": torch.tensor([634.0], device=device), "y": given.caption, "lq_latent": given.latent}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        got = half(x, **kw)
        with pixeldiff.backend("reference"):
            plain, want = half(x, **kw), whole(x, **kw)
    ours, theirs = rms(got - want), rms(plain - want)
    record_property("error_over_plain", ours / theirs)
    assert torch.isfinite(got).all()
    assert 0 < ours <= 1.25 * theirs
