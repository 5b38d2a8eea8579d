"""`python -m bench kill`: commands killed by SIGKILL and continued."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from pixeldiff.cli_errors import clean_errors
from pixeldiff.out_files import check_out_path

from . import show
from .options import json_option


@click.command()
@click.option("--times", type=click.IntRange(1), default=20, show_default=True)
@click.option("--seed", default=0, show_default=True, help="of the moments")
@json_option
@clean_errors
def kill(times: int, seed: int, path: Path | None) -> None:
    """Kill decodes and pictures of the demo at random moments, continue them, compare the bytes."""
    from .kill import Trial, run, save

    if path is not None:
        check_out_path(path, ".json")

    def told(trial: Trial) -> None:
        kills = ", ".join(
            f"{after:.2f} s ({kept} parts kept)"
            for after, kept in zip(trial.after, trial.kept, strict=True)
        )
        show.console.print(
            f"{trial.command}: killed after {kills or 'its end'}: "
            f"{'the same bytes' if trial.same else 'OTHER BYTES'}"
            f"{'' if trial.clean else ', FILES LEFT'}"
        )

    report = run(times, seed, "python -m bench " + shlex.join(sys.argv[1:]), told)
    if path is not None:
        save(report, path)
    bad = sum(not (t.same and t.clean) for t in report.trials)
    if bad:
        raise ValueError(f"{bad} of {times} ended otherwise than an uninterrupted run")
