"""`python -m bench memory`: estimates of memory beside measured peaks."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path

import click

from pixeldiff.cli_errors import clean_errors
from pixeldiff.out_files import check_out_path

from . import show
from .options import json_option, threads_option


@click.command()
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option("--kept", is_flag=True, help="with freed memory kept, as glibc does by itself")
@click.option("--only", default="", help="cases whose name holds this")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="of each case")
@threads_option
@json_option
@clean_errors
def memory(
    device: str, kept: bool, only: str, runs: int, threads: int | None, path: Path | None
) -> None:
    """Measure the peak memory of a grid of decodes and images, and compare the estimates."""
    from .memory_cases import OVER, UNDER, grid, run, save

    if runs % 2 == 0:
        raise click.UsageError(f"--runs must be odd, for a median that was measured, got {runs}")
    if path is not None:
        check_out_path(path, ".json")
    every = (dataclasses.replace(c, device=device, returned=not kept) for c in grid(threads or 1))
    cases = [case for case in every if only in case.name]
    if not cases:
        raise click.UsageError(f"--only {only!r} leaves no case")
    for report in run(cases, "python -m bench " + shlex.join(sys.argv[1:]), runs):
        found = report.runs[-1]
        show.console.print(
            f"{found.case:70} peak {found.peak / 1e6:7.1f} MB, estimated "
            f"{found.estimate['peak'] / 1e6:7.1f} MB ({found.off:+.1%})",
            highlight=False,
        )
        if path is not None:
            save(report, path)
    show.console.print(f"chosen by: {report.chosen_by}; held out: {report.held_out}")
    misses = [r.case for r in report.runs if not UNDER <= r.off <= OVER]
    if misses:
        raise ValueError(f"estimates off by more than {UNDER:.0%} or {OVER:+.0%}: {misses}")


@click.command()
@click.option("-o", "--output", "path", required=True, type=click.Path(path_type=Path))
@clean_errors
def plans(path: Path) -> None:
    """Rewrite the tables of docs/memory.md: what `pixeldiff plan` chooses for several budgets."""
    from .plans import rewrite

    rewrite(path)
    show.console.print(str(path))
