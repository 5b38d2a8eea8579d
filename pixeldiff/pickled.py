"""PyTorch's pickles as data: tensors and plain containers, no code, no more than the file holds.

They are only ever loaded with `weights_only=True`. That keeps code from running, but not a short
file from asking for more memory than there is: by compressed entries, or by tensors whose strides
show the same few bytes again and again.
"""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

# What PyTorch says of an object that it does not load; the third of those of dangerous modules.
_CULPRIT = (
    "Unsupported global: GLOBAL ",
    "Unsupported class ",
    "unsupported GLOBAL ",
    "unrecognized function ",
)
_LONGEST_NAME = 200
_OLD_PICKLES = 5  # one after the other in a file from before the zip format


class DamagedPickleError(ValueError):
    """No pickle, a damaged one, or one that PyTorch does not write."""


class UnsafePickleError(ValueError):
    """A pickle with more than tensors. Nothing of it was executed; `culprit` is what it names."""

    def __init__(self, culprit: str) -> None:
        super().__init__(f"it holds a Python object ({culprit}), not only tensors")
        self.culprit = culprit


def load_pickled(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU; tensors of zip files are views of the mapped file.

    Raises:
        DamagedPickleError, UnsafePickleError: each ends in one line. MemoryError.
    """
    _check_archive(path)
    try:
        return _load(path)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        text = str(error)
        for marker in _CULPRIT:
            if marker in text:
                named = text.split(marker, 1)[1].split()
                culprit = named[0].strip("`.,") if named else "without a name"
                raise UnsafePickleError(_short(culprit)) from None
        raise DamagedPickleError(_reason(error)) from error
    except Exception as error:  # what the unpickler raises on damaged files is not documented
        raise DamagedPickleError(_reason(error)) from error


def why_not_plain(tensor: Tensor) -> str | None:
    """None for a dense tensor whose values are all its own, else what it is."""
    if tensor.layout is not torch.strided:
        return f"is {str(tensor.layout).removeprefix('torch.')}, not dense"
    if tensor.device.type != "cpu":
        return f"holds no values, it lies on {tensor.device}"
    if tensor.is_quantized:
        return "is quantised"
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        return f"claims a shape of {tuple(tensor.shape)}, but holds fewer values"
    return None


def _check_archive(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            for _ in range(_OLD_PICKLES):
                _check_names(file)
            return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:
        raise DamagedPickleError(_reason(error)) from error
    packed = next((e for e in entries if e.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise DamagedPickleError(
            f"its entry {_short(packed.filename)} is compressed, which PyTorch never writes; save "
            "the state dict again"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in entries:
                if entry.filename.endswith(".pkl"):
                    with archive.open(entry) as stream:
                        _check_names(stream)
    except DamagedPickleError:
        raise
    except Exception as error:
        raise DamagedPickleError(_reason(error)) from error


def _check_names(stream: IO[bytes]) -> None:
    """Names of objects in a pickle are short and ASCII: PyTorch searches a name that it refuses
    with an expression that takes the square of its length, 15 s for one of 20,000 characters."""
    try:
        for opcode, value, _ in pickletools.genops(stream):
            if opcode.name == "GLOBAL" and len(value) > _LONGEST_NAME:
                raise DamagedPickleError(f"it names an object in {len(value)} characters")
    except UnicodeDecodeError as error:
        raise DamagedPickleError("it holds a name or text that is none") from error
    except DamagedPickleError:
        raise
    except Exception:  # PyTorch comes as far, and says it better
        return


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        # A file from before PyTorch's zip format cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    # PyTorch puts its advice, to load unsafely, before what it found.
    found = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    lines = [line for line in found.splitlines() if line and "weights_only" not in line]
    return _short(lines[0]) if lines else type(error).__name__


def _short(text: str) -> str:
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 200 else text[:197] + "..."
