"""One large safetensors file, written tensor by tensor, that an interrupted run can go on with.

The header of a safetensors file follows from names, types and shapes alone, so it is written first
and no tensor has to wait in memory for the others. Until the file is complete it is called
`NAME.part`, and beside it `NAME.journal` holds the SHA-256 of each finished tensor, one a line.
A later run of the same plan reads back what the journal claims, keeps what still has its checksum,
and goes on behind it; so a process killed at any instruction costs at most one tensor.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ...errors import CheckpointError
from .stored_tensors import CHUNK, ITEM_SIZES

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Piece:
    """A tensor to be written.

    Args:
        name, dtype, shape: as in the header, dtype like "BF16".
        chunks: yields its bytes from the start, the same ones at every call.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[bytes]]

    @property
    def nbytes(self) -> int:
        return ITEM_SIZES[self.dtype] * math.prod(self.shape)


def in_file_order(pieces: Sequence[Piece]) -> list[Piece]:
    """Wide types first, so that every tensor is aligned to its type, then by name."""
    return sorted(pieces, key=lambda p: (-ITEM_SIZES[p.dtype], p.name))


def write(
    path: Path,
    pieces: Sequence[Piece],
    metadata: Mapping[str, str],
    *,
    identity: str,
    check: Callable[[Path], None],
    progress: Progress | None = None,
) -> int:
    """Write `pieces` to `path`, or go on with a run of the same plan that was interrupted.

    The same pieces and metadata give the same bytes, however often the writing was interrupted.

    Args:
        path: of the result; replaced, in one move, if it exists.
        identity: changes whenever the chunks of a piece could; another one starts from nothing.
        check: called with the complete temporary file; what it raises deletes that file.
        progress: called with ("writing" or "checking", bytes done, bytes in all) after each chunk.

    Returns:
        Bytes of tensors that an earlier run had written.

    Raises:
        OSError: the disk is too small (found before anything is written) or full.
        CheckpointError: a finished tensor does not have the bytes that were written.
    """
    pieces = in_file_order(pieces)
    header = _header(pieces, metadata)
    total = sum(p.nbytes for p in pieces)
    part, journal = (path.with_name(path.name + end) for end in (".part", ".journal"))
    key = hashlib.sha256(header + identity.encode()).hexdigest()
    with _exclusive(path):
        digests = _finished(part, journal, key, header, pieces)
        kept = sum(p.nbytes for p in pieces[: len(digests)])
        _check_space(path, len(header) + total, part if digests else None)
        try:
            _continue(part, journal, key, header, pieces, digests, total, progress)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(
                errno.ENOSPC,
                f"the disk of {path.parent} is full; make room and run the same command again, "
                f"it goes on with {part.name}",
            ) from error
        try:
            _check_bytes(part, len(header), pieces, digests, total, progress)
            check(part)
        except CheckpointError:
            journal.unlink()
            part.unlink()
            raise
        os.replace(part, path)
        _sync_directory(path.parent)
        journal.unlink()
    return kept


def _header(pieces: Sequence[Piece], metadata: Mapping[str, str]) -> bytes:
    entries: dict = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for p in pieces:
        entries[p.name] = {
            "dtype": p.dtype,
            "shape": list(p.shape),
            "data_offsets": [offset, offset + p.nbytes],
        }
        offset += p.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _finished(
    part: Path, journal: Path, key: str, header: bytes, pieces: Sequence[Piece]
) -> list[str]:
    """Checksums of the leading pieces that an earlier run finished and that are still so."""
    try:
        own, *claims = journal.read_text(encoding="utf-8", errors="replace").split("\n")
        with part.open("rb") as file:
            if own != key or file.read(len(header)) != header:
                return []
            good: list[str] = []
            # A line that was cut off while it was written is no checksum.
            for piece, claim in zip(pieces, claims, strict=False):
                if _digest(file, piece.nbytes) != claim:
                    break
                good.append(claim)
            return good
    except FileNotFoundError:
        return []


def _digest(file: BinaryIO, length: int) -> str:
    """SHA-256 of the next `length` bytes, or of as many as there are."""
    sha = hashlib.sha256()
    while length and (data := file.read(min(length, CHUNK))):
        sha.update(data)
        length -= len(data)
    return sha.hexdigest()


def _check_space(path: Path, needed: int, part: Path | None) -> None:
    needed -= part.stat().st_size if part else 0
    stale = path.with_name(path.name + ".part")
    # What cannot be gone on with is truncated first.
    free = shutil.disk_usage(path.parent).free
    free += stale.stat().st_size if part is None and stale.exists() else 0
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{path} needs {needed / 1e9:.2f} GB more and {path.parent} has {free / 1e9:.2f} GB "
            "free; make room or write to another disk",
        )


def _continue(
    part: Path,
    journal: Path,
    key: str,
    header: bytes,
    pieces: Sequence[Piece],
    digests: list[str],
    total: int,
    progress: Progress | None,
) -> None:
    """Append the missing pieces, each followed by its line in the journal; extends `digests`."""
    done = sum(p.nbytes for p in pieces[: len(digests)])
    # The journal never claims more than the part holds: it is cut first and grows last.
    fresh = journal.with_name(journal.name + ".new")
    fresh.write_text("\n".join([key, *digests]) + "\n", encoding="utf-8")
    os.replace(fresh, journal)
    with part.open("r+b" if digests else "wb") as file, journal.open("a", encoding="utf-8") as log:
        if not digests:
            file.write(header)
        file.truncate(len(header) + done)
        file.seek(len(header) + done)
        for piece in pieces[len(digests) :]:
            sha, length = hashlib.sha256(), 0
            for data in piece.chunks():
                file.write(data)
                sha.update(data)
                length += len(data)
                done += len(data)
                if progress:
                    progress("writing", done, total)
            if length != piece.nbytes:
                raise RuntimeError(f"{piece.name} gave {length} bytes, not {piece.nbytes}")
            digests.append(sha.hexdigest())
            file.flush()
            log.write(digests[-1] + "\n")
            log.flush()
        file.flush()
        os.fsync(file.fileno())


def _check_bytes(
    part: Path,
    start: int,
    pieces: Sequence[Piece],
    digests: Sequence[str],
    total: int,
    progress: Progress | None,
) -> None:
    done = 0
    with part.open("rb") as file:
        file.seek(start)
        for piece, digest in zip(pieces, digests, strict=True):
            if _digest(file, piece.nbytes) != digest:
                raise CheckpointError(
                    f"{piece.name} reads back from {part} otherwise than it was written; the file "
                    "was deleted, check the disk and run the command again"
                )
            done += piece.nbytes
            if progress:
                progress("checking", done, total)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Two runs must not write one file; the lock ends with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows, where an open file cannot be replaced under its writer anyway
        yield
        return
    lock = path.with_name(path.name + ".lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"another process is writing {path}; wait for it") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
