"""`python -m training demo` makes the demo model from nothing; the other commands are its parts."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

import click
import torch

from pixeldiff.models.autoencoder import ConvAutoencoder

from . import cache, train_autoencoder, train_pid

ROOT = Path(__file__).resolve().parent
ASSETS = ROOT.parent / "pixeldiff" / "assets" / "demo"
PICTURES = 320
AUTOENCODER_STEPS = 1000


def _command() -> str:
    return "python -m training " + shlex.join(sys.argv[1:])


_work = click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    default=ROOT / "work",
    show_default=True,
    help="Folder for pictures, checkpoints and comparisons.",
)
_pid_steps = click.option("--steps", default=train_pid.Recipe.steps, show_default=True)


@click.group()
@click.option("--threads", default=0, help="CPU threads of torch; 0 leaves its choice.")
def main(threads: int) -> None:
    """Draws pictures, trains the demo autoencoder and the demo PiD, and measures them."""
    if threads:
        torch.set_num_threads(threads)


@main.command()
@_work
@click.option("--count", default=PICTURES, show_default=True)
def pictures(work: Path, count: int) -> None:
    """Draw the training pictures."""
    cache.fill(work / "pictures", range(count))


@main.command()
@_work
@click.option("--steps", default=AUTOENCODER_STEPS, show_default=True)
def autoencoder(work: Path, steps: int) -> None:
    """Train the autoencoder (needs the pictures)."""
    output = work / "autoencoder.safetensors"
    train_autoencoder.train(work / "pictures", output, steps=steps, command=_command())


@main.command()
@_work
@_pid_steps
@click.option("--resume", is_flag=True, help="Continue from the checkpoint in the work folder.")
@click.option("--branch-steps", default=train_pid.Recipe.branch_steps, show_default=True)
@click.option("--learning-rate", default=train_pid.Recipe.learning_rate, show_default=True)
@click.option("--compile/--no-compile", "compiled", default=True, help="Compile the pixel blocks.")
def pid(
    work: Path,
    steps: int,
    branch_steps: int,
    resume: bool,
    learning_rate: float,
    compiled: bool,
) -> None:
    """Train PiD (needs the pictures and the autoencoder)."""
    recipe = train_pid.Recipe(steps=steps, branch_steps=branch_steps, learning_rate=learning_rate)
    encoder = ConvAutoencoder.load(work / "autoencoder.safetensors")
    trainer = train_pid.Trainer(work / "pictures", encoder, recipe, work)
    if resume:
        trainer.resume()
    trainer.run(compiled=compiled)
    _save_pid(trainer.average, work, recipe, trainer.step)


def _save_pid(net: torch.nn.Module, work: Path, recipe: train_pid.Recipe, steps: int) -> None:
    path = work / "pid.safetensors"
    train_pid.save_network(net, path, recipe, "python -m training demo", steps)


@main.command()
@_work
@_pid_steps
def export(work: Path, steps: int) -> None:
    """Write the averaged weights of the last checkpoint as a safetensors file."""
    state = torch.load(work / "pid.pt", weights_only=True)
    net = train_pid.PiDNet(train_pid.CONFIG)
    net.load_state_dict(state["average"])
    _save_pid(net, work, train_pid.Recipe(steps=steps), state["step"])


@main.command()
@_work
def ship(work: Path) -> None:
    """Copy the trained weights to where the package carries them."""
    ASSETS.mkdir(parents=True, exist_ok=True)
    for name in ("autoencoder.safetensors", "pid.safetensors"):
        shutil.copyfile(work / name, ASSETS / name)


@main.command()
@click.option(
    "--weights",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=ASSETS,
    show_default=True,
    help="Folder of autoencoder.safetensors and pid.safetensors.",
)
@click.option("--result", type=click.Path(path_type=Path), default=ROOT / "results" / "demo.json")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "work" / "comparisons")
def evaluate(weights: Path, result: Path, out: Path) -> None:
    """Compare 4x decoding with bicubic enlargement of the autoencoder's decode."""
    from .evaluate import Decoder
    from .evaluate import evaluate as run

    net = train_pid.load_network(weights / "pid.safetensors")
    encoder = ConvAutoencoder.load(weights / "autoencoder.safetensors")
    run(Decoder(net, encoder), result, out)


@main.command()
@_work
@_pid_steps
@click.option("--pictures", "count", default=PICTURES, show_default=True)
@click.option("--autoencoder-steps", default=AUTOENCODER_STEPS, show_default=True)
@click.pass_context
def demo(
    context: click.Context, work: Path, steps: int, count: int, autoencoder_steps: int
) -> None:
    """Everything: pictures, both trainings, the shipped files and the measurement."""
    work.mkdir(parents=True, exist_ok=True)
    context.invoke(pictures, work=work, count=count)
    context.invoke(autoencoder, work=work, steps=autoencoder_steps)
    context.invoke(
        pid,
        work=work,
        steps=steps,
        branch_steps=train_pid.Recipe.branch_steps,
        resume=False,
        learning_rate=train_pid.Recipe.learning_rate,
        compiled=True,
    )
    context.invoke(ship, work=work)
    context.invoke(
        evaluate,
        weights=ASSETS,
        result=ROOT / "results" / "demo.json",
        out=work / "comparisons",
    )


if __name__ == "__main__":
    main()
