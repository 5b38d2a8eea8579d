"""Trains the small latent diffusion model from which the demo's L2P is converted.

It is a Z-Image transformer (`L2PNet` without a local decoder) over the demo autoencoder's latents.
Flow matching: the network's output is the negative velocity at a noised latent. Most steps see
small pictures, of few tokens; the last ones see pictures of the final size.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixeldiff.models.autoencoder import ConvAutoencoder
from pixeldiff.models.l2p import L2PConfig, L2PNet
from pixeldiff.models.l2p.training import training_loss
from pixeldiff.out_files import written_whole
from pixeldiff.text.tiny import TinyPromptEncoder

from .shape_latents import ShapeLatents
from .shapes import caption

SOURCE = L2PConfig(
    patch_size=2,
    in_channels=16,
    dim=128,
    n_layers=6,
    n_refiner_layers=1,
    n_heads=4,
    ffn_hidden=352,
    cap_feat_dim=64,
    axes_dims=(8, 12, 12),
    local_decoder=None,
)


@dataclass(frozen=True)
class Stage:
    """Steps over pictures of one size, or of two in turn.

    Args:
        steps: of the optimiser.
        batches: by side of the pictures, how many of them make a batch, the main size first.
        pictures: by side, how many are drawn.
        other: one step in so many is of the second size.
        learning_rate: the peak, after `warm_up` steps; it falls to `last` of it along a cosine.
        muon: the matrices' rate in that one.
        noise: mean and deviation of the noise level's logit. What a picture shows is decided at
            high noise.
    """

    steps: int
    batches: dict[int, int]
    pictures: dict[int, int]
    other: int = 4
    learning_rate: float = 1.5e-3
    warm_up: int = 200
    last: float = 0.05
    muon: float = 1.0
    noise: tuple[float, float] = (0.5, 1.2)

    def rate(self, step: int) -> float:
        """Learning rate of step number `step`, from 0."""
        ramp = min(1.0, (step + 1) / self.warm_up)
        fall = 0.5 * (1 + np.cos(np.pi * step / self.steps))
        return self.learning_rate * ramp * (self.last + (1 - self.last) * float(fall))

    def side(self, step: int) -> int:
        """Of the pictures of a step."""
        sides = list(self.batches)
        return sides[len(sides) > 1 and step % self.other == self.other - 1]


@dataclass(frozen=True)
class Recipe:
    """Of the whole training; `dropout` of the captions are empty, for guidance."""

    stages: tuple[Stage, ...] = (
        Stage(steps=3000, batches={128: 64}, pictures={128: 24576}, last=0.15),
        Stage(steps=3500, batches={128: 64}, pictures={128: 24576}, muon=3.0, noise=(0.9, 1.2)),
        Stage(
            steps=1500,
            batches={128: 64},
            pictures={128: 12288},
            learning_rate=1.2e-3,
            warm_up=100,
            last=0.1,
            muon=2.0,
            noise=(0.9, 1.2),
        ),
    )
    dropout: float = 0.1
    average: float = 0.998
    seed: int = 0

    def scaled(self, effort: float) -> Recipe:
        """The same with `effort` times the steps and pictures."""
        stages = tuple(
            replace(
                stage,
                steps=max(1, round(stage.steps * effort)),
                pictures={s: max(8, round(n * effort)) for s, n in stage.pictures.items()},
            )
            for stage in self.stages
        )
        return replace(self, stages=stages)


def initialise(net: L2PNet, seed: int) -> None:
    """PyTorch's first weights, but every block starts as the identity and the output as zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "adaLN_modulation" in name or "all_final_layer" in name:
                p.zero_()
            elif p.dim() == 2 and "pad_token" not in name:
                bound = p.shape[1] ** -0.5
                p.uniform_(-bound, bound, generator=generator)


