"""A file of prompts: one a line, or JSON lines with a seed and a size of their own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEYS = ("prompt", "seed", "size")


@dataclass(frozen=True)
class Request:
    """A picture to make. `seed` and `size`, (H, W), are None where the line says nothing."""

    prompt: str
    seed: int | None = None
    size: tuple[int | None, int | None] | None = None

    def or_else(self, *, seed: int, size: tuple[int | None, int | None]) -> Request:
        """With these where the line says nothing."""
        return Request(
            self.prompt,
            seed if self.seed is None else self.seed,
            size if self.size is None else self.size,
        )


def read_prompts(path: Path) -> list[Request]:
    """The prompts of a text file, line by line; lines without text are left out.

    Args:
        path: UTF-8. With the suffix .jsonl each line is a JSON object with "prompt" and, if wanted,
            "seed" and "size", "HEIGHTxWIDTH" or [height, width].

    Raises:
        ValueError: no prompt at all, not UTF-8, or a line that is not as above; names the line.
        OSError: not a readable file.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} must be UTF-8 text with a prompt a line: {e}") from e
    as_json = path.suffix.lower() == ".jsonl"
    requests = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            requests.append(_request(where, line) if as_json else Request(line.strip()))
    if not requests:
        raise ValueError(f"{path} must hold a prompt a line, it has none")
    return requests


def _request(where: str, line: str) -> Request:
    try:
        entry = json.loads(line)
    except ValueError as e:
        raise ValueError(f"{where}: must be a JSON object: {e}") from e
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError(f'{where}: must be a JSON object with "prompt", a text, got {line[:60]}')
    if other := sorted(entry.keys() - set(KEYS)):
        raise ValueError(f"{where}: knows {', '.join(KEYS)}, got {', '.join(other)}")
    seed = entry.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ValueError(f"{where}: seed must be an integer, got {seed!r}")
    return Request(entry["prompt"], seed, _size(where, entry.get("size")))


def _size(where: str, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    sides = value.lower().split("x") if isinstance(value, str) else value
    try:
        height, width = (int(side) for side in sides)
    except (TypeError, ValueError):
        raise ValueError(
            f'{where}: size must be "HEIGHTxWIDTH" or [height, width], got {value!r}'
        ) from None
    return height, width
