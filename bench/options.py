"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


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


def resume_option(f: Callable) -> Callable:
    return click.option(
        "--resume", is_flag=True, help="go on with --json; exit status 75 if time was short"
    )(f)
