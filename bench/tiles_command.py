"""`python -m bench tiles`: the demo's decode in tiles."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from pixeldiff.cli_errors import clean_errors
from pixeldiff.cli_options import parsed_tile
from pixeldiff.out_files import check_out_path

from . import show
from .options import comma, json_option, threads_option


@click.command()
@click.option("--size", "side", default=4096, show_default=True, help="pixels of a side")
@click.option(
    "--mode",
    "modes",
    multiple=True,
    default=("sync,independent",),
    show_default=True,
    callback=comma(choices=("sync", "independent", "file", "whole")),
)
@click.option("--tile", callback=parsed_tile, default="auto", help="HEIGHTxWIDTH in latent cells")
@click.option("--limit", type=click.IntRange(1), help="bytes: fail where more becomes resident")
@threads_option
@json_option
@clean_errors
def tiles(
    side: int,
    modes: tuple[str, ...],
    tile: str | tuple[int, int],
    limit: int | None,
    threads: int | None,
    path: Path | None,
) -> None:
    """What the demo's decode in tiles keeps resident above its weights, and its time."""
    from .tiles import Plan, run, save

    if path is not None:
        check_out_path(path, ".json")
    command = "python -m bench " + shlex.join(sys.argv[1:])
    for report in run(Plan(side, modes, threads or 1, tile), command):
        found = report.runs[-1]
        show.console.print(
            f"{found.mode}, {side} x {side}: {found.above / 1e9:.2f} GB resident above "
            f"{found.before / 1e9:.2f} GB with the weights; {found.seconds:.0f} s"
        )
        if path is not None:
            save(report, path)
    if limit is not None and (worst := max(r.above for r in report.runs)) > limit:
        raise ValueError(f"{worst / 1e9:.2f} GB became resident, more than {limit / 1e9:.2f} GB")
