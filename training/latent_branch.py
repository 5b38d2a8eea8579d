"""First stage of the PiD training: the latent branch alone, as a plain regression.

What a small network has to learn most is to read the latent. Only the convolution stack of the
latent branch is needed for that, so it is trained first with a throw-away linear head that paints
each 16x16 patch, at a fifteenth of the cost of a sampler run. The head is then folded into the
network: the stack's features pass the PiT gate into the conditioning u, and the attention gate of
the first PiT block, which is linear in u, paints them.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixeldiff.models.pid import PiDNet

from .initialise import PIXEL_GAIN

if TYPE_CHECKING:
    from .train_pid import Cycle, Trainer

_CODING_RATE = 0.3  # learning rate of the autoencoder, as a share of the stack's
_CODING_WEIGHT = 0.5  # weight of its own reconstruction


def paint(net: PiDNet, head: nn.Conv2d, latent: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 3, H, W): the picture the latent branch and the linear head see in the latent."""
    patch = net.config.patch_size
    features = net.lq_proj.features(latent, (size[0] // patch, size[1] // patch))
    return F.pixel_shuffle(head(features), patch)


def train_latent_branch(trainer: Trainer, cycles: Sequence[Cycle]) -> None:
    """Trains the stack of `trainer.net.lq_proj` and folds the head into the net.

    A cycle starts from the averaged weights of the one before.
    """
    from .train_pid import TIMES

    net, config = trainer.net, trainer.net.config
    head = nn.Conv2d(config.lq_hidden_dim, 3 * config.patch_size**2, 1)
    nn.init.zeros_(head.bias)
    for cycle in cycles:
        train_cycle(trainer, head, cycle)
    trainer.autoencoder.requires_grad_(False)
    with torch.no_grad():
        images, _ = trainer.sampler.batch(0.0, whole=False)
        grid = tuple(side // config.patch_size for side in images.shape[-2:])
        features = net.lq_proj.features(trainer.clean_latent(images), grid)
    fold(net, head, features, TIMES)


def train_cycle(trainer: Trainer, head: nn.Conv2d, cycle: Cycle) -> None:
    """One cosine cycle; leaves the averaged weights in the stack, the head and the autoencoder.

    In a coding cycle the autoencoder trains along at a lower rate, on its own loss and on the
    painting's: the latent then serves both ways to read it. Its latent statistics stay as they are.
    """
    from .evaluate import monitor_paint
    from .train_pid import low_quality, picture_loss, similarity

    net = trainer.net
    # The structural term has its own weight in a cycle.
    recipe = dataclasses.replace(trainer.recipe, structure=0.0)
    stack = net.lq_proj.latent_proj
    autoencoder = trainer.autoencoder.requires_grad_(cycle.coding)
    painting = [*stack.parameters(), *head.parameters()]
    coding = list(autoencoder.parameters()) if cycle.coding else []
    parameters, steps = painting + coding, cycle.steps
    groups = [{"params": painting, "scale": 1.0}, {"params": coding, "scale": _CODING_RATE}]
    optimiser = torch.optim.AdamW(groups, lr=cycle.learning_rate, betas=(0.9, 0.98))
    average = [parameter.detach().clone() for parameter in parameters]
    started, losses = time.monotonic(), []
    for step in range(1, steps + 1):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            rate = min(step / 50, 0.97 * cosine + 0.03)
            group["lr"] = cycle.learning_rate * group["scale"] * rate
        images, _ = trainer.sampler.batch(0.0, whole=False)
        small = low_quality(images)
        latent = autoencoder.encode(small)
        predicted = paint(net, head, latent, tuple(images.shape[-2:]))
        if cycle.structure:
            error = predicted - images
            loss = error.square().mean() + 0.03 * error.abs().mean()
            loss = loss + cycle.structure * (1 - similarity(predicted, images))
        else:
            loss = picture_loss(predicted, images, recipe)
        if cycle.coding:
            own = picture_loss(autoencoder.decode(latent), small, recipe)
            loss = loss + _CODING_WEIGHT * own
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, weight=1 - min(0.995, step / (step + 20)))
        losses.append((predicted.detach() - images).square().mean().item())
        if step % 100 == 0 or step == steps:
            psnr = 10 * math.log10(4 * len(losses) / sum(losses))
            pace = (time.monotonic() - started) / step
            print(
                f"latent branch {step}/{steps}  PSNR {psnr:.2f} dB  {pace:.2f} s/step", flush=True
            )
            losses = []
        if step % 500 == 0 or step == steps:
            _swap(parameters, average)
            monitor_paint(lambda z, size: paint(net, head, z, size), trainer.autoencoder)
            if step < steps:
                _swap(parameters, average)


@torch.no_grad()
def _swap(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)


@torch.no_grad()
def fold(net: PiDNet, head: nn.Conv2d, features: Tensor, times: Sequence[float]) -> None:
    """Makes the network predict v = (x - paint(latent)) / t at the given times.

    The conditioning of the first PiT block is u = silu(e(t)) + gate * features while the patch
    stream is zero. Its linear map to the pixels has two jobs. Painting must not see the time, and
    the factor 1/t must not see the features: features go to the complement of the span of the time
    vectors, at the cost of their few directions of least variance.

    Args:
        head: the linear head, lq_hidden_dim to 3 * patch_size^2; lq_hidden_dim = hidden_size.
        features: (B, lq_hidden_dim, h, w) of some pictures, to know these directions.
        times: the diffusion times of the sampler, at most a handful.
    """
    config, block = net.config, net.pixel_blocks[0]
    dim, pixels, p = config.hidden_size, config.patch_size**2, config.pixel_hidden_size
    gate = net.pit_lq_gate
    gate.content_proj.weight.zero_()
    gate.log_alpha.zero_()
    opening = torch.sigmoid(gate.content_proj.bias).item()

    t = torch.tensor(times, dtype=torch.float64)
    clock = F.silu(net.t_embedder(1000 * t.float())).double()  # (times, dim)
    _, _, basis = torch.linalg.svd(clock)
    free = basis[len(times) :]  # (dim - times, dim), orthonormal, orthogonal to every time vector
    flat = features.transpose(0, 1).flatten(1).double()
    _, directions = torch.linalg.eigh(flat @ flat.T)
    kept = directions[:, len(times) :].T  # (dim - times, dim), the directions of most variance
    unit = flat.square().mean().sqrt()
    into_u = free.T @ kept / unit
    net.lq_proj.pit_head.weight.copy_(into_u / opening)
    net.lq_proj.pit_head.bias.zero_()

    # q += gate1(u) * expand bias; a unit of colour is PIXEL_GAIN along its direction of q.
    step = block.expand_from_attn.bias.mean().double()
    colours = (net.pixel_embedder.proj.weight / PIXEL_GAIN).double()  # (p, 3), orthonormal columns
    paint_u = head.weight.double().view(3, pixels, dim) @ (kept.T @ free * unit)
    weight = -PIXEL_GAIN / step * torch.einsum("pc,cjw->jpw", colours, paint_u)
    # The final norm divides by the RMS of q, so a token scaled by t has 1/t of the gain. The colour
    # part, x - paint, is t (eps - x0) and scales by itself; the offset is made to.
    solve = torch.linalg.pinv(clock) @ (t - 1)
    weight += net.pixel_embedder.proj.bias.double()[:, None] / step * solve
    modulation = block.adaLN_modulation[0]
    modulation.weight.unflatten(0, (pixels, 6, p))[:, 2] = weight.float()
    bias = (
        -PIXEL_GAIN / step * torch.einsum("pc,cj->jp", colours, head.bias.double().view(3, pixels))
    )
    modulation.bias.unflatten(0, (pixels, 6, p))[:, 2] = bias.float()
