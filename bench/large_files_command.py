"""`python -m bench files`: picture files larger than memory need be."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from pixeldiff.cli_errors import clean_errors
from pixeldiff.out_files import check_out_path

from . import show
from .options import comma, json_option, threads_option


def _case(word: str) -> tuple[str, int]:
    suffix, _, side = word.partition(":")
    if suffix not in ("png", "tif") or int(side) < 1:
        raise ValueError
    return f".{suffix}", int(side)


@click.command()
@click.option(
    "--case",
    "cases",
    multiple=True,
    default=("tif:38000,png:16896",),
    show_default=True,
    callback=comma(_case),
    help="png:SIDE or tif:SIDE",
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="for the files, which are removed; default: that of temporary files",
)
@threads_option
@json_option
@clean_errors
def files(
    cases: tuple[tuple[str, int], ...], folder: Path | None, threads: int | None, path: Path | None
) -> None:
    """Write pictures of noise row by row, read them back: what becomes resident.

    Wants the extras [tiff] and [png].
    """
    from .large_files import run, save

    if path is not None:
        check_out_path(path, ".json")
    command = "python -m bench " + shlex.join(sys.argv[1:])
    for report in run(cases, threads or 1, folder, command):
        last = report.files[-1]
        show.console.print(
            f"{last.suffix}, {last.side} x {last.side}: {last.file_bytes / 1e9:.2f} GB"
            f"{', a BigTIFF' if last.bigtiff else ''}; {last.above / 1e9:.3f} GB became resident; "
            f"{'the same pixels' if last.same else 'OTHER PIXELS'}"
        )
        if path is not None:
            save(report, path)
    if not all(written.same for written in report.files):
        raise ValueError("a file that was read back is not what was written")
