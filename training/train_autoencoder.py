"""Trains the demo autoencoder on shrunken training pictures."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pixeldiff.models.autoencoder import ConvAutoencoder

from .cache import PictureCache

CROP = 64
# The decoder's pictures are at a quarter of the size of the training pictures; the other scales
# teach the autoencoder softer and denser detail.
SHRINK = (4, 2, 8)
SHRINK_ODDS = (0.6, 0.25, 0.15)


def shrink(picture: np.ndarray, factor: int) -> np.ndarray:
    """(H, W, 3) uint8 -> antialiased bicubic, sides divided by factor (rounded down)."""
    height, width = picture.shape[:2]
    size = (width // factor, height // factor)
    return np.asarray(Image.fromarray(np.asarray(picture)).resize(size, Image.BICUBIC))


class CropSampler:
    """Random square crops at random scales, flipped, turned and recoloured; everything seeded."""

    def __init__(self, cache: PictureCache, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.levels = [[shrink(p, factor) for p in cache.pictures] for factor in SHRINK]

    def batch(self, count: int) -> Tensor:
        """(count, 3, CROP, CROP) fp32 in [-1, 1]."""
        rng, crops = self.rng, []
        for _ in range(count):
            level = self.levels[int(rng.choice(len(SHRINK), p=SHRINK_ODDS))]
            picture = level[int(rng.integers(len(level)))]
            top = int(rng.integers(picture.shape[0] - CROP + 1))
            left = int(rng.integers(picture.shape[1] - CROP + 1))
            crop = picture[top : top + CROP, left : left + CROP]
            crop = np.rot90(crop, int(rng.integers(4)))
            if rng.random() < 0.5:
                crop = crop[:, ::-1]
            crops.append(recolour(rng, crop))
        stacked = torch.from_numpy(np.stack(crops))
        return stacked.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def recolour(rng: np.random.Generator, crop: np.ndarray) -> np.ndarray:
    """Varies (H, W, 3) uint8: channels permuted, inverted or made equal, contrast stretched."""
    draw = rng.random()
    if draw < 0.3:
        crop = crop[..., rng.permutation(3)]
    elif draw < 0.4:
        crop = np.repeat(crop[..., 1:2], 3, axis=-1)
    if rng.random() < 0.15:
        crop = 255 - crop
    if rng.random() < 0.5:
        gain, middle = np.exp(rng.uniform(-0.3, 0.8)), crop.mean()
        crop = np.clip((crop - middle) * gain + middle, 0, 255).astype(np.uint8)
    return crop


@torch.no_grad()
def store_latent_statistics(model: ConvAutoencoder, sampler: CropSampler, batches: int = 8) -> None:
    """Sets latent_shift and latent_scale from the raw latents of fresh crops."""
    model.latent_shift.zero_()
    model.latent_scale.fill_(1)
    latents = torch.cat([model.encode(sampler.batch(64)) for _ in range(batches)])
    std, mean = torch.std_mean(latents, dim=(0, 2, 3))
    model.latent_shift.copy_(mean)
    model.latent_scale.copy_(std.clamp_min(1e-3))


@torch.no_grad()
def start_at_principal_components(model: ConvAutoencoder, sampler: CropSampler) -> None:
    """Sets the linear code to the whitened principal components of blocks; branches give zero."""
    factor, channels = model.config.factor, model.config.latent_channels
    blocks = F.unfold(sampler.batch(512), factor, stride=factor)
    blocks = blocks.transpose(1, 2).flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(blocks.T @ blocks / len(blocks))
    std = values[-channels:].sqrt()
    components = vectors[:, -channels:].T
    weight = components / std[:, None]
    model.encoder_blocks.weight.copy_(weight.view_as(model.encoder_blocks.weight))
    model.decoder_blocks.weight.copy_((components.T * std).view_as(model.decoder_blocks.weight))
    for layer in (
        model.encoder_blocks.bias,
        model.decoder_blocks.bias,
        *model.encoder[-1].parameters(),
        *model.decoder[-1].parameters(),
    ):
        layer.zero_()


def train(
    pictures: Path,
    output: Path,
    *,
    steps: int = 1000,
    batch: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 1,
    command: str = "",
) -> ConvAutoencoder:
    """Trains, normalises the latent, writes `output` (bf16) and returns the averaged model.

    The loss is mean squared error plus a tenth of the absolute error; AdamW with a linear warm-up
    and a cosine decay; the weights are an exponential moving average.
    """
    torch.manual_seed(seed)
    sampler = CropSampler(PictureCache(pictures), seed)
    model = ConvAutoencoder().to(memory_format=torch.channels_last)
    start_at_principal_components(model, sampler)
    average = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-4)
    warm_up = min(50, max(1, steps // 10))
    started, seen = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        rate = min(step / warm_up, cosine + 0.01)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * rate
        images = sampler.batch(batch).contiguous(memory_format=torch.channels_last)
        error = model(images) - images
        loss = error.square().mean() + 0.1 * error.abs().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        decay = min(0.995, step / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(average.parameters()), list(model.parameters()), weight=1 - decay
            )
        mean_square = error.detach().square().mean().item()
        seen = mean_square if step == 1 else 0.98 * seen + 0.02 * mean_square
        if step % 50 == 0 or step in (1, steps):
            psnr = 10 * math.log10(4 / seen)
            minutes = (time.monotonic() - started) / 60
            print(f"autoencoder {step}/{steps}  PSNR {psnr:.2f} dB  {minutes:.1f} min", flush=True)
        if step % 500 == 0 or step == steps:
            store_latent_statistics(average, sampler)
            average.save(
                output,
                metadata={
                    "training": {
                        "command": command,
                        "steps": step,
                        "batch": batch,
                        "crop": CROP,
                        "learning_rate": learning_rate,
                        "seed": seed,
                    }
                },
            )
    return average
