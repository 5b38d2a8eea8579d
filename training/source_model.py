"""The trained source: captions to latents to pictures, as any latent diffusion model does it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from pixeldiff.models.autoencoder import ConvAutoencoder
from pixeldiff.models.l2p import L2PNet
from pixeldiff.models.l2p.checkpoint import load_net
from pixeldiff.models.l2p.sampler import guided, sample
from pixeldiff.models.l2p.scheduler import SHIFT, schedule
from pixeldiff.sources import demo_autoencoder
from pixeldiff.text.tiny import TinyPromptEncoder


@dataclass(frozen=True)
class SourceModel:
    """Network, autoencoder, and the statistics that the network's latents are normalised with."""

    net: L2PNet
    autoencoder: ConvAutoencoder
    shift: Tensor
    scale: Tensor

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype = torch.float32) -> SourceModel:
        """Of a file that `train_source` wrote."""
        with safe_open(path, framework="pt") as file:
            latent = json.loads(file.metadata()["latent"])
        shift, scale = (torch.tensor(latent[k]).view(1, -1, 1, 1) for k in ("shift", "scale"))
        net = load_net(path, dtype=dtype).eval().requires_grad_(False)
        return cls(net, demo_autoencoder().to(dtype), shift, scale)

    @torch.no_grad()
    def pictures(
        self,
        captions: Sequence[str],
        seeds: Sequence[int],
        side: int,
        *,
        steps: int,
        guidance: float,
        shift: float = SHIFT,
    ) -> Tensor:
        """(B, 3, side, side) fp32 in [-1, 1]; each picture depends on its caption and seed alone.

        Args:
            captions, seeds: B of them.
            side: in pixels, a multiple of 16.
            steps, guidance, shift: of the sampling.
        """
        config = self.net.config
        size = (side // self.autoencoder.config.factor,) * 2
        words = TinyPromptEncoder(config.cap_feat_dim)
        plan = schedule(steps, shift=shift)
        noise = [
            torch.randn(config.in_channels, *size, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        predict = guided(
            self.net,
            words.encode(captions),
            words.encode([""] * len(captions)),
            size,
            guidance_scale=guidance,
            times=plan.times,
        )
        latent = sample(predict, torch.stack(noise), plan) * self.scale + self.shift
        dtype = self.autoencoder.encoder_blocks.weight.dtype
        return self.autoencoder.decode(latent.to(dtype)).float().clamp(-1, 1)
