"""First stage of the PiD training: the latent branch alone, as a plain regression.

What a small network has to learn most is to read the latent. Only the convolution stack of the
latent branch is needed for that, so it is trained first with a throw-away linear head that paints
each 16x16 patch, at a fifteenth of the cost of a sampler run; the autoencoder trains along. The
head is then folded into the network: the stack's features pass the PiT gate into the conditioning
u, and the attention gate of the first PiT block, which is linear in u, paints them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixeldiff.models.pid import PiDNet

from .initialise import PIXEL_GAIN
from .optimiser import MuonAdamW

if TYPE_CHECKING:
    from .train_pid import Cycle, Trainer

_CODING_RATE = 0.3  # learning rate of the autoencoder, as a share of the stack's
_CODING_WEIGHT = 0.5  # weight of its own reconstruction
_CONSTANT = 0.3  # share of a cycle at the full rate, before a linear decay to nothing
_FINE = 0.9  # share of a cycle after which the stack runs in fp32


def paint(net: PiDNet, head: nn.Conv2d, latent: Tensor, sigma: Tensor | None = None) -> Tensor:
    """(B, 3, H, W): the picture the latent branch and the linear head see in the latent.

    Args:
        latent: (B, C, h, w).
        sigma: (B,), the noise in the latent: the gate closes with it, as it will in the network.
    """
    config = net.config
    size = (side * config.pixels_per_latent_cell for side in latent.shape[-2:])
    features = net.lq_proj.features(latent, tuple(side // config.patch_size for side in size))
    if sigma is not None:
        features = features * _opening(net, sigma) / _opening(net, torch.zeros(1))
    return F.pixel_shuffle(head(features), config.patch_size)


def _opening(net: PiDNet, sigma: Tensor) -> Tensor:
    gate = net.pit_lq_gate
    return torch.sigmoid(gate.content_proj.bias - gate.log_alpha.exp() * sigma)[:, None, None, None]


def train_latent_branch(trainer: Trainer, cycles: Sequence[Cycle]) -> None:
    """Trains the stack of `trainer.net.lq_proj` with the autoencoder; folds the head into the net.

    A cycle starts from the averaged weights of the one before.
    """
    from .train_pid import TIMES

    net, config, autoencoder = trainer.net, trainer.net.config, trainer.autoencoder
    head = nn.Conv2d(config.lq_hidden_dim, 3 * config.patch_size**2, 1)
    nn.init.zeros_(head.bias)
    with torch.no_grad():
        head.weight.mul_(0.1)
    for module in (net.lq_proj.latent_proj, head, autoencoder):
        module.to(memory_format=torch.channels_last)
    for number, cycle in enumerate(cycles):
        train_cycle(trainer, head, cycle)
        trainer.save_painter(head, number)
    autoencoder.requires_grad_(False)
    with torch.no_grad():
        images = trainer.sampler.crops(256, 256, 6)
        grid = tuple(side // config.patch_size for side in images.shape[-2:])
        features = net.lq_proj.features(trainer.clean_latent(images), grid)
    for module in (net, autoencoder):
        module.to(memory_format=torch.contiguous_format)
    fold(net, head, features, TIMES)


def train_cycle(trainer: Trainer, head: nn.Conv2d, cycle: Cycle) -> None:
    """One cycle; leaves the averaged weights in the stack, the head and the autoencoder.

    In a coding cycle the autoencoder trains along at a lower rate, on its own reconstruction and on
    the painting, so that the latent serves both readers. Else it is frozen, and the stack runs in
    bf16 until the last tenth of the cycle.
    """
    from .evaluate import monitor_paint
    from .train_pid import low_quality, picture_loss

    net, autoencoder, steps = trainer.net, trainer.autoencoder, cycle.steps
    recipe = cycle.loss(trainer.recipe)
    autoencoder.requires_grad_(cycle.coding)
    stack, gate = net.lq_proj.latent_proj, net.pit_lq_gate.log_alpha
    painting = [*stack.parameters(), *head.parameters(), gate]
    coding = list(autoencoder.parameters()) if cycle.coding else []
    parameters = painting + coding
    optimiser = MuonAdamW([(painting, 1.0), (coding, _CODING_RATE)], cycle.learning_rate)
    average = [parameter.detach().clone() for parameter in parameters]
    started, losses = time.monotonic(), []
    for step in range(1, steps + 1):
        images, _ = trainer.sampler.batch(0.0, whole=False)
        small = low_quality(images).contiguous(memory_format=torch.channels_last)
        latent = autoencoder.encode(small)
        noisy, sigma = trainer.noised(latent)
        trust = (1 - sigma)[:, None, None, None]
        rough = not cycle.coding and step < _FINE * steps
        with torch.autocast("cpu", torch.bfloat16, enabled=rough):
            predicted = paint(net, head, noisy, sigma)
        predicted = predicted.float()
        loss = picture_loss(predicted, images, recipe, trust)
        if cycle.coding:
            own = picture_loss(autoencoder.decode(latent), small, recipe)
            loss = loss + _CODING_WEIGHT * own
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        decay = (1 - step / steps) / (1 - _CONSTANT)
        optimiser.step(min(step / 50, 1.0, decay + 0.005))
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, weight=1 - min(0.995, step / (step + 20)))
        losses.append(((predicted.detach() - images) * trust).square().mean().item())
        if step % 250 == 0 or step == steps:
            psnr = 10 * math.log10(4 * len(losses) / sum(losses))
            pace = (time.monotonic() - started) / step
            print(
                f"latent branch {step}/{steps}  PSNR {psnr:.2f} dB  {pace:.3f} s/step", flush=True
            )
            losses = []
        if step % 1000 == 0 or step == steps:
            _swap(parameters, average)
            monitor_paint(lambda z: paint(net, head, z), autoencoder)
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
