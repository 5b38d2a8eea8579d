"""What a latent must be before anything is done with it. Errors name the operation and the rule."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ...errors import LatentError, LatentWarning
from ...finite import LATENT, check_finite
from .backbones import BACKBONES, Backbone, family_members
from .latent_statistics import published_statistics

# Of the middle channel. Normalised latents have about 1, pictures without texture less, noise 1;
# raw ones of flux have 2.8, of sdxl 7.7, of qwenimage 2.2. Those of sd3 have 0.65, as a flat
# picture: they cannot be told.
_LARGEST_STD = 1.8
_FEWEST_CELLS = 64  # of a channel: below, a standard deviation says little

_AXES = {3: ("sample", "token", "channel"), 5: ("sample", "channel", "frame", "row", "column")}


def check_values(op: str, latent: Tensor) -> None:
    if not isinstance(latent, Tensor):
        raise LatentError(f"{op}: latent must be a torch.Tensor, got {type(latent).__name__}")
    if latent.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise LatentError(f"{op}: latent must be float32, float16 or bfloat16, got {latent.dtype}")
    if latent.numel() == 0:
        raise LatentError(f"{op}: latent is empty, got shape {tuple(latent.shape)}")
    check_finite(f"{op}: latent", latent, axes=_AXES.get(latent.dim(), LATENT), error=LatentError)


def check_map(op: str, what: str, latent: Tensor, channels: int, b: Backbone) -> None:
    if latent.dim() == 4 and latent.shape[1] == channels:
        return
    hint = ""
    if b.family == "flux2" and latent.dim() == 4:
        other = {b.channels: "raw=False", b.channels // 4: "raw=True"}.get(latent.shape[1])
        hint = f"; with {latent.shape[1]} channels pass {other}" if other else ""
    elif latent.dim() == 3 and b.token_channels is not None:
        hint = "; for tokens pass packed=True and grid=(zh, zw)"
    raise LatentError(
        f"{op}: {what} of {b.name} is (B, {channels}, zh, zw), got {tuple(latent.shape)}{hint}"
    )


def check_grid(op: str, latent: Tensor, b: Backbone) -> None:
    if b.grid and tuple(latent.shape[2:]) != b.grid:
        raise LatentError(
            f"{op}: {b.name} latents have a fixed grid {b.grid}, got {tuple(latent.shape[2:])}"
        )


def channels_hint(channels: int) -> str:
    """For an error: whose latents have so many channels."""
    families = [b.name for b in BACKBONES.values() if b.name == b.family and b.channels == channels]
    families = [name for name in families if name != "demo"]
    if families:
        names = " and ".join(", ".join(family_members(f)) for f in families)
        return f"; {channels} channels are those of {names}: load the decoder of that backbone"
    flux2 = BACKBONES["flux2"]
    if 4 * channels == flux2.channels:
        return (
            f"; {channels} channels are those of raw {flux2.name} latents, which "
            "pixeldiff.models.pid.to_pid_latent(raw=True) converts"
        )
    packed = [
        b.name for b in BACKBONES.values() if b.packing == "2x2" and b.token_channels == channels
    ]
    if packed:
        return (
            f"; {channels} channels are those of packed tokens of {', '.join(packed)}, which "
            "pixeldiff.models.pid.to_pid_latent(packed=True) converts"
        )
    return ""


def sigma_hint(largest: float) -> str:
    """For an error: what a noise level beyond 1 most likely is."""
    if 1 < largest <= 20:
        return (
            f"; if {largest:g} is a standard deviation beside a latent of scale 1 (Karras sigma), "
            f"sigma is {largest / (1 + largest):.3g} here; if it is a percentage, {largest / 100:g}"
        )
    if 20 < largest <= 100:
        return f"; if {largest:g} is a percentage, sigma is {largest / 100:g}"
    if 100 < largest <= 1000:
        return f"; if {largest:g} is a timestep of 0 to 1000, sigma is {largest / 1000:g}"
    return ""


def warn_unnormalised(latent: Tensor, backbone_name: str | None, *, stacklevel: int) -> None:
    """Warn of a latent (B, Cz, zh, zw) that its backbone's diffusion model cannot have made.

    Told by the spread within channels alone: a picture without texture has any mean. One pass over
    the latent, and one wait for its device.
    """
    b = BACKBONES.get(backbone_name or "")
    statistics = None if b is None else published_statistics(b.family)
    if statistics is None or latent.shape[2] * latent.shape[3] < _FEWEST_CELLS:
        return
    spread = latent.detach().float().std(dim=(2, 3))
    normalised = spread * statistics.scale.flatten().to(spread)
    middle, after = torch.stack((spread, normalised)).median(dim=2).values.amax(dim=1).tolist()
    if middle <= _LARGEST_STD:
        return
    more = "no scaling of its VAE explains that"
    if after <= _LARGEST_STD:
        more = (
            f"scaled as its VAE's would be {after:.2g}. A raw VAE latent is converted by "
            f'pixeldiff.models.pid.to_pid_latent(latent, "{b.name}", raw=True)'
        )
    warnings.warn(
        f"latent does not look like one of {b.name}: the standard deviation of its middle channel "
        f"is {middle:.2g}, that of a normalised latent about 1; {more}",
        LatentWarning,
        stacklevel=stacklevel,
    )
