"""Which backends measurement puts first for a call, the fastest first.

What was measured stands in `measured/<op>.json`, written by `python -m bench choose`:

    {"9.0": {"bfloat16 d64": {"14": {"order": ["cuda", "reference"], "device": ..., ...}}}}

compute capability -> kind of problem -> size (`problems.py`) -> backends in order, and what they
were measured with and how long each took. "reference" is PyTorch's own way.

A size that was not measured takes the order of the nearest that was, in powers of two; of two
equally near, of the larger, where a wrong choice costs more. Another kind, another capability or
no file: nothing is listed, and the op's own order holds. Calls on a CPU never look.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import json_text
from .problems import Raw, classes_of, power

FOLDER = Path(__file__).with_name("measured")
CHOOSE = "python -m bench choose"

Order = tuple[str, ...]
Sizes = Mapping[int, Order]


def order(op: str, args: tuple[Any, ...]) -> Order:
    """Names of the backends to try first for this call; empty where nothing says so.

    Raises:
        ValueError: the table of `op` is damaged; names the file.
    """
    index = device_index(args[0])
    if index is None:
        return ()
    describe = _described(op, index)
    return () if describe is None else _order_of(op, index, describe(*args))


def device_index(x: Tensor) -> int | None:
    """Of the GPU that a call on `x` runs on, or None."""
    return x.get_device() if x.is_cuda else None


@functools.cache
def capability(index: int) -> str:
    return "{}.{}".format(*torch.cuda.get_device_capability(index))


@functools.cache
def _described(op: str, index: int) -> Callable[..., Raw] | None:
    """What describes a call of `op`, or None where nothing was measured for this device."""
    return classes_of(op).describe if table(op).get(capability(index)) else None


@functools.lru_cache(maxsize=4096)  # a size of image has an entry of its own here
def _order_of(op: str, index: int, raw: Raw) -> Order:
    kind = classes_of(op).kind(raw)
    return nearest(table(op)[capability(index)].get(kind, {}), power(raw[0]))


def nearest(sizes: Mapping[int, Order], size: int) -> Order:
    """The order of the measured size nearest to `size`; empty if there is none."""
    if not sizes:
        return ()
    return sizes[min(sizes, key=lambda s: (abs(s - size), -s))]


@functools.cache
def table(op: str) -> Mapping[str, Mapping[str, Sizes]]:
    """Capability -> kind -> size -> order; empty without a file.

    Raises:
        ValueError: the file is no such table; names it.
    """
    return orders(read(path(op)), path(op))


def path(op: str) -> Path:
    return FOLDER / f"{op}.json"


def read(path: Path) -> dict[str, Any]:
    """What stands in a table's file, unchecked; empty if there is none.

    Raises:
        ValueError: it is not JSON, or not an object; names it.
    """
    if not path.exists():
        return {}
    try:
        data = json_text.loads(path.read_bytes())
    except ValueError as e:
        raise _damaged(path, f"it is no JSON: {e}") from e
    return _mapping(path, "it", data)


def orders(data: Mapping[str, Any], path: Path) -> dict[str, dict[str, dict[int, Order]]]:
    """The orders alone of what `read` returned.

    Raises:
        ValueError: an entry is none; names the file and the entry.
    """
    found: dict[str, dict[str, dict[int, Order]]] = {}
    for capable, by_kind in data.items():
        kinds = found.setdefault(capable, {})
        for kind, by_size in _mapping(path, f"[{capable!r}]", by_kind).items():
            where = f"[{capable!r}][{kind!r}]"
            sizes = kinds.setdefault(kind, {})
            for size, entry in _mapping(path, where, by_size).items():
                at = f"{where}[{size!r}]"
                if not size.removeprefix("-").isdigit():
                    raise _damaged(path, f"{at} must be a size, a power of two's exponent")
                sizes[int(size)] = _order(path, at, _mapping(path, at, entry).get("order"))
    return found


def _order(path: Path, where: str, names: Any) -> Order:
    right = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not right or not names or len(set(names)) < len(names):
        raise _damaged(path, f"{where} must have an order of different backends, got {names!r}")
    return tuple(names)


def _mapping(path: Path, where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _damaged(path, f"{where} must be an object, got {value!r}")
    return value


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path} is not a table of measured backends: {what}; write it again with `{CHOOSE}`, or "
        f"delete it: {path.stem} then chooses as if nothing had been measured"
    )


def forget() -> None:
    """Read the tables again at the next call."""
    for cached in (capability, table, _described, _order_of):
        cached.cache_clear()
