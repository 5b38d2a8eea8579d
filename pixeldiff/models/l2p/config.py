"""Geometry of an L2P network and of its local decoder: frozen dataclasses, checked when made.

Source: L2P (arXiv 2605.12013) and its 4K/8K/10K release, on the Z-Image transformer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SEQ_MULTIPLE = 32  # image and caption rows are padded to a multiple of this, each on its own
TIME_CHANNELS = 256
TIME_HIDDEN = 1024
MAX_ADALN_WIDTH = 256


def _is_integer(value: object, least: int) -> bool:
    """Below 2^31, as sizes of tensors are in kernels."""
    return type(value) is int and least <= value < 2**31


@dataclass(frozen=True)
class Level:
    """One resolution of the local decoder: its way down (`enc`) and its way up (`up`, `dec`).

    Args:
        name: what follows `enc`, `up` and `dec` in tensor names.
        skip, up, out: output channels of the encoder's convolution, which the way up meets again,
            of the convolution behind the upsampling, and of the one behind the concatenation.
    """

    name: str
    skip: int
    up: int
    out: int


@dataclass(frozen=True)
class LocalDecoderConfig:
    """Levels of the small U-Net, the one at full resolution first, and its narrowest part.

    Args:
        levels: each halves the resolution.
        bottleneck: channels where the image meets the transformer's features.
    """

    levels: tuple[Level, ...]
    bottleneck: int = 512

    def __post_init__(self) -> None:
        counts = [v for level in self.levels for v in (level.skip, level.up, level.out)]
        if not all(_is_integer(v, 1) for v in (*counts, self.bottleneck)):
            raise ValueError(
                f"LocalDecoderConfig: channels must be integers >= 1, got {counts} and bottleneck "
                f"{self.bottleneck!r}"
            )
        if not all(isinstance(level.name, str) for level in self.levels):
            raise ValueError("LocalDecoderConfig: the name of a level must be a text")

    @property
    def pixels_per_cell(self) -> int:
        """Image pixels per bottleneck cell along one axis."""
        return 2 ** len(self.levels)

    def with_widths(self, widths: Mapping[int, int]) -> LocalDecoderConfig:
        """The same levels with other channel counts: {released count: new count}."""

        def width(channels: int) -> int:
            return widths.get(channels, channels)

        levels = tuple(Level(v.name, width(v.skip), width(v.up), width(v.out)) for v in self.levels)
        return LocalDecoderConfig(levels, width(self.bottleneck))

    def scaled(self, factor: float) -> LocalDecoderConfig:
        """The same levels with `factor` times the channels; those of the image (3) stay.

        Raises:
            ValueError: factor is not a positive number.
        """
        if not 0 < factor < math.inf:
            raise ValueError(f"LocalDecoderConfig: factor must be a positive number, got {factor}")
        counts = {v for level in self.levels for v in (level.skip, level.up, level.out)}
        counts.add(self.bottleneck)
        return self.with_widths({v: max(1, round(v * factor)) for v in counts if v > 3})


_INNER = (Level("2", 128, 128, 64), Level("3", 256, 256, 128))
_OUTER = (Level("0", 16, 16, 16), Level("0b", 32, 32, 16), Level("1", 64, 64, 32))
_DEEPEST = Level("4", 512, 512, 256)

DECODERS: dict[str, LocalDecoderConfig] = {
    "1k": LocalDecoderConfig((Level("1", 64, 64, 64), *_INNER, _DEEPEST)),
    "4k": LocalDecoderConfig((*_OUTER, *_INNER, _DEEPEST)),
    "8k": LocalDecoderConfig((Level("_8k", 3, 16, 16), *_OUTER, *_INNER, _DEEPEST)),
    "10k": LocalDecoderConfig((Level("_10k_a", 3, 16, 16), *_OUTER, *_INNER)),
}


@dataclass(frozen=True)
class L2PConfig:
    """Network geometry. The defaults are the released 1K network.

    Args:
        patch_size: p, pixels (or latent cells) along one side of a patch.
        in_channels: of the noisy input, 3 for pixels.
        dim: D, width of a token.
        n_layers, n_refiner_layers: main blocks; blocks of each of the two refiners.
        n_heads: attention heads, each of D / n_heads channels.
        ffn_hidden: F, width of the gated feed-forward; None is int(D / 3 * 8).
        cap_feat_dim: E, width of a caption feature.
        axes_dims: rotary channels of a head for (sequence, row, column).
        axes_lens: positions below which each of the three must stay.
        rope_theta: rotary base.
        t_scale: the time embedding sees t_scale * t.
        norm_eps: of every RMSNorm.
        local_decoder: of a pixel network; None is the latent model it was converted from, which
            ends in a linear layer instead.

    Raises:
        ValueError: a value that no such network can have; the message names the field.
    """

    patch_size: int = 16
    in_channels: int = 3
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    ffn_hidden: int | None = None
    cap_feat_dim: int = 2560
    axes_dims: tuple[int, int, int] = (32, 48, 48)
    axes_lens: tuple[int, int, int] = (1024, 512, 512)
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    norm_eps: float = 1e-5
    local_decoder: LocalDecoderConfig | None = DECODERS["1k"]

    def __post_init__(self) -> None:
        for name in ("axes_dims", "axes_lens"):  # lists, where they come from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in (
            *("patch_size", "in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads"),
            *("ffn_hidden", "cap_feat_dim"),
        ):
            if name == "ffn_hidden" and self.ffn_hidden is None:
                object.__setattr__(self, "ffn_hidden", int(self.dim / 3 * 8))
            value = getattr(self, name)
            least = 0 if name == "n_refiner_layers" else 1
            if not _is_integer(value, least):
                raise ValueError(f"L2PConfig: {name} must be an integer >= {least}, got {value!r}")
        for name in ("rope_theta", "t_scale", "norm_eps"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                raise ValueError(f"L2PConfig: {name} must be a positive number, got {value!r}")
        if self.dim % self.n_heads:
            raise ValueError(
                f"L2PConfig: dim must be divisible by n_heads = {self.n_heads}, got {self.dim}"
            )
        dims, lens = self.axes_dims, self.axes_lens
        if (
            len(dims) != 3
            or any(not _is_integer(d, 2) or d % 2 for d in dims)
            or sum(dims) != self.head_dim
        ):
            raise ValueError(
                f"L2PConfig: axes_dims must be three even numbers whose sum is dim / n_heads = "
                f"{self.head_dim}, got {dims}"
            )
        decoder = self.local_decoder
        if decoder is not None and not isinstance(decoder, LocalDecoderConfig):
            raise ValueError(
                f"L2PConfig: local_decoder must be a LocalDecoderConfig or None, got {decoder!r}"
            )
        if len(lens) != 3 or not all(_is_integer(n, 1) for n in lens):
            raise ValueError(f"L2PConfig: axes_lens must be three positive integers, got {lens}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def adaln_dim(self) -> int:
        """Width of the time vector."""
        return min(self.dim, MAX_ADALN_WIDTH)

    @property
    def size_multiple(self) -> int:
        """H and W are multiples of this: whole patches, and whole cells of the bottleneck."""
        cell = 1 if self.local_decoder is None else self.local_decoder.pixels_per_cell
        return math.lcm(self.patch_size, cell)

    @property
    def max_caption_tokens(self) -> int:
        """Longest caption whose padded rows, and the image behind them, have rotary positions."""
        return (self.axes_lens[0] - 2) // SEQ_MULTIPLE * SEQ_MULTIPLE

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> L2PConfig:
        """The inverse of `to_dict`. Raises ValueError, TypeError, KeyError: not what it gives."""
        if not isinstance(values, Mapping):
            raise TypeError(f"L2PConfig: must be given a mapping, got {type(values).__name__}")
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ValueError(f"L2PConfig: unknown field {name!r}")
        kept = dict(values)
        decoder = kept.get("local_decoder")
        if isinstance(decoder, Mapping):
            levels = tuple(Level(**level) for level in decoder["levels"])
            kept["local_decoder"] = LocalDecoderConfig(levels, decoder["bottleneck"])
        return cls(**kept)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dict; `from_dict(c.to_dict()) == c`."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Variant:
    """One released network: its name, the side of its square training images, its geometry."""

    name: str
    native_size: int
    config: L2PConfig


VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        Variant("z-image", 1024, L2PConfig(patch_size=2, in_channels=16, local_decoder=None)),
        Variant("1k", 1024, L2PConfig()),
        Variant("4k", 4096, L2PConfig(patch_size=64, local_decoder=DECODERS["4k"])),
        Variant("8k", 8192, L2PConfig(patch_size=128, local_decoder=DECODERS["8k"])),
        Variant("10k", 10240, L2PConfig(patch_size=160, local_decoder=DECODERS["10k"])),
    )
}
SOURCE = VARIANTS["z-image"]  # the latent model that the others were converted from
