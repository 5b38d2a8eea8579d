"""Damage to files: bytes, lengths, JSON headers, archives. Everything comes from one `Random`."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable
from typing import Any

NUMBERS = [0, 1, 2, 7, 127, 128, 255, 256, 65535, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 63) - 1]
VALUES = [
    *NUMBERS, -1, -(1 << 63), 1 << 64, 10**400, 0.5, -0.0, 1e308, None, True, "", "x", "F16", "I8",
    "F8_E4M3", "F4", "nan", "\x00", "\ud800", "é" * 300, [], [[]], {}, [0], [1, 1], [-1], [1.5],
    ["1"], [1 << 40, 1 << 40], [0, 1 << 62], [8] * 2000,
]  # fmt: skip
TOKENS = [bytes([c]) for c in b'"{}[],:\\\x00\xff'] + [b"NaN", b"-1", b"1e999"]
TOKENS += [b"[" * 20_000, b"9" * 6000, b"PK\x03\x04", b"\x80\x02", b"c__builtin__\neval\n", b"R."]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four kinds of damage, of the structure or of anything."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind: Callable[[bytes, random.Random], bytes] = rng.choice(_KINDS)
        if data[8:9] == b"{" and rng.random() < 0.5:
            kind = _header
        elif data[:2] == b"PK" and rng.random() < 0.5:
            kind = _archive
        elif data[:1] == b"{" and rng.random() < 0.5:
            kind = _json_text
        data = kind(data, rng)
    return data


def _place(data: bytes, rng: random.Random) -> int:
    """More often near the beginning and the end, where structure is."""
    near = min(len(data), rng.choice((8, 16, 64, 512, 4096, 1 << 30)))
    at = rng.randrange(near + 1) if near else 0
    return at if rng.random() < 0.7 else len(data) - at


def _flip(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if out:
            at = min(_place(data, rng), len(out) - 1)
            out[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    return bytes(out)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: _place(data, rng)]


def _drop(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + rng.choice((1, 2, 4, 8, 64, 4096)) :]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + rng.choice((*TOKENS, rng.randbytes(rng.choice((1, 8, 300))))) + data[at:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    at, length = _place(data, rng), rng.choice((1, 8, 64, 1024))
    return data[:at] + data[at : at + length] * rng.choice((2, 3, 50)) + data[at + length :]


def _number(data: bytes, rng: random.Random) -> bytes:
    at, size = _place(data, rng), rng.choice((1, 2, 4, 8))
    value = (rng.choice(NUMBERS) & ((1 << 8 * size) - 1)).to_bytes(
        size, rng.choice(("little", "big"))
    )
    return data[:at] + value + data[at + size :]


_KINDS = [_flip, _cut, _drop, _insert, _repeat, _number]


def _header(data: bytes, rng: random.Random) -> bytes:
    """Of a safetensors file: other JSON of the right length, mostly."""
    length = int.from_bytes(data[:8], "little")
    text = _json_text(data[8 : 8 + length], rng)
    told = len(text) if rng.random() < 0.9 else rng.choice(NUMBERS)
    return told.to_bytes(8, "little") + text + data[8 + length :]


def _json_text(text: bytes, rng: random.Random) -> bytes:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _flip(text, rng)
    if rng.random() < 0.2:
        return b"[" * 2000 + text + b"]" * 2000
    for _ in range(rng.choice((1, 1, 3))):
        value = _other(value, rng)
    return json.dumps(value).encode()


def _other(value: Any, rng: random.Random) -> Any:
    """The value with a change somewhere below it."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        how = rng.random()
        if how < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if how < 0.2:
            return {
                **value,
                rng.choice((key + "x", "", "a.b", "x" * 3000, "__metadata__")): value[key],
            }
        return {**value, key: _other(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], _other(value[at], rng), *value[at + 1 :]]
    if isinstance(value, str) and value[:1] in "{[" and value and rng.random() < 0.8:
        return _json_text(value.encode(errors="replace"), rng).decode(errors="replace")
    if isinstance(value, int) and rng.random() < 0.3:
        return value + rng.choice((-1, 1, 8, -value))
    return rng.choice(VALUES)


def _archive(data: bytes, rng: random.Random) -> bytes:
    """Of a zip file: the same archive with an entry changed, so that its sums are right."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [(i.filename, archive.read(i)) for i in archive.infolist()]
    except Exception:
        return _flip(data, rng)
    if not entries:
        return data
    at = rng.randrange(len(entries))
    pickles = [i for i, (name, _) in enumerate(entries) if name.endswith(".pkl")]
    if pickles and rng.random() < 0.7:
        at = pickles[0]
    name, held = entries[at]
    how = rng.random()
    if how < 0.1:
        del entries[at]
    elif how < 0.2:
        entries[at] = (rng.choice((name + "x", "../" + name, "a/b", name[:-1] or "x")), held)
    else:
        entries[at] = (name, rng.choice(_KINDS)(held, rng))
    packed = rng.choice((zipfile.ZIP_STORED,) * 8 + (zipfile.ZIP_DEFLATED,))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packed) as archive:
        for entry, held in entries:
            archive.writestr(zipfile.ZipInfo(entry), held, packed)
    return out.getvalue()
