"""Amounts of memory as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1}
for _i, _letter in enumerate("kmgt", 1):
    _UNITS[f"{_letter}b"] = _UNITS[_letter] = 1000**_i
    _UNITS[f"{_letter}ib"] = 1024**_i
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)")


def parsed_bytes(name: str, value: str | int) -> int:
    """Bytes of "4GB", "512 MiB", "1.5g" (as GB), or a whole number.

    Raises:
        ValueError: not an amount, or none that is more than 0. TypeError: another type.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"{name} must be bytes or text like '4GB', got {value!r}")
    if isinstance(value, int):
        count = value
    else:
        found = _AMOUNT.fullmatch(value.strip().lower())
        if found is None or found[2] not in _UNITS:
            raise ValueError(
                f"{name} must be a number of bytes with a unit (kB, MB, GB, TB; KiB, MiB, GiB, "
                f"TiB), like '4GB' or '1.5GiB', got {value!r}"
            )
        count = int(float(found[1]) * _UNITS[found[2]])
    if count < 1:
        raise ValueError(f"{name} must be more than 0 bytes, got {value!r}")
    return count


def in_words(count: int) -> str:
    """Of a size to read: "1.25 GB", "340 MB"."""
    if count < 1e6:
        return f"{count} bytes"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def upward(count: int) -> str:
    """The same, rounded up, so that it is enough: "1.26 GB", "341 MB"."""
    step = 10_000_000 if count >= 1_000_000_000 else 1_000_000
    return in_words(-(-count // step) * step)
