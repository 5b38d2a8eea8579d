"""Second stage of the PiD training: the patch stream, through a short cut of the pixel stream.

After the first stage a pixel token is, to a good approximation, its embedding plus the attention
gate of the first PiT block: `short_cut` computes just that, at a fifth of the cost of a full call.
What it trains (the patch stream and its modulations, the latent branch, the gates) are the
network's own parameters, so nothing has to be folded afterwards.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from pixeldiff.models.pid import PiDCondition, PiDNet

from .initialise import PIXEL_GAIN

if TYPE_CHECKING:
    from .train_pid import Trainer


def conditioning(net: PiDNet, condition: PiDCondition, t: float, batch: int) -> Tensor:
    """(B, N, D): the conditioning u of the pixel blocks at time t, the noisy picture unseen."""
    mod = net.modulation(torch.full((batch,), 1000 * t))
    unseen = torch.zeros(batch, net.config.in_channels, *condition.size)
    s = net._patch_stream(unseen, mod, condition, None)
    u = F.silu(mod.time[:, None] + s)
    return net.pit_lq_gate(u, condition.features[-1], condition.logits[-1])


def short_cut(
    net: PiDNet, condition: PiDCondition, t: float, batch: int, noise: torch.Generator
) -> Tensor:
    """The picture (B, 3, H, W) that one call at time t sees, without attention and MLP of PiT.

    The noisy picture of the call is made from the picture itself, as the sampler makes it; the
    patch stream does not look at it.
    """
    config, block = net.config, net.pixel_blocks[0]
    patch, p = config.patch_size, config.pixel_hidden_size
    height, width = (side // patch for side in condition.size)
    u = conditioning(net, condition, t, batch)
    modulation, expand = block.adaLN_modulation[0], block.expand_from_attn
    weight = modulation.weight.unflatten(0, (-1, 6, p))[:, 2].flatten(0, 1)
    bias = modulation.bias.unflatten(0, (-1, 6, p))[:, 2].flatten()
    gated = (F.linear(u, weight, bias) * expand.bias).unflatten(2, (-1, p))  # (B, N, P*P, p)

    embed = net.pixel_embedder.proj
    colours = embed.weight.detach() / PIXEL_GAIN
    seen = -(gated.detach() @ colours) / PIXEL_GAIN
    noisy = (1 - t) * seen + t * torch.randn(seen.shape, generator=noise)
    q = F.linear(noisy, embed.weight, embed.bias) + gated
    final = net.final_layer
    velocity = final.linear(F.rms_norm(q, (p,), final.norm.weight, 1e-6))
    tokens = noisy - t * velocity
    tokens = tokens.permute(0, 3, 2, 1).flatten(1, 2).unflatten(2, (height, width))
    return F.pixel_shuffle(tokens, patch)


def train_patch_stream(trainer: Trainer, steps: int, learning_rate: float) -> None:
    """Trains for `steps` batches and leaves the averaged weights in `trainer.net`."""
    from .evaluate import Decoder, monitor
    from .train_pid import TIMES, picture_loss

    net, recipe, rng = trainer.net, trainer.recipe, trainer.sampler.rng
    # What the first stage trained stays as it is: the patch stream learns what that one cannot see.
    untouched = (
        "s_embedder.",
        "pixel_embedder.",
        "pixel_blocks.",
        "final_layer.",
        "t_embedder.",
        "lq_proj.latent_proj.",
        "lq_proj.pit_head.",
        "pit_lq_gate.",
    )
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(
        trainer.groups(without=untouched), lr=learning_rate, betas=(0.9, 0.98), weight_decay=1e-3
    )
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for parameter in trained:
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    of_net = {id(p): name for name, p in net.named_parameters()}
    averaged = dict(trainer.average.named_parameters())
    average = [averaged[of_net[id(p)]] for p in parameters]
    started, losses = time.monotonic(), []
    for step in range(1, steps + 1):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        rate = learning_rate * min(step / 100, 0.97 * cosine + 0.03)
        for group in optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        images, captions = trainer.sampler.batch(0.0, whole=False)
        latent, sigma, text = trainer.condition(images, captions)
        condition = net.prepare(latent, text, sigma, size=tuple(images.shape[-2:]))
        t = TIMES[int(rng.integers(len(TIMES)))]
        predicted = short_cut(net, condition, t, len(images), trainer.noise)
        trust = (1 - sigma)[:, None, None, None]
        loss = picture_loss(predicted, images, recipe, trust)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, weight=1 - min(0.995, step / (step + 20)))
        losses.append(((predicted.detach() - images) * trust).square().mean().item())
        if step % 100 == 0 or step == steps:
            psnr = 10 * math.log10(4 * len(losses) / sum(losses))
            pace = (time.monotonic() - started) / step
            print(f"patch stream {step}/{steps}  PSNR {psnr:.2f} dB  {pace:.2f} s/step", flush=True)
            losses = []
        if step % 500 == 0 or step == steps:
            monitor(Decoder(trainer.average, trainer.autoencoder))
            trainer.save_checkpoint()
    for parameter in trained:
        parameter.requires_grad_(True)
    net.load_state_dict(trainer.average.state_dict())
