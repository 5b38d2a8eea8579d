"""`pixeldiff l2p train`: an L2P model learns from a folder of pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .cli_errors import clean_errors
from .cli_options import err, out, parsed_size, progress_bar


@click.command()
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
@click.option("--size", callback=parsed_size, help="HEIGHTxWIDTH; default: the model's own size")
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
@click.option("--average", type=float, help="keep a running average of the weights, such as 0.999")
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
    average: float | None,
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
        average=average,
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
        err.print(
            f"{len(pictures)} pictures; {learning / 1e6:,.1f} M parameters learn; shift {shift:g} "
            f"(sample with the same); from step {trainer.steps_done} to {steps}",
            markup=False,
        )
    try:
        with progress_bar(quiet or not processes.first, "training") as callback:
            complete = trainer.run(plan, callback)
    except KeyboardInterrupt:  # the second one: the first ends the run with a checkpoint
        err.print("interrupted; the last checkpoint stays: go on with --resume")
        sys.exit(130)
    if processes.first:
        out.print(str(output / f"step-{trainer.steps_done:08d}"), markup=False)
    if not complete:
        err.print(f"stopped after step {trainer.steps_done}; go on with --resume")
        sys.exit(130)
