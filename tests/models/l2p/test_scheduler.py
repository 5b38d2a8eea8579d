"""The schedule against the golden tables, bit for bit, and against diffusers' scheduler."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from pixeldiff.models.l2p.scheduler import schedule


def test_golden_tables(golden_dir):
    tables = load_file(golden_dir / "l2p" / "sched_tables.safetensors")
    names = {name.rpartition(".")[0] for name in tables}
    assert len(names) == 48
    for name in names:
        n, rest = name.removeprefix("N").split(".shift")
        shift, strength = rest.split(".strength")
        s = schedule(int(n), shift=float(shift), strength=float(strength))
        assert s.steps == int(n)
        assert s.sigmas[-1] == 0
        assert torch.equal(torch.tensor(s.sigmas[:-1]), tables[f"{name}.sigmas"])
        timesteps = tables[f"{name}.timesteps"]
        assert torch.equal(torch.tensor(s.timesteps), timesteps)
        assert torch.equal(torch.tensor(s.times), (1000 - timesteps) / 1000)


def test_known_values():
    assert schedule(1).sigmas == (1.0, 0.0)
    assert schedule(1).times == (0.0,)
    assert schedule(4).sigmas == pytest.approx((1, 0.9, 0.75, 0.5, 0))
    # The shift comes after the strength: 0.6 starts at 1.8 / 2.2.
    assert schedule(5, strength=0.6).sigmas[0] == pytest.approx(1.8 / 2.2)


@pytest.mark.parametrize("steps", [1, 3, 30])
def test_against_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    import numpy as np

    other = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    other.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    assert schedule(steps).sigmas == pytest.approx(other.sigmas.tolist(), abs=2e-7)


@pytest.mark.parametrize(
    ("steps", "strength", "made"),
    [(5, 0.6, 3), (10, 0.25, 3), (4, 0.1, 1), (4, 1.0, 4), (1, 1e-20, 1)],
)
def test_skipping_keeps_the_end_of_the_whole_schedule(steps, strength, made):
    s = schedule(steps, strength=strength, strength_rule="skip")
    assert s.steps == made
    assert s.sigmas == schedule(steps).sigmas[-made - 1 :]
    assert s.times == schedule(steps).times[-made:]


def test_bf16_times_are_those_of_the_release():
    rounded, exact = schedule(30, time_dtype="bf16"), schedule(30)
    assert [1000 * t for t in rounded.times[:6]] == pytest.approx([0, 12, 24, 36, 48, 64], abs=1e-4)
    assert rounded.sigmas == exact.sigmas
    for steps in (30, 50):
        pairs = zip(schedule(steps, time_dtype="bf16").times, schedule(steps).times, strict=True)
        assert 1e-3 < max(abs(a - b) for a, b in pairs) < 4e-3
        assert len(set(schedule(steps, time_dtype="bf16").times)) == steps


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"steps": True}, "steps must be an integer >= 1, got True"),
        ({"steps": 2.0}, "steps must be an integer >= 1, got 2.0"),
        ({"shift": 0}, "shift must be a positive number, got 0"),
        ({"shift": float("nan")}, "shift must be a positive number, got nan"),
        ({"strength": 0}, r"strength must be in \(0, 1\], got 0"),
        ({"strength": 1.1}, r"strength must be in \(0, 1\], got 1.1"),
        ({"strength": "1"}, r"strength must be in \(0, 1\], got '1'"),
        ({"strength_rule": "drop"}, "strength_rule must be one of rescale, skip, got 'drop'"),
        ({"time_dtype": "fp16"}, "time_dtype must be one of fp32, bf16, got 'fp16'"),
    ],
)
def test_errors(changes, words):
    arguments = {"steps": 4, **changes}
    with pytest.raises(ValueError, match=words):
        schedule(arguments.pop("steps"), **arguments)
