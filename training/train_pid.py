"""Trains the demo PiD on its own sampler's trajectories.

Each optimiser step draws a batch of pictures, rolls the few-step sampler from pure noise exactly as
inference does up to a random one of its calls, and regresses that call's clean picture (the
trajectory before it is detached). It is the self-rollout of PiD's distillation (arXiv 2605.23902)
with the teacher replaced by the truth: what the network meets in training is what it meets when it
decodes.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from pixeldiff.models.autoencoder import ConvAutoencoder
from pixeldiff.models.pid import PiDConfig, PiDNet
from pixeldiff.out_files import written_whole
from pixeldiff.text.tiny import TinyTextEmbedder

from .cache import PictureCache
from .initialise import initialise
from .latent_branch import train_latent_branch
from .patch_stream import train_patch_stream
from .train_autoencoder import recolour

T_LIST = (0.999, 0.866, 0.634, 0.342, 0.0)
TIMES = (1.0, *T_LIST[:-1])  # every time the network is called at; a single step starts at 1

CONFIG = PiDConfig(
    hidden_size=128,
    num_groups=2,
    patch_depth=2,
    pixel_depth=1,
    pixel_hidden_size=8,
    pixel_attn_hidden_size=144,
    pixel_num_groups=2,
    txt_embed_dim=64,
    txt_max_length=16,
    lq_hidden_dim=128,
    lq_num_res_blocks=7,
    lq_interval=1,
    lq_gate_type="sigma_aware_per_token",
    lq_conv_padding_mode="replicate",
    pit_lq_inject=True,
)

# (height, width, pictures per batch, odds early, odds late). Rotary coordinates span the whole
# picture whatever its size, so the network has to see every size it will be used at.
_SHAPES = (
    (256, 256, 6, 0.45, 0.15),
    (256, 384, 4, 0.14, 0.08),
    (384, 256, 4, 0.10, 0.07),
    (384, 384, 3, 0.14, 0.15),
    (512, 512, 2, 0.12, 0.25),
    (1024, 1024, 1, 0.05, 0.30),
)
_STARTED = (
    "t_embedder.",
    "lq_proj.",
    "pit_lq_gate.",
    "pixel_embedder.",
    "pixel_blocks.",
    "final_layer.",
)
_LATE = 0.7  # share of the steps after which the late odds hold
_LEVELS = (1.0, 1.4, 2.0, 4.0)  # by how much pictures are shrunk before crops are cut
_ENLARGED = 0.2  # share of crops enlarged twice: photographs are often that smooth


@dataclass(frozen=True)
class Cycle:
    """One cycle of the first stage.

    Args:
        steps: optimiser steps.
        learning_rate: peak of `MuonAdamW`.
        coding: whether the autoencoder trains along.
        structure, energy: weights of these terms of `picture_loss`.
    """

    steps: int
    learning_rate: float
    coding: bool = False
    structure: float = 0.0
    energy: float = 0.0

    def loss(self, recipe: Recipe) -> Recipe:
        """`recipe` with the weights of this cycle."""
        return dataclasses.replace(recipe, structure=self.structure, energy=self.energy)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a training run.

    Args:
        branch: the first stage, see `latent_branch`.
        patch_steps, patch_rate: steps and learning rate of the second stage, see `patch_stream`;
            without steps that stream stays at zero.
        steps: optimiser steps of the third stage, each on one call of a sampler run; 0 skips it.
        learning_rate: peak of AdamW in stage three, after a linear warm-up and before a cosine
            decay.
        started_rate: share of it for the parameters that the first stage leaves in a good state.
        warm_up: steps of the warm-up.
        ema: decay of the averaged weights that are shipped.
        absolute: weight of the Charbonnier loss beside the squared error.
        gradient: weight of the Charbonnier loss of horizontal and vertical differences; it buys
            edges as steep as the original's for a little squared error.
        structure: weight of 1 - SSIM in stages two and three, against grain and steps between
            patches.
        energy: weight of the difference in local gradient energy there: pictures as sharp as the
            original where squared error alone would blur what it cannot know.
        noisy: share of pictures whose latent is noised, sigma uniform in [0, 0.8].
        no_caption: share of pictures with the null caption.
        seed: of the weights, the batches and the noise.
    """

    branch: tuple[Cycle, ...] = (
        Cycle(4000, 1e-3, coding=True, structure=0.02),
        Cycle(16000, 1e-3, structure=0.03),
        Cycle(1500, 3e-4, structure=0.06, energy=0.16),
    )
    patch_steps: int = 900
    patch_rate: float = 1e-3
    steps: int = 0
    learning_rate: float = 3e-4
    started_rate: float = 0.15
    warm_up: int = 60
    ema: float = 0.99
    absolute: float = 0.05
    gradient: float = 0.04
    structure: float = 0.05
    energy: float = 0.16
    noisy: float = 0.08
    no_caption: float = 0.1
    seed: int = 1


