"""JSON from files that nobody vouches for."""

from __future__ import annotations

import json
from typing import Any


def loads(text: str | bytes) -> Any:
    """Raises ValueError: no JSON, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook`: of a name that comes twice, JSON takes the last without a word.

    Raises:
        ValueError: a name comes twice.
    """
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("its header lists a name twice")
    return entries
