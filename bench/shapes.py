"""The real shapes: where each op stands in a network, and how large it is there.

One entry a system. An op that no system lists is timed at the image tokens of the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pixeldiff.ops.examples import Geometry

PATCH = 16


@dataclass(frozen=True)
class System:
    """Args:
    sizes: pixels along one side of the output.
    geometry: of the released network; the grid is set by the size.
    sites: op -> site -> what differs there from the image tokens of the main stream.
    patches: size -> pixels along one side of a patch, where it is not PATCH.
    decoders: size -> levels of the local decoder, see Geometry.
    """

    sizes: tuple[int, ...]
    geometry: Geometry
    sites: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    patches: Mapping[int, int] = field(default_factory=dict)
    decoders: Mapping[int, tuple[tuple[int, int, int], ...]] = field(default_factory=dict)

    def at(self, size: int, patches: int | None = None) -> Geometry:
        """Of the network of this size; `patches` along one side of the image, if not all."""
        patch = self.patches.get(size, PATCH)
        side = size // patch if patches is None else patches
        decoder = self.decoders.get(size, self.geometry.decoder)
        return replace(self.geometry, grid=(side, side), patch=patch, decoder=decoder)


@dataclass(frozen=True)
class Case:
    """One op at one place of a network at one size; `scale` divides the side of the image."""

    op: str
    system: str
    site: str
    size: int
    scale: int
    geometry: Geometry

    @property
    def label(self) -> str:
        return f"{self.op} {self.system}/{self.site} {self.size}" + (
            f" (1/{self.scale} side)" if self.scale > 1 else ""
        )


_IMAGE: Mapping[str, Mapping[str, Any]] = {"image": {}}
_TEXT_ROWS = {"grid": (1, 300)}
# The trunk sees the same tokens at every size of its own.
_SAME = {"patch": PATCH, "decoder": ()}
_TRUNK: Mapping[str, Mapping[str, Any]] = {"trunk": _SAME}
# Channels of the local decoder's levels at 4096. Its form for 1024 starts at the third of them,
# those beyond 4096 with one of three channels before the first.
_DECODER = (
    *((16, 16, 16), (32, 32, 16), (64, 64, 32)),
    *((128, 128, 64), (256, 256, 128), (512, 512, 256)),
)
_THIN = (3, 16, 16)
# Two thin ones, one between, a wide one.
_LEVELS = {"full": {}, "half": {"level": 1}, "quarter": {"level": 2}, "sixteenth": {"level": 4}}
_PIT = {"width": 1152, "heads": 16, "head_dim": 72, "text": 0}

SYSTEMS: dict[str, System] = {
    # 14 MMDiT blocks of width 1536, 2 PiT blocks of width 1152 (arXiv 2605.23902).
    "pid": System(
        sizes=(1024, 2048, 4096),
        geometry=Geometry(
            text=300, width=1536, heads=24, head_dim=64, hidden=2 * 4 * 1536 // 3, attn=1152
        ),
        sites={
            "rms_norm": {"caption": _TEXT_ROWS},
            "rms_norm_modulate": {"image": {}, "text": _TEXT_ROWS},
            "rms_norm_modulate_fp8": {"image": {}, "text": _TEXT_ROWS},
            "gated_residual_norm": {"image": {}, "text": _TEXT_ROWS},
            "gated_residual_norm_fp8": {"image": {}, "text": _TEXT_ROWS},
            "swiglu": {"image": {}, "text": _TEXT_ROWS},
            "swiglu_fp8": {"image": {}, "text": _TEXT_ROWS},
            "quantize_rows": {"mmdit": {}, "pit": _PIT},
            "fp8_linear": {"mmdit": {}, "pit": _PIT, "text": _TEXT_ROWS},
            "qk_norm_rope": {"mmdit": {}, "pit": _PIT},
            "qkv_norm_rope": {"mmdit": {}, "pit": _PIT},
            "joint_attention": {"mmdit": {}, "pit": _PIT},
            "joint_attention_fp8": {"mmdit": {}, "pit": _PIT},
            "sigma_gate": {"v1": {}, "v1.5": {"gates": 1}},
            "sigma_gate_norm": {"v1": {}, "v1.5": {"gates": 1}},
            "sigma_gate_norm_fp8": {"v1": {}, "v1.5": {"gates": 1}},
        },
    ),
    # 34 blocks of width 3840 over image and 128 caption tokens; the local decoder's levels
    # (arXiv 2605.12013).
    "l2p": System(
        sizes=(1024, 4096),
        geometry=Geometry(
            text=128,
            width=3840,
            heads=30,
            head_dim=128,
            hidden=10240,
            decoder=_DECODER,
            bottleneck=512,
        ),
        sites={
            "gated_norm_residual": _TRUNK,
            "swiglu": _TRUNK,
            "qk_norm_rope": _TRUNK,
            "qkv_norm_rope": _TRUNK,
            "joint_attention": _TRUNK,
            "rms_norm_modulate": {"trunk": {**_SAME, "shift": False}},
            "local_decoder_down": _LEVELS,
            "local_decoder_pixels": {"full": {}, "guided": {"guided": True}},
            "local_decoder_up": _LEVELS,
        },
        patches={1024: 16, 4096: 64, 8192: 128, 10240: 160},
        decoders={
            1024: ((64, 64, 64), *_DECODER[3:]),
            4096: _DECODER,
            8192: (_THIN, *_DECODER),
            10240: (_THIN, *_DECODER[:-1]),
        },
    ),
}


def cases(op: str, sizes: tuple[int, ...] = (), scale: int = 1) -> list[Case]:
    """Every place of an op, at every size asked for (default: the systems' own).

    Raises:
        ValueError: a size that `scale` does not divide into whole patches.
    """
    found = []
    listed = any(op in system.sites for system in SYSTEMS.values())
    for name, system in SYSTEMS.items():
        first = name == next(iter(SYSTEMS))
        sites = system.sites.get(op, _IMAGE if first and not listed else {})
        for size in sizes or system.sizes:
            patch = system.patches.get(size, PATCH)
            side, left = divmod(size, scale * patch)
            if left or side == 0:
                raise ValueError(
                    f"size / scale must be a positive multiple of {patch}, got {size} / {scale}"
                )
            whole = system.at(size, side)
            found += [
                Case(op, name, site, size, scale, replace(whole, **changes))
                for site, changes in sites.items()
                if changes.get("level", 0) < max(1, len(whole.decoder))
            ]
    # Rows of the text do not grow with the image: once is enough.
    unique: dict[tuple[str, str, Geometry], Case] = {}
    for case in found:
        unique.setdefault((case.system, case.site, case.geometry), case)
    return list(unique.values())