class BatchSampler:
    """Random crops with their captions. Everything is drawn from one seeded generator."""

    def __init__(self, cache: PictureCache, seed: int) -> None:
        self.rng = np.random.default_rng([7, seed])
        self.captions = cache.captions
        self.levels = [[_shrunk(p, factor) for p in cache.pictures] for factor in _LEVELS]

    def batch(self, progress: float, *, whole: bool = True) -> tuple[Tensor, list[str]]:
        """((B, 3, H, W) fp32 in [-1, 1], B captions).

        Args:
            progress: the done share of training; late batches hold larger crops.
            whole: now and then a whole picture.
        """
        rng = self.rng
        odds = np.array([shape[4 if progress > _LATE else 3] for shape in _SHAPES])
        odds[-1] *= whole
        height, width, count, *_ = _SHAPES[int(rng.choice(len(_SHAPES), p=odds / odds.sum()))]
        if height == 1024:  # whole pictures, some of them not square
            chosen = int(rng.integers(len(self.captions)))
            picture = recolour(rng, np.asarray(self.levels[0][chosen]))
            return _to_tensor([picture]), [self.captions[chosen]]
        return self._cut(height, width, count)

    def crops(self, height: int, width: int, count: int) -> Tensor:
        """(count, 3, height, width) fp32 in [-1, 1]."""
        return self._cut(height, width, count)[0]

    def _cut(self, height: int, width: int, count: int) -> tuple[Tensor, list[str]]:
        rng, chosen, crops = self.rng, [], []
        while len(crops) < count:
            level = self.levels[int(rng.integers(len(self.levels)))]
            index = int(rng.integers(len(level)))
            picture = level[index]
            enlarge = 2 if rng.random() < _ENLARGED else 1
            high, wide = height // enlarge, width // enlarge
            if picture.shape[0] < high or picture.shape[1] < wide:
                continue
            top = int(rng.integers(picture.shape[0] - high + 1))
            left = int(rng.integers(picture.shape[1] - wide + 1))
            crop = picture[top : top + high, left : left + wide]
            if enlarge > 1:
                enlarged = Image.fromarray(np.ascontiguousarray(crop))
                crop = np.asarray(enlarged.resize((width, height), Image.BICUBIC))
            chosen.append(index)
            crops.append(recolour(rng, crop[:, ::-1] if rng.random() < 0.5 else crop))
        return _to_tensor(crops), [self.captions[i] for i in chosen]


def _to_tensor(pictures: list[np.ndarray]) -> Tensor:
    images = torch.from_numpy(np.ascontiguousarray(np.stack(pictures)))
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def _shrunk(picture: np.ndarray, factor: float) -> np.ndarray:
    if factor == 1:
        return picture
    size = (round(picture.shape[1] / factor), round(picture.shape[0] / factor))
    return np.asarray(Image.fromarray(np.asarray(picture)).resize(size, Image.LANCZOS))


