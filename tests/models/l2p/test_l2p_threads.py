"""Several threads, one pipeline or two: each gets the pixels it gets alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_l2p import captions, config, draw, network
from turns import StepByStep, Turns, together

from pixeldiff.models.l2p import L2PPipeline

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, gpu])]
Y = captions(5, 9, 33)

WAYS = {
    "whole": {"prompt_embeds": Y[0], "height": 32, "width": 48, "seed": 1},
    "large": {"prompt_embeds": Y[1], "height": 64, "width": 80, "seed": 2, "shift": 5.0},
    "guided": {
        "prompt_embeds": Y[:2],
        "negative_prompt_embeds": Y[2],
        "guidance_scale": 2.0,
        "height": 48,
        "width": 32,
        "seed": 3,
    },
    "tiles": {"prompt_embeds": Y[2], "height": 48, "width": 80, "seed": 4, "tile": (32, 32)},
    "same-tiles": {"prompt_embeds": Y[0], "height": 48, "width": 80, "seed": 8, "tile": (32, 32)},
    "picture": {"prompt_embeds": Y[0], "image": draw(1, 3, 32, 32).clamp(-1, 1), "seed": 5},
    "looked-at": {"prompt_embeds": Y[1], "height": 32, "width": 32, "seed": 6, "debug": True},
    "pieces": {
        "prompt_embeds": Y[1],
        "height": 96,
        "width": 96,
        "seed": 7,
        "decoder_memory": 400_000,
    },
}
# Each beside two others, on one; some on two.
NEIGHBOURS = list(zip(WAYS, [*WAYS][1:] + [*WAYS][:1], strict=True))
CASES = [(1, *ways) for ways in NEIGHBOURS] + [(2, *ways) for ways in NEIGHBOURS[::3]]


def generate(pipe, way, **more):
    options = {"num_inference_steps": 2, "strength": 1.0, "output_type": "pt", **WAYS[way], **more}
    return pipe(**options).images.cpu()


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(scope="module")
def net(device):
    return network(config()).to(device)


@pytest.fixture(scope="module")
def alone(net):
    return {way: generate(L2PPipeline(net, cuda_graphs=False), way) for way in WAYS}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_operation_by_operation(net, alone, case):
    """Whatever one thread does between two operations of the other."""
    pipes, *ways = case
    own = [L2PPipeline(net) for _ in range(pipes)]
    turns = Turns(2)
    works = [lambda p=p, w=w: generate(p, w) for p, w in zip((own * 2)[:2], ways, strict=True)]
    for way, got in zip(ways, together(works, turns), strict=True):
        assert torch.equal(got, alone[way]), way
    assert turns.passed > 100


@pytest.mark.parametrize("pipes", [1, 2])
def test_step_by_step(device, net, alone, pipes):
    """Freely within a step, on kernels of several threads or streams at once; again and again, so
    that on CUDA some are captured and replayed beside others."""
    ways = ["whole", "large", "tiles", "guided"]
    nets = [net] if pipes == 1 else [network(config()).to(device) for _ in range(2)]
    own = [L2PPipeline(n) for n in nets]
    for _ in range(4):
        step = StepByStep(len(ways))
        works = [
            lambda p=p, w=w, s=step: generate(p, w, callback=s)
            for p, w in zip(itertools.cycle(own), ways, strict=False)
        ]
        for way, got in zip(ways, together(works), strict=True):
            assert torch.equal(got, alone[way]), way
        assert step.met == 2
