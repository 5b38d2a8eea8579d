"""The latent generators PiD decodes for: the shape of their latents and how they hand them over.

A *backbone* is a generator a user names ("flux2-klein-4b"); its *family* is the backbone whose
latents, and therefore whose PiD weights, it shares ("flux2").

Source: PiD, arXiv 2605.23902, and the published VAE configurations of the generators.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from ...errors import UnknownNameError


@dataclass(frozen=True)
class CaptureSteps:
    """When to hand a latent over before the generator is done.

    Args:
        steps: network evaluations of the whole generation.
        after: evaluations (first, last advisable) after which to take the latent. (steps, steps)
            means the final latent: few-step generators have nothing left to skip.
    """

    steps: int
    after: tuple[int, int]

    @property
    def final_only(self) -> bool:
        return self.after == (self.steps, self.steps)


@dataclass(frozen=True)
class Backbone:
    """One latent generator.

    Args:
        name: what users type.
        family: backbone with the same latents and the same PiD weights; itself for most.
        channels: Cz, channels of the latent PiD takes.
        factor: image pixels per cell of that latent along one axis.
        packing: how the generator's pipeline lays its tokens out: "none"; "2x2" (a token holds a
            2x2 block of cells, channel = c*4 + row*2 + col); "raster" (a token is one cell).
        grid: (zh, zw) when the generator knows one size only.
        variance_preserving: noise keeps the latent's variance (SDXL) instead of interpolating.
        capture: advised hand-over point.
    """

    name: str
    family: str
    channels: int
    factor: int
    packing: str = "none"
    grid: tuple[int, int] | None = None
    variance_preserving: bool = False
    capture: CaptureSteps | None = None

    @property
    def token_channels(self) -> int | None:
        """Width of a packed token, or None where pipelines do not pack."""
        return {"none": None, "2x2": 4 * self.channels, "raster": self.channels}[self.packing]


def _final(steps: int) -> CaptureSteps:
    return CaptureSteps(steps, (steps, steps))


BACKBONES: dict[str, Backbone] = {
    b.name: b
    for b in (
        Backbone("flux", "flux", 16, 8, "2x2", capture=CaptureSteps(28, (24, 24))),
        Backbone("zimage", "flux", 16, 8, capture=CaptureSteps(50, (46, 46))),
        Backbone("zimage-turbo", "flux", 16, 8, capture=_final(9)),
        Backbone("flux2", "flux2", 128, 16, "raster", capture=CaptureSteps(50, (46, 46))),
        Backbone("flux2-klein-4b", "flux2", 128, 16, "raster", capture=_final(4)),
        Backbone("flux2-klein-9b", "flux2", 128, 16, "raster", capture=_final(4)),
        Backbone("sd3", "sd3", 16, 8, capture=CaptureSteps(28, (24, 24))),
        Backbone(
            "sdxl", "sdxl", 4, 8, variance_preserving=True, capture=CaptureSteps(30, (26, 26))
        ),
        Backbone("qwenimage", "qwenimage", 16, 8, "2x2", capture=CaptureSteps(50, (44, 44))),
        Backbone("qwenimage-2512", "qwenimage", 16, 8, "2x2", capture=CaptureSteps(50, (44, 44))),
        Backbone(
            "dinov2", "dinov2", 768, 16, "raster", (32, 32), capture=CaptureSteps(50, (44, 48))
        ),
        Backbone(
            "siglip", "siglip", 1152, 16, "raster", (16, 16), capture=CaptureSteps(50, (44, 48))
        ),
        # The small autoencoder that ships with the package; it hands over normalised latents.
        Backbone("demo", "demo", 16, 8),
    )
}


def backbone(name: str) -> Backbone:
    """The backbone of this name; case and `_` versus `-` do not matter.

    Raises:
        UnknownNameError: lists near matches and all names.
    """
    if not isinstance(name, str):
        raise UnknownNameError(f"backbone: name must be a string, got {name!r}")
    key = name.strip().lower().replace("_", "-")
    if key in BACKBONES:
        return BACKBONES[key]
    raise UnknownNameError(f"backbone: {unknown_name(name, key, BACKBONES)}")


def family_members(family: str) -> tuple[str, ...]:
    """Names of all backbones that share the latents of `family`, itself first."""
    return tuple(b.name for b in BACKBONES.values() if b.family == family)


def unknown_name(given: str, key: str, names) -> str:
    """The end of an error message about a name that is not in `names`."""
    near = difflib.get_close_matches(key, list(names), n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"unknown name {given!r}.{hint} Known: {', '.join(names)}"
