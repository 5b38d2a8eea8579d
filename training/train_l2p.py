"""From the source to the demo's L2P with the package's own commands: convert, train, merge.

Only the shallow layers learn, in rounds of their own rate and size of pictures; each goes on from
the merged result of the one before.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from pixeldiff.cli import main as pixeldiff
from pixeldiff.models.l2p.pipeline import Sampling
from pixeldiff.models.l2p.training import TRAINABLE_SETS, TrainableSet
from pixeldiff.out_files import written_whole

DECODER_WIDTH = 0.25  # of the released local decoder's, for a trunk of 128 channels
FORM = 1024  # the released form whose patches and decoder levels it takes: 16 pixels, four levels


@dataclass(frozen=True)
class Round:
    """One run of `pixeldiff l2p train`; pictures are resized to `side`."""

    side: int
    steps: int
    batch: int
    learning_rate: float
    shift: float = 8.0  # more than for 4K: where the picture's layout is decided


@dataclass(frozen=True)
class ShallowRecipe:
    """Of the shallow layers: `blocks` main blocks at either end; the rest as for l2p train."""

    rounds: tuple[Round, ...] = (
        Round(side=128, steps=6000, batch=16, learning_rate=1e-3),
        Round(side=128, steps=3500, batch=16, learning_rate=4e-4),
        Round(side=128, steps=1500, batch=16, learning_rate=1e-4, shift=6.0),
    )
    blocks: int = 2
    trainable: str = "default"
    average: float = 0.999

    def scaled(self, effort: float) -> ShallowRecipe:
        """The same with `effort` times the steps."""
        rounds = tuple(replace(r, steps=max(1, round(r.steps * effort))) for r in self.rounds)
        return replace(self, rounds=rounds)


@dataclass(frozen=True)
class SourcePictures:
    """Pictures that the source makes; `steps` and `guidance` are those of its sampling."""

    side: int
    count: int
    steps: int
    guidance: float


SIDE = 128  # of the pictures that the shipped network makes where nothing is said
PICTURES = SourcePictures(side=SIDE, count=9248, steps=16, guidance=2.5)
SAMPLING = Sampling(steps=30, guidance_scale=4.5, shift=5.0)


def trainable_set(recipe: ShallowRecipe) -> TrainableSet:
    """The tensors that learn."""
    return replace(TRAINABLE_SETS[recipe.trainable], first=recipe.blocks, last=recipe.blocks)


def train(source: Path, pictures: Path, recipe: ShallowRecipe, work: Path) -> Path:
    """Converts the source and trains what is new and what is next to it.

    Args:
        source: file of the latent model.
        pictures: folder of synthesised pictures.
        recipe: of the rounds.
        work: folder for what comes in between.

    Returns:
        The merged file of the last round.
    """
    base = work / "l2p-start.safetensors"
    _run("l2p", "convert", "--source", source, "--resolution", FORM,
         "--decoder-width", DECODER_WIDTH, "-o", base, "--force", "--quiet")  # fmt: skip
    for number, each in enumerate(recipe.rounds):
        folder = work / f"l2p-round-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        _run("l2p", "train", "--model", base, "--data", pictures, "-o", folder,
             "--steps", each.steps, "--size", f"{each.side}x{each.side}", "--batch", each.batch,
             "--lr", each.learning_rate, "--shift", each.shift, "--weight-decay", 0,
             "--trainable", recipe.trainable, "--blocks", recipe.blocks, "--clip", 1,
             "--average", recipe.average, "--no-recompute",
             "--save-every", 1000, "--keep", 1, "--seed", number,
             "--device", "cpu", "--precision", "bf16")  # fmt: skip
        (delta,) = folder.glob("step-*/delta.safetensors")
        merged = work / f"l2p-{number}.safetensors"
        _run("l2p", "merge", base, delta, "-o", merged, "--force", "--quiet")
        base = merged
    return base


def ship(
    trained: Path, output: Path, *, side: int, sampling: Sampling, facts: dict[str, object]
) -> None:
    """Writes the network in bf16, with all that `L2PPipeline.from_pretrained` reads of it.

    Args:
        trained: a merged file.
        output: the file to write.
        side: of the pictures it makes where nothing is said.
        sampling: likewise.
        facts: JSON-able, on how it was made.
    """
    with safe_open(trained, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata |= {
        "variant": json.dumps({"name": "demo", "native_size": side}),
        "sampling": json.dumps(asdict(sampling)),
        "text_encoder": "demo",
        "training": json.dumps(facts),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_whole([output]) as (partial,):
        partial.write_bytes(save({n: t.to(torch.bfloat16) for n, t in tensors.items()}, metadata))


def _run(*arguments: object) -> None:
    words = [str(a) for a in arguments]
    print("pixeldiff " + " ".join(words), flush=True)
    pixeldiff(words, standalone_mode=False)
