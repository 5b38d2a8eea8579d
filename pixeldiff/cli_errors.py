"""How commands end: one message and an exit code for what a user can cause, no traceback."""

from __future__ import annotations

import errno
import functools
import sys
import warnings
from collections.abc import Callable

import click
from rich.console import Console

from .out_of_memory import is_out_of_memory

_err = Console(stderr=True, highlight=False, soft_wrap=True)

_USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    RuntimeError,
    ArithmeticError,
    MemoryError,
)


def clean_errors(f: Callable) -> Callable:
    """What a user can cause becomes one message on stderr and exit code 1, without a traceback.

    Warnings become notes on stderr, an interruption exit code 130.
    """

    @functools.wraps(f)
    def run(*args, **kwargs):
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return f(*args, **kwargs)
        except (click.exceptions.Exit, click.Abort):  # RuntimeErrors that are click's own business
            raise
        except _USER_ERRORS as e:
            if getattr(e, "errno", None) == errno.EPIPE:  # the reader of a pipe left: click's too
                raise
            message = _OUT_OF_MEMORY if is_out_of_memory(e) else str(e) or type(e).__name__
            _err.print(f"error: {message}", style="red", markup=False)
            sys.exit(1)
        except KeyboardInterrupt:
            _err.print("interrupted; nothing was written")
            sys.exit(130)

    return run


_OUT_OF_MEMORY = "out of memory; decode a smaller size, or with --precision bf16"


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    if issubclass(category, UserWarning):
        _err.print(f"note: {message}", style="yellow", markup=False)
