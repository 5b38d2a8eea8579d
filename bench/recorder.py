"""Collects rows and keeps the file of them on disk complete while the measuring goes on."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from pixeldiff.out_files import check_out_path

from . import schema
from .resume import rows_before
from .schema import Machine, Row


class Recorder:
    """Rows so far, in memory and, after every `add`, in `path`.

    Args:
        path: of the file, or None for none.
        command: as written there; default: this process's.

    Raises:
        ValueError, OSError: `path` cannot be written; found before anything is measured.
    """

    def __init__(self, path: Path | None, command: str | None = None) -> None:
        self.path = None if path is None else check_out_path(path, ".json")
        self.command = command or "python -m bench " + shlex.join(sys.argv[1:])
        self.rows: list[Row] = []

    def resume(self, machine: Machine) -> list[Row]:
        """The rows that this command left in `path` before, on a machine just like it; they stay.

        Raises:
            ValueError: there is no `path`, or its file is no result.
        """
        if self.path is None:
            raise ValueError("--resume goes on with the file that --json names; name one")
        self.rows = rows_before(self.path, self.command, machine)
        return list(self.rows)

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
