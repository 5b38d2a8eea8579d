"""Student and teacher samplers: schedules, update rules, draw order, callbacks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pixeldiff.models.noise import NoiseSource
from pixeldiff.models.pid.samplers import (
    dynamic_shift,
    network_time,
    sample_student,
    sample_teacher,
    student_times,
    teacher_times,
)
from pixeldiff.models.steps import Interrupted
from pixeldiff.verify.golden import read_golden

SHAPE = (2, 3, 4, 6)


def draw(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def field(x: torch.Tensor, tau: float) -> torch.Tensor:
    """A velocity that depends on state and time, cheap and smooth."""
    return torch.sin(2 * x) + x * (tau / 1000) - 0.3


# ---- Schedules -------------------------------------------------------------------------------


def test_student_times_are_the_golden_ones(golden_dir):
    runs = read_golden(golden_dir / "pid" / "sample_student.safetensors").meta["runs"]
    assert {run["num_steps"] for run in runs} >= {1, 2}
    for run in runs:
        times = student_times(run["num_steps"] or 4)
        assert list(times) == run["t_list"]
        assert [network_time(t) for t in times[:-1]] == run["net_t"]


def test_student_times_of_every_length():
    def fp32(*values):
        return tuple(torch.tensor(values, dtype=torch.float32).tolist())

    assert student_times() == student_times(4) == fp32(0.999, 0.866, 0.634, 0.342, 0.0)
    assert student_times(3) == fp32(0.999, 0.866, 0.342, 0.0)
    assert student_times(2) == fp32(0.999, 0.634, 0.0)
    assert student_times(1) == (1.0, 0.0)
    assert student_times(1, (0.9, 0.5, 0.0)) == (1.0, 0.0)
    assert student_times(2, (0.9, 0.5, 0.0)) == fp32(0.9, 0.5, 0.0)


@pytest.mark.parametrize("steps", [0, 5, -1, True, 2.0, "4", None])
def test_other_step_counts_are_refused(steps):
    with pytest.raises(ValueError, match=r"^steps must be an integer in 1\.\.4, got .* repeat"):
        student_times(steps)


def test_teacher_grid_is_the_golden_one(golden_dir):
    runs = read_golden(golden_dir / "pid" / "sample_teacher.safetensors").meta["runs"]
    for run in runs:
        times = teacher_times(run["steps"], run["resolved_shift"])
        assert len(times) == run["steps"] + 1
        assert times[-1] == 0
        assert all(a > b for a, b in itertools.pairwise(times))
        assert [network_time(t) for t in times[:-1]] == pytest.approx(run["net_t"], rel=2e-7)


def test_teacher_grid_by_formula():
    times = teacher_times(5, 6.0)
    for i, t in enumerate(times):
        r = 0.999 * (5 - i) / 5
        assert t == pytest.approx(6 * r / (1 + 5 * r), abs=2e-7)


@pytest.mark.parametrize("steps", [0, True, 2.5])
def test_teacher_steps(steps):
    with pytest.raises(ValueError, match=r"^steps must be an integer >= 1, got "):
        teacher_times(steps, 1.0)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan])
def test_teacher_shift(shift):
    with pytest.raises(ValueError, match=r"^shift must be positive, got "):
        teacher_times(2, shift)


def test_dynamic_shift():
    assert dynamic_shift((1024, 1024), 4.0, 1024) == 4.0
    assert dynamic_shift((4096, 4096), 4.0, 1024) == 8.0
    assert dynamic_shift((2048, 8192), 6.0, 2048) == pytest.approx(6 * math.sqrt(2))


# ---- Student ---------------------------------------------------------------------------------


def test_sde_with_the_matching_noise_is_the_ode():
    """eps = x + (1 - t) v makes (1 - t') x0 + t' eps equal to x + (t' - t) v."""
    state = {}

    def velocity(x, tau):
        state.update(x=x, v=field(x, tau), t=tau / 1000)
        return state["v"]

    def matching(shape):
        return state["x"] + (1 - state["t"]) * state["v"]

    times, noise = student_times(4), draw(0)
    ode = sample_student(velocity, noise, times, None, sample_type="ode")
    sde = sample_student(velocity, noise, times, matching)
    torch.testing.assert_close(sde, ode, rtol=1e-6, atol=2e-6)
    other = sample_student(velocity, noise, times, lambda shape: draw(5))
    assert not torch.allclose(other, ode, atol=1e-2)


@pytest.mark.parametrize("sample_type", ["sde", "ode"])
@pytest.mark.parametrize("prediction_type", ["velocity", "x0"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_student_rule_in_fp64(sample_type, prediction_type, steps):
    noise, eps, used = draw(0), [draw(i) for i in (1, 2, 3)], []

    def next_noise(shape):
        assert shape == SHAPE
        used.append(eps[len(used)])
        return used[-1]

    times = student_times(steps)
    kinds = {"sample_type": sample_type, "prediction_type": prediction_type}
    got = sample_student(field, noise, times, next_noise, **kinds)
    assert got.dtype == torch.float32
    x = noise.double()
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        out = field(x, 1000 * t)
        x0 = x - t * out if prediction_type == "velocity" else out
        v = out if prediction_type == "velocity" else (x - out) / max(t, 0.05)
        if t_next == 0:
            x = x0
        elif sample_type == "sde":
            x = (1 - t_next) * x0 + t_next * eps[i]
        else:
            x = x + (t_next - t) * v
    torch.testing.assert_close(got.double(), x, rtol=1e-5, atol=1e-5)
    assert len(used) == (steps - 1 if sample_type == "sde" else 0)


def test_zero_velocity_returns_the_state():
    noise = draw(0)
    got = sample_student(lambda x, tau: torch.zeros_like(x), noise, student_times(1), None)
    assert torch.equal(got, noise)


def test_x0_below_the_floor_of_t():
    """(x - x0) / max(t, 0.05): at t = 0.02 the ODE moves by the floor's velocity."""
    noise, target = draw(0), draw(1)
    seen = []

    def velocity(x, tau):
        seen.append(x)
        return target

    times = (0.02, 0.01, 0.0)
    kinds = {"sample_type": "ode", "prediction_type": "x0"}
    sample_student(velocity, noise, times, None, **kinds)
    want = noise - 0.01 * (noise - target) / 0.05
    torch.testing.assert_close(seen[1], want, rtol=1e-6, atol=1e-6)


def test_fp32_state_is_as_good():
    args = (field, draw(0), student_times(4), lambda shape: draw(1))
    wide = sample_student(*args)
    narrow = sample_student(*args, state_dtype=torch.float32)
    assert narrow.dtype == torch.float32
    assert (narrow - wide).abs().max() <= 1e-6 * max(1.0, wide.abs().max().item())


def test_the_state_is_not_changed_in_place():
    noise = draw(0)
    before = noise.clone()
    sample_student(field, noise, student_times(4), lambda shape: draw(1))
    sample_teacher(field, None, noise, teacher_times(3, 1.0), cfg_scale=1)
    assert torch.equal(noise, before)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"sample_type": "euler"}, "sample_type must be one of sde, ode, got 'euler'"),
        ({"prediction_type": "eps"}, "prediction_type must be one of velocity, x0, got 'eps'"),
    ],
)
def test_student_kinds(kinds, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        sample_student(field, draw(0), student_times(1), None, **kinds)


# ---- Teacher ---------------------------------------------------------------------------------


def test_first_step_is_euler():
    """Order 1 in the data form is x + (t' - t) v exactly; so is a whole one-step run."""
    states = []

    def velocity(x, tau):
        states.append(x)
        return field(x, tau)

    times, noise = teacher_times(6, 2.0), draw(0).double()
    sample_teacher(velocity, None, noise, times, cfg_scale=1)
    want = noise + (times[1] - times[0]) * field(noise, network_time(times[0]))
    torch.testing.assert_close(states[1], want, rtol=1e-9, atol=1e-9)
    one = teacher_times(1, 2.0)
    got = sample_teacher(field, None, noise, one, cfg_scale=1)
    torch.testing.assert_close(got, noise - one[0] * field(noise, network_time(one[0])))


def test_multistep_rule_in_fp64():
    times, noise = teacher_times(5, 3.0), draw(0).double()
    got = sample_teacher(field, None, noise, times, cfg_scale=1)
    lam = [math.log((1 - t) / t) for t in times[:-1]]
    x, x0 = noise, []
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        x0.append(x - t * field(x, network_time(t)))
        if t_next == 0:
            x = x0[-1]
            continue
        h = lam[i + 1] - lam[i]
        estimate = x0[-1]
        if i:
            estimate = estimate + (x0[-1] - x0[-2]) * h / (lam[i] - lam[i - 1]) / 2
        x = t_next / t * x - (1 - t_next) * math.expm1(-h) * estimate
    torch.testing.assert_close(got, x, rtol=1e-12, atol=1e-12)


def test_second_order():
    """Twice the steps, a quarter of the error (a bit more here, with the first-order ends)."""

    def velocity(x, tau):
        return torch.cos(x) * (0.5 + tau / 1000)

    noise = draw(0).double() * 0.5

    def run(steps: int) -> torch.Tensor:
        times = tuple(0.9 - 0.6 * i / steps for i in range(steps + 1))
        return sample_teacher(velocity, None, noise, times, cfg_scale=1)

    best = run(3000)
    errors = [(run(n) - best).abs().max().item() for n in (20, 40, 80)]
    assert errors[0] / errors[1] > 3.2
    assert errors[1] / errors[2] > 3.2


@pytest.mark.parametrize("prediction_type", ["velocity", "x0"])
def test_guidance(prediction_type):
    """cfg w between two fields is no guidance on their extrapolation."""

    def null(x, tau):
        return torch.cos(x)

    def mixed(x, tau):
        return null(x, tau) + 2.75 * (field(x, tau) - null(x, tau))

    times, noise, kind = teacher_times(4, 1.0), draw(0).double(), prediction_type
    got = sample_teacher(field, null, noise, times, cfg_scale=2.75, prediction_type=kind)
    want = sample_teacher(mixed, None, noise, times, cfg_scale=1, prediction_type=kind)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_no_guidance_needs_no_null_call():
    def fail(x, tau):
        raise AssertionError("called without guidance")

    sample_teacher(field, fail, draw(0), teacher_times(2, 1.0), cfg_scale=1.0)
    with pytest.raises(ValueError, match=r"^cfg_scale = 5.0 needs the negative caption"):
        sample_teacher(field, None, draw(0), teacher_times(2, 1.0))
    with pytest.raises(ValueError, match=r"^prediction_type must be one of velocity, x0"):
        sample_teacher(field, None, draw(0), teacher_times(2, 1.0), prediction_type="eps")


# ---- Noise -----------------------------------------------------------------------------------


def test_one_generator_draws_the_batch_in_order():
    """The initial state, then one full-batch draw for each SDE step."""
    source = NoiseSource(torch.Generator().manual_seed(3), "cpu")
    states = []
    start = source(SHAPE)

    def velocity(x, tau):
        states.append(x)
        return torch.zeros_like(x)

    sample_student(velocity, start, student_times(4), source)
    generator = torch.Generator().manual_seed(3)
    draws = [torch.randn(SHAPE, generator=generator) for _ in range(4)]
    assert torch.equal(start, draws[0])
    x = start
    for state, t, eps in zip(states[1:], student_times(4)[1:], draws[1:], strict=False):
        x = (1 - t) * x + t * eps
        torch.testing.assert_close(state, x)
    assert torch.equal(source(SHAPE), torch.randn(SHAPE, generator=generator))


def test_a_generator_for_each_sample_is_batch_independent():
    def draws(seeds):
        source = NoiseSource([torch.Generator().manual_seed(s) for s in seeds], "cpu")
        return [source((len(seeds), *SHAPE[1:])) for _ in range(2)]

    both, alone = draws([7, 8]), draws([8])
    for batch, single in zip(both, alone, strict=True):
        assert torch.equal(batch[1:], single)
        assert batch.dtype == torch.float32
    one = torch.Generator().manual_seed(8)
    assert torch.equal(alone[0], torch.randn(1, *SHAPE[1:], generator=one))
    assert not torch.equal(both[0][0], both[0][1])


def test_generators_must_match_the_batch():
    source = NoiseSource([torch.Generator()], "cpu")
    with pytest.raises(
        ValueError, match=r"^generator: a list must hold one generator per sample, 2, got 1$"
    ):
        source(SHAPE)


# ---- Callback --------------------------------------------------------------------------------


def _student(callback):
    return sample_student(
        field, draw(0), student_times(4), lambda shape: draw(1), callback=callback
    )


def _teacher(callback):
    return sample_teacher(
        field, None, draw(0), teacher_times(4, 2.0), cfg_scale=1, callback=callback
    )


@pytest.mark.parametrize(
    ("run", "times"), [(_student, student_times(4)), (_teacher, teacher_times(4, 2.0))]
)
def test_callback(run, times):
    told = []
    result = run(told.append)
    assert [(i.step, i.steps, i.t) for i in told] == [
        (n + 1, 4, t) for n, t in enumerate(times[:-1])
    ]
    assert torch.equal(told[-1].x0, result)
    assert torch.equal(run(None), result)


@pytest.mark.parametrize("run", [_student, _teacher])
def test_interruption(run):
    told = []

    def stop(info):
        told.append(info.step)
        return info.step < 2

    with pytest.raises(Interrupted, match=r"^stopped by the callback after step 2 of 4$"):
        run(stop)
    assert told == [1, 2]
    assert torch.equal(run(lambda info: None), run(lambda info: True))


def test_sde_without_a_source_of_noise():
    noise = torch.zeros(1, 3, 2, 2)
    with pytest.raises(ValueError, match="draw: an SDE of more than one step needs"):
        sample_student(lambda x, tau: x, noise, student_times(2), None)
    assert sample_student(lambda x, tau: x, noise, student_times(1), None).shape == noise.shape
