"""Decoders to time: the demo, and every released network with random weights of its real size."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pixeldiff.models.pid import PiDConfig, PiDNet
from pixeldiff.models.pid.decoder import PRECISIONS, PiDDecoder, check_precision, ready
from pixeldiff.models.pid.variants import Variant, variant, variants

DEMO = "demo"


def names() -> tuple[str, ...]:
    """Every name `resolve` takes as listed; other spellings of variants work too."""
    return DEMO, *(v.name for v in variants() if v.kind != "t2i_backbone")


def resolve(name: str) -> Variant | None:
    """The released network of this name; None is the demo.

    Raises:
        ValueError: no such network, or the text-to-image backbone, which decodes nothing.
    """
    if name == DEMO:
        return None
    found = variant(name)
    if found.kind == "t2i_backbone":
        raise ValueError(f"{name} has no latent to decode; choose from {', '.join(names())}")
    return found


def decoder(name: str, device: torch.device, precision: str) -> PiDDecoder:
    """A decoder in its compute dtype, which is the only one its weights ever have; what "fp8"
    quantises had bf16 before, one layer at a time.

    Raises:
        ValueError: a precision this device does not have.
    """
    check_precision(precision, device)
    found = resolve(name)
    if found is None:
        return PiDDecoder.from_pretrained(DEMO, device=device, precision=precision)
    dtype = PRECISIONS[precision]
    net = PiDNet(found.inference_config, device="meta", dtype=dtype).to_empty(device=device)
    fill(net, dtype)
    ready(net.requires_grad_(False), precision)
    return PiDDecoder(net, variant=found, name=f"{found.name}, random")


@torch.no_grad()
def fill(net: nn.Module, dtype: torch.dtype) -> None:
    """Random weights that depend on a parameter's name only: two implementations of one network
    get the same ones. Matrices keep the variance of their input, gains are near one.

    Args:
        dtype: the values are drawn in it, and converted where the parameter has another.
    """
    for name, parameter in net.named_parameters():
        seed = zlib.crc32(name.encode())
        generator = torch.Generator(parameter.device).manual_seed(seed)
        same = parameter.dtype == dtype
        drawn = parameter if same else torch.empty_like(parameter, dtype=dtype)
        if parameter.dim() < 2:
            drawn.normal_(0, 0.05, generator=generator)
            if name.endswith("weight"):
                drawn.add_(1)
        else:
            drawn.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        if not same:
            parameter.copy_(drawn)


@dataclass(frozen=True)
class Inputs:
    """What one image is decoded from."""

    latent: Tensor
    caption: Tensor


def inputs(config: PiDConfig, side: int, batch: int, device: torch.device) -> Inputs:
    """Random inputs of a square image.

    Raises:
        ValueError: a side the latent cannot give.
    """
    cell = config.pixels_per_latent_cell
    if side % cell or side < cell:
        raise ValueError(f"size must be a positive multiple of {cell} for this network, got {side}")
    generator = torch.Generator().manual_seed(3)
    shape = (batch, config.lq_latent_channels, side // cell, side // cell)
    caption = (1, config.txt_max_length, config.txt_embed_dim)
    return Inputs(
        torch.randn(shape, generator=generator).to(device),
        torch.randn(caption, generator=generator).to(device),
    )
