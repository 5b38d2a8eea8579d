"""`python -m training demo` makes the demo's PiD from nothing, `l2p-demo` its L2P.

The other commands are their parts.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import click
import torch

from pixeldiff.models.autoencoder import ConvAutoencoder
from pixeldiff.sources import demo_autoencoder

from . import cache, train_autoencoder, train_l2p, train_pid, train_source
from .source_model import SourceModel
from .synthesise import synthesise

ROOT = Path(__file__).resolve().parent
ASSETS = ROOT.parent / "pixeldiff" / "assets" / "demo"
PICTURES = 480
AUTOENCODER_STEPS = 1000
L2P_FILES = ("l2p.safetensors", "l2p_source.safetensors")
SYNTHESISED = "synthesised"
SHEET = ROOT.parent / "docs" / "l2p-demo.png"
FILES = ("autoencoder.safetensors", "pid.safetensors")


def _command() -> str:
    return "python -m training " + shlex.join(sys.argv[1:])


def _few(count: int, effort: float) -> int:
    return max(1, round(count * effort)) if count else 0


_work = click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    default=ROOT / "work",
    show_default=True,
    help="Folder for pictures, checkpoints and comparisons.",
)
_effort = click.option(
    "--effort",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Multiplies every step count and the number of pictures; small values try the pipeline.",
)
_compiled = click.option(
    "--compile/--no-compile", "compiled", default=True, help="Compile the pixel blocks."
)


@click.group()
@click.option("--threads", default=0, help="CPU threads of torch; 0 leaves its choice.")
def main(threads: int) -> None:
    """Draws pictures, trains the demo's autoencoder, PiD and L2P on them, and measures them."""
    if threads:
        torch.set_num_threads(threads)


@main.command()
@_work
@_effort
def pictures(work: Path, effort: float) -> None:
    """Draw the training pictures."""
    cache.fill(work / "pictures", range(_few(PICTURES, effort)))


@main.command()
@_work
@_effort
def autoencoder(work: Path, effort: float) -> None:
    """Train the autoencoder (needs the pictures)."""
    steps = _few(AUTOENCODER_STEPS, effort)
    output = work / "autoencoder.safetensors"
    train_autoencoder.train(work / "pictures", output, steps=steps, command=_command())


@main.command()
@_work
@_effort
@_compiled
@click.option("--resume", is_flag=True, help="Continue from the checkpoint in the work folder.")
def pid(work: Path, effort: float, compiled: bool, resume: bool) -> None:
    """Train PiD (needs the pictures and the autoencoder, which it trains on)."""
    full = train_pid.Recipe()
    recipe = train_pid.Recipe(
        steps=_few(full.steps, effort),
        branch=tuple(replace(c, steps=_few(c.steps, effort)) for c in full.branch),
        patch_steps=_few(full.patch_steps, effort),
    )
    encoder = ConvAutoencoder.load(work / "autoencoder.safetensors")
    trainer = train_pid.Trainer(work / "pictures", encoder, recipe, work)
    if resume:
        trainer.resume()
    trainer.run(compiled=compiled)
    path = work / "pid.safetensors"
    train_pid.save_network(trainer.average, path, recipe, _command(), trainer.step)


@main.command()
@_work
@click.option("--assets", type=click.Path(path_type=Path), default=ASSETS, show_default=True)
def ship(work: Path, assets: Path) -> None:
    """Copy the trained weights to where the package carries them."""
    assets.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(work / name, assets / name)


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
@click.option("--generated", default=12, show_default=True, help="Held-out generated pictures.")
def evaluate(weights: Path, result: Path, out: Path, generated: int) -> None:
    """Compare 4x decoding with bicubic enlargement of the autoencoder's decode."""
    from .evaluate import Decoder
    from .evaluate import evaluate as run

    net = train_pid.load_network(weights / "pid.safetensors")
    encoder = ConvAutoencoder.load(weights / "autoencoder.safetensors")
    run(Decoder(net, encoder), result, out, generated)


@main.command()
@_work
@_effort
@_compiled
@click.option("--ship/--no-ship", "shipping", default=True, help="Replace the shipped weights.")
@click.pass_context
def demo(context: click.Context, work: Path, effort: float, compiled: bool, shipping: bool) -> None:
    """Everything: pictures, both trainings, the shipped files and the measurement."""
    work.mkdir(parents=True, exist_ok=True)
    context.invoke(pictures, work=work, effort=effort)
    context.invoke(autoencoder, work=work, effort=effort)
    context.invoke(pid, work=work, effort=effort, compiled=compiled, resume=False)
    weights, result = work, work / "demo.json"
    if shipping:
        context.invoke(ship, work=work, assets=ASSETS)
        weights, result = ASSETS, ROOT / "results" / "demo.json"
    context.invoke(evaluate, weights=weights, result=result, out=work / "comparisons", generated=12)


