"""The JSON that every measurement is written to, and its validation.

A file is {"schema": 1, "command": ..., "rows": [...]}; a row says on its own what was measured,
where, with what, and when. bench/README.md describes every field.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixeldiff.out_files import written_whole

VERSION = 1
KINDS = ("ceiling", "kernel", "decode", "forward", "tile", "profile")
# refused: the implementation says it cannot take the call; failed: it raised; skipped: not tried.
STATUSES = ("measured", "refused", "failed", "skipped")
DTYPES = ("fp32", "bf16", "fp16", "fp8")
BOUNDS = ("memory", "compute")
RULES = ("one rounding", "twice eager", "half an e4m3 spacing")


class SchemaError(ValueError):
    """A result that is not of the schema; the message says which field and what is wrong."""


@dataclass
class Machine:
    """Where and with what a row was measured."""

    device: str
    device_name: str
    threads: int
    python: str
    torch: str
    triton: str | None
    cuda: str | None
    driver: str | None
    pixeldiff: str
    commit: str
    utc: str
    capability: str | None = None


@dataclass
class Timing:
    """Milliseconds of one call (kernel) or one image (decode), warmed up; `first_ms` is not."""

    median_ms: float
    min_ms: float
    max_ms: float
    mad_ms: float
    samples_ms: list[float]
    first_ms: float | None = None
    host_ms: float | None = None


@dataclass
class Rates:
    """The work of one call, what was reached, and what this machine can do."""

    bytes: int
    flops: int
    gb_s: float
    tflop_s: float
    ceiling_gb_s: float | None = None
    ceiling_tflop_s: float | None = None
    bound: str | None = None
    percent: float | None = None


@dataclass
class Accuracy:
    """Largest errors against the fp64 oracle; `of_budget` at most 1 passes the tests' rule."""

    rule: str
    error: float
    eager_error: float
    of_budget: float


@dataclass
class Memory:
    """Bytes at the peak of one call or image. `activation_bytes` is the peak less what was held
    before the call began."""

    peak_bytes: int
    activation_bytes: int
    weight_bytes: int | None = None
    first_peak_bytes: int | None = None
    base_bytes: int | None = None
    source: str = ""


@dataclass
class Decode:
    """What only a whole decode has."""

    steps: int
    step_ms: float
    prepare_ms: float
    load_ms: float
    parameters: int
    new_size_first_ms: float | None = None
    new_size_tenth_ms: float | None = None
    joules_per_image: float | None = None
    watts: float | None = None
    psnr_reference_db: float | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Kernel:
    """A kernel of a group of calls: how often a step launches it, and ms of all its launches."""

    name: str
    calls: float
    ms: float


@dataclass
class Profile:
    """A group of calls in a step, or the step itself (`share` is then what its kernels cover).

    `share` is percent of `step_ms`, the step of the median image as it was under the profiler;
    `floor_ms` is the sum of the floors of the calls, `gap_ms` what the time is beyond it.
    """

    calls: float
    share: float
    step_ms: float
    floor_ms: float
    gap_ms: float
    kernels: list[Kernel] = field(default_factory=list)

    @property
    def ms(self) -> float:
        """Of the group in that step."""
        return self.share * self.step_ms / 100


@dataclass
class Row:
    kind: str
    name: str
    site: str
    shape: dict[str, int]
    dtype: str
    backend: str
    status: str
    machine: Machine
    reason: str | None = None
    timing: Timing | None = None
    rates: Rates | None = None
    accuracy: Accuracy | None = None
    memory: Memory | None = None
    decode: Decode | None = None
    profile: Profile | None = None
    speedup_eager: float | None = None
    speedup_compiled: float | None = None
    speedup_upstream: float | None = None
    speedup_upstream_compiled: float | None = None
    reference_error: float | None = None


