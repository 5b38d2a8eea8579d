"""Commands whose finished work is kept: `--resume`, and what an interruption says."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import torch

from .cli_options import err
from .errors import ResumeError
from .jobs import JobStore
from .jobs.store import PLACES

SUFFIX = ".job"

resume_option = click.option(
    "--resume",
    is_flag=True,
    help=f"keep finished work in OUTPUT{SUFFIX}, and go on with what is there",
)


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextlib.contextmanager
def kept_work(output: Path, resume: bool, *, always: bool = False) -> Iterator[JobStore | None]:
    """The store of a command that writes `output`; None where nothing is kept.

    Args:
        resume: take over what an interrupted run left; without it that is refused, since to compute
            it took time and whether to throw it away is not ours to decide.
        always: keep finished work without `resume` too.

    Raises:
        ResumeError: there is unfinished work and `resume` is False, or as `JobStore`.
    """
    folder = output.with_name(output.name + SUFFIX)
    if not resume and os.path.isdir(folder) and os.listdir(folder):
        raise ResumeError(
            f"{folder} holds unfinished work of an earlier run; pass --resume to go on with it, or "
            f"remove that folder to begin anew"
        )
    if not resume and not always:
        with _terminable():
            yield None
        return
    try:
        with _terminable(), JobStore(folder) as store:
            yield store
    except BaseException as e:
        if not os.path.isdir(folder) or isinstance(e, ResumeError):
            raise
        kept = f"finished work is kept in {folder}; the same command with --resume goes on"
        if isinstance(e, KeyboardInterrupt):
            err.print(f"interrupted; {kept}", markup=False)
            sys.exit(143 if isinstance(e, Terminated) else 130)
        err.print(f"note: {kept}", style="yellow", markup=False)
        raise


def is_finished(store: JobStore, index: int, path: Path) -> bool:
    """Whether picture `index` of the job is written and still as it was."""
    held = store.get(_picture(index))
    return held is not None and path.is_file() and torch.equal(held["sha256"], _sha256(path))


def finish(store: JobStore, index: int, path: Path) -> None:
    """Remember that picture `index` is written."""
    store.put(_picture(index), {"sha256": _sha256(path)})


@contextlib.contextmanager
def kept_picture(store: JobStore | None, index: int, resume: bool) -> Iterator[JobStore | None]:
    """The store of one picture's steps, within that of all; it goes when the block succeeds."""
    if store is None or not resume:
        yield None
        return
    with store.within(_picture(index)) as steps:
        yield steps
        steps.remove()


def _picture(index: int) -> str:
    return f"picture-{index:0{PLACES}d}"


def _sha256(path: Path) -> torch.Tensor:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            sha.update(data)
    return torch.frombuffer(bytearray(sha.digest()), dtype=torch.uint8)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