@main.command("l2p-source")
@_work
@_effort
@_compiled
@click.option("--resume", is_flag=True, help="Continue after the last complete stage.")
def l2p_source(work: Path, effort: float, compiled: bool, resume: bool) -> None:
    """Train the small latent diffusion model (needs the shipped autoencoder)."""
    recipe = train_source.Recipe().scaled(effort)
    trainer = train_source.SourceTrainer(demo_autoencoder(), recipe, work)
    if resume:
        trainer.resume()
    trainer.run(compiled=compiled)
    trainer.save(work / L2P_FILES[1], _command())


@main.command("l2p-pictures")
@_work
@_effort
def l2p_pictures(work: Path, effort: float) -> None:
    """Let the source make the pictures that L2P learns from."""
    wanted = train_l2p.PICTURES
    synthesise(
        SourceModel.load(work / L2P_FILES[1], torch.bfloat16),
        work / SYNTHESISED,
        _few(wanted.count, effort),
        wanted.side,
        steps=wanted.steps,
        guidance=wanted.guidance,
    )


@main.command("l2p-shallow")
@_work
@_effort
def l2p_shallow(work: Path, effort: float) -> None:
    """Convert the source and train L2P's shallow layers (needs the source and its pictures)."""
    recipe = train_l2p.ShallowRecipe().scaled(effort)
    trained = train_l2p.train(work / L2P_FILES[1], work / SYNTHESISED, recipe, work)
    pictures = asdict(train_l2p.PICTURES)
    facts = {"command": _command(), "recipe": asdict(recipe), "pictures": pictures}
    train_l2p.ship(
        trained, work / L2P_FILES[0], side=train_l2p.SIDE, sampling=train_l2p.SAMPLING, facts=facts
    )


@main.command("l2p-evaluate")
@click.option(
    "--weights",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=ASSETS,
    show_default=True,
    help="Folder of l2p.safetensors and l2p_source.safetensors.",
)
@click.option("--result", type=click.Path(path_type=Path), default=ROOT / "results/l2p_demo.json")
@click.option("--picture", type=click.Path(path_type=Path), default=SHEET, help="Sheet to write.")
@click.option("--captions", default=96, show_default=True, help="Held-out captions to score on.")
@click.option("--repeats", default=5, show_default=True, help="Timed pictures of each model.")
def l2p_evaluate(weights: Path, result: Path, picture: Path, captions: int, repeats: int) -> None:
    """Score source and L2P on held-out captions, and time them side by side."""
    from pixeldiff.models.l2p import L2PPipeline

    from .evaluate_l2p import evaluate as run

    run(
        SourceModel.load(weights / L2P_FILES[1]),
        L2PPipeline.from_pretrained(weights / L2P_FILES[0], device="cpu"),
        result,
        picture,
        count=captions,
        repeats=repeats,
        side=train_l2p.SIDE,
    )


@main.command("l2p-demo")
@_work
@_effort
@_compiled
@click.option("--ship/--no-ship", "shipping", default=True, help="Replace the shipped weights.")
@click.pass_context
def l2p_demo(
    context: click.Context, work: Path, effort: float, compiled: bool, shipping: bool
) -> None:
    """Everything of L2P: source, its pictures, conversion, shallow layers and scores."""
    work.mkdir(parents=True, exist_ok=True)
    context.invoke(l2p_source, work=work, effort=effort, compiled=compiled, resume=False)
    context.invoke(l2p_pictures, work=work, effort=effort)
    context.invoke(l2p_shallow, work=work, effort=effort)
    weights, result, sheet = work, work / "l2p_demo.json", work / "l2p-demo.png"
    if shipping:
        for name in L2P_FILES:
            shutil.copyfile(work / name, ASSETS / name)
        weights, result, sheet = ASSETS, ROOT / "results" / "l2p_demo.json", SHEET
    captions, repeats = _few(96, min(1.0, effort)), _few(5, min(1.0, effort))
    context.invoke(
        l2p_evaluate,
        weights=weights,
        result=result,
        picture=sheet,
        captions=captions,
        repeats=repeats,
    )


if __name__ == "__main__":
    main()
