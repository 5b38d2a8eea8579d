"""The PiD goldens on a CPU and a GPU: in fp32 within their tolerances, in bf16 beside the released
network under autocast, in fp8 beside what fp8 itself costs; and the errors that docs/precision.md
states of bf16 and fp8."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from devices import each_device

from bench import precision
from pixeldiff.models import fp8
from pixeldiff.models.pid import PiDConfig, PiDNet
from pixeldiff.models.pid.decoder import PiDDecoder
from pixeldiff.verify import _runner
from pixeldiff.verify.golden import Golden, compare, read_golden

PUBLISHED = Path(__file__).resolve().parents[3] / "bench/results/epyc-2core/precision.json"
ON_CPU = ("comp_positional", "comp_pit_block")  # they make tables without a device


@pytest.fixture(autouse=True)
def _exact_and_alone():
    """fp32 convolutions in fp32, and no gradients."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def on(device: str, golden: Golden) -> Golden:
    tensors = {k: v.to(device) for k, v in golden.tensors.items()}
    return dataclasses.replace(golden, tensors=tensors)


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def network(golden: Golden, device: str) -> PiDNet:
    net = PiDNet(PiDConfig.from_dict(golden.meta["config"]), device=device)
    net.load_state_dict(golden.weights())
    return net


def call(net: PiDNet, golden: Golden) -> torch.Tensor:
    x, t, y = (golden.tensors[f"in.{k}"] for k in "xty")
    latent, sigma = golden.get("in.lq_latent"), golden.get("in.degrade_sigma")
    return net(x, t, y, lq_latent=latent, degrade_sigma=sigma)


@each_device
def test_fp32(pid_golden, device):
    golden = read_golden(pid_golden)
    if golden.name in ON_CPU and device != "cpu":
        pytest.skip("checked through the networks")
    with torch.device(device), torch.inference_mode():
        got = _runner(golden)(on(device, golden))
    rows = [compare(golden, key, got[key].cpu()) for key in golden.expected()]
    misses = [f"{r.key}: {r.error:.3g} > {r.tolerance:.3g}" for r in rows if not r.ok]
    assert rows
    assert not misses


@each_device
def test_bf16_is_as_good_as_released(pid_golden, device, record_property):
    """Relative RMS error of bf16, in units of that of the released network under autocast."""
    golden = read_golden(pid_golden)
    if golden.get("info.v_bf16ac") is None:
        pytest.skip("states no bf16 output")
    golden = on(device, golden)
    net = network(golden, device).bfloat16()
    v = call(net.pack_() if device == "cuda" else net, golden)
    want, autocast = golden.tensors["out.v"], golden.tensors["info.v_bf16ac"]
    ours, theirs = rms(v - want), rms(autocast - want)
    record_property("bf16_error_over_released", ours / theirs)
    assert 0 < ours <= 1.25 * theirs


@each_device
def test_fp8_costs_what_fp8_costs(pid_golden, device, record_property):
    """On a GPU, whose products sum in another way, no more than on the CPU; and more than bf16."""
    golden = read_golden(pid_golden)
    if golden.get("info.v_bf16ac") is None:
        pytest.skip("states no output of a whole network")
    if fp8.why_not(torch.device(device)) is not None:
        pytest.skip(fp8.why_not(torch.device(device)))
    want = golden.tensors["out.v"]
    plain = network(golden, "cpu").bfloat16()
    low = copy.deepcopy(plain).quantize_()
    bound = rms(call(low, golden) - want)
    assert bound > rms(call(plain, golden) - want)
    low = network(golden, device).bfloat16().quantize_()
    v = call(low.pack_() if device == "cuda" else low, on(device, golden))
    error = rms(v.cpu() - want)
    record_property("fp8_error_over_cpu", error / bound)
    assert 0 < error <= 1.1 * bound


def published(found: list[precision.Error], stated: list[precision.Error]) -> None:
    """Each within a tenth of what is stated, or below it."""
    want = {e.name: e for e in stated}
    assert {e.name for e in found} == want.keys()
    over = [
        f"{e.name} {p}: {getattr(e, p):.4f} > {getattr(want[e.name], p):.4f}"
        for e in found
        for p in precision.LOW
        if not 0 < getattr(e, p) <= 1.1 * getattr(want[e.name], p)
    ]
    assert not over


@each_device
def test_published_errors_at_released_width(device):
    published(precision.at_released_width(torch.device(device)), precision.load(PUBLISHED).released)


def in_a_decode(device: str) -> list[precision.Error]:
    """Of the demo's layers and blocks in a decode of noise without a caption."""
    decoders = {
        p: PiDDecoder.from_pretrained("demo", device=device, precision=p)
        for p in ("fp32", *precision.LOW)
    }
    nets = {p: copy.deepcopy(d.net) for p, d in decoders.items()}
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 16, 4, 4, generator=generator).bfloat16().float().to(device)
    given = precision.Input("noise", "", np.zeros((128, 128, 3), np.uint8), latent, "")
    layers, blocks = precision.in_a_decode(nets, decoders["fp32"], given)
    return layers + blocks


@each_device
def test_errors_in_a_decode(device):
    """Those published are of a photograph: their mean over the layers is that of any picture, each
    is held against this CPU's."""
    found, stated = in_a_decode(device), precision.load(PUBLISHED)
    published(found, in_a_decode("cpu"))
    for p in precision.LOW:
        means = [
            np.mean([getattr(e, p) for e in errors])
            for errors in (found[: len(stated.layers)], stated.layers)
        ]
        assert means[0] <= 1.1 * means[1]
