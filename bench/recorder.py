"""Collects rows and keeps the file of them on disk complete while the measuring goes on."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from pixeldiff.out_files import check_out_path

from . import schema
from .schema import Row


class Recorder:
    """Rows so far, in memory and, after every `add`, in `path`.

    Raises:
        ValueError, OSError: `path` cannot be written; found before anything is measured.
    """

    def __init__(self, path: Path | None, command: str | None = None) -> None:
        self.path = None if path is None else check_out_path(path, ".json")
        self.command = command or "python -m bench " + shlex.join(sys.argv[1:])
        self.rows: list[Row] = []

    def add(self, rows: list[Row]) -> None:
        self.rows += rows
        if self.path is not None:
            schema.save(self.path, self.rows, self.command)

    def record(self, measured: Iterator[list[Row]], show: Callable[[list[Row]], None]) -> bool:
        """Take everything that is measured; False if Ctrl-C or SIGTERM ended it early."""
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            for rows in measured:
                self.add(rows)
                show(rows)
        except KeyboardInterrupt:
            return False
        finally:
            signal.signal(signal.SIGTERM, before)
        return True


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
