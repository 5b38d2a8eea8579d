"""Latents: from what a generator, its pipeline or its VAE hands over to what PiD takes.

Three forms of the same latent occur:

* *normalised*, (B, Cz, zh, zw): what the generator's diffusion works in, and what PiD takes;
* *packed*, (B, tokens, channels): the normalised latent as a pipeline's transformer sees it;
* *raw*, (B, C, h, w): the mean a VAE's encoder produces and its decoder takes. diffusers pipelines
  un-scale a latent to this form right before `vae.decode`.

Source: PiD, arXiv 2605.23902, and the published VAE configurations of the generators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import LatentError
from .backbones import Backbone, backbone
from .latent_checks import check_grid, check_map, check_values
from .latent_noise import (
    captured_sigma,
    from_capture,
    noise_latent,
    rae_sigmas,
    round_to_bfloat16,
)
from .latent_packing import (
    map_to_tokens,
    pack_2x2,
    patchify_2x2,
    tokens_to_map,
    unpack_2x2,
    unpatchify_2x2,
)
from .latent_statistics import (
    BATCH_NORM_EPS,
    RAE_EPS,
    LatentStatistics,
    published_statistics,
)

__all__ = [
    "BATCH_NORM_EPS",
    "RAE_EPS",
    "LatentStatistics",
    "captured_sigma",
    "from_capture",
    "from_pid_latent",
    "map_to_tokens",
    "noise_latent",
    "pack_2x2",
    "patchify_2x2",
    "rae_sigmas",
    "round_to_bfloat16",
    "to_pid_latent",
    "tokens_to_map",
    "unpack_2x2",
    "unpatchify_2x2",
]

LAYER_NORM_EPS = 1e-6  # Scale-RAE (SigLIP)


def to_pid_latent(
    latent: Tensor,
    backbone_name: str,
    *,
    packed: bool | None = None,
    raw: bool = False,
    grid: tuple[int, int] | None = None,
    statistics: LatentStatistics | None = None,
) -> Tensor:
    """The latent PiD takes, (B, Cz, zh, zw) fp32, from any form a pipeline or VAE hands over.

    A normalised latent (the default) is checked and passed on. A time axis of length 1, as the
    Qwen-Image pipeline keeps, is dropped from any (B, C, 1, h, w) input.

    Args:
        latent: fp32 | fp16 | bf16.
            Normalised: (B, Cz, zh, zw).
            Packed (`packed=True`): (B, zh/2*zw/2, 4 Cz) for flux and qwenimage; (B, zh*zw, Cz) for
            flux2, dinov2 and siglip. Other generators do not pack.
            Raw (`raw=True`): the VAE mean, (B, Cz, zh, zw); for flux2 (B, 32, 2 zh, 2 zw), which
            is also what the klein pipelines return as their final latent; for siglip the tower's
            output before its final norm, as a map or as tokens.
        backbone_name: a name of `BACKBONES`.
        packed: None decides by the number of axes (3 = packed).
        grid: (zh, zw) of the result, needed for packed input: the generated image's height and
            width divided by the backbone's factor (8 or 16).
        statistics: normalisation of raw latents. Needed for flux2 (batch-norm statistics of its
            VAE) and dinov2, whose statistics come with their weights; optional elsewhere.

    Raises:
        UnknownNameError: no such backbone.
        LatentError: shape, dtype, NaN or infinity, a missing `grid` or `statistics`.
    """
    b = backbone(backbone_name)
    op = "to_pid_latent"
    check_values(op, latent)
    if packed is None:
        packed = latent.dim() == 3
    if packed:
        if raw and b.family != "siglip":
            raise LatentError(
                f"{op}: packed {b.name} tokens are always normalised; pass packed=True or "
                "raw=True, not both"
            )
        latent = _unpack(op, latent, b, grid)
    latent = _without_time_axis(latent)
    if raw:
        return _normalise(op, latent, b, statistics)
    check_map(op, "a normalised latent", latent, b.channels, b)
    check_grid(op, latent, b)
    return latent.float()


def from_pid_latent(
    latent: Tensor,
    backbone_name: str,
    *,
    packed: bool = False,
    raw: bool = False,
    statistics: LatentStatistics | None = None,
) -> Tensor:
    """The inverse of `to_pid_latent`: a normalised latent as packed tokens or as a raw VAE latent.

    Args:
        latent: (B, Cz, zh, zw), fp32 | fp16 | bf16.
        backbone_name, statistics: as for `to_pid_latent`.
        packed, raw: the form wanted; neither returns the latent in fp32 as it is.

    Returns:
        fp32; shapes as in `to_pid_latent`, without a time axis.

    Raises:
        UnknownNameError: no such backbone.
        LatentError: shape, dtype, NaN or infinity, missing `statistics`, or a form that does not
            exist: siglip's layer norm has no inverse, and not every generator packs.
    """
    b = backbone(backbone_name)
    op = "from_pid_latent"
    check_values(op, latent)
    if packed and raw:
        raise LatentError(f"{op}: packed tokens are always normalised; ask for packed or raw")
    check_map(op, "a normalised latent", latent, b.channels, b)
    check_grid(op, latent, b)
    latent = latent.float()
    if packed:
        if b.packing == "none":
            raise LatentError(f"{op}: {b.name} pipelines do not pack their latents")
        if b.packing == "raster":
            return map_to_tokens(latent)
        if latent.shape[2] % 2 or latent.shape[3] % 2:
            raise LatentError(
                f"{op}: {b.name} packs 2x2 cells, so zh and zw must be even, got "
                f"{tuple(latent.shape[2:])}"
            )
        return pack_2x2(latent)
    if not raw:
        return latent
    if b.family == "siglip":
        raise LatentError(
            f"{op}: siglip latents are layer-normed; their raw form is not recoverable"
        )
    s = _statistics(op, b, statistics, latent)
    latent = latent / s.scale.to(latent.device) + s.shift.to(latent.device)
    return unpatchify_2x2(latent) if b.family == "flux2" else latent


def _unpack(op: str, tokens: Tensor, b: Backbone, grid: tuple[int, int] | None) -> Tensor:
    if b.packing == "none":
        raise LatentError(
            f"{op}: {b.name} latents are never packed; expected (B, {b.channels}, zh, zw), got "
            f"{tuple(tokens.shape)}"
        )
    if tokens.dim() != 3 or tokens.shape[2] != b.token_channels:
        raise LatentError(
            f"{op}: packed {b.name} latents are (B, tokens, {b.token_channels}), got "
            f"{tuple(tokens.shape)}"
        )
    grid = grid or b.grid
    count = tokens.shape[1]
    if grid is None:
        raise LatentError(
            f"{op}: packed latents need grid=(zh, zw), the generated image's height and width "
            f"divided by {b.factor}; {count} tokens do not tell the aspect ratio"
        )
    zh, zw = grid
    cells = 4 if b.packing == "2x2" else 1
    if zh < 1 or zw < 1 or (cells == 4 and (zh % 2 or zw % 2)) or zh * zw != count * cells:
        even = "even numbers " if cells == 4 else ""
        raise LatentError(
            f"{op}: grid=(zh, zw) must be {even}with zh * zw = {count * cells} for {count} "
            f"{b.name} tokens, got {tuple(grid)}"
        )
    if b.grid and tuple(grid) != b.grid:
        raise LatentError(f"{op}: {b.name} latents have a fixed grid {b.grid}, got {tuple(grid)}")
    return unpack_2x2(tokens, grid) if cells == 4 else tokens_to_map(tokens, grid)


def _normalise(op: str, raw: Tensor, b: Backbone, statistics: LatentStatistics | None) -> Tensor:
    if b.family == "flux2":
        check_map(op, "a raw latent", raw, b.channels // 4, b)
        if raw.shape[2] % 2 or raw.shape[3] % 2:
            raise LatentError(
                f"{op}: raw {b.name} latents need an even height and width, got "
                f"{tuple(raw.shape[2:])}"
            )
        raw = patchify_2x2(raw)
    else:
        check_map(op, "a raw latent", raw, b.channels, b)
    check_grid(op, raw, b)
    raw = raw.float()
    if b.family == "siglip":
        if statistics is not None:
            raise LatentError(f"{op}: siglip latents are layer-normed and take no statistics")
        normed = torch.nn.functional.layer_norm(
            raw.movedim(1, -1), (b.channels,), eps=LAYER_NORM_EPS
        )
        return normed.movedim(-1, 1).contiguous()
    s = _statistics(op, b, statistics, raw)
    return (raw - s.shift.to(raw.device)) * s.scale.to(raw.device)


def _statistics(
    op: str, b: Backbone, given: LatentStatistics | None, latent: Tensor
) -> LatentStatistics:
    s = given or published_statistics(b.family)
    if s is None and b.family == "demo":
        raise LatentError(f"{op}: the demo autoencoder's latents have no raw form; leave raw out")
    if s is None:
        where = (
            "LatentStatistics.from_moments(vae.bn.running_mean, vae.bn.running_var, "
            "eps=BATCH_NORM_EPS)"
            if b.family == "flux2"
            else "LatentStatistics.from_moments(mean, var, eps=RAE_EPS)"
        )
        raise LatentError(
            f"{op}: raw {b.name} latents need statistics={where}; they come with the weights of "
            "its autoencoder"
        )
    for name in ("shift", "scale"):
        shape = tuple(getattr(s, name).shape)
        legal = ((), (b.channels, 1, 1), tuple(latent.shape[1:]))
        if shape not in legal:
            raise LatentError(
                f"{op}: statistics.{name} must be one of {', '.join(map(str, legal))} for "
                f"{b.name}, got {shape}"
            )
    return s


def _without_time_axis(latent: Tensor) -> Tensor:
    if latent.dim() == 5 and latent.shape[2] == 1:
        return latent.squeeze(2)
    return latent
