"""Starting weights of a PiD network that is trained from nothing.

The published training starts from a large text-to-image model. A network of a few million
parameters trained for an hour has no such start, so its first state is arranged to solve the easy
half of the task: the velocity (x - x0) / t contains the noisy pixel itself, and carrying it through
the pixel stream unharmed is linear. That path is laid by hand; everything that is about the picture
(x0) is left to training.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from pixeldiff.models.pid import PiDNet
from pixeldiff.models.pid.lq_projection import SigmaGate

# Amplitudes of the pixel stream: noisy pixel, and constant offset orthogonal to it. The offset
# dominates the RMS of a pixel token, so the final norm acts on the pixel almost linearly; both
# dwarf the sin/cos position table (amplitude 1), which would otherwise leak into the velocity.
PIXEL_GAIN = 2048.0
PIXEL_OFFSET = 32768.0


def initialise(net: PiDNet, seed: int) -> None:
    """Fills every parameter of `net` in place; the same seed gives the same weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)
                module.bias.zero_()
        net.y_pos_embedding.normal_(0.0, 0.5, generator=generator)
        for block in net.patch_blocks:
            for modulation in (block.adaLN_modulation_img[0], block.adaLN_modulation_txt[0]):
                modulation.weight.normal_(0.0, 0.02, generator=generator)
                gates = modulation.weight.unflatten(0, (6, -1))
                gates[2] = gates[5] = 0
        # The patch stream starts at zero, so it joins a network that paints already.
        net.s_embedder.proj.weight.zero_()
        if net.config.lq_latent_channels is not None:
            for head in (*net.lq_proj.output_heads, net.lq_proj.pit_head):
                head.weight.zero_()
            for block in net.lq_proj.latent_proj[3:]:
                block.block[5].weight.mul_(0.3)
        for module in net.modules():
            if isinstance(module, SigmaGate):
                nn.init.trunc_normal_(module.content_proj.weight, std=0.01, generator=generator)
                module.content_proj.bias.fill_(2.0)
                module.log_alpha.zero_()
        _lay_pixel_path(net, generator)


def _lay_pixel_path(net: PiDNet, generator: torch.Generator) -> None:
    """v = x at the start, and a pixel MLP whose gate can change that gain."""
    p, channels = net.config.pixel_hidden_size, net.config.in_channels
    # Orthonormal directions for the colours, and the last two channels for the offset alone: what
    # steers the two differs in size so much that one bf16 value could not hold both.
    offset = torch.zeros(p)
    offset[-2:] = torch.tensor([1.0, -1.0]) / math.sqrt(2)
    basis = torch.randn(p, channels, generator=generator)
    basis[-2:] = 0
    colours = torch.linalg.qr(basis).Q
    embed, final = net.pixel_embedder.proj, net.final_layer.linear
    embed.weight.copy_(PIXEL_GAIN * colours)
    embed.bias.copy_(PIXEL_OFFSET * math.sqrt(p) * offset)
    rms = math.sqrt(PIXEL_OFFSET**2 + channels * PIXEL_GAIN**2 / p)
    final.weight.copy_(colours.T * rms / PIXEL_GAIN)
    final.bias.zero_()
    for block in net.pixel_blocks:
        modulation = block.adaLN_modulation[0]
        weight = modulation.weight.unflatten(0, (-1, 6, p))
        weight.zero_()
        # The attention gate multiplies this bias, which makes it a linear map from a patch's
        # conditioning to each of its pixels: the shortest way for the picture to reach the output.
        block.expand_from_attn.bias.fill_(PIXEL_GAIN / 2)
        block.expand_from_attn.weight.mul_(0.1)
        # The first hidden units hold the colours in GELU's linear range.
        fc1, fc2 = block.mlp.fc1, block.mlp.fc2
        fc1.weight[:channels] = colours.T * rms / PIXEL_GAIN
        fc1.bias[:channels] = 4.0
        fc2.weight[:, :channels] = PIXEL_GAIN * colours
        fc2.bias.copy_(-4.0 * fc2.weight[:, :channels].sum(1))
