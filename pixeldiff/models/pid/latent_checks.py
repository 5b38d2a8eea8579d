"""What a latent must be before anything is done with it. Errors name the operation and the rule."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import LatentError
from ...finite import LATENT, check_finite
from .backbones import Backbone

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
