"""Drawn shapes as latents of the demo autoencoder, with their scenes: what the source learns from.

Drawing and encoding is done once; captions are worded anew at every use.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pixeldiff.models.autoencoder import ConvAutoencoder

from .shapes import Scene, draw, random_scene

_TOGETHER = 64


@dataclass(frozen=True)
class ShapeLatents:
    """Latents (n, C, h, w) bf16, as the autoencoder gives them, and the scenes they show."""

    latents: Tensor
    scenes: list[Scene]

    def __len__(self) -> int:
        return len(self.scenes)

    @classmethod
    def made(cls, path: Path, autoencoder: ConvAutoencoder, count: int, side: int, seed: int):
        """Those of a file, which is written first where there is none of as many.

        Args:
            count: pictures of trained combinations.
            side: of the pictures, in pixels.
            seed: of the scenes.
        """
        if path.is_file():
            stored = torch.load(path, weights_only=True)
            if len(stored["scenes"]) >= count:
                scenes = [Scene(**{**s, "centre": tuple(s["centre"]), "phase": tuple(s["phase"])})
                          for s in stored["scenes"][:count]]  # fmt: skip
                return cls(stored["latents"][:count], scenes)
        rng = np.random.default_rng([seed, side])
        scenes = [random_scene(rng) for _ in range(count)]
        coder = autoencoder.to(torch.bfloat16)
        latents = torch.cat(
            [encoded(coder, scenes[i : i + _TOGETHER], side) for i in range(0, count, _TOGETHER)]
        )
        autoencoder.float()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"latents": latents, "scenes": [dataclasses.asdict(s) for s in scenes]}, path)
        return cls(latents, scenes)


@torch.no_grad()
def encoded(autoencoder: ConvAutoencoder, scenes: list[Scene], side: int) -> Tensor:
    """(n, C, h, w) in the dtype of the autoencoder's weights."""
    pixels = torch.from_numpy(np.stack([draw(scene, side) for scene in scenes]))
    images = pixels.permute(0, 3, 1, 2).float() * 2 / 255 - 1
    return autoencoder.encode(images.to(autoencoder.encoder_blocks.weight.dtype))
