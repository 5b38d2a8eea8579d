"""`pixeldiff l2p`: convert a latent model to pixels, and merge what training changed."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from .cli_errors import clean_errors
from .cli_l2p_train import train
from .cli_options import err


@click.group()
def l2p() -> None:
    """Make L2P pixel networks from latent ones, and train them."""


@l2p.command()
@click.option("--source", required=True, type=click.Path(path_type=Path), help="Z-Image, or L2P")
@click.option("--resolution", type=int, required=True, help="1024, 4096, 8192 or 10240")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help=".safetensors")
@click.option("--seed", default=42, show_default=True, help="of the new layers")
@click.option(
    "--decoder-width",
    default=1.0,
    show_default=True,
    help="channels of the local decoder in the released ones, for a narrower trunk",
)
@click.option("--report", type=click.Path(path_type=Path), help="JSON file to write")
@click.option("--force", is_flag=True, help="replace OUTPUT if it exists")
@click.option("--quiet", is_flag=True, help="no progress bar")
@clean_errors
def convert(
    source: Path,
    resolution: int,
    output: Path,
    seed: int,
    decoder_width: float,
    report: Path | None,
    force: bool,
    quiet: bool,
) -> None:
    """Start a pixel network for images of RESOLUTION from a latent diffusion transformer.

    The source is a .safetensors file, an index of shards, a directory with them, or a diffusers
    pipeline. An interrupted conversion goes on when the same command is run again.
    """
    from .models.l2p.conversion import convert as run

    with _shown(report, quiet) as (progress, finish):
        finish(
            run(source, output, resolution, seed=seed, decoder_width=decoder_width,
                overwrite=force, progress=progress)
        )  # fmt: skip


@l2p.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("delta", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help=".safetensors")
@click.option("--ignore-misfits", is_flag=True, help="leave out tensors that BASE has no place for")
@click.option("--report", type=click.Path(path_type=Path), help="JSON file to write")
@click.option("--force", is_flag=True, help="replace OUTPUT if it exists")
@click.option("--quiet", is_flag=True, help="no progress bar")
@clean_errors
def merge(
    base: Path,
    delta: Path,
    output: Path,
    ignore_misfits: bool,
    report: Path | None,
    force: bool,
    quiet: bool,
) -> None:
    """Write BASE with the trained tensors of DELTA in place of its own."""
    from .models.l2p.merging import merge as run

    with _shown(report, quiet) as (progress, finish):
        finish(
            run(base, delta, output, ignore_misfits=ignore_misfits, overwrite=force,
                progress=progress)
        )  # fmt: skip


@contextlib.contextmanager
def _shown(report: Path | None, quiet: bool) -> Iterator[tuple[Callable, Callable]]:
    """(progress callback, what to call with the report); an interruption says how to go on."""
    from rich.progress import DownloadColumn, Progress, TimeElapsedColumn, TransferSpeedColumn

    from .out_files import check_out_path, written_whole

    if report is not None:
        check_out_path(report, ".json")
    columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=err,
        disable=quiet or not err.is_terminal,
        transient=True,
    ) as bar:
        tasks: dict[str, int] = {}

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done)

        def finish(result) -> None:
            bar.stop()
            click.echo(str(result))
            if report is not None:
                with written_whole([report]) as (partial,):
                    partial.write_text(json.dumps(result.to_dict(), indent=2) + "\n")

        try:
            yield progress, finish
        except KeyboardInterrupt:
            bar.stop()
            err.print("interrupted; run the same command again to go on from here")
            sys.exit(130)


l2p.add_command(train)
