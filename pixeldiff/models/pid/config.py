"""Geometry of a PiD network: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

GATE_TYPES = ("sigma_aware_per_token_per_dim", "sigma_aware_per_token")
PADDING_MODES = ("zeros", "replicate", "reflect")
ROPE_MODES = ("original", "ntk_aware")

# Fields of published configurations that name features no released network uses. They are accepted
# at these values only: any other value would describe a different network.
_INERT = {
    "lq_in_channels": 0,
    "lq_inject_mode": "controlnet",
    "enable_ed": False,
    "use_text_rope": True,
}
# Fields that never change the forward pass (initialisation, training, or parts of `enable_ed`).
_IGNORED = {
    "num_text_blocks",
    "repa_encoder_index",
    "zero_init_lq",
    "train_lq_proj_only",
    "ed_compress_ratio",
    "ed_depth_per_stage",
    "ed_window_size",
    "ed_num_heads",
    "ed_hidden_size",
    "ed_use_token_shuffle",
}


@dataclass(frozen=True)
class PiDConfig:
    """Network geometry. The defaults are the released 1.36 B parameter v1 flux network.

    Args:
        hidden_size: D, width of a patch token. Divisible by `num_groups`, quotient by 4.
        num_groups: attention heads of the patch stream.
        patch_depth, pixel_depth: number of MMDiT and of PiT blocks.
        patch_size: P, pixels along one side of a patch.
        pixel_hidden_size: p, channels of a pixel token, a multiple of 4.
        pixel_attn_hidden_size, pixel_num_groups: width and heads of the PiT attention.
        txt_embed_dim, txt_max_length: width of a caption embedding and the tokens kept of it.
        rope_mode: "ntk_aware" (all releases) or "original".
        rope_ref_h, rope_ref_w: reference image size in pixels of the NTK-aware rotary base.
        lq_latent_channels: channels of the latent, or None for the text-to-image backbone
            (PixelDiT), which has no latent branch at all.
        latent_spatial_down_factor: image pixels per latent cell along one axis.
        lq_latent_unpatchify_factor: u, the latent is unfolded u x u before it is used.
        sr_scale: output pixels per pixel of the latent's image.
        lq_hidden_dim, lq_num_res_blocks: width and depth of the latent's conv stack.
        lq_interval: an LQ gate sits before every `lq_interval`-th MMDiT block.
        lq_gate_type: one logit per token and channel (v1) or per token (v1.5).
        lq_conv_padding_mode: padding of every convolution of the latent's stack.
        pit_lq_inject: gate the latent into the conditioning of the PiT blocks too (v1.5).
        lq_aux_rgb_head: hold the training-only RGB head.
        lq_aux_rgb_head_latent_block_idx: ResBlock (1-based) the RGB head reads; -1 = the last.

    Raises:
        ValueError: a value that no PiD network can have; the message names the field.
    """

    hidden_size: int = 1536
    num_groups: int = 24
    patch_depth: int = 14
    pixel_depth: int = 2
    patch_size: int = 16
    in_channels: int = 3
    pixel_hidden_size: int = 16
    pixel_attn_hidden_size: int = 1152
    pixel_num_groups: int = 16
    txt_embed_dim: int = 2304
    txt_max_length: int = 300
    text_rope_theta: float = 10000.0
    rope_mode: str = "ntk_aware"
    rope_ref_h: int = 1024
    rope_ref_w: int = 1024
    lq_latent_channels: int | None = 16
    latent_spatial_down_factor: int = 8
    lq_latent_unpatchify_factor: int = 1
    sr_scale: int = 4
    lq_hidden_dim: int = 512
    lq_num_res_blocks: int = 4
    lq_interval: int = 2
    lq_gate_type: str = "sigma_aware_per_token_per_dim"
    lq_conv_padding_mode: str = "zeros"
    pit_lq_inject: bool = False
    lq_aux_rgb_head: bool = False
    lq_aux_rgb_head_latent_block_idx: int = -1

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type != "int" or f.name == "lq_aux_rgb_head_latent_block_idx":
                continue
            least = 0 if f.name == "lq_num_res_blocks" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"PiDConfig: {f.name} must be an integer >= {least}, got {value!r}"
                )
        self._divides("num_groups", "hidden_size")
        self._divides("pixel_num_groups", "pixel_attn_hidden_size")
        self._multiple_of_4("hidden_size / num_groups", self.head_dim)
        self._multiple_of_4("pixel_attn_hidden_size / pixel_num_groups", self.pixel_head_dim)
        self._multiple_of_4("pixel_hidden_size", self.pixel_hidden_size)
        self._one_of("rope_mode", ROPE_MODES)
        self._one_of("lq_gate_type", GATE_TYPES)
        self._one_of("lq_conv_padding_mode", PADDING_MODES)
        for name in ("rope_ref_h", "rope_ref_w"):
            if getattr(self, name) < self.patch_size:
                raise ValueError(
                    f"PiDConfig: {name} must be at least patch_size = {self.patch_size}, got "
                    f"{getattr(self, name)}"
                )
        if self.lq_latent_channels is not None:
            self._check_latent_branch()

    def _check_latent_branch(self) -> None:
        channels = self.lq_latent_channels
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise ValueError(
                f"PiDConfig: lq_latent_channels must be None or an integer >= 1, got {channels!r}"
            )
        if self.lq_latent_channels % self.lq_latent_unpatchify_factor**2:
            raise ValueError(
                f"PiDConfig: lq_latent_channels must be divisible by lq_latent_unpatchify_factor"
                f"^2 = {self.lq_latent_unpatchify_factor**2}, got {self.lq_latent_channels}"
            )
        if self.lq_hidden_dim % 4:
            raise ValueError(
                f"PiDConfig: lq_hidden_dim must be divisible by 4 (GroupNorm groups), got "
                f"{self.lq_hidden_dim}"
            )
        cells = self.sr_scale * self.latent_spatial_down_factor
        if cells % (self.lq_latent_unpatchify_factor * self.patch_size) and (
            (self.lq_latent_unpatchify_factor * self.patch_size) % cells
        ):
            raise ValueError(
                "PiDConfig: one latent cell must cover a whole number of patches or the reverse; "
                f"sr_scale * latent_spatial_down_factor / lq_latent_unpatchify_factor / patch_size "
                f"is {self.patches_per_latent_cell}"
            )
        if not self.lq_aux_rgb_head:
            return
        self._divides("sr_scale", "patch_size")
        if self.lq_aux_rgb_head_latent_block_idx > self.lq_num_res_blocks:
            raise ValueError(
                f"PiDConfig: lq_aux_rgb_head_latent_block_idx must be at most lq_num_res_blocks = "
                f"{self.lq_num_res_blocks}, got {self.lq_aux_rgb_head_latent_block_idx}"
            )

    def _divides(self, small: str, large: str) -> None:
        if getattr(self, large) % getattr(self, small):
            raise ValueError(
                f"PiDConfig: {large} must be divisible by {small} = {getattr(self, small)}, got "
                f"{getattr(self, large)}"
            )

    def _multiple_of_4(self, name: str, value: int) -> None:
        if value % 4:
            raise ValueError(f"PiDConfig: {name} must be a multiple of 4, got {value}")

    def _one_of(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(
                f"PiDConfig: {name} must be one of {', '.join(choices)}, got "
                f"{getattr(self, name)!r}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_groups

    @property
    def pixel_head_dim(self) -> int:
        return self.pixel_attn_hidden_size // self.pixel_num_groups

    @property
    def ffn_size(self) -> int:
        """SwiGLU width: two thirds of four times D, rounded down."""
        return 2 * (4 * self.hidden_size) // 3

    @property
    def num_injections(self) -> int:
        return -(-self.patch_depth // self.lq_interval)

    @property
    def patches_per_latent_cell(self) -> float:
        """Patch cells per (unfolded) latent cell along one axis."""
        cell = self.latent_spatial_down_factor / self.lq_latent_unpatchify_factor
        return self.sr_scale * cell / self.patch_size

    @property
    def pixels_per_latent_cell(self) -> int:
        """Output pixels per latent cell along one axis."""
        return self.latent_spatial_down_factor * self.sr_scale

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PiDConfig:
        """A config from a published one (JSON). Fields that have no effect are dropped.

        A dict without any `lq_*` field is the text-to-image backbone (`lq_latent_channels=None`).

        Raises:
            ValueError: an unknown field, or one that asks for a feature no release has.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        kept: dict[str, Any] = {}
        for name, value in values.items():
            if name in known:
                kept[name] = value
            elif name in _INERT:
                if value != _INERT[name]:
                    raise ValueError(
                        f"PiDConfig: {name} = {value!r} is not supported (no released network "
                        f"uses it); expected {_INERT[name]!r}"
                    )
            elif name not in _IGNORED:
                raise ValueError(f"PiDConfig: unknown field {name!r}")
        if not any(name.startswith("lq_") for name in values):
            kept["lq_latent_channels"] = None
        return cls(**kept)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dict; `from_dict(c.to_dict()) == c`."""
        return dataclasses.asdict(self)