class SourceTrainer:
    """The network in bf16, its fp32 weights, their running average, and the pictures.

    Args:
        autoencoder: whose latents it learns.
        recipe: of the run.
        work: folder for latents and checkpoints.
    """

    def __init__(self, autoencoder: ConvAutoencoder, recipe: Recipe, work: Path) -> None:
        self.recipe, self.work = recipe, work
        self.words = TinyPromptEncoder(SOURCE.cap_feat_dim)
        self.seen: dict[int, int] = {}
        self.data = {
            side: ShapeLatents.made(
                work / f"latents-{side}.pt", autoencoder, count, side, recipe.seed
            )
            for stage in recipe.stages
            for side, count in stage.pictures.items()
        }
        first = next(iter(self.data.values())).latents.float()
        self.shift, self.scale = first.mean((0, 2, 3)), first.std((0, 2, 3))
        self.net = L2PNet(SOURCE)
        initialise(self.net, recipe.seed)
        self.weights = {n: p.detach().clone() for n, p in self.net.named_parameters()}
        self.average = {n: p.clone() for n, p in self.weights.items()}
        self.net.bfloat16()
        self.stages_done = 0

    def resume(self) -> None:
        """Go on after the last stage that `work` holds the end of, if it holds any."""
        path = self.work / "source-stages.pt"
        if path.is_file():
            stored = torch.load(path, weights_only=True)
            self.weights, self.average = stored["weights"], stored["average"]
            self.shift, self.scale = stored["latent"]
            self.seen, self.stages_done = stored["seen"], stored["stages_done"]
            self._into_network()

    def _checkpoint(self) -> None:
        stored = {
            "weights": self.weights,
            "latent": (self.shift, self.scale),
            "average": self.average,
            "seen": self.seen,
            "stages_done": self.stages_done,
        }
        torch.save(stored, self.work / "source-stages.pt")

    def run(self, *, compiled: bool) -> None:
        """All stages. Prints the loss; leaves the running average in `average`."""
        if compiled:
            for block in (*self.net.noise_refiner, *self.net.context_refiner, *self.net.layers):
                block.forward = torch.compile(block.forward, dynamic=False)
        # The flash kernel's backward is slow for sequences this short.
        with sdpa_kernel(SDPBackend.MATH):
            for number, stage in enumerate(self.recipe.stages):
                if number < self.stages_done:
                    continue
                self._stage(number, stage)
                self.stages_done = number + 1
                self._checkpoint()

    def _stage(self, number: int, stage: Stage) -> None:
        rng = np.random.default_rng([self.recipe.seed, number])
        generator = torch.Generator().manual_seed(self.recipe.seed + number)
        optimisers = _optimisers(self.weights, stage.muon)
        losses, begun = [], time.perf_counter()
        for step in range(stage.steps):
            side = stage.side(step)
            batch = stage.batches[side]
            loss = self._loss(self.data[side], batch, stage.noise, rng, generator)
            loss.backward()
            for name, p in self.net.named_parameters():
                self.weights[name].grad = None if p.grad is None else p.grad.float()
                p.grad = None
            nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
            for optimiser in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = stage.rate(step) * group["share"]
                optimiser.step()
            self._take_over(step if number == 0 else 10**6)
            self.seen[side] = self.seen.get(side, 0) + batch
            losses.append(loss.item())
            if (step + 1) % 100 == 0 or step + 1 == stage.steps:
                seconds = time.perf_counter() - begun
                print(f"source stage {number} step {step + 1}/{stage.steps}: loss "
                      f"{np.mean(losses[-100:]):.4f}, {seconds:.0f} s", flush=True)  # fmt: skip
            if (step + 1) % 500 == 0:
                self.save(self.work / "source.safetensors", "")

    def _loss(
        self,
        data: ShapeLatents,
        batch: int,
        level: tuple[float, float],
        rng: np.random.Generator,
        generator: torch.Generator,
    ) -> Tensor:
        chosen = rng.integers(len(data), size=batch)
        shape = (1, -1, 1, 1)
        x0 = data.latents[chosen].float().sub(self.shift.view(shape)).div(self.scale.view(shape))
        texts = [
            "" if rng.random() < self.recipe.dropout else caption(data.scenes[i], rng)
            for i in chosen
        ]
        noise = torch.randn(x0.shape, generator=generator)
        sigma = (level[0] + level[1] * torch.randn(batch, generator=generator)).sigmoid()
        return training_loss(self.net, x0, noise, sigma, 1 - sigma, self.words.encode(texts))

    @torch.no_grad()
    def _into_network(self) -> None:
        parameters = dict(self.net.named_parameters())
        torch._foreach_copy_(list(parameters.values()), [self.weights[n] for n in parameters])

    @torch.no_grad()
    def _take_over(self, step: int) -> None:
        self._into_network()
        decay = min(self.recipe.average, (step + 1) / (step + 10))
        torch._foreach_lerp_(
            list(self.average.values()), list(self.weights.values()), weight=1 - decay
        )

    def save(self, path: Path, command: str) -> None:
        """The running average in bf16, with the geometry and how it was made as metadata."""
        metadata = {
            "format": "pt",
            "config": json.dumps(SOURCE.to_dict()),
            "latent": json.dumps({"shift": self.shift.tolist(), "scale": self.scale.tolist()}),
            "training": json.dumps(
                {"command": command, "recipe": asdict(self.recipe), "pictures_seen": self.seen}
            ),
        }
        tensors = {n: p.to(torch.bfloat16).contiguous() for n, p in self.average.items()}
        with written_whole([path]) as (partial,):
            partial.write_bytes(save(tensors, metadata))


def _optimisers(weights: dict[str, Tensor], share: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, at `share` of the rate; AdamW for the rest."""
    matrices, others = [], []
    for name, p in weights.items():
        inside = name.startswith(("layers.", "noise_refiner.", "context_refiner."))
        muon = inside and p.dim() == 2 and "adaLN" not in name
        (matrices if muon else others).append(p)
    return [
        torch.optim.AdamW([{"params": others, "share": 1.0}], betas=(0.9, 0.98), weight_decay=0.0),
        torch.optim.Muon(
            [{"params": matrices, "share": share}],
            weight_decay=0.0,
            adjust_lr_fn="match_rms_adamw",
        ),
    ]
