"""`python -m bench huge`: a decode to a file, killed and continued."""

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
@click.option("--size", "side", default=16896, show_default=True, help="pixels of a side")
@click.option("--tile", callback=parsed_tile, default="16x16", help="HEIGHTxWIDTH in latent cells")
@click.option(
    "--kill",
    "kills",
    multiple=True,
    default=("0.4",),
    show_default=True,
    callback=comma(float),
    help="shares of the tiles after which it is killed",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="a .tif")
@threads_option
@json_option
@clean_errors
def huge(
    side: int,
    tile: str | tuple[int, int],
    kills: tuple[float, ...],
    output: Path,
    threads: int | None,
    path: Path | None,
) -> None:
    """Decode the demo's scene to a file as large as it likes, killed on the way: its memory.

    Wants the extra [train], which draws the scene, and [tiff]. Interrupted, it goes on when it is
    called again.
    """
    from .huge import Plan, run, save

    check_out_path(output, ".tif")
    if path is not None:
        check_out_path(path, ".json")
    if side % 32 or side < 32:
        raise click.UsageError(f"--size must be a multiple of 32, got {side}")
    if isinstance(tile, str):
        raise click.UsageError(f"--tile must be HEIGHTxWIDTH, got {tile}")
    plan = Plan(side, tile, kills, threads or 1)
    for report in run(plan, output.absolute(), "python -m bench " + shlex.join(sys.argv[1:])):
        if path is not None:
            save(report, path)
        if report.likeness is None:
            last = report.processes[-1]
            show.console.print(
                f"{'killed' if last.killed else 'ended'} after {last.seconds:.0f} s with "
                f"{last.kept - last.found} parts more; {last.above / 1e9:.2f} GB became resident"
            )
    show.console.print(
        f"{output}: {report.file_bytes / 1e9:.2f} GB; the drawn scene in each of "
        f"{report.likeness.squares} squares at {report.likeness.least:.1f} dB or more, half of "
        f"them at {report.likeness.median:.1f} or more",
        markup=False,
    )
