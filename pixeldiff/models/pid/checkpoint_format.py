"""Bytes to named tensors: safetensors (also sharded) and PyTorch's zip and legacy pickles.

Tensors of a safetensors file or a zip pickle are views of the mapped file: nothing is read before
it is used. A pickle is only ever loaded with `weights_only=True`, so no code of it runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    ForeignCheckpointError,
    IncompleteCheckpointError,
    UnsafeCheckpointError,
)
from ...json_text import each_once, loads
from ...pickled import DamagedPickleError, UnsafePickleError, load_pickled, why_not_plain
from .checkpoint_location import EXTENSIONS, INDEX_SUFFIX

MAX_HEADER = 8 << 20  # of a safetensors file or an index; those of a released network take 80 kB

# Entries of a training checkpoint that hold a network, and the prefix that says which copy it is.
_NESTED = {
    "state_dict": "",
    "model": "",
    "net": "",
    "module": "",
    "ema": "net_ema.",
    "model_ema": "net_ema.",
    "ema_state_dict": "net_ema.",
}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a checkpoint file by name, and its text metadata (safetensors only).

    Raises:
        CheckpointFormatError: extension, or a damaged file. CheckpointNotFoundError: no such file.
        UnsafeCheckpointError: a pickle with more than tensors. IncompleteCheckpointError: a shard
        lacks tensors of its index. ForeignCheckpointError: a pickle without a state dict.
    """
    if not path.is_file():
        raise CheckpointNotFoundError(f"read_checkpoint: no file {path}")
    name = path.name.lower()
    if name.endswith(INDEX_SUFFIX):
        return _read_sharded(path)
    if not name.endswith(EXTENSIONS):
        raise CheckpointFormatError(
            f"read_checkpoint: {path} must end in {', '.join((*EXTENSIONS, INDEX_SUFFIX))}"
        )
    _refuse_other_content(path)
    if name.endswith(".safetensors"):
        return _read_safetensors(path)
    return _read_pickle(path), {}


def _refuse_other_content(path: Path) -> None:
    """Catch what downloads commonly leave in place of a checkpoint."""
    with path.open("rb") as file:
        head = file.read(64)
    what = None
    is_zip = head.startswith(b"PK\x03\x04")
    if not head:
        what = "is empty"
    elif head.startswith(b"version https://git-lfs"):
        what = "is a Git LFS pointer, not the file itself; run git lfs pull"
    elif head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        what = "is a web page; the download went to a login or error page"
    elif is_zip and path.suffix == ".safetensors":
        what = "is a PyTorch file; rename it to .pth"
    elif head[8:10] == b'{"' and path.suffix != ".safetensors":
        what = "is a safetensors file; rename it to .safetensors"
    if what:
        raise CheckpointFormatError(f"read_checkpoint: {path} {what}")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError(f"its header would take {length} bytes")
            header = file.read(length)
        with safe_open(path, framework="pt", device="cpu") as file:
            # Looked at by now: of the right length, of UTF-8, not nested deeply.
            json.loads(header, object_pairs_hook=each_once)
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _read_sharded(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        shard_of = read_weight_map(path)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointFormatError(
            f"read_checkpoint: {path} is no safetensors index (JSON with a weight_map): {error!r}"
        ) from error
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for shard in sorted(set(shard_of.values())):
        if PurePosixPath(shard).name != shard:
            raise CheckpointFormatError(
                f"read_checkpoint: {path} names a shard outside its directory: {shard!r}"
            )
        if not (path.parent / shard).is_file():
            raise IncompleteCheckpointError(
                f"read_checkpoint: shard {shard} of {path} is missing",
                tuple(key for key, s in shard_of.items() if s == shard),
            )
        held, text = _read_safetensors(path.parent / shard)
        missing = tuple(key for key, s in shard_of.items() if s == shard and key not in held)
        if missing:
            raise IncompleteCheckpointError(
                f"read_checkpoint: shard {shard} of {path} lacks {len(missing)} tensors of the "
                f"index, first {missing[0]}",
                missing,
            )
        tensors.update(held)
        metadata.update(text)
    return tensors, metadata


def read_weight_map(path: Path) -> dict[str, str]:
    """Of an index, the file of each tensor. Raises ValueError, KeyError, TypeError: it is none."""
    table = dict(read_json(path)["weight_map"])
    for shard in table.values():
        if not isinstance(shard, str) or not 0 < len(shard.encode()) < 256:
            raise ValueError(f"{str(shard)[:99]!r} is no name of a file")
    return table


def read_json(path: Path) -> Any:
    """A small file. Raises ValueError: no JSON, or far larger than what it is to hold."""
    if (size := path.stat().st_size) > MAX_HEADER:
        raise ValueError(f"it has {size} bytes")
    return loads(path.read_text(encoding="utf-8"))


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = load_pickled(path)
    except UnsafePickleError as error:
        raise UnsafeCheckpointError(
            f"read_checkpoint: {path} holds a Python object ({error.culprit}), not only tensors; "
            "it was not loaded, because unpickling it could run any code. Save its state "
            "dict alone, best as .safetensors"
        ) from None
    except DamagedPickleError as error:
        raise _damaged(path, error) from error
    tensors = _state_dict_in(content)
    if not tensors:
        names = list(content)[:5] if isinstance(content, Mapping) else type(content).__name__
        raise ForeignCheckpointError(
            f"read_checkpoint: {path} holds no state dict (name -> tensor), but {str(names)[:200]}"
        )
    for name, tensor in tensors.items():
        if (reason := why_not_plain(tensor)) is not None:
            raise CheckpointFormatError(f"read_checkpoint: {name[:200]} of {path} {reason}")
    return tensors


def _state_dict_in(content: Any, prefix: str = "", depth: int = 2) -> dict[str, Tensor]:
    """The tensors of a state dict, or of the networks nested in a training checkpoint."""
    if not isinstance(content, Mapping):
        return {}
    nested: dict[str, Tensor] = {}
    if depth:
        for name, sub_prefix in _NESTED.items():
            found = _state_dict_in(content.get(name), prefix + sub_prefix, depth - 1)
            for key, tensor in found.items():
                nested.setdefault(key, tensor)
    if nested:
        return nested
    # What has no name is no parameter: where one was renamed by damage, it is missing.
    return {
        prefix + k: t for k, t in content.items() if isinstance(k, str) and isinstance(t, Tensor)
    }


def _damaged(path: Path, error: Exception) -> CheckpointFormatError:
    reason = str(error).strip().splitlines()
    return CheckpointFormatError(
        f"read_checkpoint: {path} ({path.stat().st_size} bytes) is damaged or cut short "
        f"({reason[0] if reason else type(error).__name__}); download it again"
    )
