"""A folder with the finished parts of a job.

    job.json        what the job is, with a checksum
    NAME.piece      a finished part, see `pieces`
    .HEX.part       a file being written when the process ended; removed by the next run
    NAME/           the folder of a job within the job

Every file appears whole, by a rename behind an fsync. A part that is damaged, or of another job, is
as good as absent: it is made again.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import ResumeError
from ..out_files import sync_folder, written_whole
from .identity import canonical, differences, weights_digest
from .pieces import read_piece, write_piece

JOB, PIECE, PARTIAL = "job.json", ".piece", ".part"
PLACES = 6  # digits of numbers in names, so that names sort as numbers do


class JobStore:
    """The kept work of one job; a context manager.

        with JobStore("out.png.job") as store:
            result = decoder.decode(latent, tile="auto", resume=store)
            save_picture("out.png", result.images[0], result.metadata)

    Entered, it makes the folder or takes over what an interrupted run left in it. Left without an
    exception, it removes the folder: the work is done. Left by one, it keeps what is finished; a
    folder in which nothing is finished goes.

    Args:
        folder: in a directory that exists.

    Raises:
        ResumeError: (entered) the folder holds other things, or another process works on it.
        OSError: it cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder)
        self.found = 0  # parts that were there
        self.made = 0  # parts that were made, and kept
        self._job: str | None = None
        self._weights: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._open = contextlib.ExitStack()

    def __enter__(self) -> JobStore:
        try:
            self.path.mkdir(exist_ok=True)
        except FileExistsError:
            raise ResumeError(f"resume: {self.path} must be a folder, it is a file") from None
        self._open.enter_context(_only_one(self.path))
        try:
            self._refuse_other_contents()
            for stale in self.path.glob(f".*{PARTIAL}"):
                stale.unlink()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None or not self.begun:
                self.remove()
        finally:
            self._open.close()

    @property
    def begun(self) -> bool:
        """Whether something finished is in the folder."""
        return any(p.suffix == PIECE or p.is_dir() for p in self.path.glob("*"))

    def stated(self) -> dict[str, Any]:
        """What the folder says its job is; empty where it says nothing intact."""
        try:
            text = json.loads((self.path / JOB).read_text(encoding="utf-8"))
            job = text["job"]
            return job if text["sha256"] == _sha256(job) else {}
        except (OSError, ValueError, LookupError, TypeError):
            return {}

    def seed(self, given: int | None) -> int | None:
        """`given`, or where that is None the seed that the folder's job began with, if any."""
        stated = self.stated().get("seed")
        return stated if given is None and isinstance(stated, int) else given

    def weights(self, net: nn.Module) -> str:
        """Digest of a network's weights, which must not change as long as the store is open."""
        if net not in self._weights:
            self._weights[net] = weights_digest(net)
        return self._weights[net]

    def begin(self, job: Mapping[str, Any]) -> None:
        """Say what the job is: what decides the pixels, by name.

        Args:
            job: JSON-able.

        Raises:
            ResumeError: the folder holds parts of another job; names what differs.
        """
        held = self.stated()
        if held and self.begun and (other := differences(held, job)):
            raise ResumeError(
                f"resume: {self.path} holds an unfinished job that differs in "
                f"{', '.join(other)}; go on with the same arguments, or remove that folder to begin"
                f" anew"
            )
        self._job = _sha256(job)
        if not held or differences(held, job):
            with written_whole([self.path / JOB]) as (partial,):
                text = {"sha256": self._job, "job": json.loads(canonical(job))}
                partial.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")

    def check_space(self, needed: int) -> None:
        """Raises OSError unless what the job keeps, at most `needed` bytes, fits on the disk."""
        needed -= sum(f.stat().st_size for f in self.path.glob(f"*{PIECE}"))
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"resume: {self.path} needs {needed / 1e9:.2f} GB for finished work and there are "
                f"{free / 1e9:.2f} GB free; make room, name a folder on another disk, or work "
                f"without",
            )

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of a finished part, on the CPU, or None."""
        tensors = read_piece(self._file(name), self._begun_job(), name)
        self.found += tensors is not None
        return tensors

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a finished part. It is on the disk when this returns.

        Raises:
            OSError: it cannot be written; the parts before it are untouched.
        """
        write_piece(self._file(name), self._begun_job(), name, tensors)
        self.made += 1

    def drop(self, name: str) -> None:
        self._file(name).unlink(missing_ok=True)

    def names(self, prefix: str = "") -> list[str]:
        """Of the parts in the folder, damaged ones too, sorted."""
        files = self.path.glob(f"*{PIECE}")
        return sorted(f.stem for f in files if f.stem.startswith(prefix))

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[JobStore]:
        """The store of a job within this one, opened. It stays, unless it is removed: it goes with
        this one."""
        inner = JobStore(self.path / name)
        inner._weights = self._weights
        with inner._open:
            yield inner.__enter__()

    def remove(self) -> None:
        """Remove the folder and what is in it."""
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != JOB:
                path.unlink()
        (self.path / JOB).unlink(missing_ok=True)  # last: until then the folder is known for ours
        self.path.rmdir()
        sync_folder(self.path.parent)

    def _file(self, name: str) -> Path:
        return self.path / f"{name}{PIECE}"

    def _begun_job(self) -> str:
        if self._job is None:
            raise RuntimeError("JobStore: begin() says what the job is, before parts of it")
        return self._job

    def _refuse_other_contents(self) -> None:
        for path in self.path.iterdir():
            if not _ours(path):
                raise ResumeError(
                    f"resume: {self.path} must be empty or hold an unfinished job, it holds "
                    f"{path.name}; name another folder"
                )


def resumable(call: Callable) -> Callable:
    """For a method with a keyword `resume`: called with a folder, it gets the open store of it."""

    @functools.wraps(call)
    def run(self, *args, resume=None, **options):
        if resume is None or isinstance(resume, JobStore):
            return call(self, *args, resume=resume, **options)
        if not isinstance(resume, str | os.PathLike):
            raise TypeError(
                f"resume must be a folder or an open JobStore, got {type(resume).__name__}"
            )
        with JobStore(resume) as store:
            return call(self, *args, resume=store, **options)

    return run


def _ours(path: Path) -> bool:
    if path.is_dir():
        return all(map(_ours, path.iterdir()))
    return path.name == JOB or path.suffix in (PIECE, PARTIAL)


def _sha256(job: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(job).encode()).hexdigest()


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Two processes must not work on one job; the lock ends with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no locks of folders
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResumeError(
                f"resume: another process works on {folder}; wait for it, or name another folder"
            ) from None
        yield
    finally:
        os.close(handle)
