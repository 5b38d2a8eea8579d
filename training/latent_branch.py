"""First stage of the PiD training: the latent branch alone, as a plain regression.

What a small network has to learn most is to read the latent. Only the convolution stack of the
latent branch is needed for that, so it is trained first with a throw-away linear head that paints
each 16x16 patch, at a fifteenth of the cost of a sampler run. The head is then folded into the
network: the stack's features pass the PiT gate into the conditioning u, and the attention gate of
the first PiT block, which is linear in u, paints them.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixeldiff.models.pid import PiDNet

from .initialise import PIXEL_GAIN

if TYPE_CHECKING:
    from .train_pid import Trainer

# Features enter u at this RMS, so that the untrained rest of u is small beside them.
_FEATURE_RMS = 4.0


def paint(net: PiDNet, head: nn.Conv2d, latent: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 3, H, W): the picture the latent branch and the linear head see in the latent."""
    patch = net.config.patch_size
    features = net.lq_proj.features(latent, (size[0] // patch, size[1] // patch))
    return F.pixel_shuffle(head(features), patch)


def train_latent_branch(trainer: Trainer, steps: int, learning_rate: float) -> None:
    """Trains `trainer.net.lq_proj`'s stack for `steps` batches and folds the head into the net."""
    from .train_pid import picture_loss

    net, recipe = trainer.net, trainer.recipe
    config = net.config
    head = nn.Conv2d(config.lq_hidden_dim, 3 * config.patch_size**2, 1)
    nn.init.zeros_(head.bias)
    stack = net.lq_proj.latent_proj
    parameters = [*stack.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98))
    started, losses = time.monotonic(), []
    for step in range(1, steps + 1):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min(step / 50, 0.9 * cosine + 0.1)
        images, _ = trainer.sampler.batch(0.0, whole=False)
        with torch.no_grad():
            latent = trainer.clean_latent(images)
        predicted = paint(net, head, latent, tuple(images.shape[-2:]))
        loss = picture_loss(predicted, images, recipe)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimiser.step()
        losses.append((predicted.detach() - images).square().mean().item())
        if step % 100 == 0 or step == steps:
            psnr = 10 * math.log10(4 * len(losses) / sum(losses))
            pace = (time.monotonic() - started) / step
            print(
                f"latent branch {step}/{steps}  PSNR {psnr:.2f} dB  {pace:.2f} s/step", flush=True
            )
            losses = []
    with torch.no_grad():
        images, _ = trainer.sampler.batch(0.0, whole=False)
        grid = tuple(side // config.patch_size for side in images.shape[-2:])
        features = net.lq_proj.features(trainer.clean_latent(images), grid)
        fold(net, head, scale=_FEATURE_RMS / features.square().mean().sqrt().item())


@torch.no_grad()
def fold(net: PiDNet, head: nn.Conv2d, *, scale: float) -> None:
    """Makes the network predict v = x - paint(latent), up to what its other parts add.

    Args:
        head: the linear head, lq_hidden_dim to 3 * patch_size^2, lq_hidden_dim <= hidden_size.
        scale: amplification of the features on their way into u.
    """
    config, block = net.config, net.pixel_blocks[0]
    width = config.lq_hidden_dim
    gate = net.pit_lq_gate.content_proj
    gate.weight.zero_()
    opening = torch.sigmoid(gate.bias).item()
    net.lq_proj.pit_head.weight.copy_(torch.eye(config.hidden_size, width) * scale / opening)
    net.lq_proj.pit_head.bias.zero_()
    # q += gate1(u) * expand bias; a unit of colour is PIXEL_GAIN along its direction of q.
    colours = net.pixel_embedder.proj.weight / PIXEL_GAIN  # (p, 3), orthonormal columns
    amplitude = -PIXEL_GAIN / block.expand_from_attn.bias.mean()
    pixels = config.patch_size**2
    paint_weight = head.weight.view(3, pixels, width) / scale
    modulation = block.adaLN_modulation[0]
    rows = modulation.weight.unflatten(0, (pixels, 6, config.pixel_hidden_size))
    rows[:, 2, :, :width] = amplitude * torch.einsum("pc,cjw->jpw", colours, paint_weight)
    bias = modulation.bias.unflatten(0, (pixels, 6, config.pixel_hidden_size))
    bias[:, 2] = amplitude * torch.einsum("pc,cj->jp", colours, head.bias.view(3, pixels))
