"""A small convolutional autoencoder with the geometry of the flux one: factor 8, 16 channels.

It exists so that the package can show the whole path, picture to latent to picture, without any
download. Its latents mean nothing to other models.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from ..json_text import loads
from ..out_files import written_whole

_FORMAT = "pixeldiff.autoencoder.v1"


@dataclass(frozen=True)
class AutoencoderConfig:
    """Geometry of a `ConvAutoencoder`.

    Args:
        widths: channels at full, 1/2, 1/4 and 1/8 resolution; the factor is 2^(len - 1).
        blocks: residual blocks at each of these resolutions, in encoder and decoder alike.
        latent_channels: channels of the latent.

    Raises:
        ValueError: lengths that differ, or a value below the least one.
    """

    widths: tuple[int, ...] = (32, 48, 64, 96)
    blocks: tuple[int, ...] = (0, 1, 1, 1)
    latent_channels: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if len(self.widths) != len(self.blocks) or len(self.widths) < 2:
            raise ValueError(
                "AutoencoderConfig: widths and blocks must have the same length of at least 2, "
                f"got {self.widths} and {self.blocks}"
            )
        if min(self.widths) < 1 or min(self.blocks) < 0 or self.latent_channels < 1:
            raise ValueError(
                "AutoencoderConfig: widths and latent_channels must be positive and blocks not "
                f"negative, got {self.widths}, {self.latent_channels}, {self.blocks}"
            )

    @property
    def factor(self) -> int:
        """Image pixels per latent cell along one axis."""
        return 2 ** (len(self.widths) - 1)


class _ResBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))). No norm: depth is small and amplitudes carry the picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class ConvAutoencoder(nn.Module):
    """Deterministic convolutional autoencoder with a normalised latent.

    The latent is normalised per channel with statistics stored beside the weights:
    `latent = (encoder(image) - latent_shift) / latent_scale`, close to mean 0 and standard
    deviation 1 over natural pictures.
    """

    def __init__(
        self,
        config: AutoencoderConfig | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or AutoencoderConfig()
        widths, blocks = config.widths, config.blocks
        encoder: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
        for level, width in enumerate(widths):
            if level:
                encoder += [
                    nn.SiLU(),
                    nn.Conv2d(widths[level - 1], width, 3, stride=2, padding=1),
                ]
            encoder += [_ResBlock(width) for _ in range(blocks[level])]
        encoder += [nn.SiLU(), nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)]
        decoder: list[nn.Module] = [nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)]
        for level in reversed(range(len(widths))):
            decoder += [_ResBlock(widths[level]) for _ in range(blocks[level])]
            if level:
                decoder += [
                    nn.SiLU(),
                    nn.Conv2d(widths[level], 4 * widths[level - 1], 3, padding=1),
                    nn.PixelShuffle(2),
                ]
        decoder += [nn.SiLU(), nn.Conv2d(widths[0], 3, 3, padding=1)]
        # Each branch corrects a linear code of disjoint blocks; training starts that one at the
        # principal components, which alone carries most of a picture.
        factor = config.factor
        self.encoder_blocks = nn.Conv2d(3, config.latent_channels, factor, stride=factor)
        self.encoder = nn.Sequential(*encoder)
        self.decoder_blocks = nn.Conv2d(config.latent_channels, 3 * factor**2, 1)
        self.decoder = nn.Sequential(*decoder)
        self.register_buffer("latent_shift", torch.zeros(config.latent_channels))
        self.register_buffer("latent_scale", torch.ones(config.latent_channels))
        self.to(device=device, dtype=dtype)

    def encode(self, image: Tensor) -> Tensor:
        """Normalised latent of a picture.

        Args:
            image: (B, 3, H, W) in [-1, 1], dtype of the weights; H and W multiples of the factor.

        Returns:
            (B, latent_channels, H / factor, W / factor), dtype of image.

        Raises:
            ValueError: shape.
        """
        factor = self.config.factor
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(
                f"ConvAutoencoder.encode: image must be (B, 3, H, W), got {tuple(image.shape)}"
            )
        if image.shape[2] % factor or image.shape[3] % factor or 0 in image.shape:
            raise ValueError(
                f"ConvAutoencoder.encode: H and W must be positive multiples of {factor}, got "
                f"{image.shape[2]} x {image.shape[3]}; crop or pad the picture"
            )
        shift, scale = self._statistics(image.dtype)
        return (self.encoder_blocks(image) + self.encoder(image) - shift) / scale

    def decode(self, latent: Tensor) -> Tensor:
        """Picture of a normalised latent.

        Args:
            latent: (B, latent_channels, h, w), dtype of the weights.

        Returns:
            (B, 3, h * factor, w * factor), about [-1, 1], not clamped.

        Raises:
            ValueError: shape.
        """
        channels = self.config.latent_channels
        if latent.ndim != 4 or latent.shape[1] != channels:
            raise ValueError(
                f"ConvAutoencoder.decode: latent must be (B, {channels}, h, w), got "
                f"{tuple(latent.shape)}"
            )
        shift, scale = self._statistics(latent.dtype)
        raw = latent * scale + shift
        return F.pixel_shuffle(self.decoder_blocks(raw), self.config.factor) + self.decoder(raw)

    def forward(self, image: Tensor) -> Tensor:
        """`decode(encode(image))`."""
        return self.decode(self.encode(image))

    def _statistics(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        shape = (1, -1, 1, 1)
        return self.latent_shift.to(dtype).view(shape), self.latent_scale.to(dtype).view(shape)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.bfloat16,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Writes a safetensors file that `load` reads; the config travels in its metadata.

        Args:
            dtype: dtype of the stored weights. The latent statistics stay fp32.
            metadata: more JSON-able entries for the file's metadata.
        """
        path = Path(path)
        tensors = {
            name: value.detach()
            .cpu()
            .contiguous()
            .to(torch.float32 if name.startswith("latent_") else dtype)
            for name, value in self.state_dict().items()
        }
        entries = {
            "format": _FORMAT,
            "config": json.dumps(dataclasses.asdict(self.config)),
            **{name: json.dumps(value) for name, value in (metadata or {}).items()},
        }
        with written_whole([path]) as (partial,):
            partial.write_bytes(save(tensors, entries))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ConvAutoencoder:
        """Reads a file written by `save`, in eval mode and without gradients.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not an autoencoder file, or its tensors do not fit its config; the message
                names the first offending ones.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"ConvAutoencoder.load: no file {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise ValueError(
                f"ConvAutoencoder.load: {path} is not a readable safetensors file: {error}"
            ) from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"ConvAutoencoder.load: {path} must have the metadata entry format = {_FORMAT!r}, "
                f"got {metadata.get('format')!r}"
            )
        try:
            config = AutoencoderConfig(**loads(metadata["config"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"ConvAutoencoder.load: metadata 'config' of {path} is not an AutoencoderConfig: "
                f"{error!r}"
            ) from error
        model = _on_meta(config, path, len(tensors))
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in tensors.items()}
        wrong = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        if wrong:
            raise ValueError(
                f"ConvAutoencoder.load: {path} does not fit its config; first of {len(wrong)} "
                f"wrong tensors: {wrong[0]}, expected shape {expected.get(wrong[0])}, got "
                f"{found.get(wrong[0])}"
            )
        tensors = {
            name: value.to(torch.float32 if name.startswith("latent_") else dtype)
            for name, value in tensors.items()
        }
        model.load_state_dict(tensors, strict=True, assign=True)
        model.to(device)
        return model.eval().requires_grad_(False)


def _on_meta(config: AutoencoderConfig, path: Path, tensors: int) -> ConvAutoencoder:
    """The network without memory: what a file claims to hold may be larger than any machine."""
    if sum(config.blocks) + len(config.widths) <= tensors:  # each has several
        try:
            with torch.device("meta"):
                return ConvAutoencoder(config)
        except (RuntimeError, TypeError, ValueError, OverflowError):
            pass  # shapes that no tensor has
    raise ValueError(
        f"ConvAutoencoder.load: {path} does not fit its config, {str(config)[:200]}: it holds "
        f"{tensors} tensors"
    )
