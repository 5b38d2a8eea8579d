"""Lengths of images and tiles that must lie on a grid."""

from __future__ import annotations

from typing import Any

from ..errors import SizeError


def neighbours(value: int, step: int) -> str:
    """The multiples of `step` next to a length, as an error names them: "96 or 112"."""
    below = value // step * step
    if below == value:
        return str(value)
    return f"{below} or {below + step}" if below else str(step)


def pair_of_multiples(name: str, value: Any, step: int, unit: str) -> tuple[int, int]:
    """Two positive lengths, checked.

    Raises:
        SizeError: not two positive integers, or no multiples of `step`; names the nearest.
    """
    pair = tuple(value) if isinstance(value, tuple | list) else ()
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in pair):
        raise SizeError(f"{name} must be two positive integers (h, w) in {unit}, got {value!r}")
    if any(v % step for v in pair):
        raise SizeError(
            f"{name} (h, w) must be multiples of {step} {unit}, so that it consists of whole "
            f"patches, got {pair}; nearest: h {neighbours(pair[0], step)}, "
            f"w {neighbours(pair[1], step)}"
        )
    return pair
