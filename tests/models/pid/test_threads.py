"""Several threads, one decoder or two: each gets the pixels it gets alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_pid import tiny_caption, tiny_latent, tiny_net
from turns import StepByStep, Turns, together

from pixeldiff.models.pid import PiDDecoder
from pixeldiff.models.pid.variants import SamplingSettings

TEACHER = SamplingSettings(steps=4, times=None, stochastic=False, cfg_scale=2.5, shift=3.0)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, gpu])]

# What two threads ask for at once: different sizes, ways, captions, noise levels and steps.
WAYS = {
    "whole": {"size": (2, 3), "seed": 1},
    "large": {"size": (4, 6), "seed": 2, "sigma": 0.4},
    "batch": {"size": (3, 2), "seed": 3, "batch": 2, "sigma": [0.1, 0.9]},
    "tiles": {"size": (4, 6), "seed": 4, "tile": (2, 2)},
    "same-tiles": {"size": (4, 6), "seed": 9, "tile": (2, 2)},
    "other-tiles": {"size": (5, 4), "seed": 5, "tile": (3, 2), "overlap": 0, "tile_batch": 2},
    "alone": {"size": (4, 4), "seed": 6, "tile": (2, 2), "tile_mode": "independent"},
    "looked-at": {"size": (3, 3), "seed": 7, "debug": True},
    "ode": {"size": (2, 2), "seed": 8, "sample_type": "ode"},
}
# Each beside two others, on one; some on two.
NEIGHBOURS = list(zip(WAYS, [*WAYS][1:] + [*WAYS][:1], strict=True))
CASES = [(1, *ways) for ways in NEIGHBOURS] + [(2, *ways) for ways in NEIGHBOURS[::3]]


def decode(decoder, way, **more):
    given = dict(WAYS[way])
    latent = tiny_latent(given.pop("batch", 1), *given.pop("size"), seed=given["seed"])
    options = {"caption": tiny_caption(seed=given["seed"]), "output": "pt", **given, **more}
    return decoder.decode(latent.to(decoder.device), **options).images.cpu()


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(scope="module")
def net(device):
    return tiny_net().to(device)


@pytest.fixture(scope="module")
def alone(net):
    return {way: decode(PiDDecoder(net, cuda_graphs=False), way) for way in WAYS}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_operation_by_operation(net, alone, case):
    """Whatever one thread does between two operations of the other."""
    decoders, *ways = case
    own = [PiDDecoder(net, low_memory=i == 1) for i in range(decoders)]
    turns = Turns(2)
    works = [lambda d=d, w=w: decode(d, w) for d, w in zip((own * 2)[:2], ways, strict=True)]
    for way, got in zip(ways, together(works, turns), strict=True):
        assert torch.equal(got, alone[way]), way
    assert turns.passed > 100


@pytest.mark.parametrize("decoders", [1, 2])
def test_step_by_step(device, net, alone, decoders):
    """Freely within a step, on kernels of several threads or streams at once; again and again, so
    that on CUDA some are captured and replayed beside others."""
    ways = ["whole", "large", "tiles", "batch"]
    nets = [net] if decoders == 1 else [tiny_net().to(device) for _ in range(2)]
    own = [PiDDecoder(n) for n in nets]
    for _ in range(4):
        step = StepByStep(len(ways))
        works = [
            lambda d=d, w=w, s=step: decode(d, w, callback=s)
            for d, w in zip(itertools.cycle(own), ways, strict=False)
        ]
        for way, got in zip(ways, together(works), strict=True):
            assert torch.equal(got, alone[way]), way
        assert step.met == 4


def test_teachers(net):
    decoder = PiDDecoder(net, sampling=TEACHER)
    given = {"negative_caption": tiny_caption(seed=20)}
    ways = ["whole", "tiles", "alone"]
    expected = [decode(decoder, way, **given) for way in ways]
    turns = Turns(len(ways))
    works = [lambda w=w: decode(decoder, w, **given) for w in ways]
    for got, want in zip(together(works, turns), expected, strict=True):
        assert torch.equal(got, want)
    assert turns.passed > 100


def test_one_that_fails_beside_one_that_does_not(net, alone):
    decoder = PiDDecoder(net)

    def fails():
        with pytest.raises(ValueError, match="must be finite"):
            decode(decoder, "whole", caption=tiny_caption() * float("nan"))
        with pytest.raises(ZeroDivisionError):
            decode(decoder, "large", callback=lambda info: 1 / 0)

    _, got = together([fails, lambda: decode(decoder, "tiles")], Turns(2))
    assert torch.equal(got, alone["tiles"])
