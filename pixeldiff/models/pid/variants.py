"""The released PiD networks, by name: geometry, sampling settings, trained sizes, licence.

No weights are part of pixeldiff. A variant says what a released file holds and how it is run.

Source: PiD, arXiv 2605.23902, and the configurations published with its weights.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ...errors import UnknownNameError
from .backbones import BACKBONES, backbone, family_members, unknown_name
from .config import PiDConfig
from .samplers import STUDENT_T_LIST

LICENCE_NOTE = (
    "The released PiD weights are under NVIDIA's non-commercial source code licence (NSCLv1): "
    "research and evaluation only. pixeldiff itself is Apache-2.0 and contains no such weights."
)


@dataclass(frozen=True)
class DynamicShift:
    """Timestep shift that grows with the image: base_shift * sqrt(sqrt(H W) / base_size)."""

    base_shift: float
    base_size: int


@dataclass(frozen=True)
class SamplingSettings:
    """How a released network is sampled.

    Args:
        steps: usual number of network evaluations (pairs of evaluations under guidance).
        times: the distilled schedule, ending in 0; None for networks that take any grid.
        stochastic: fresh noise is drawn between steps (distilled networks).
        cfg_scale: guidance scale; 1 = none, as for every distilled network.
        shift: timestep shift where `dynamic_shift` is None.
        dynamic_shift: size-dependent shift, in place of `shift`.
        timescale: the network's time input is `timescale * t`.
        prediction_type: what the network returns.
    """

    steps: int
    times: tuple[float, ...] | None
    stochastic: bool
    cfg_scale: float
    shift: float = 6.0
    dynamic_shift: DynamicShift | None = None
    timescale: float = 1000.0
    prediction_type: str = "velocity"


@dataclass(frozen=True)
class Variant:
    """One released network.

    Args:
        name: short name, for example "flux-v1.5".
        checkpoint: name of its folder in the release.
        kind: "distilled" (4 steps), "undistilled" (many steps, guided) or "t2i_backbone"
            (text to image, no latent).
        version: "v1", "v1.5", or None for the text-to-image backbone.
        resolution: trained size class, "2k" or "2kto4k".
        backbones: generators whose latents it decodes, the family's own name first.
        config: geometry as published, including a training-only head the file may lack.
        sampling: schedule and guidance.
    """

    name: str
    checkpoint: str
    kind: str
    version: str | None
    resolution: str
    backbones: tuple[str, ...]
    config: PiDConfig
    sampling: SamplingSettings

    @property
    def checkpoint_file(self) -> str:
        """Path of the weights inside the release."""
        return f"checkpoints/{self.checkpoint}/model_ema_bf16.pth"

    @property
    def family(self) -> str | None:
        """The backbone family, or None for the text-to-image backbone."""
        return self.backbones[0] if self.backbones else None

    @property
    def inference_config(self) -> PiDConfig:
        """`config` without the training-only RGB head."""
        return dataclasses.replace(self.config, lq_aux_rgb_head=False)


def _student(dynamic_shift: DynamicShift | None) -> SamplingSettings:
    return SamplingSettings(4, STUDENT_T_LIST, True, 1.0, dynamic_shift=dynamic_shift)


def _v1(family: str, resolution: str, sr_scale: int = 4) -> Variant:
    b = BACKBONES[family]
    return Variant(
        name=f"{family}-{resolution}",
        checkpoint=f"PiD_res{resolution}_sr{sr_scale}x_official_{family}_distill_4step",
        kind="distilled",
        version="v1",
        resolution=resolution,
        backbones=family_members(family),
        config=PiDConfig(
            lq_latent_channels=b.channels,
            latent_spatial_down_factor=b.factor,
            sr_scale=sr_scale,
        ),
        sampling=_student(DynamicShift(4.0, 1024) if resolution == "2kto4k" else None),
    )


def _v1_5(family: str, kind: str) -> Variant:
    b = BACKBONES[family]
    shift = DynamicShift(6.0, 2048)
    distilled = kind == "distilled"
    return Variant(
        name=f"{family}-v1.5" + ("" if distilled else "-undistilled"),
        checkpoint=f"PiD_v1pt5_res2kto4k_sr4x_official_{family}_"
        + ("distill_4step" if distilled else "undistilled"),
        kind=kind,
        version="v1.5",
        resolution="2kto4k",
        backbones=family_members(family),
        config=PiDConfig(
            rope_ref_h=2048,
            rope_ref_w=2048,
            lq_latent_channels=b.channels,
            latent_spatial_down_factor=b.factor,
            # FLUX.2's 2x2-packed latent is unfolded to 32 channels before the conv stack.
            lq_latent_unpatchify_factor=2 if family == "flux2" else 1,
            lq_hidden_dim=1024,
            lq_gate_type="sigma_aware_per_token",
            lq_conv_padding_mode="replicate",
            pit_lq_inject=True,
            lq_aux_rgb_head=True,
        ),
        sampling=(
            _student(shift)
            if distilled
            else SamplingSettings(25, None, False, 5.0, dynamic_shift=shift)
        ),
    )


_PIXELDIT = Variant(
    name="pixeldit",
    checkpoint="PixelDiT_finetune_2kto4k",
    kind="t2i_backbone",
    version=None,
    resolution="2kto4k",
    backbones=(),
    config=PiDConfig(rope_ref_h=2048, rope_ref_w=2048, lq_latent_channels=None),
    sampling=SamplingSettings(50, None, False, 2.75, dynamic_shift=DynamicShift(6.0, 2048)),
)

_VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        _v1("flux", "2k"),
        _v1("flux2", "2k"),
        _v1("sd3", "2k"),
        _v1("dinov2", "2k"),
        _v1("siglip", "2k", sr_scale=8),
        _v1("sd3", "2kto4k"),
        _v1("sdxl", "2kto4k"),
        *(_v1_5(f, "distilled") for f in ("flux", "flux2", "qwenimage")),
        *(_v1_5(f, "undistilled") for f in ("flux", "flux2", "qwenimage")),
        _PIXELDIT,
    )
}


def _all_names() -> dict[str, str]:
    """Every accepted spelling, in lower case -> short name."""
    names: dict[str, str] = {}
    for v in _VARIANTS.values():
        names[v.checkpoint.lower()] = v.name
        suffix = v.name[len(v.family) :] if v.family else v.name
        for member in v.backbones or ("",):
            names[member + suffix] = v.name
    return names


_NAMES = _all_names()


def variants() -> tuple[Variant, ...]:
    """All released networks, v1 first."""
    return tuple(_VARIANTS.values())


def variants_for(name: str) -> tuple[Variant, ...]:
    """The released networks that decode the latents of a backbone ("flux2-klein-4b", "sd3").

    Raises:
        UnknownNameError: no such backbone.
    """
    family = backbone(name).family
    return tuple(v for v in _VARIANTS.values() if v.family == family)


def variant(name: str) -> Variant:
    """The released network of this name.

    Accepts the short name ("flux-2k", "sd3-2kto4k", "flux2-v1.5", "qwenimage-v1.5-undistilled",
    "pixeldit"), the same with another backbone of the family ("zimage-turbo-2k"), and the name of
    the checkpoint. Case does not matter.

    Raises:
        UnknownNameError: lists near matches and all short names.
    """
    if not isinstance(name, str):
        raise UnknownNameError(f"variant: name must be a string, got {name!r}")
    key = name.strip().lower()
    if key in _NAMES:
        return _VARIANTS[_NAMES[key]]
    if key in BACKBONES:
        choices = " or ".join(v.name for v in variants_for(key))
        raise UnknownNameError(f"variant: {name!r} is a backbone; its released networks: {choices}")
    raise UnknownNameError(f"variant: {unknown_name(name, key, _VARIANTS)}")


def variant_in_path(path: str) -> Variant | None:
    """The released network whose checkpoint name is a part of `path`, if exactly one is."""
    text = path.lower()
    found = [v for v in _VARIANTS.values() if v.checkpoint.lower() in text]
    return found[0] if len(found) == 1 else None