def low_quality(images: Tensor, scale: int = 4) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> the same at 1/scale, antialiased bicubic, clamped."""
    size = (images.shape[2] // scale, images.shape[3] // scale)
    small = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
    return small.clamp(-1, 1)


def _schedule(rng: np.random.Generator) -> list[float]:
    """Mostly the four steps; now and then one of the shorter schedules that decoding offers."""
    steps = int(rng.choice([4, 3, 2, 1], p=[0.76, 0.08, 0.08, 0.08]))
    if steps == 1:
        return [1.0, 0.0]
    return [T_LIST[round(i)] for i in np.linspace(0, len(T_LIST) - 1, steps + 1)]


def _charbonnier(error: Tensor) -> Tensor:
    return (error.square() + 1e-4).sqrt().mean()


def picture_loss(
    predicted: Tensor, target: Tensor, recipe: Recipe, trust: Tensor | float = 1.0
) -> Tensor:
    """Squared error, a little absolute error, and absolute error of the differences.

    Each picture's error counts relative to its own size, which makes the squared error a mean of
    decibels: otherwise the few busiest pictures would decide everything.

    `trust`, (B, 1, 1, 1) or a number, further scales the error of each picture.
    """
    error = predicted - target
    own = error.detach().square().mean(dim=(1, 2, 3), keepdim=True)
    error = error * trust * (0.012 / (own + 0.001)).sqrt()
    loss = error.square().mean() + recipe.absolute * _charbonnier(error)
    if recipe.gradient:
        across, down = error.diff(dim=3), error.diff(dim=2)
        loss = loss + recipe.gradient * (_charbonnier(across) + _charbonnier(down))
    if recipe.structure:
        loss = loss + recipe.structure * (1 - similarity(predicted, target, trust))
    if recipe.energy:
        contrast = gradient_energy(predicted) - gradient_energy(target)
        loss = loss + recipe.energy * (contrast * trust).abs().mean()
    return loss


def gradient_energy(images: Tensor) -> Tensor:
    """(B, 1, h, w): root of the mean squared differences of the luma in 8x8 windows, 4 apart."""
    luma = images.mean(dim=1, keepdim=True)
    across, down = luma.diff(dim=3)[:, :, 1:], luma.diff(dim=2)[:, :, :, 1:]
    return (F.avg_pool2d(across.square() + down.square(), 8, stride=4) + 1e-4).sqrt()


def similarity(a: Tensor, b: Tensor, trust: Tensor | float = 1.0) -> Tensor:
    """Mean structural similarity of pictures in [-1, 1], Gaussian windows four pixels apart."""
    offsets = torch.arange(11, dtype=a.dtype) - 5
    profile = torch.exp(-(offsets**2) / (2 * 1.5**2))
    profile = (profile / profile.sum()).expand(a.shape[1], 1, 11)

    def window(x: Tensor) -> Tensor:
        x = F.conv2d(x, profile[..., None], stride=(4, 1), groups=x.shape[1])
        return F.conv2d(x, profile[..., None, :], stride=(1, 4), groups=x.shape[1])

    mean_a, mean_b = window(a), window(b)
    var_a, var_b = window(a * a) - mean_a**2, window(b * b) - mean_b**2
    covariance = window(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    score = score / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return 1 - ((1 - score) * trust).mean()


class Trainer:
    """State of one training run.

    Args:
        pictures: folder of a filled `PictureCache`.
        recipe: see `Recipe`.
        work: folder for the checkpoint `pid.pt`, overwritten as training goes.
    """

    def __init__(
        self, pictures: Path, autoencoder: ConvAutoencoder, recipe: Recipe, work: Path
    ) -> None:
        self.recipe, self.work, self.autoencoder = recipe, work, autoencoder
        self.net = PiDNet(CONFIG)
        initialise(self.net, recipe.seed)
        self._freeze_unused()
        self.average = copy.deepcopy(self.net).requires_grad_(False).eval()
        self.embed = TinyTextEmbedder(CONFIG.txt_embed_dim, CONFIG.txt_max_length)
        self.sampler = BatchSampler(PictureCache(pictures), recipe.seed)
        self.noise = torch.Generator().manual_seed(recipe.seed)
        self.optimiser = torch.optim.AdamW(
            self.groups(),
            betas=(0.9, 0.98),
            weight_decay=1e-3,
        )
        self.step, self.branch_trained = 0, False

    def groups(self, without: tuple[str, ...] = ()) -> list[dict]:
        """Parameter groups with their share of the learning rate, but for names that start so.

        An Adam step moves every weight about as far, so a layer's output moves in proportion to its
        inputs: wide layers get a smaller share. So do parameters the first stage leaves in a good
        state, which fresh neighbours would otherwise shake out of it.
        """
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.net.named_parameters():
            if not parameter.requires_grad or (without and name.startswith(without)):
                continue
            scale = min(1.0, 128 / parameter.shape[1]) if parameter.dim() == 2 else 1.0
            if name.startswith(_STARTED) and "output_heads" not in name:
                scale *= self.recipe.started_rate
            groups.setdefault(scale, []).append(parameter)
        return [{"params": members, "scale": scale} for scale, members in groups.items()]

    def _freeze_unused(self) -> None:
        """The text output of the last block reaches nothing; zeros compress and never train."""
        last = self.net.patch_blocks[-1]
        for module in (last.attn.proj_y, last.norm_y2, last.mlp_y):
            for parameter in module.parameters():
                parameter.requires_grad_(False)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.noise)

    def clean_latent(self, images: Tensor) -> Tensor:
        """The normalised latent of the pictures at a quarter of their size."""
        return self.autoencoder.encode(low_quality(images))

    def noised(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """((1 - sigma) latent + sigma noise, sigma (B,)); sigma is 0 for most pictures."""
        rng, count = self.sampler.rng, len(latent)
        noisy = rng.random(count) < self.recipe.noisy
        sigma = torch.from_numpy(np.where(noisy, rng.uniform(0, 0.8, count), 0.0)).float()
        s = sigma[:, None, None, None]
        return (1 - s) * latent + s * self._randn(*latent.shape), sigma

    def condition(self, images: Tensor, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """(latent as decoding gets it, sigma (B,), caption embeddings) for a batch of pictures."""
        rng, recipe = self.sampler.rng, self.recipe
        latent, sigma = self.noised(self.clean_latent(images))
        kept = ["" if rng.random() < recipe.no_caption else caption for caption in captions]
        return latent.bfloat16().float(), sigma, self.embed.encode(kept)

    def train_step(self) -> float:
        """One optimiser step on one call of a sampler run; returns its squared error."""
        recipe, net, rng = self.recipe, self.net, self.sampler.rng
        images, captions = self.sampler.batch(self.step / recipe.steps)
        latent, sigma, text = self.condition(images, captions)
        times = _schedule(rng)
        chosen = int(rng.integers(len(times) - 1))
        condition = net.prepare(latent, text, sigma, size=tuple(images.shape[-2:]))
        # A noisy latent leaves an error ten times that of a clean one; unweighted, a few of them
        # would decide what the network learns about all.
        trust = (1 - sigma)[:, None, None, None]
        x = self._randn(*images.shape)
        for index, (t, following) in enumerate(pairwise(times)):
            velocity = net.step(x, torch.full((len(x),), 1000 * t), condition)
            predicted = x - t * velocity
            if index == chosen:
                break
            # Not under no_grad: the compiled blocks would be compiled a second time for it.
            predicted = predicted.detach()
            x = (1 - following) * predicted + following * self._randn(*images.shape)
        loss = picture_loss(predicted, images, recipe, trust)
        self.optimiser.zero_grad(set_to_none=True)
        # 1/t evens out the size of the velocity's gradient, t of it being the picture's.
        (0.6 / t * loss).backward()
        self._update()
        return ((predicted.detach() - images) * trust).square().mean().item()

    def _update(self) -> None:
        recipe = self.recipe
        self.step += 1
        decay = 0.5 * (1 + math.cos(math.pi * min(self.step / recipe.steps, 1.0)))
        rate = recipe.learning_rate * min(self.step / recipe.warm_up, 0.99 * decay + 0.01)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), 0.5)
        if torch.isfinite(norm):
            self.optimiser.step()
        ema = min(recipe.ema, self.step / (self.step + 10))
        with torch.no_grad():
            averaged, current = list(self.average.parameters()), list(self.net.parameters())
            torch._foreach_lerp_(averaged, current, weight=1 - ema)

    def save_painter(self, head: nn.Conv2d, cycle: int) -> None:
        """Keeps the state of the first stage after `cycle` in the work folder."""
        state = {
            "cycle": cycle,
            "net": self.net.state_dict(),
            "head": head.state_dict(),
            "autoencoder": self.autoencoder.state_dict(),
        }
        partial = self.work / "painter.pt.part"
        torch.save(state, partial)
        os.replace(partial, self.work / "painter.pt")

    def save_checkpoint(self) -> None:
        state = {
            "step": self.step,
            "net": self.net.state_dict(),
            "autoencoder": self.autoencoder.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "noise": self.noise.get_state(),
            "batches": json.dumps(self.sampler.rng.bit_generator.state),
        }
        partial = self.work / "pid.pt.part"
        torch.save(state, partial)
        os.replace(partial, self.work / "pid.pt")

    def resume(self) -> None:
        """Continues from the checkpoint in the work folder."""
        state = torch.load(self.work / "pid.pt", weights_only=True)
        self.step, self.branch_trained = state["step"], True
        self.net.load_state_dict(state["net"])
        self.autoencoder.load_state_dict(state["autoencoder"])
        self.autoencoder.requires_grad_(False)
        self.average.load_state_dict(state["average"])
        if self.step:
            self.optimiser.load_state_dict(state["optimiser"])
        self.noise.set_state(state["noise"])
        self.sampler.rng.bit_generator.state = json.loads(state["batches"])

    def run(self, *, monitor_every: int = 200, compiled: bool = True) -> None:
        """Trains to the last step, printing as it goes.

        Args:
            monitor_every: steps between checkpoints, each followed by figures on a few pictures.
            compiled: compile the pixel blocks, whose many cheap operations on large tensors take
                most of the time otherwise.
        """
        from .evaluate import Decoder, monitor

        if compiled:
            for block in self.net.pixel_blocks:
                block.compile(dynamic=True)
        if not self.branch_trained:
            train_latent_branch(self, self.recipe.branch)
            self.average.load_state_dict(self.net.state_dict())
            if self.recipe.patch_steps:
                train_patch_stream(self, self.recipe.patch_steps, self.recipe.patch_rate)
            self.branch_trained = True
            self.autoencoder.save(
                self.work / "autoencoder.safetensors",
                metadata={"training": {"with_pid": dataclasses.asdict(self.recipe)}},
            )
            self.save_checkpoint()
            monitor(Decoder(self.average, self.autoencoder))
        started, first = time.monotonic(), self.step
        seen: list[float] = []
        while self.step < self.recipe.steps:
            seen.append(self.train_step())
            if self.step % 50 == 0:
                psnr = 10 * math.log10(4 / np.mean(seen))
                pace = (time.monotonic() - started) / (self.step - first)
                print(
                    f"pid {self.step}/{self.recipe.steps}  PSNR {psnr:.2f} dB  {pace:.2f} s/step",
                    flush=True,
                )
                seen = []
            if self.step % monitor_every == 0 or self.step == self.recipe.steps:
                self.save_checkpoint()
                monitor(Decoder(self.average, self.autoencoder))


def load_network(path: Path) -> PiDNet:
    """A network written by `save_network`, in fp32, eval mode and without gradients."""
    with safe_open(path, framework="pt") as file:
        config = PiDConfig.from_dict(json.loads(file.metadata()["config"]))
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    net = PiDNet(config, device="meta")
    net.load_state_dict(tensors, strict=True, assign=True)
    return net.eval().requires_grad_(False)


def save_network(net: PiDNet, path: Path, recipe: Recipe, command: str, steps: int) -> None:
    """Writes bf16 weights with everything needed to rebuild and to sample the network."""
    metadata = {
        "format": "pixeldiff.pid.v1",
        "backbone": "demo",
        "config": json.dumps(net.config.to_dict()),
        "sampling": json.dumps(
            {
                "t_list": T_LIST,
                "type": "sde",
                "prediction": "velocity",
                "caption": {
                    "embedder": "tiny",
                    "width": net.config.txt_embed_dim,
                    "length": net.config.txt_max_length,
                },
            }
        ),
        "training": json.dumps(
            {"command": command, **dataclasses.asdict(recipe), "steps_done": steps}
        ),
    }
    tensors = {}
    for name, tensor in net.state_dict().items():
        # The way of the noisy pixel through the network must be exact to a thousandth; it lies in
        # small tensors, which stay fp32.
        exact = tensor.dim() < 2 or name.startswith(("pixel_embedder.", "final_layer."))
        dtype = torch.float32 if exact else torch.bfloat16
        tensors[name] = tensor.detach().to(dtype).contiguous()
    with written_whole([path]) as (partial,):
        partial.write_bytes(save(tensors, metadata))
