"""The two samplers: the distilled student's 1 to 4 steps and the teacher's multistep solver.

Both work on a function `velocity(x, tau) -> network output` with tau = 1000 t, draw nothing but
standard normals from a `NoiseSource`, and return the unclamped image.

Source: PiD (arXiv 2605.23902); the teacher's solver is DPM-Solver++ 2M (arXiv 2211.01095).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...jobs import Stages
from ...ops.pixel_head_step import PREDICTION_TYPES, SAMPLE_TYPES, update
from ..steps import Callback, fp32, one_of, report

STUDENT_T_LIST = (0.999, 0.866, 0.634, 0.342, 0.0)

Velocity = Callable[[Tensor, float], Tensor]
Draw = Callable[[tuple[int, ...]], Tensor]
Advance = Callable[[Tensor, float, float, Draw | None, bool], tuple[Tensor, Tensor | None]]


def network_time(t: float) -> float:
    """1000 t, multiplied in fp32."""
    return (torch.tensor(t, dtype=torch.float32, device="cpu") * 1000).item()


def student_times(steps: int = 4, t_list: Sequence[float] = STUDENT_T_LIST) -> tuple[float, ...]:
    """The times of a `steps`-step decode, from the distilled schedule, ending in 0.

    A single step starts at t = 1.0, as released, not at 0.999.

    Raises:
        ValueError: steps outside 1..len(t_list)-1. The student knows only the times it was
            distilled at; a longer schedule repeats them and gains nothing.
    """
    longest = len(t_list) - 1
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= longest:
        raise ValueError(
            f"steps must be an integer in 1..{longest}, got {steps!r}: the distilled network was "
            f"trained at the times {tuple(t_list[:-1])} only, and more steps would repeat them"
        )
    if steps == 1:
        return (1.0, 0.0)
    # Half to even, as upstream rounds them; Python's round does the same.
    picks = [round(i * longest / steps) for i in range(steps + 1)]
    return tuple(fp32(t_list[i]) for i in picks)


def sample_student(
    velocity: Velocity,
    noise: Tensor,
    times: Sequence[float],
    draw: Draw | None,
    *,
    sample_type: str = "sde",
    prediction_type: str = "velocity",
    state_dtype: torch.dtype = torch.float64,
    callback: Callback | None = None,
) -> Tensor:
    """Sample with the distilled student's rule.

        x0 = x - t v
        x <- (1 - t') x0 + t' eps  (SDE)  or  x + (t' - t) v  (ODE);  x0 at t' = 0

    Args:
        velocity: network output at (x, 1000 t).
        noise: (B, 3, H, W) fp32 standard normal, the state at the first time, unscaled.
        times: decreasing diffusion times, ending in 0, as `student_times` gives them.
        draw: eps of an SDE step by shape; not called in an ODE nor for the last step.
        sample_type: "sde" (released) or "ode".
        prediction_type: "velocity" (released) or "x0".
        state_dtype: of the arithmetic of x0; fp64 as released, fp32 to halve its working memory.
        callback: called after each network call; returning False stops.

    Returns:
        (B, 3, H, W) fp32, unclamped.

    Raises:
        ValueError: an unknown sample or prediction type. Interrupted: the callback returned False.
    """
    one_of("sample_type", sample_type, SAMPLE_TYPES)
    one_of("prediction_type", prediction_type, PREDICTION_TYPES)

    def advance(
        x: Tensor, t: float, t_next: float, draw: Draw | None, want_x0: bool
    ) -> tuple[Tensor, Tensor]:
        out = velocity(x, network_time(t))
        return update(
            x,
            out,
            None if draw is None else draw(tuple(x.shape)),
            t,
            t_next,
            sample_type=sample_type,
            prediction_type=prediction_type,
            state_dtype=state_dtype,
        )

    return run_student(advance, noise, times, draw, sample_type=sample_type, callback=callback)


def run_student(
    advance: Advance,
    noise: Tensor,
    times: Sequence[float],
    draw: Draw | None,
    *,
    sample_type: str = "sde",
    callback: Callback | None = None,
    stages: Stages | None = None,
) -> Tensor:
    """`sample_student` for a network that makes whole steps, `PiDNet.student_step`.

    Args:
        advance: (x, t, t_next, draw, want_x0) -> (x at t_next, x0), the network's output at t put
            through `pixeldiff.ops.pixel_head_step.update`, or bitwise the same. Its draw is None
            where the step takes no noise; x0 may be None unless wanted.
        noise: the state after `stages.first` steps, where that is not 0.
        stages: where x is kept after each step.
        The others: as for `sample_student`.
    """
    if sample_type == "sde" and len(times) > 2 and draw is None:
        raise ValueError("draw: an SDE of more than one step needs a source of noise, got None")
    x = noise
    del noise
    steps, first = len(times) - 1, stages.first if stages else 0
    for i, (t, t_next) in itertools.islice(enumerate(itertools.pairwise(times)), first, None):
        fresh = draw if sample_type == "sde" and t_next != 0 else None
        x, x0 = advance(x, t, t_next, fresh, callback is not None)
        if stages:
            stages.made(i + 1, steps, {"x": x})
        report(callback, i + 1, steps, t, x0)
        del x0  # it would last through the next network call
    return x


def teacher_times(steps: int, shift: float) -> tuple[float, ...]:
    """The shifted flow grid of the undistilled sampler: steps + 1 decreasing times, the last 0.

    Raises:
        ValueError: steps < 1 or shift <= 0.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}")
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift!r}")
    r = 1 - torch.linspace(1, 0.001, steps + 1, dtype=torch.float32, device="cpu")
    return tuple((shift * r / (1 + (shift - 1) * r)).flip(0).tolist())


