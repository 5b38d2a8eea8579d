"""`pixeldiff`: decode latents, generate pictures, show this machine, bake captions, verify goldens.

Exit codes: 0 done; 1 it failed or a verification missed; 2 wrong usage, or a file that `verify`
does not understand (even if others missed); 130 interrupted.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from rich.console import Console

from . import __version__
from .cli_errors import clean_errors
from .cli_l2p import l2p

_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pixeldiff")
def main() -> None:
    """Kernels for pixel-space diffusion, the PiD latent decoder, and L2P pictures from text."""


def _size(_ctx, _param, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    try:
        height, width = (int(v) for v in value.lower().split("x"))
    except ValueError:
        raise click.BadParameter(f"must be HEIGHTxWIDTH, like 1024x768, got {value!r}") from None
    return height, width


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="PNG to write")
@click.option("--model", default="demo", show_default=True, help="checkpoint, hub id, or demo")
@click.option("--backbone", help="generator of the latent, where the checkpoint fits several")
@click.option("--caption", help="text; loads the model's text encoder")
@click.option("--caption-file", type=click.Path(path_type=Path), help="embeddings of bake-caption")
@click.option("--text-encoder", help="folder or hub id of the Gemma-2 used for texts")
@click.option("--sigma", default=0.0, show_default=True, help="noise level of the latent, 0..1")
@click.option("--steps", type=int, help="network calls; 1..4 for distilled models")
@click.option("--cfg-scale", type=float, help="guidance of undistilled models; 1 is none")
@click.option("--negative-caption", help="text, for guidance")
@click.option(
    "--negative-caption-file", type=click.Path(path_type=Path), help="embeddings, for guidance"
)
@click.option("--seed", default=0, show_default=True)
@click.option("--size", callback=_size, help="HEIGHTxWIDTH; default: the latent's size, scaled")
@click.option("--device", help="cuda, cpu, ...; default: cuda where there is one")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp8"]),
    help="default: bf16 on CUDA; fp8: e4m3 products, capability 8.9 (docs/precision.md)",
)
@click.option("--low-memory", is_flag=True, help="half the activations, about 1% slower")
@click.option("--quiet", is_flag=True, help="no progress bar")
@clean_errors
def decode(
    source: Path,
    output: Path,
    model: str,
    backbone: str | None,
    caption: str | None,
    caption_file: Path | None,
    text_encoder: str | None,
    sigma: float,
    steps: int | None,
    cfg_scale: float | None,
    negative_caption: str | None,
    negative_caption_file: Path | None,
    seed: int,
    size: tuple[int, int] | None,
    device: str | None,
    precision: str | None,
    low_memory: bool,
    quiet: bool,
) -> None:
    """Decode SOURCE to a PNG.

    SOURCE is a .safetensors file with one latent tensor (B, C, h, w) or (C, h, w), normalised as
    the generator's diffusion model sees it; or, with the demo model, a picture, which is encoded
    first. Several latents are written to OUTPUT with -0, -1, ... before the suffix.
    """
    from .images import check_png_path, save_pngs
    from .models.pid.decoder import PiDDecoder
    from .sources import latent_from

    text = _caption_option("--caption", caption, caption_file)
    negative = _caption_option("--negative-caption", negative_caption, negative_caption_file)
    check_png_path(output)
    latent = latent_from(source, encoder="demo" if model == "demo" else None)
    paths = _output_paths(output, latent.shape[0])
    for path in paths:
        check_png_path(path)
    decoder = PiDDecoder.from_pretrained(
        model,
        backbone=backbone,
        device=device,
        precision=precision,
        text_encoder=text_encoder,
        low_memory=low_memory,
    )
    with progress_bar(quiet) as callback:
        result = decoder.decode(
            latent,
            caption=text,
            sigma=sigma,
            steps=steps,
            cfg_scale=cfg_scale,
            negative_caption=negative,
            seed=seed,
            size=size,
            callback=callback,
        )
    metadata = [result.metadata]
    if len(paths) > 1:
        metadata = [{**result.metadata, "batch_index": i} for i in range(len(paths))]
    for path in save_pngs(list(zip(paths, result.images, metadata, strict=True))):
        _out.print(str(path), markup=False)


@main.command()
@click.argument("prompt", required=False)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="PNG to write")
@click.option("--model", required=True, help="L2P checkpoint, hub id, or demo")
@click.option("--prompt-embeds", type=click.Path(path_type=Path), help="embeddings, for PROMPT")
@click.option("--negative-prompt", help='text, for guidance; "" where PROMPT is given')
@click.option(
    "--negative-prompt-embeds", type=click.Path(path_type=Path), help="embeddings, for guidance"
)
@click.option("--text-encoder", help="folder or hub id of the Qwen3 for texts, or demo")
@click.option("--size", callback=_size, help="HEIGHTxWIDTH; default: the picture's, or the model's")
@click.option("--steps", type=int, help="network calls; default: the model's")
@click.option("--guidance", type=float, help="1 is none; default: the model's")
@click.option("--shift", type=float, help="of the schedule; default: 3")
@click.option("--image", type=click.Path(path_type=Path), help="picture to start from")
@click.option("--strength", default=0.6, show_default=True, help="how much of it to give up, 0..1")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", help="cuda, cpu, ...; default: cuda where there is one")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="default: bf16 on CUDA")
@click.option("--quiet", is_flag=True, help="no progress bar")
@clean_errors
def generate(
    prompt: str | None,
    output: Path,
    model: str,
    prompt_embeds: Path | None,
    negative_prompt: str | None,
    negative_prompt_embeds: Path | None,
    text_encoder: str | None,
    size: tuple[int, int] | None,
    steps: int | None,
    guidance: float | None,
    shift: float | None,
    image: Path | None,
    strength: float,
    seed: int,
    device: str | None,
    precision: str | None,
    quiet: bool,
) -> None:
    """Make a picture of PROMPT with an L2P model.

    With --image the picture is the start, resized to --size where that is given.

    The demo model draws one shape (circle, square, triangle, star, ring, cross, diamond, heart),
    small or large, on a plain, striped, checkered or dotted background, each of them red, orange,
    yellow, green, blue, purple, pink, white or black: "a red circle on a blue striped background".
    Other words are no error, but mean nothing to it.
    """
    from .images import check_png_path, save_png
    from .models.l2p import L2PPipeline

    if (prompt is None) == (prompt_embeds is None):
        raise click.UsageError("give either PROMPT or --prompt-embeds")
    given = _caption_option("PROMPT", prompt, prompt_embeds)
    negative = _caption_option("--negative-prompt", negative_prompt, negative_prompt_embeds)
    check_png_path(output)
    picture = None if image is None else _picture(image, size)
    pipeline = L2PPipeline.from_pretrained(
        model, device=device, precision=precision, text_encoder=text_encoder
    )
    height, width = size or (None, None)
    with progress_bar(quiet, "generating") as callback:
        result = pipeline(
            prompt,
            negative_prompt,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            seed=seed,
            prompt_embeds=given if prompt is None else None,
            negative_prompt_embeds=negative if negative_prompt is None else None,
            image=picture,
            strength=strength,
            shift=shift,
            callback=callback,
        )
    if len(result.images) > 1:
        raise ValueError(f"{prompt_embeds} must hold one prompt, got {len(result.images)}")
    _out.print(str(save_png(output, result.images[0], result.metadata)), markup=False)


def _picture(path: Path, size: tuple[int, int] | None):
    from PIL import Image

    from .images import to_rgb

    with Image.open(path) as opened:
        picture = to_rgb(opened)
    if size is None or picture.size == size[::-1]:
        return picture
    return picture.resize(size[::-1], Image.Resampling.LANCZOS)


def _caption_option(name: str, text: str | None, file: Path | None):
    from .text import load_caption

    if text is not None and file is not None:
        raise click.UsageError(f"{name} and {name}-file exclude each other")
    return text if file is None else load_caption(file)


def _output_paths(output: Path, count: int) -> list[Path]:
    if count == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{i}") for i in range(count)]


@contextlib.contextmanager
def progress_bar(quiet: bool, what: str = "decoding") -> Iterator[Callable]:
    """A callback that shows a progress bar on stderr while the block runs."""
    from rich.progress import Progress, TimeElapsedColumn

    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(
        *columns, console=_err, disable=quiet or not _err.is_terminal, transient=True
    ) as bar:
        task = bar.add_task(what, total=None)

        def callback(info) -> None:
            bar.update(task, completed=info.step, total=info.steps)

        yield callback


@main.command()
@clean_errors
def info() -> None:
    """Show versions, devices, the native build, and which backend runs each op here, and why."""
    from .info import render

    render(_out)


@main.command("bake-caption")
@click.argument("text", nargs=-1)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help=".safetensors")
@click.option(
    "--encoder",
    default="google/gemma-2-2b-it",
    show_default=True,
    help="folder or hub id of a Gemma-2, or demo",
)
@click.option("--prefix-file", type=click.Path(path_type=Path), help="instruction prefix as text")
@click.option("--device", default="cpu", show_default=True)
@clean_errors
def bake_caption(
    text: tuple[str, ...], output: Path, encoder: str, prefix_file: Path | None, device: str
) -> None:
    """Write the embeddings of TEXT... (none: of the empty caption) to a file.

    With that file a picture is decoded without any text encoder: decode --caption-file.
    """
    from . import text as captions
    from .models.devices import check_device
    from .out_files import check_out_path

    check_out_path(output, ".safetensors")
    if encoder == "demo":
        from .text.tiny import TinyTextEmbedder

        source = TinyTextEmbedder()
    else:
        prefix = captions.instruction_prefix(prefix_file)
        source = captions.GemmaCaptionEncoder.from_pretrained(
            encoder, device=check_device(device), prefix=prefix
        )
    result = captions.bake_caption(output, list(text) or None, source)
    _out.print(f"{output}: {tuple(result.embedding.shape)}", markup=False)


@l2p.command()
@click.option("--model", required=True, help="L2P checkpoint to train: what convert wrote")
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="folder: NAME.png with NAME.safetensors (embedding) or NAME.txt (caption)",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="run's folder")
@click.option("--resume", is_flag=True, help="go on from the newest checkpoint in the folder")
@click.option("--steps", default=20_000, show_default=True, type=click.IntRange(1))
@click.option("--size", callback=_size, help="HEIGHTxWIDTH; default: the model's own size")
@click.option("--trainable", type=click.Choice(["default", "strict"]), default="default")
@click.option(
    "--blocks",
    type=click.IntRange(0),
    help="main blocks that learn at either end; default: 5, strict 4",
)
@click.option("--shift", type=float, help="of the noise schedule; default: 3, from 4K on 5")
@click.option("--noise-levels", type=click.Choice(["uniform", "noisy"]), default="uniform")
@click.option("--batch", default=1, show_default=True, help="examples at once, per process")
@click.option("--accumulate", default=1, show_default=True, help="batches to a step")
@click.option("--lr", default=5e-5, show_default=True)
@click.option("--weight-decay", default=0.01, show_default=True)
@click.option("--clip", type=float, help="largest gradient norm; default: no limit")
@click.option("--no-recompute", is_flag=True, help="keep all activations: faster, far more memory")
@click.option("--save-every", default=500, show_default=True, type=click.IntRange(0))
@click.option("--keep", default=2, show_default=True, type=click.IntRange(1), help="checkpoints")
@click.option("--sample-every", default=0, type=click.IntRange(0), help="0: no sample pictures")
@click.option("--samples", default=1, show_default=True, help="pictures, of the first captions")
@click.option("--sample-steps", default=30, show_default=True, type=click.IntRange(1))
@click.option("--text-encoder", help="folder or hub id of the Qwen3 for texts, or demo")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", help="cuda, cpu, ...; default: cuda where there is one")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="default: bf16 on CUDA")
@click.option("--quiet", is_flag=True, help="no progress bar")
@clean_errors
def train(
    model: str,
    data: Path,
    output: Path,
    resume: bool,
    steps: int,
    size: tuple[int, int] | None,
    trainable: str,
    blocks: int | None,
    shift: float | None,
    noise_levels: str,
    batch: int,
    accumulate: int,
    lr: float,
    weight_decay: float,
    clip: float | None,
    no_recompute: bool,
    save_every: int,
    keep: int,
    sample_every: int,
    samples: int,
    sample_steps: int,
    text_encoder: str | None,
    seed: int,
    device: str | None,
    precision: str | None,
    quiet: bool,
) -> None:
    """Train the shallow layers of an L2P model on pictures its source model made.

    Pictures are resized, bilinear, to cover the size, and cut to it about their middle. The folder
    gets checkpoints of the tensors that learn (delta.safetensors, for l2p merge), log.jsonl and
    sample pictures. Ctrl-C or SIGTERM end the run with a checkpoint and exit code 130.
    """
    import dataclasses

    from .models.l2p import read_checkpoint
    from .models.l2p.sizes import check_size
    from .models.l2p.train_data import PictureFolder, pictures_of
    from .models.l2p.train_loop import (
        Schedule,
        Trainer,
        TrainSettings,
        check_checkpoints_fit,
        prepare_folder,
    )
    from .models.l2p.train_processes import Processes
    from .models.l2p.training import TRAINABLE_SETS, NoiseLevels, default_shift

    processes = Processes(device)
    prepare_folder(output, resume=resume)
    checkpoint = read_checkpoint(model, dtype=None)
    config = checkpoint.config
    if size is None and checkpoint.variant is None:
        raise click.UsageError("the model was never released and has no size of its own: --size")
    size = size or (checkpoint.variant.native_size,) * 2
    chosen = TRAINABLE_SETS[trainable]
    if blocks is not None:
        chosen = dataclasses.replace(chosen, first=blocks, last=blocks)
    shift = default_shift(config) if shift is None else shift
    settings = TrainSettings(
        size=size,
        trainable=chosen,
        levels=NoiseLevels(shift, noise_levels),
        batch=batch,
        accumulate=accumulate,
        lr=lr,
        weight_decay=weight_decay,
        clip=clip,
        precision=precision or ("bf16" if processes.device.type == "cuda" else "fp32"),
        recompute=not no_recompute,
        seed=seed,
    )
    check_size(config, size)

    def encoder():
        from .models.l2p.prompts import DEMO
        from .text import Qwen3PromptEncoder
        from .text.tiny import TinyPromptEncoder

        if text_encoder == DEMO:
            return TinyPromptEncoder(config.cap_feat_dim)
        return Qwen3PromptEncoder.from_pretrained(
            text_encoder, device=processes.device, embed_dim=config.cap_feat_dim
        )

    if not processes.first:  # the first one encodes the texts for all
        processes.wait()
    pictures = pictures_of(
        data,
        config,
        encoder=encoder if text_encoder else None,
        encoded=output / "embeddings",
    )
    if processes.first:
        processes.wait()
    trainer = Trainer(checkpoint, PictureFolder(pictures, size), settings, output, processes)
    del checkpoint
    plan = Schedule(steps, save_every, sample_every, keep, samples, sample_steps)
    check_checkpoints_fit(trainer, plan)
    if resume:
        trainer.resume()
    learning = sum(p.numel() for p in trainer.learning.values())
    if processes.first:
        _err.print(
            f"{len(pictures)} pictures; {learning / 1e6:,.1f} M parameters learn; shift {shift:g} "
            f"(sample with the same); from step {trainer.steps_done} to {steps}",
            markup=False,
        )
    try:
        with progress_bar(quiet or not processes.first, "training") as callback:
            complete = trainer.run(plan, callback)
    except KeyboardInterrupt:  # the second one: the first ends the run with a checkpoint
        _err.print("interrupted; the last checkpoint stays: go on with --resume")
        sys.exit(130)
    if processes.first:
        _out.print(str(output / f"step-{trainer.steps_done:08d}"), markup=False)
    if not complete:
        _err.print(f"stopped after step {trainer.steps_done}; go on with --resume")
        sys.exit(130)


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--all", "show_all", is_flag=True, help="print every tensor, not only the outputs")
@clean_errors
def verify(files: tuple[Path, ...], show_all: bool) -> None:
    """Run golden FILES through the installed package and print each tensor's error.

    Exits 0 if every tensor is within its tolerance; 2 if a file is not understood, whatever the
    others gave; else 1 if an error exceeds its tolerance or a file cannot be run to its end.
    """
    from .verify import NotUnderstood, verify_file

    missed, failed, unknown = 0, 0, 0
    for path in files:
        try:
            report = verify_file(path)
        except NotUnderstood as e:
            _err.print(f"{path}: {e}", style="yellow", markup=False)
            unknown += 1
        except Exception as e:  # the other files still count
            reason = f"{type(e).__name__}: {e}"
            _err.print(f"{path}: cannot be run: {reason}", style="red", markup=False)
            failed += 1
        else:
            missed += _print_report(report, show_all)
    parts = [
        f"{len(files) - unknown - failed} files run",
        f"{missed} tensors missed",
        f"{unknown} files not understood",
    ]
    if failed:
        parts.append(f"{failed} files failed")
    _out.print(", ".join(parts))
    sys.exit(2 if unknown else 1 if missed or failed else 0)


def _print_report(report, show_all: bool) -> int:
    """Prints the table of one file and returns how many of its tensors missed."""
    from rich.table import Table
    from rich.text import Text

    rows = [r for r in report.rows if show_all or not r.ok or r.key.startswith("out.")]
    table = Table("tensor", "error", "tolerance", "", title=Text(report.name), title_justify="left")
    for r in rows:
        style = None if r.ok else "red"
        bound = f"{r.tolerance:.1e}" + ("" if r.unit == "abs" else f" {r.unit}")
        table.add_row(Text(r.key), f"{r.error:.1e}", bound, "ok" if r.ok else "MISS", style=style)
    _out.print(table, markup=False)
    missed = sum(not r.ok for r in report.rows)
    _out.print(
        f"{report.name}: {len(report.rows) - missed} of {len(report.rows)} tensors ok\n",
        markup=False,
    )
    return missed


main.add_command(l2p)

if __name__ == "__main__":
    main()
