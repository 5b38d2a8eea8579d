"""Recompute the PiD goldens of whole networks: one forward pass, and both samplers."""

from __future__ import annotations

from torch import Tensor

from ..models.pid.config import PiDConfig
from ..models.pid.network import PiDNet
from ..models.pid.samplers import (
    dynamic_shift,
    network_time,
    sample_student,
    sample_teacher,
    student_times,
    teacher_times,
)
from .golden import Golden, NotUnderstood

Results = dict[str, Tensor]


def _network(g: Golden) -> PiDNet:
    try:
        config = PiDConfig.from_dict(g.meta["config"])
        net = PiDNet(config)
    except (ValueError, TypeError) as e:
        raise NotUnderstood(f"its network cannot be built: {e}") from e
    g.load(net)
    return net.eval()


def full_forward(g: Golden) -> Results:
    net = _network(g)
    x, t, y = (g.tensors[f"in.{k}"] for k in "xty")
    kwargs = {"lq_latent": g.get("in.lq_latent"), "degrade_sigma": g.get("in.degrade_sigma")}
    out: Results = {"out.v": net(x, t, y, **kwargs)}
    grid = (x.shape[2] // net.config.patch_size, x.shape[3] // net.config.patch_size)

    def trace(name: str, value: Tensor) -> None:
        out[f"mid.{name}"] = value

    net(x, t, y, **kwargs, trace=trace)
    for key in g.tensors:
        if key.startswith("out.feature."):
            block = out[f"mid.patch_blocks.{key.rpartition('.')[2]}.x"]
            out[key] = block.transpose(1, 2).unflatten(2, grid)
    if "out.pred_lq_rgb" in g.tensors:
        out["out.pred_lq_rgb"] = net.lq_proj.predict_lq_rgb(kwargs["lq_latent"], grid)
    return out


def student(g: Golden) -> Results:
    """The stored noises stand for the generator's draws; the time lists are recomputed."""
    net, out = _network(g), {}
    latent, sigma, y = (g.tensors[f"in.{k}"] for k in ("lq_latent", "degrade_sigma", "y"))
    for run in g.meta["runs"]:
        name = run["run"]
        times = student_times(run["num_steps"] or 4)
        if list(times) != run["t_list"]:
            raise NotUnderstood(f"run {name} uses the times {run['t_list']}, this one {times}")
        noise = g.tensors[f"in.{name}.noise"]
        condition = net.prepare(
            latent,
            y,
            sigma,
            size=tuple(noise.shape[-2:]),
            timesteps=[network_time(t) for t in times[:-1]],
        )
        draws = iter([g.tensors[f"in.{name}.eps.{i}"] for i in range(run["injected_noises"])])
        calls = []

        def velocity(x: Tensor, tau: float, condition=condition, calls=calls) -> Tensor:
            v = net.step(x, tau, condition)
            calls.append((x, v))
            return v

        result = sample_student(
            velocity,
            noise,
            times,
            lambda shape, draws=draws: next(draws),
            sample_type=run["sample_type"],
            prediction_type=run["prediction_type"],
        )
        out[f"out.{name}.unclamped"] = result
        out[f"out.{name}.image"] = result.clamp(-1, 1)
        for i, (x, v) in enumerate(calls):
            out[f"mid.{name}.x.{i}"], out[f"mid.{name}.v.{i}"] = x, v
    return out


def teacher(g: Golden) -> Results:
    net, out = _network(g), {}
    latent, sigma, y = (g.tensors[f"in.{k}"] for k in ("lq_latent", "degrade_sigma", "y"))
    for run in g.meta["runs"]:
        name, noise = run["run"], g.tensors[f"in.{run['run']}.noise"]
        size = tuple(noise.shape[-2:])
        shift = run["shift_arg"]
        if shift is None and run["dynamic_shift"]:
            base = run["dynamic_shift"]
            shift = dynamic_shift(size, base["base_shift"], base["base_image_size_for_shift_calc"])
        times = teacher_times(run["steps"], run["resolved_shift"] if shift is None else shift)
        condition = net.prepare(latent, y, sigma, size=size)
        null = net.recaption(condition, g.tensors["in.null_y"].expand(y.shape[0], -1, -1))
        states = []

        def velocity(x: Tensor, tau: float, condition=condition, states=states) -> Tensor:
            states.append(x)
            return net.step(x, tau, condition)

        out[f"out.{name}.unclamped"] = sample_teacher(
            velocity,
            lambda x, tau, null=null: net.step(x, tau, null),
            noise,
            times,
            cfg_scale=run["cfg_scale"],
            prediction_type=run["prediction_type"],
        )
        for i, x in enumerate(states):
            out[f"mid.{name}.x.{i}"] = x
    return out


NETWORKS = {"full_forward": full_forward, "student_sampling": student, "teacher_sampling": teacher}
