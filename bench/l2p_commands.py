"""`python -m bench local-decoder` and `convert`: the memory of L2P at full size."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from pixeldiff.cli_errors import clean_errors
from pixeldiff.out_files import check_out_path

from . import show
from .machine import DTYPES
from .options import comma, json_option, threads_option


@click.command("local-decoder")
@click.option("--form", type=click.Choice(("1k", "4k", "8k", "10k")), default="8k")
@click.option("--size", "side", default=8192, show_default=True, help="pixels of a side")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    default=("fp32,bf16",),
    show_default=True,
    callback=comma(choices=tuple(DTYPES)),
)
@click.option("--memory", "budget", default=1_000_000_000, show_default=True, help="decoder_memory")
@click.option("--whole-size", "whole_side", default=1024, show_default=True, help="run whole too")
@click.option("--limit", type=click.IntRange(1), help="bytes: fail where more becomes resident")
@threads_option
@json_option
@clean_errors
def local_decoder(
    limit: int | None, threads: int | None, path: Path | None, **options: Any
) -> None:
    """What a tiled decode of L2P's local decoder keeps resident on a CPU, and its errors.

    Random weights of the released widths. Weights, image, features and result count.
    """
    from .local_decoder import Plan, run, save

    if path is not None:
        check_out_path(path, ".json")
    for report in run(Plan(**options, threads=threads or 1), _command()):
        found = report.runs[-1]
        show.console.print(
            f"{found.dtype}: {_gb(found.peak)} resident at the peak, of which weights "
            f"{_gb(found.weights)}, image {_gb(found.image)}, features {_gb(found.features)}, "
            f"result {_gb(found.result)}, beside them {_gb(found.beside)}; {found.seconds:.0f} s; "
            f"errors {found.seam_error:.1e} at a seam, {found.whole_error:.1e} beside the whole"
        )
        if path is not None:
            save(report, path)
    if limit is not None and (worst := max(r.peak for r in report.runs)) > limit:
        raise ValueError(f"{_gb(worst)} became resident, more than {_gb(limit)}")


@click.command()
@click.option("--resolution", "resolutions", multiple=True, default=("1024,4096",),
              show_default=True, callback=comma(int))  # fmt: skip
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), required=True,
              help="for the source (sparse) and, one at a time, the results (13 GB)")  # fmt: skip
@click.option("--shards", default=3, show_default=True, type=click.IntRange(1))
@click.option("--limit", default=6_000_000_000, show_default=True, help="bytes: fail beyond them")
@json_option
@clean_errors
def convert(limit: int, path: Path | None, **options: Any) -> None:
    """Peak memory, reading and writing of `pixeldiff l2p convert` at the size of Z-Image.

    The source has its names and shapes and hardly any content; it and the results are deleted.
    """
    from .convert import run
    from .local_decoder import save

    if path is not None:
        check_out_path(path, ".json")
    for report in run(**options, command=_command()):
        found = report.runs[-1]
        show.console.print(
            f"{found.resolution}: {_gb(found.peak)} resident at the peak "
            f"({_gb(found.peak - found.before)} above the imports), {_gb(found.read)} read, "
            f"{_gb(found.written)} written, {found.seconds:.0f} s"
        )
        if path is not None:
            save(report, path)
    if (worst := max(r.peak for r in report.runs)) > limit:
        raise ValueError(f"{_gb(worst)} became resident, more than {_gb(limit)}")


def _command() -> str:
    return "python -m bench " + shlex.join(sys.argv[1:])


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
