"""Tensors of safetensors files by place: file, byte range, type and shape, without their values.

A conversion moves tens of gigabytes that it never computes with. It reads them as bytes, a chunk at
a time, so that memory does not depend on the size of a tensor, and no bit can change on the way.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open

from ...errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    IncompleteCheckpointError,
)
from ...json_text import each_once
from ..pid.checkpoint_format import MAX_HEADER, read_weight_map
from ..pid.checkpoint_location import INDEX_SUFFIX

CHUNK = 8 << 20
ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. Takes the few operations by which names are split, as a tensor would.

    Args:
        file: a safetensors file.
        start: of its first byte in the file.
        dtype: as safetensors writes it, "BF16".
        shape: of the tensor, row-major.
        nbytes: length of the byte range.
    """

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def dim(self) -> int:
        return len(self.shape)

    def chunk(self, count: int) -> tuple[StoredTensor, ...]:
        """`count` equal parts of the rows, which must divide."""
        rows, size = self.shape[0] // count, self.nbytes // count
        part = replace(self, shape=(rows, *self.shape[1:]), nbytes=size)
        return tuple(replace(part, start=self.start + i * size) for i in range(count))

    def __getitem__(self, index: None) -> StoredTensor:
        """With None: the same values with an axis of length 1 in front."""
        if index is not None:
            raise TypeError(f"StoredTensor: only [None] is defined, got {index!r}")
        return replace(self, shape=(1, *self.shape))

    def chunks(self) -> Iterator[bytes]:
        """The values, at most `CHUNK` bytes at a time.

        Raises:
            CheckpointFormatError: the file became shorter than it was when its header was read.
        """
        left = self.nbytes
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            while left:
                data = file.read(min(left, CHUNK))
                if not data:
                    raise CheckpointFormatError(
                        f"{self.file} became shorter while it was read; {left} bytes are missing"
                    )
                left -= len(data)
                yield data


@dataclass(frozen=True)
class StoredFiles:
    """All tensors of a checkpoint, from one or many files.

    Args:
        path: what it is called in messages: the file, the index, or the directory of shards.
        files: the safetensors files, in reading order.
        tensors: by name.
        metadata: text metadata of all files.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]

    @property
    def identity(self) -> str:
        """Changes when a file is replaced or edited: name, size and time of each."""
        stats = [(f.name, f.stat()) for f in self.files]
        return json.dumps([(name, s.st_size, s.st_mtime_ns) for name, s in stats])


def stored_files(source: str | Path) -> StoredFiles:
    """Headers of the safetensors checkpoint at `source`; no values are read.

    Args:
        source: a .safetensors file; an index JSON; or a directory that holds an index, or one file,
            or the shards of one checkpoint without their index. Of a directory with a folder
            `transformer` (a diffusers pipeline), that folder.

    Raises:
        CheckpointNotFoundError: nothing there. CheckpointFormatError: not safetensors, damaged, or
        several checkpoints. IncompleteCheckpointError: a shard, or a tensor of the index, is not
        there.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        path = _in_folder(folder)
    elif not path.is_file():
        raise CheckpointNotFoundError(f"no file or directory {str(source)!r}")
    if path.is_dir():
        return _joined(path, _shards_in(path), None)
    if path.name.endswith(INDEX_SUFFIX):
        table = _index(path)
        files = tuple(path.parent / shard for shard in sorted(set(table.values())))
        return _joined(path, files, table)
    if path.suffix != ".safetensors":
        raise CheckpointFormatError(
            f"{path} must be a .safetensors file, an index of them ({INDEX_SUFFIX}) or a directory "
            "with either; other formats cannot be streamed, save the state dict as safetensors"
        )
    return _joined(path, (path,), None)


def _in_folder(folder: Path) -> Path:
    """The index or the only file in a folder, or the folder itself where it holds bare shards."""
    indices = sorted(folder.glob("*" + INDEX_SUFFIX))
    if len(indices) > 1:
        names = ", ".join(f.name for f in indices)
        raise CheckpointFormatError(f"{folder} holds several indices, name one of them: {names}")
    files = sorted(folder.glob("*.safetensors"))
    if not indices and not files:
        raise CheckpointNotFoundError(f"no .safetensors file in {folder}")
    if indices:
        return indices[0]
    return folder if len(files) > 1 or _SHARD.fullmatch(files[0].name) else files[0]


def _shards_in(folder: Path) -> tuple[Path, ...]:
    files = tuple(sorted(folder.glob("*.safetensors")))
    parts = [_SHARD.fullmatch(f.name) for f in files]
    if not all(parts) or len({(m[1], m[3]) for m in parts if m}) != 1:
        raise CheckpointFormatError(
            f"{folder} holds {len(files)} .safetensors files that are not the numbered shards of "
            f"one checkpoint; name one of them: {', '.join(f.name for f in files[:8])}"
        )
    stem, count = parts[0][1], int(parts[0][3])
    for i in range(1, count + 1):
        name = f"{stem}-{i:05d}-of-{count:05d}.safetensors"
        if not (folder / name).is_file():
            raise IncompleteCheckpointError(f"shard {name} of {folder} is missing")
    return files


def _index(path: Path) -> dict[str, str]:
    try:
        table = read_weight_map(path)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointFormatError(
            f"{path} is no safetensors index (JSON with a weight_map): {error!r}"
        ) from error
    for shard in set(table.values()):
        if PurePosixPath(shard).name != shard:
            raise CheckpointFormatError(f"{path} names a shard outside its directory: {shard!r}")
        if not (path.parent / shard).is_file():
            raise IncompleteCheckpointError(
                f"shard {shard} of {path} is missing",
                tuple(key for key, s in table.items() if s == shard),
            )
    return table


def _joined(path: Path, files: tuple[Path, ...], table: Mapping[str, str] | None) -> StoredFiles:
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        held, text = read_header(file)
        twice = next((name for name in held if name in tensors), None)
        if twice is not None:
            raise CheckpointFormatError(f"{twice} is both in {tensors[twice].file} and in {file}")
        tensors.update(held)
        metadata.update(text)
    for name, shard in (table or {}).items():
        if name not in tensors or tensors[name].file.name != shard:
            raise IncompleteCheckpointError(f"{shard} of {path} lacks {name}", (name,))
    return StoredFiles(path, files, tensors, metadata)


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and text metadata of one safetensors file.

    Raises:
        CheckpointFormatError: damaged, cut short, a tensor listed twice, or another format.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError(f"its header would take {length} bytes")
            # Checks every offset and the file's length. Not "pt": its mapping of the file must fit
            # into memory.
            with safe_open(file, framework="np"):
                pass
            header = json.loads(stream.read(length), object_pairs_hook=each_once)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointFormatError(
            f"{file} ({file.stat().st_size} bytes) is no safetensors file, damaged or cut short "
            f"({error}); download it again"
        ) from error
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        tensors[name] = StoredTensor(file, 8 + length + begin, entry["dtype"], shape, end - begin)
    return tensors, metadata


def check_types(tensors: Mapping[str, StoredTensor], path: Path) -> None:
    """Only floating-point weights, of which each value has its own bytes.

    Raises:
        CheckpointFormatError: with the first tensor of another type.
    """
    for name, t in tensors.items():
        if ITEM_SIZES.get(t.dtype, 0) * math.prod(t.shape) != t.nbytes:
            raise CheckpointFormatError(
                f"{name} of {path} is {t.dtype}; quantised weights are not read, only "
                f"{', '.join(ITEM_SIZES)}"
            )
