"""What training an L2P network is: which tensors learn, at which noise levels, and the loss.

Only the shallow layers learn: those that met the latent, which pixels have replaced.

Source: L2P (arXiv 2605.12013), training, and its 4K/8K/10K release.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..steps import one_of
from .block import Block
from .config import L2PConfig
from .network import L2PNet
from .scheduler import SHIFT, TIME_DTYPES, TIMESTEPS, schedule

LEVELS = 1000  # noise levels to draw from
LARGE_SHIFT = 5.0
INDEX_RULES = ("uniform", "noisy")
_PROJECTION_AND_DECODER = ("all_x_embedder.", "local_decoder.")


@dataclass(frozen=True)
class TrainableSet:
    """Which tensors learn. The input projection and the local decoder always do.

    Args:
        first, last: main blocks at either end of the trunk.
        surroundings: also the refiners, the time MLP, the caption embedder and the pad tokens.
    """

    first: int
    last: int
    surroundings: bool

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"TrainableSet: {name} must be an integer >= 0, got {value!r}")

    def holds(self, name: str, n_layers: int) -> bool:
        """Whether the tensor of this name learns in a network of so many main blocks."""
        if name.startswith("layers."):
            i = int(name.split(".")[1])
            return i < self.first or i >= n_layers - self.last
        return self.surroundings or name.startswith(_PROJECTION_AND_DECODER)


# "default" is what the 4K, 8K and 10K programs run and the types in the released 1K file show;
# "strict" is the paper's set as the same release spells it out.
TRAINABLE_SETS = {"default": TrainableSet(5, 5, True), "strict": TrainableSet(4, 4, False)}


def set_trainable(net: L2PNet, chosen: TrainableSet) -> dict[str, nn.Parameter]:
    """Let exactly the chosen tensors require gradients; returns them by name.

    Raises:
        ValueError: the latent model, which has no local decoder to train.
    """
    if net.config.local_decoder is None:
        raise ValueError(
            "l2p train: the model is a latent one; convert it first: pixeldiff l2p convert"
        )
    learning = {}
    for name, p in net.named_parameters():
        p.requires_grad_(chosen.holds(name, net.config.n_layers))
        if p.requires_grad:
            learning[name] = p
    return learning


def default_shift(config: L2PConfig) -> float:
    """The schedule's shift to train a network with: 3, and 5 for patches of 64 and larger.

    Neighbouring pixels of a large picture are so alike that a given noise level destroys less of
    it; the paper's ablation at 4K is best near 5.
    """
    return LARGE_SHIFT if config.patch_size >= 64 else SHIFT


@dataclass(frozen=True)
class NoiseLevels:
    """The distribution of noise levels: an index into the schedule of 1000 steps.

    Args:
        shift: of the schedule.
        rule: "uniform" over all 1000 (the 4K, 8K and 10K release), or "noisy", max(0, U{-100, ...,
            799}): one draw in nine is pure noise and none is below sigma 0.43 at shift 3 (reported
            of the 1K release).
        time_dtype: "bf16" rounds timesteps before both uses as the releases do.
    """

    shift: float = SHIFT
    rule: str = "uniform"
    time_dtype: str = "fp32"

    def __post_init__(self) -> None:
        one_of("rule", self.rule, INDEX_RULES)
        schedule(1, shift=self.shift, time_dtype=self.time_dtype)  # its checks

    def draw(self, generator: torch.Generator) -> int:
        low, high = (0, LEVELS) if self.rule == "uniform" else (-100, 800)
        return max(0, int(torch.randint(low, high, (), generator=generator)))

    def at(self, index: int) -> tuple[float, float]:
        """(sigma, t) of one index; 0 is pure noise."""
        table = _table(self.shift, self.time_dtype)
        if self.time_dtype == "fp32":
            return table.sigmas[index], table.times[index]
        steps = torch.tensor(table.timesteps)
        rounded = steps[index].to(TIME_DTYPES[self.time_dtype]).float()
        return float(steps[(steps - rounded).abs().argmin()] / TIMESTEPS), table.times[index]


@functools.lru_cache(maxsize=8)
def _table(shift: float, time_dtype: str):
    return schedule(LEVELS, shift=shift, time_dtype=time_dtype)


def noised(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma noise for images (B, 3, H, W) and sigma (B,), in fp32."""
    sigma = sigma.float().view(-1, 1, 1, 1)
    return (1 - sigma) * x0.float() + sigma * noise.float()


def velocity_loss(u: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Mean over all pixels of (v - (noise - x0))^2 in fp32, where v = -u is the velocity."""
    return (u.float() + (noise.float() - x0.float())).square().mean()


def training_loss(
    net: L2PNet, x0: Tensor, noise: Tensor, sigma: Tensor, t: Tensor, captions: Sequence[Tensor]
) -> Tensor:
    """The loss of B examples, with a graph.

    Args:
        x0: (B, 3, H, W) images in [-1, 1].
        noise: (B, 3, H, W) standard normal.
        sigma, t: (B,) fp32, noise levels and the times that go with them.
        captions: B features (T_b, E).
    """
    return velocity_loss(net(noised(x0, noise, sigma), t, captions), x0, noise)


def recompute_blocks(net: L2PNet) -> None:
    """Keep no activations inside transformer blocks and decoder levels; make them again backward.

    A third more arithmetic. Without it a released network does not fit one GPU.
    """
    for module in net.modules():
        if isinstance(module, Block):
            module.forward = functools.partial(
                checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False
            )
    net.local_decoder.recompute = True


def generator_for(seed: int, *what: str | int) -> torch.Generator:
    """Randomness of one thing alone, such as one example's noise: nothing to save or restore."""
    text = ":".join(map(str, (seed, *what)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
