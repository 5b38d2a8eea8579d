"""The local decoder: a small U-Net over the noisy image, joined with the trunk's features.

Activations are channels last, so that the trunk's rows of tokens are its input as they are.

Source: L2P (arXiv 2605.12013), local decoder; the four forms of its releases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from torch.utils.checkpoint import checkpoint

from ... import ops
from .config import Level, LocalDecoderConfig

Trace = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Encoded:
    """What the decoder knows of the image alone.

    Args:
        skips: per level (S, H, W, C), full resolution first.
        bottleneck: (S, h, w, Cb), the image's share of the narrowest layer, bias included.
    """

    skips: list[Tensor]
    bottleneck: Tensor


class LocalDecoder(nn.Module):
    """encode(x), then decode with the features: (noisy image, features) -> network output.

    Args:
        config: levels and widths.
        dim: D, channels of a feature.
        channels: of the image.
    """

    def __init__(self, config: LocalDecoderConfig, dim: int, channels: int = 3, **factory) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # in training: keep no activations inside a level

        def conv(before: int, after: int, size: int = 3) -> nn.Conv2d:
            return nn.Conv2d(before, after, size, padding=size // 2, **factory)

        below = channels
        for level in config.levels:
            setattr(self, f"enc{level.name}", nn.Sequential(conv(below, level.skip), nn.SiLU()))
            below = level.skip
        self.bottleneck = nn.Sequential(conv(below + dim, config.bottleneck, 1), nn.SiLU())
        below = config.bottleneck
        for level in reversed(config.levels):
            up = nn.Sequential(nn.Upsample(scale_factor=2), conv(below, level.up))
            dec = nn.Sequential(conv(level.up + level.skip, level.out), nn.SiLU())
            setattr(self, f"up{level.name}", up)
            setattr(self, f"dec{level.name}", dec)
            below = level.out
        self.out_conv = conv(below, channels, 1)

    def forward(self, x: Tensor, features: Tensor, guidance: Tensor | None = None) -> Tensor:
        """The network output at the noisy image.

        Args:
            x: (S, 3, H, W), any float dtype.
            features: (B, h, w, D), S a divisor of B: features b belong to image b % S. H and W are
                multiples of h and w, and of 2^levels.
            guidance: (), mixes the outputs of the first and second half of the features, see
                `pixels`.

        Returns:
            (B, 3, H, W), fp32; half as many under guidance.
        """
        return self.decode(self.encode(x), features, guidance)

    def encode(self, x: Tensor, *, trace: Trace | None = None) -> Encoded:
        """The half that sees the image only; images that differ in their features share it."""
        h, skips = x.permute(0, 2, 3, 1), []
        for level in self.config.levels:
            skip, h = self.down(level, h)
            skips.append(skip)
            if trace:
                trace(f"enc{level.name}", skip)
        return Encoded(skips, self.narrowed(h))

    def decode(
        self,
        encoded: Encoded,
        features: Tensor,
        guidance: Tensor | None = None,
        *,
        trace: Trace | None = None,
    ) -> Tensor:
        """The half that joins in the features; arguments and result as in `forward`."""
        h = self.join(encoded.bottleneck, features)
        if trace:
            trace("bottleneck", h)
        for level, skip in zip(reversed(self.config.levels), reversed(encoded.skips), strict=True):
            h = self.up(level, h, skip)
            if trace:
                trace(f"dec{level.name}", h)
        return self.pixels(h, guidance)

    def down(self, level: Level, h: Tensor) -> tuple[Tensor, Tensor]:
        """A level's way down: (S, H, W, C) -> its skip tensor and the next level's input."""
        conv = getattr(self, f"enc{level.name}")[0]
        return self._level(ops.local_decoder_down, h, conv.weight, conv.bias)

    def up(self, level: Level, h: Tensor, skip: Tensor) -> Tensor:
        """A level's way up: what came from below, (B, H/2, W/2, C), doubled and joined."""
        up = getattr(self, f"up{level.name}")[1]
        dec = getattr(self, f"dec{level.name}")[0]
        weights = (up.weight, up.bias, dec.weight, dec.bias)
        return self._level(ops.local_decoder_up, h, skip, *weights)

    def pixels(self, h: Tensor, guidance: Tensor | None = None) -> Tensor:
        """(B, H, W, C) of the last level -> (B, 3, H, W) fp32.

        Under guidance g, a tensor (), the first half of h is positive, the second negative, and the
        result (B/2, 3, H, W) is u_neg + g (u_pos - u_neg), in fp32.
        """
        weight = self.out_conv.weight.flatten(1)
        return ops.local_decoder_pixels(h, weight, self.out_conv.bias, guidance)

    def narrowed(self, h: Tensor) -> Tensor:
        """The image's share of the bottleneck, bias included, before the activation."""
        weight, bias = self.bottleneck[0].weight.flatten(1), self.bottleneck[0].bias
        return linear(h, weight[:, : h.shape[-1]], bias)

    def _level(self, op: Callable, *args: Tensor):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(op, *args, use_reentrant=False, preserve_rng_state=False)
        return op(*args)

    def join(self, image: Tensor, features: Tensor) -> Tensor:
        """silu of the bottleneck: image (S, gh, gw, Cb) and features (B, h, w, D).

        A 1x1 convolution commutes with nearest-neighbour resizing: it is applied to the features'
        own grid, by far the smaller one in the 10K form, as a product of rows.
        """
        weight = self.bottleneck[0].weight.flatten(1)[:, -features.shape[-1] :]
        y = nearest(linear(features, weight), image.shape[1:3])
        return silu((y.unflatten(0, (-1, image.shape[0])) + image).flatten(0, 1))


def nearest(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """x (B, h, w, C) on a grid of another size: row i shows floor(i * h / grid rows)."""
    for axis, size in ((1, grid[0]), (2, grid[1])):
        if x.shape[axis] != size:
            index = torch.arange(size, device=x.device) * x.shape[axis] // size
            x = x.index_select(axis, index)
    return x
