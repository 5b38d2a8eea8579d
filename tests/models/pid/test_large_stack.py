"""The latent branch's convolutions in place: the same values, and fewer large tensors."""

from __future__ import annotations

import copy

import pytest
import torch

from pixeldiff.errors import NonFiniteError
from pixeldiff.memory.live import LiveMemory
from pixeldiff.models.pid import PiDDecoder, large_stack
from pixeldiff.models.pid.config import PADDING_MODES, PiDConfig
from pixeldiff.models.pid.lq_projection import LQProjection
from tests.tiny_pid import CONFIG, tiny_caption, tiny_latent, tiny_net

GRID = (26, 18)  # of a latent of 13 x 9


def projection(dtype=torch.float32, **options) -> LQProjection:
    config = PiDConfig(**{**vars(CONFIG), "lq_hidden_dim": 16, "lq_num_res_blocks": 2, **options})
    torch.manual_seed(0)
    found = LQProjection(config, dtype=dtype, device="cpu")
    for p in found.parameters():
        torch.nn.init.normal_(p, 0.1, 0.3)
    return found.requires_grad_(False)


def banded(found, latent, grid, monkeypatch, band):
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(large_stack, "LARGE", 0)
        patch.setattr(large_stack, "_BAND", band)
        return found.features(latent, grid)


def check(found, latent, grid, monkeypatch, band):
    """At most twice as far from the values in fp64 as the layers as they are written, and four
    roundings of fp32: libraries choose their sums by size."""
    oracle = copy.deepcopy(found).double().features(latent.double(), grid)
    error = (found.features(latent, grid).double() - oracle).abs().max()
    got = (banded(found, latent, grid, monkeypatch, band).double() - oracle).abs().max()
    assert got <= 2 * error + 4 * torch.finfo(torch.float32).eps * oracle.abs().max()


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 100])
@pytest.mark.parametrize(("batch", "h", "w"), [(1, 13, 9), (2, 8, 11), (1, 1, 5), (3, 7, 1)])
def test_the_same_values(monkeypatch, batch, h, w, rows, dtype, mode):
    found = projection(dtype, lq_conv_padding_mode=mode)
    latent = tiny_latent(batch, h, w).to(dtype)
    grid = (2 * h, 2 * w)
    band = rows * batch * 16 * grid[1] * dtype.itemsize
    if mode == "reflect" and min(grid) < 2:
        pytest.skip("nothing to reflect")
    check(found, latent, grid, monkeypatch, band)


def test_scale_of_the_input(monkeypatch):
    found = projection()
    check(found, 1e-3 * tiny_latent(1, 13, 9), GRID, monkeypatch, 3000)


def test_nan_stays_where_it_is(monkeypatch):
    found, latent = projection(), tiny_latent(2, 13, 9)
    latent[1, 0, 5, 5] = float("nan")
    whole, got = found.features(latent, GRID), banded(found, latent, GRID, monkeypatch, 3000)
    assert got[0].isfinite().all()
    assert whole[1].isnan().any()
    assert torch.equal(whole.isnan(), got.isnan())


def test_only_large_tensors_and_without_gradients(monkeypatch):
    found, latent = projection(), tiny_latent(1, 8, 8)
    monkeypatch.setattr(large_stack, "convolved", None)
    grid = (16, 16)
    monkeypatch.setattr(large_stack, "LARGE", 16 * 16 * 16 * 4)
    with torch.no_grad():
        found.features(latent, grid)
    monkeypatch.setattr(large_stack, "LARGE", 16 * 16 * 16 * 4 - 1)
    found.requires_grad_(True)
    found.features(latent, grid).sum().backward()
    assert found.latent_proj[0].weight.grad.abs().max() > 0
    with torch.no_grad(), pytest.raises(TypeError):
        found.features(latent, grid)


def test_fewer_large_tensors_are_held(monkeypatch):
    found, latent = projection(), tiny_latent(1, 128, 128)
    grid, large = (256, 256), 16 * 256 * 256 * 4
    monkeypatch.setattr(large_stack, "_BAND", large // 64)
    peaks = {}
    for limit in (large, large - 1):
        monkeypatch.setattr(large_stack, "LARGE", limit)
        with torch.no_grad(), LiveMemory() as memory:
            found.features(latent, grid)
        peaks[limit] = memory.peak / large
    assert peaks[large - 1] < 2.4 < 3.3 < peaks[large]


def test_released_sizes_are_not_touched():
    for size, wide in ((4096, False), (16384, True)):
        grid = (size // 16, size // 16)
        assert large_stack.is_large(1, 512, grid, torch.bfloat16) == wide


def test_a_decode_in_tiles(monkeypatch):
    decoder, latent = PiDDecoder(tiny_net()), tiny_latent(1, 6, 6)
    options = {"caption": tiny_caption(), "seed": 0, "output": "pt", "debug": True, "tile": (4, 4)}
    whole = decoder.decode(latent, **options).images
    monkeypatch.setattr(large_stack, "LARGE", 0)
    assert (decoder.decode(latent, **options).images - whole).abs().max() < 1e-4
    decoder.net.lq_proj.latent_proj[3].block[2].weight.view(-1)[0] = float("inf")
    with pytest.raises(NonFiniteError) as caught:
        decoder.decode(latent, **options)
    assert caught.value.module == "lq_proj.latent_proj.3.block.2"
