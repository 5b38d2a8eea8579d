"""`python -m bench`: kernels, decode, report. Described in bench/README.md."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from pixeldiff.cli import clean_errors
from pixeldiff.models.pid.decoder import check_device

from . import show
from .machine import DTYPES
from .recorder import Recorder


def comma(kind: Callable[[str], Any] = str, choices: tuple[str, ...] = ()) -> Callable:
    """A click callback: values given several times, with commas, or both, as one tuple."""

    def parse(_ctx, _param, value: tuple[str, ...]) -> tuple:
        words = [w.strip() for v in value for w in v.split(",") if w.strip()]
        for word in words:
            if choices and word not in choices:
                raise click.BadParameter(f"must be of {', '.join(choices)}, got {word!r}")
        try:
            return tuple(kind(w) for w in words)
        except ValueError:
            raise click.BadParameter(f"got {', '.join(words)}") from None

    return parse


def threads_option(f: Callable) -> Callable:
    return click.option(
        "--threads", type=click.IntRange(1), help="CPU threads of PyTorch and the CPU kernels"
    )(f)


def json_option(f: Callable) -> Callable:
    return click.option(
        "--json", "path", type=click.Path(path_type=Path), help="file to write, kept up to date"
    )(f)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measures pixeldiff against plain PyTorch and against this machine's own limits."""


@main.command()
@click.option("--op", "ops", multiple=True, callback=comma(), help="default: all")
@click.option("--device", help="cpu or cuda; default: cuda where there is one")
@click.option("--dtype", "dtypes", multiple=True, callback=comma(choices=tuple(DTYPES)))
@click.option("--backend", "backends", multiple=True, callback=comma(), help="default: all")
@click.option("--sizes", multiple=True, callback=comma(int), help="pixels of a side: 1024,2048")
@click.option("--scale", type=click.IntRange(1), help="divides the side; default 1, 4 on a CPU")
@click.option("--rounds", type=click.IntRange(3), help="samples of each implementation")
@click.option("--seconds", default=4.0, show_default=True, help="for the samples of one case")
@click.option("--limit", type=float, help="seconds for everything; the rest is skipped, and said")
@click.option("--quick", is_flag=True, help="1024 at side / 16, three rounds: only that it runs")
@click.option("--compile/--no-compile", "compiled", default=True, help="the compiled baseline")
@threads_option
@json_option
@clean_errors
def kernels(
    ops: tuple[str, ...],
    device: str | None,
    dtypes: tuple[str, ...],
    backends: tuple[str, ...],
    sizes: tuple[int, ...],
    scale: int | None,
    rounds: int | None,
    seconds: float,
    limit: float | None,
    quick: bool,
    compiled: bool,
    threads: int | None,
    path: Path | None,
) -> None:
    """Every op and backend against plain PyTorch, eager and compiled, at real shapes.

    Defaults on a GPU: bf16, 1024, 2048 and 4096. On a CPU: fp32 and bf16, 2048 with a quarter of
    the side (1024 tokens).
    """
    from .kernels import Plan, run

    where = check_device(device)
    cpu = where.type == "cpu"
    if threads:
        torch.set_num_threads(threads)
    plan = Plan(
        device=where,
        ops=ops,
        dtypes=dtypes or (("fp32", "bf16") if cpu and not quick else ("fp32",) if cpu else ("bf16",)),
        backends=backends,
        sizes=sizes or ((1024,) if quick else (2048,) if cpu else ()),
        scale=scale or (16 if quick else 4 if cpu else 1),
        rounds=rounds or (3 if quick else 9),
        seconds=seconds,
        limit=limit,
        compiled=compiled,
        matrix=256 if quick else None,
    )
    _finish(Recorder(path), run(plan), show.kernels)


def _finish(recorder: Recorder, measured, table: Callable) -> None:
    whole = recorder.record(measured, table)
    if recorder.path is not None:
        show.console.print(f"{recorder.path}: {len(recorder.rows)} rows", markup=False)
    if not whole:
        show.console.print("interrupted; the rows above are kept")
        sys.exit(130)


if __name__ == "__main__":
    main(prog_name="python -m bench")
