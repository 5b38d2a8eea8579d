"""Output files: refused early if they cannot be written, then written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path


def check_out_path(path: str | os.PathLike[str], *suffixes: str) -> Path:
    """The path, if a file can be written there; call it before long work starts.

    Args:
        path: of a file that may exist already; its directory must exist.
        suffixes: the path must end in one of them, with the dot, in either case.

    Raises:
        ValueError: another suffix. OSError: no such directory, not writable, the path is one, or
        its name is too long.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        known = " or ".join(filter(None, (", ".join(suffixes[:-1]), suffixes[-1])))
        raise ValueError(f"the output must be a {known} file, got {path.name!r}")
    longest, length = _longest_name(path.parent), len(os.fsencode(path.name))
    if longest is not None and length > longest:
        raise OSError(
            errno.ENAMETOOLONG,
            f"name too long: at most {longest} bytes, got {length} ({path.name[:40]}...)",
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the output directory does not exist: {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"the output is a directory: {path}")
    try:
        # Permission bits say nothing about read-only and virtual file systems: try it.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as e:
        reason = e.strerror or e
        raise PermissionError(
            f"the output directory is not writable: {path.parent} ({reason})"
        ) from e
    return path


@contextlib.contextmanager
def written_whole(paths: Sequence[Path], *, by_way_of: Path | None = None) -> Iterator[list[Path]]:
    """Temporary paths to write instead of `paths`, which they become if the block succeeds.

    Args:
        by_way_of: folder of the temporary files, on the same file system; default: beside `paths`.

    If it does not, by an error or an interruption, there is neither a new file nor a temporary one.
    The data are on the disk before a name is theirs: a power cut leaves the old file or the new.
    """
    partial = [(by_way_of or path.parent) / f".{secrets.token_hex(8)}.part" for path in paths]
    try:
        yield partial
        for source in partial:
            _sync_file(source)
        for source, path in zip(partial, paths, strict=True):
            os.replace(source, path)
        for folder in {path.parent for path in paths}:
            sync_folder(folder)
    finally:
        for source in partial:
            source.unlink(missing_ok=True)


def _longest_name(folder: Path) -> int | None:
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # Windows; no such folder, which is said below
        return None


def sync_folder(folder: Path) -> None:
    """Have the folder's names on the disk."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some file systems cannot
            raise
    finally:
        os.close(handle)


def _sync_file(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())
