"""What an earlier run of the same command left in its file, for one that goes on with it; and what
happens where a kernel takes its process's device away."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from . import schema
from .schema import Machine, Row

# Exit statuses of a command that has more to do when it is run again: its time was up, or its
# process has lost the device.
TIME_UP, DEVICE_LOST = 75, 76
LOST = "the device was lost: "
HANG_SECONDS = 20.0  # for a first call: a Triton kernel takes a few to compile

# What must be the same of the machine, as for a choice of backends; drivers differ from one
# rented machine to the next.
SAME = ("device", "device_name", "capability", "commit", "torch", "triton")

Watch = Callable[[Row], contextlib.AbstractContextManager]


class DeviceLost(RuntimeError):
    """After an access out of bounds or its like nothing runs on the device in this process.

    `rows` say what did it; the next process leaves that out.
    """

    def __init__(self, rows: list[Row]) -> None:
        super().__init__(rows[0].reason)
        self.rows = rows


def unwatched(row: Row) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


class Watchdog:
    """Ends the process where a kernel never does: waiting for it, no signal reaches Python.

    Args:
        seconds: that a call may take.
        save: is given the row that says so.
    """

    def __init__(
        self,
        seconds: float,
        save: Callable[[list[Row]], None],
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self._seconds, self._save, self._end = seconds, save, end

    @contextlib.contextmanager
    def around(self, row: Row) -> Iterator[None]:
        """Around the first call of the implementation of this row."""
        timer = threading.Timer(self._seconds, self._late, (row,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _late(self, row: Row) -> None:
        reason = f"{LOST}its first call did not end in {self._seconds:g} s"
        self._save([replace(row, status="failed", reason=reason)])
        self._end(DEVICE_LOST)


def limit_reached(seconds: float) -> str:
    """The reason of a row that was left out for want of time."""
    return f"the time limit of {seconds:g} s was reached"


def guarded(
    measure: Callable[[], list[Row]], failed: Callable[[str], Row], device: torch.device
) -> list[Row]:
    """The rows of a case; of one that failed as a whole (memory, overflow) `failed(reason)` alone.

    Raises:
        DeviceLost: see there.
    """
    try:
        return measure()
    except DeviceLost:
        raise
    except (RuntimeError, MemoryError, ArithmeticError) as e:
        row = failed(reason(e))
        if _is_lost(device):
            raise DeviceLost([row]) from e
        return [row]


def check_not_lost(device: torch.device, row: Row) -> None:
    """After an implementation has failed, as its row says.

    Raises:
        DeviceLost: with this one.
    """
    if _is_lost(device):
        row.reason = f"{LOST}{row.reason}"[:300]
        raise DeviceLost([row])


def _is_lost(device: torch.device) -> bool:
    """Else what it held is free again."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def reason(e: BaseException) -> str:
    text = (str(e).strip() or type(e).__name__).splitlines()[0]
    return f"{type(e).__name__}: {text}"[:300]


def rows_before(path: Path, command: str, machine: Machine) -> list[Row]:
    """The rows of `path` that `command` would measure again just so; none if there is no file.

    Only those of a machine, versions and commit that are the `SAME`, and not those of what was left
    out.

    Raises:
        SchemaError: the file is no result.
    """
    if not path.exists():
        return []
    rows = schema.load(path)
    if json.loads(path.read_text())["command"] != command:
        return []
    return [
        row
        for row in rows
        if row.status != "skipped"
        and all(getattr(row.machine, name) == getattr(machine, name) for name in SAME)
    ]


def by_case(rows: Iterable[Row]) -> dict[Hashable, list[Row]]:
    """Rows of kernels or tiles, those of one case together."""
    found: dict[Hashable, list[Row]] = {}
    for row in rows:
        found.setdefault(case_of(row), []).append(row)
    return found


def case_of(row: Row) -> Hashable:
    return (row.kind, row.name, row.site, row.dtype, *sorted(row.shape.items()))


def losses(rows: Iterable[Row]) -> set[str]:
    """The implementations that a device was lost with."""
    return {row.backend for row in rows if (row.reason or "").startswith(LOST)}


def is_done(rows: list[Row]) -> bool:
    """Whether a case has all its rows, and not only those of losses."""
    return len(rows) > len(losses(rows))
