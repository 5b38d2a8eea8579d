"""From the latent to features on the patch grid, and the gates that let them into the network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear, pixel_shuffle, pixel_unshuffle, silu

from ... import ops
from ...ops.registry import upcast
from . import large_stack
from .config import PiDConfig
from .residual import Stream


class ResBlock(nn.Module):
    def __init__(self, dim: int, padding_mode: str, **factory) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.GroupNorm(4, dim, eps=1e-5, **factory),
            nn.SiLU(),
            nn.Conv2d(dim, dim, 3, padding=1, padding_mode=padding_mode, **factory),
            nn.GroupNorm(4, dim, eps=1e-5, **factory),
            nn.SiLU(),
            nn.Conv2d(dim, dim, 3, padding=1, padding_mode=padding_mode, **factory),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)

    def add_(self, x: Tensor) -> Tensor:
        """`forward` in the memory of x, with one tensor more of its size."""
        norm1, _, conv1, norm2, _, conv2 = self.block
        h = large_stack.normed(x, norm1, torch.empty_like(x))
        large_stack.normed(large_stack.convolve_(h, conv1), norm2, h)
        return large_stack.add_convolved_(x, h, conv2)


class SigmaGate(nn.Module):
    """x + sigmoid(W [x ; f] + b - exp(log_alpha) sigma) * f, the sigma-aware adapter of PiD."""

    def __init__(self, dim: int, gate_type: str, **factory) -> None:
        super().__init__()
        outputs = dim if gate_type == "sigma_aware_per_token_per_dim" else 1
        self.content_proj = nn.Linear(2 * dim, outputs, **factory)
        self.log_alpha = nn.Parameter(torch.zeros((), **factory))

    def lq_logit(self, feature: Tensor, sigma: Tensor) -> Tensor:
        """The part of the logit that does not depend on x: (B, N, K)."""
        weight = self.content_proj.weight[:, feature.shape[-1] :]
        content = linear(feature, weight, self.content_proj.bias)
        noise = upcast(self.log_alpha).exp() * sigma[:, None, None]
        # One logit a token stays in fp32.
        if content.shape[-1] == 1:
            return upcast(content) - noise
        # One a channel is as large as the feature: the difference, taken in the wider type, is
        # rounded where content was, with no copy of it in fp32.
        return content.sub_(noise)

    def forward(self, x: Tensor, feature: Tensor, lq_logit: Tensor) -> Tensor:
        return ops.sigma_gate(x, feature, self._x_weight(), lq_logit)

    def inject(self, stream: Stream, feature: Tensor, lq_logit: Tensor) -> None:
        """`forward`, left to the norm that follows."""
        stream.inject(feature, self._x_weight(), lq_logit)

    def _x_weight(self) -> Tensor:
        return self.content_proj.weight[:, : self.content_proj.in_features // 2]


class LQProjection(nn.Module):
    """Latent [B, Cz, zh, zw] -> one feature [B, N, D] for each injection point.

    PiD (arXiv 2605.23902), LQ projection. Everything here depends on the latent alone.
    """

    def __init__(self, config: PiDConfig, **factory) -> None:
        super().__init__()
        self.config = config
        dim, out, mode = config.lq_hidden_dim, config.hidden_size, config.lq_conv_padding_mode
        conv = {"kernel_size": 3, "padding": 1, "padding_mode": mode, **factory}
        self.latent_proj = nn.Sequential(
            nn.Conv2d(self._conv_channels(), dim, **conv),
            nn.SiLU(),
            nn.Conv2d(dim, dim, **conv),
            *(ResBlock(dim, mode, **factory) for _ in range(config.lq_num_res_blocks)),
        )
        self.output_heads = nn.ModuleList(
            nn.Linear(dim, out, **factory) for _ in range(config.num_injections)
        )
        if config.pit_lq_inject:
            self.pit_head = nn.Linear(dim, out, **factory)
        if config.lq_aux_rgb_head:
            k = config.patch_size // config.sr_scale
            self.lq_aux_rgb_head = nn.Sequential(
                nn.LayerNorm(dim, eps=1e-5, **factory),
                nn.Linear(dim, dim, **factory),
                nn.SiLU(),
                nn.Linear(dim, 3 * k * k, **factory),
            )
        self.gate_modules = nn.ModuleList(
            SigmaGate(out, config.lq_gate_type, **factory) for _ in range(config.num_injections)
        )

    def _conv_channels(self) -> int:
        c = self.config
        channels = c.lq_latent_channels // c.lq_latent_unpatchify_factor**2
        ratio = c.patches_per_latent_cell
        return channels if ratio >= 1 else channels * round(1 / ratio) ** 2

    def align(self, latent: Tensor, grid: tuple[int, int]) -> Tensor:
        """Bring the latent to the patch grid (h, w): unfold, then replicate, resize or fold."""
        u = self.config.lq_latent_unpatchify_factor
        if u > 1:
            latent = pixel_shuffle(latent, u)
        ratio = self.config.patches_per_latent_cell
        if ratio > 1:
            return interpolate(latent, size=grid, mode="nearest")
        fold = round(1 / ratio)
        size = (grid[0] * fold, grid[1] * fold)
        if tuple(latent.shape[-2:]) != size:
            latent = interpolate(latent, size=size, mode="bilinear", align_corners=False)
        return pixel_unshuffle(latent, fold) if fold > 1 else latent

    def features(self, latent: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, Q, h, w], the output of the conv stack."""
        latent, dim = self.align(latent, grid), self.config.lq_hidden_dim
        large = large_stack.is_large(latent.shape[0], dim, grid, latent.dtype)
        if torch.is_grad_enabled() or not large:
            return self.latent_proj(latent)
        first, _, second, *blocks = self.latent_proj
        x = large_stack.convolved(latent, first)
        del latent
        large_stack.convolve_(silu(x, inplace=True), second)
        for block in blocks:
            block.add_(x)
        return x

    def tokens(self, features: Tensor) -> Tensor:
        """[B, Q, h, w] -> [B, N, Q], what every head reads."""
        return features.flatten(2).transpose(1, 2).contiguous()

    def head(self, index: int, tokens: Tensor) -> Tensor:
        """[B, N, D], the feature of one injection point; PiT's comes last, if there is one."""
        patch_stream = index < len(self.output_heads)
        return (self.output_heads[index] if patch_stream else self.pit_head)(tokens)

    def heads(self, features: Tensor) -> list[Tensor]:
        """The features of all injection points."""
        tokens, count = self.tokens(features), len(self.output_heads) + self.config.pit_lq_inject
        return [self.head(index, tokens) for index in range(count)]

    def predict_lq_rgb(self, latent: Tensor, grid: tuple[int, int]) -> Tensor:
        """The training-only RGB head: [B, 3, H/sr_scale, W/sr_scale].

        Raises:
            ValueError: the network holds no such head.
        """
        if not self.config.lq_aux_rgb_head:
            raise ValueError("predict_lq_rgb: this network has no RGB head (lq_aux_rgb_head=False)")
        index = self.config.lq_aux_rgb_head_latent_block_idx
        stack = self.latent_proj if index < 1 else self.latent_proj[: 3 + index]
        features = stack(self.align(latent, grid))
        rgb = self.lq_aux_rgb_head(features.flatten(2).transpose(1, 2))
        k = self.config.patch_size // self.config.sr_scale
        return pixel_shuffle(rgb.transpose(1, 2).unflatten(2, grid), k)
