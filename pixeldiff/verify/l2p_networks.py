"""Recompute the L2P goldens of whole networks: calls, samplings, schedules, a training example."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..images import to_uint8
from ..models.l2p.network import L2PNet
from ..models.l2p.sampler import guided, sample, start
from ..models.l2p.scheduler import schedule
from ..models.l2p.training import NoiseLevels, noised, velocity_loss
from .golden import Golden
from .l2p_inputs import Results, given, load_weights, network_config, stated_network, weights

SCHEDULE = re.compile(r"(N(\d+)\.shift([\d.]+)\.strength([\d.]+))\.sigmas")


def network(g: Golden) -> Results:
    net = stated_network(g)
    x, t = given(g, "x"), g.tensors["t"]
    captions = [g.tensors[f"caption.{b}"].float() for b in range(len(t))]
    out: Results = {}

    def trace(name: str, value: Tensor) -> None:
        out[f"cap.{name}"] = value

    net(x, t, captions, trace=trace)
    # Without a trace the last block leaves out rows: this is the result that counts.
    return {**out, "net_out": net(x, t, captions)}


def sampling(g: Golden) -> Results:
    """The picture is that of the file's own last state: any other may round the other way."""
    case, net, negative = g.meta["case"], stated_network(g), g.get("caption_neg")
    plan = schedule(case["steps"], shift=case["shift"], strength=case["strength"])
    predict = guided(
        net,
        [g.tensors["caption"].float()],
        None if negative is None else [negative.float()],
        (case["H"], case["W"]),
        guidance_scale=case["cfg_scale"],
        times=plan.times,
    )
    x = start(g.tensors["noise"].float(), plan, g.get("init_image"))
    out = {"x_start": x, "v.0": -predict(x, plan.times[0])}

    def keep(step: int, timestep: float, x: Tensor, x0: Tensor) -> Tensor:
        out[f"x.{step + 1}"] = x
        return x

    out["x_final"] = sample(predict, x, plan, replace=keep)
    out["sigmas"] = torch.tensor(plan.sigmas[:-1])
    out["timesteps"] = torch.tensor(plan.timesteps)
    final = g.tensors["out.x_final"]
    return {**out, "image_uint8": torch.from_numpy(to_uint8(final, rounded=True)[0])}


def schedules(g: Golden) -> Results:
    out: Results = {}
    for stated in filter(None, map(SCHEDULE.search, g.tensors)):
        name, steps, shift, strength = stated.groups()
        plan = schedule(int(steps), shift=float(shift), strength=float(strength))
        out[f"{name}.sigmas"] = torch.tensor(plan.sigmas[:-1])
        out[f"{name}.timesteps"] = torch.tensor(plan.timesteps)
    return out


def training_step(g: Golden) -> Results:
    # Outside the caller's inference mode, whose tensors can take no part in a gradient.
    with torch.inference_mode(False), torch.enable_grad():
        net = L2PNet(network_config(g.meta["config"]))
        load_weights(net, weights(g))
        x0, noise, caption = (g.tensors[name].float() for name in ("x0", "noise", "caption"))
        sigma, t = (torch.tensor([value]) for value in NoiseLevels().at(g.meta["case"]["index"]))
        x = noised(x0, noise, sigma)
        u = net(x, t, [caption])
        loss = velocity_loss(u, x0, noise)
        loss.backward()
    out = {"x_t": x, "pred": -u, "target": noise - x0, "loss": loss[None]}
    grads = {name: p.grad for name, p in net.named_parameters()}
    out["grad_norms_sorted_by_key"] = torch.stack([grads[name].norm() for name in sorted(grads)])
    return {**out, **{f"grad.{name}": grad for name, grad in grads.items()}}
