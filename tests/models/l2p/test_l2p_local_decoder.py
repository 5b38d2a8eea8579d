"""The local decoder: its four forms, its two halves, and where in the image each pixel looks."""

from __future__ import annotations

import pytest
import torch
from tiny_l2p import PATCHES, WIDTHS, draw, fill, relative
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, max_pool2d, silu

from pixeldiff.models.l2p import local_decoder
from pixeldiff.models.l2p.config import DECODERS
from pixeldiff.models.l2p.local_decoder import LocalDecoder, nearest

DIM = 10
each_form = pytest.mark.parametrize("form", DECODERS)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def decoder(form: str, dtype: torch.dtype = torch.float64) -> LocalDecoder:
    net = LocalDecoder(DECODERS[form].with_widths(WIDTHS), DIM)
    fill(net)
    return net.to(dtype)


def multiple(form: str) -> int:
    return {"1k": 16, "4k": 64, "8k": 128, "10k": 320}[form]


def inputs(form: str, batch: int = 1, cells: tuple[int, int] = (1, 2)) -> tuple[Tensor, Tensor]:
    height, width = (n * multiple(form) for n in cells)
    patch = PATCHES[form]
    x = draw(batch, 3, height, width).double()
    return x, draw(batch, height // patch, width // patch, DIM, seed=2).double()


def plain(form: str, net: LocalDecoder, x: Tensor, features: Tensor) -> Tensor:
    """The definition, layer by layer in the order of the published tables, channels first."""
    w = net.state_dict()

    def conv(name: str, h: Tensor) -> Tensor:
        weight = w[f"{name}.weight"]
        return conv2d(h, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)

    order = {
        "1k": ["1", "2", "3", "4"],
        "4k": ["0", "0b", "1", "2", "3", "4"],
        "8k": ["_8k", "0", "0b", "1", "2", "3", "4"],
        "10k": ["_10k_a", "0", "0b", "1", "2", "3"],
    }[form]
    h, skips = x, {}
    for level in order:
        skips[level] = silu(conv(f"enc{level}.0", h))
        h = max_pool2d(skips[level], 2)
    condition = interpolate(features.permute(0, 3, 1, 2), size=h.shape[-2:], mode="nearest")
    h = silu(conv("bottleneck.0", torch.cat((h, condition), 1)))
    for level in reversed(order):
        h = conv(f"up{level}.1", interpolate(h, scale_factor=2, mode="nearest"))
        h = silu(conv(f"dec{level}.0", torch.cat((h, skips[level]), 1)))
    return conv("out_conv", h)


@each_form
def test_is_its_definition(form):
    """In fp64: the split concatenations and the product before the resize are rounding apart."""
    net, given = decoder(form), inputs(form, batch=2)
    assert relative(net(*given), plain(form, net, *given)) < 1e-12


def test_features_are_narrowed_before_they_are_resized(monkeypatch):
    """In the 10K form their own grid has 64^2 cells of the bottleneck's 160^2."""
    net, (x, features), resized = decoder("10k"), inputs("10k"), []

    def counted(y, grid):
        resized.append((tuple(y.shape[1:]), grid))
        return nearest(y, grid)

    monkeypatch.setattr(local_decoder, "nearest", counted)
    net(x, features)
    assert resized == [((2, 4, WIDTHS[512]), (5, 10))]


def test_feature_rows_are_resized_as_pytorch_does():
    """64 cells on 160, the native 10K grid; and the other sizes it may have."""
    for before, after in ((64, 160), (2, 5), (4, 10), (6, 15), (512, 1280), (3, 3)):
        rows = torch.arange(before).double()[None, :, None, None].expand(1, before, 2, 1)
        want = interpolate(rows.permute(0, 3, 1, 2), size=(after, 4), mode="nearest")
        assert torch.equal(nearest(rows, (after, 4)), want.permute(0, 2, 3, 1))
    pattern = nearest(torch.arange(64)[None, :, None, None], (160, 1)).flatten()
    assert pattern[:10].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]


@each_form
def test_features_share_an_image(form):
    net = decoder(form)
    x, features = inputs(form, batch=2)
    features = torch.cat((features, features.flip(1) + 1))
    u = net(x, features)
    assert u.shape == (4, *x.shape[1:])
    for b in range(4):
        alone = net(x[b % 2 : b % 2 + 1], features[b : b + 1])
        assert relative(u[b : b + 1], alone) < 1e-12


@each_form
def test_encoding_does_not_see_the_features(form):
    net = decoder(form)
    x, features = inputs(form)
    encoded = net.encode(x)
    first = net.decode(encoded, features)
    assert relative(net.decode(encoded, -features), first) > 1e-3
    assert torch.equal(net.decode(encoded, features), first)


@pytest.mark.parametrize(
    ("form", "cells", "halo"),
    [("1k", 10, 64), ("4k", 10, 256), ("8k", 10, 512), ("10k", 4, 320)],
)
def test_shifting_image_and_features_shifts_the_output(form, cells, halo):
    """By one cell, or two in the 10K form; away from the borders, where zero padding is seen."""
    net, step = decoder(form), multiple(form)
    features_per_step = step // PATCHES[form]
    x = draw(1, 3, (cells + 1) * step, step).double()
    features = draw(1, (cells + 1) * features_per_step, features_per_step, DIM, seed=2).double()
    u = net(x[:, :, :-step], features[:, :-features_per_step])
    moved = net(x[:, :, step:], features[:, features_per_step:])
    want = u[:, :, halo + step : cells * step - halo]
    assert want.shape[2] >= step
    assert relative(moved[:, :, halo : halo + want.shape[2]], want) < 1e-12


@each_form
def test_image_of_another_type_is_rounded_first(form):
    net = decoder(form, torch.bfloat16)
    x, features = (t.float() for t in inputs(form))
    features = features.bfloat16()
    u = net(x, features)
    assert u.dtype == torch.float32
    assert torch.equal(u, net(x.bfloat16(), features))
