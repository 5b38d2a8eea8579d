"""A finished part of a job as a file: tensors, what they belong to, and a checksum.

    18 bytes    "pixeldiff piece 1\n"
     8 bytes    length of the header, little-endian
    header      JSON: job, name, and of each tensor name, dtype and shape
    tensors     one after the other
    32 bytes    SHA-256 of all that

The checksum comes last, so that a tensor is hashed while it is written, once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..out_files import written_whole

MAGIC = b"pixeldiff piece 1\n"
_CHUNK = 1 << 24
_LONGEST_HEADER = 1 << 20
_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64)
}


def write_piece(path: Path, job: str, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a piece whole or not at all; it is on the disk when this returns.

    Args:
        job: digest of the job's identity. name: of the piece within the job.
        tensors: on any device.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    header = {
        "job": job,
        "name": name,
        "tensors": [[k, str(t.dtype).removeprefix("torch."), t.shape] for k, t in tensors.items()],
    }
    text = json.dumps(header).encode()
    with written_whole([path]) as (partial,), partial.open("wb") as file:
        sha = hashlib.sha256()
        for data in (MAGIC, len(text).to_bytes(8, "little"), text):
            file.write(data)
            sha.update(data)
        for t in tensors.values():
            for chunk in _bytes(t.detach().cpu().contiguous()):
                file.write(chunk)
                sha.update(chunk)
        file.write(sha.digest())


def read_piece(path: Path, job: str, name: str) -> dict[str, Tensor] | None:
    """The tensors, on the CPU; None where there is no such file, or it is damaged or another's."""
    try:
        with path.open("rb") as file:
            return _read(file, job, name)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _read(file: BinaryIO, job: str, name: str) -> dict[str, Tensor] | None:
    sha = hashlib.sha256()

    def take(count: int) -> bytes:
        data = file.read(count)
        if len(data) != count:
            raise ValueError("cut off")
        sha.update(data)
        return data

    if take(len(MAGIC)) != MAGIC:
        return None
    length = int.from_bytes(take(8), "little")
    if length > _LONGEST_HEADER:
        return None
    header = json.loads(take(length))
    if header["job"] != job or header["name"] != name:
        return None
    left = file.seek(0, 2) - len(MAGIC) - 8 - length
    file.seek(len(MAGIC) + 8 + length)
    tensors = {}
    for key, dtype, shape in header["tensors"]:
        # Not allocated before it is known to be there: the header is not checked yet.
        left -= torch.Size(shape).numel() * _DTYPES[dtype].itemsize
        if left < sha.digest_size:
            return None
        tensors[key] = t = torch.empty(shape, dtype=_DTYPES[dtype])
        for chunk in _bytes(t):
            if file.readinto(chunk) != len(chunk):
                return None
            sha.update(chunk)
    return tensors if file.read() == sha.digest() else None


def _bytes(t: Tensor) -> Iterator[memoryview]:
    """The memory of a contiguous tensor on the CPU, in chunks."""
    if not t.numel():
        return
    flat = memoryview(t.reshape(-1).view(torch.uint8).numpy())
    for first in range(0, len(flat), _CHUNK):
        yield flat[first : first + _CHUNK]