def dynamic_shift(size: tuple[int, int], base_shift: float, base_size: int) -> float:
    """base_shift * sqrt(sqrt(H W) / base_size)."""
    return base_shift * math.sqrt(math.sqrt(size[0] * size[1]) / base_size)


def sample_teacher(
    velocity: Velocity,
    null_velocity: Velocity | None,
    noise: Tensor,
    times: Sequence[float],
    *,
    cfg_scale: float = 5.0,
    prediction_type: str = "velocity",
    callback: Callback | None = None,
    stages: Stages | None = None,
) -> Tensor:
    """Sample with the second-order multistep solver and classifier-free guidance.

    The image estimate is x - t (v_u + cfg (v_c - v_u)), evaluated directly: the algebraically equal
    detour through the noise divides by 1 - t, which is 2.5e-4 at the first step.

    Args:
        velocity: network output with the caption.
        null_velocity: with the negative caption; may be None when cfg_scale is 1.
        noise: (B, 3, H, W) fp32 standard normal; or the state after `stages.first` steps.
        times: as `teacher_times` gives them.
        cfg_scale: guidance, 1 is none.
        prediction_type: "velocity" or "x0".
        callback: called after each step; returning False stops.
        stages: where x and the estimate before it are kept after each step.

    Returns:
        (B, 3, H, W), the dtype of noise, unclamped.

    Raises:
        ValueError: guidance without a null velocity, or an unknown prediction type.
        Interrupted: the callback returned False.
    """
    one_of("prediction_type", prediction_type, ("velocity", "x0"))
    if cfg_scale != 1 and null_velocity is None:
        raise ValueError(
            f"cfg_scale = {cfg_scale} needs the negative caption's embedding; pass it, or "
            f"cfg_scale=1"
        )
    x, previous, previous_lambda = noise, None, 0.0
    del noise
    steps, first = len(times) - 1, stages.first if stages else 0
    if first:
        previous = stages.held("previous", lambda: None)
        previous_lambda = _log_snr(times[first - 1])
    for i, (t, t_next) in itertools.islice(enumerate(itertools.pairwise(times)), first, None):
        tau = network_time(t)
        out = velocity(x, tau)
        if cfg_scale != 1:
            null = null_velocity(x, tau)
            out = null + cfg_scale * (out - null)
        x0 = x - t * out if prediction_type == "velocity" else out
        lam = _log_snr(t)
        if t_next == 0:
            x = x0
        else:
            h = _log_snr(t_next) - lam
            phi = math.expm1(-h)
            x = (t_next / t) * x - (1 - t_next) * phi * x0
            if previous is not None:
                r = (lam - previous_lambda) / h
                x = x - 0.5 * (1 - t_next) * phi / r * (x0 - previous)
        previous, previous_lambda = x0, lam
        if stages:
            stages.made(i + 1, steps, {"x": x, "previous": previous})
        report(callback, i + 1, steps, t, x0)
        del out, x0
    return x


def _log_snr(t: float) -> float:
    return math.log((1 - t) / t)