def to_dict(rows: list[Row], command: str) -> dict[str, Any]:
    return {
        "schema": VERSION,
        "command": command,
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def validate(data: Any) -> list[Row]:
    """The rows of a parsed result file.

    Raises:
        SchemaError: names the field, what it must be, and what it is.
    """
    if not isinstance(data, dict):
        raise SchemaError(f"a result must be an object, got {type(data).__name__}")
    if data.get("schema") != VERSION:
        raise SchemaError(f"schema must be {VERSION}, got {data.get('schema')!r}")
    for key, kind in (("command", str), ("rows", list)):
        if not isinstance(data.get(key), kind):
            raise SchemaError(f"{key} must be a {kind.__name__}, got {data.get(key)!r}")
    extra = sorted(data.keys() - {"schema", "command", "rows"})
    if extra:
        raise SchemaError(f"unknown field {extra[0]!r}")
    rows = []
    for i, value in enumerate(data["rows"]):
        row = _object(Row, value, f"rows[{i}]")
        _check_row(row, f"rows[{i}]")
        rows.append(row)
    return rows


def load(path: Path) -> list[Row]:
    """The rows of a result file.

    Raises:
        SchemaError: not JSON, or not of the schema; names the file. OSError: cannot be read.
    """
    try:
        return validate(json.loads(path.read_text()))
    except (SchemaError, json.JSONDecodeError) as e:
        raise SchemaError(f"{path}: {e}") from e


def save(path: Path, rows: list[Row], command: str) -> None:
    """Write a result file whole or not at all; a reader always finds a valid one.

    Raises:
        SchemaError: a row is not of the schema; nothing is written.
    """
    data = to_dict(rows, command)
    validate(data)
    with written_whole([path]) as (partial,):
        partial.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def _object(cls: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise SchemaError(f"{where} must be an object, got {value!r}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(value.keys() - hints.keys())
    if unknown:
        raise SchemaError(f"{where} has an unknown field {unknown[0]!r}")
    required = {
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - value.keys())
    if missing:
        raise SchemaError(f"{where} lacks the field {missing[0]!r}")
    return cls(**{k: _value(hints[k], v, f"{where}.{k}") for k, v in value.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in args:
            return None
        (hint,) = (a for a in args if a is not types.NoneType)
        return _value(hint, value, where)
    if dataclasses.is_dataclass(hint):
        return _object(hint, value, where)
    if origin is list:
        if not isinstance(value, list):
            raise SchemaError(f"{where} must be a list, got {value!r}")
        return [_value(args[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise SchemaError(f"{where} must be an object, got {value!r}")
        return {k: _value(args[1], v, f"{where}.{k}") for k, v in value.items()}
    allowed = (int, float) if hint is float else hint
    if not isinstance(value, allowed) or isinstance(value, bool):
        raise SchemaError(f"{where} must be {hint.__name__}, got {value!r}")
    if hint is float and not math.isfinite(value):
        raise SchemaError(f"{where} must be finite, got {value!r}")
    return value


def _check_row(row: Row, where: str) -> None:
    for name, choices in (("kind", KINDS), ("status", STATUSES), ("dtype", DTYPES)):
        _one_of(f"{where}.{name}", getattr(row, name), choices)
    if row.status != "measured":
        if not row.reason:
            raise SchemaError(f"{where}.reason must say why the status is {row.status}")
        if row.timing is not None:
            raise SchemaError(f"{where}.timing must be null where the status is {row.status}")
        return
    if row.timing is None:
        raise SchemaError(f"{where}.timing must not be null where the status is measured")
    _check_timing(row.timing, f"{where}.timing")
    if row.kind != "decode" and row.rates is None:
        raise SchemaError(f"{where}.rates must not be null for a measured {row.kind}")
    if row.kind == "decode" and row.decode is None:
        raise SchemaError(f"{where}.decode must not be null for a measured decode")
    if row.kind == "profile" and row.profile is None:
        raise SchemaError(f"{where}.profile must not be null for a measured profile")
    if row.rates is not None and row.rates.bound is not None:
        _one_of(f"{where}.rates.bound", row.rates.bound, BOUNDS)
    if row.accuracy is not None:
        _one_of(f"{where}.accuracy.rule", row.accuracy.rule, RULES)


def _check_timing(t: Timing, where: str) -> None:
    if not t.samples_ms:
        raise SchemaError(f"{where}.samples_ms must not be empty")
    if not 0 < t.min_ms <= t.median_ms <= t.max_ms:
        raise SchemaError(
            f"{where} must have 0 < min <= median <= max, got {t.min_ms}, {t.median_ms}, {t.max_ms}"
        )
    if (t.min_ms, t.max_ms) != (min(t.samples_ms), max(t.samples_ms)):
        raise SchemaError(f"{where}.min_ms and max_ms must be those of samples_ms")


def _one_of(where: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SchemaError(f"{where} must be one of {', '.join(choices)}, got {value!r}")
