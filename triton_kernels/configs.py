"""Which tile a launch uses: the measured table where it has an entry, else the kernel's heuristic.

A table is `<op>.json` beside its kernel, written by `python -m bench tune` on a GPU and read here:

    {"9.0": {"bf16 d64": {"block_m": 128, ..., "num_warps": 8}}}     capability -> key -> Config

What was measured to write it (times, device, versions) stands in bench/results. An op without a
file, or without the capability or the key, uses its heuristic: nothing is ever tuned during a call.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from .launching import capability

C = TypeVar("C")
FOLDER = Path(__file__).parent


@functools.cache
def table(op: str) -> dict[str, dict[str, dict[str, int]]]:
    """The measured configs of `op`: capability -> key -> fields; empty if there are none."""
    path = FOLDER / f"{op}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def choose(
    op: str,
    config: type[C],
    heuristic: Callable[..., C],
    key: Callable[..., str],
    args: tuple[Any, ...],
) -> C:
    """The config for a call of `op`.

    Args:
        config: the kernel's Config class.
        heuristic: (capability, *args) -> Config.
        key: (*args) -> class of problem, such as "bf16 d64".
        args: of the op, in schema order.
    """
    found = capability(next(a for a in args if isinstance(a, Tensor)))
    measured = table(op)
    if measured:
        fields = measured.get(f"{found[0]}.{found[1]}", {}).get(key(*args))
        if fields is not None:
            return config(**fields)
    return heuristic(found, *args)
