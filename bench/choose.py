"""Turns races into the choice of backends: pixeldiff/ops/measured/<op>.json.

A race is one op at one place, size and dtype of one result file: what `bench kernels` timed in turn
on the same data. Only times of one race are ever compared. Races of the same class of problem
(pixeldiff/ops/problems.py) are weighed together, by the geometric mean of (time / least time), as
`bench tune` weighs tiles; the GPU's own time counts, not the host's, since a decode is replayed
from a graph. A backend keeps its place unless one behind it is faster by `MARGIN`, so that noise
does not turn a table over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixeldiff.ops import choice
from pixeldiff.ops.choice import Order
from pixeldiff.ops.examples import arguments
from pixeldiff.ops.problems import problem
from pixeldiff.ops.registry import OPS
from pixeldiff.out_files import written_whole

from .kernels import EAGER, shape_of
from .machine import DTYPES
from .schema import Machine, Row, load
from .shapes import Case, cases

TABLES = choice.FOLDER
MARGIN = 1.02
REFERENCE = "reference"
# What a table's "reference" was timed as, where that is not the op's own: an op that stands for
# several others is not called at all then.
REFERENCES = {"qkv_norm_rope": "in-parts"}
# What must be the same of all files: a choice holds for one kind of device and one set of kernels.
SAME = ("device_name", "capability", "commit", "torch", "triton")
Class = tuple[str, str, int]  # op, kind, size


@dataclass(frozen=True)
class Race:
    """Args:
    ms: of what can be chosen and was right.
    out: of what can be chosen, and failed or was wrong: why.
    refused: what said it cannot take the call; it is passed over at a call too.
    others: ms of what cannot be chosen, the compiled reference and rivals.
    """

    file: str
    op: str
    kind: str
    size: int
    site: str
    pixels: int
    utc: str
    ms: Mapping[str, float]
    out: Mapping[str, str]
    refused: frozenset[str]
    others: Mapping[str, float]

    @property
    def of_class(self) -> Class:
        return self.op, self.kind, self.size


@dataclass(frozen=True)
class Decision:
    """What the races of one class say.

    Args:
        before: the order in which those that raced are tried now.
        after: the order to try them in; empty where nothing can be said, and `notes` say why.
        gain: time of what is tried first now over that of what will be.
        stands: whether the table has this very entry, so that nothing changes.
        entry: of the table.
    """

    op: str
    kind: str
    size: int
    before: Order
    after: Order
    gain: float
    stands: bool
    notes: tuple[str, ...]
    entry: Mapping[str, Any]


def read(paths: Sequence[Path]) -> tuple[Machine, list[Race]]:
    """What the files were measured with, and their races.

    Raises:
        ValueError: a file is not a result, holds no race on a GPU, was measured with something
            else than the others, or at shapes that bench/shapes.py does not have now.
    """
    first: tuple[Path, Machine] | None = None
    races = []
    for path in paths:
        rows = [row for row in load(path) if row.kind == "kernel"]
        if not rows:
            raise ValueError(f"{path} holds no races; `python -m bench kernels` writes them")
        for row in rows:
            _check_machine(path, row.machine, *(first or (path, row.machine)))
            first = first or (path, row.machine)
        races += _races(path, rows)
    if first is None:
        raise ValueError("give at least one result file of `python -m bench kernels`")
    return first[1], races


def decide(
    machine: Machine, races: Sequence[Race], tables: Path = TABLES, *, replace: bool = False
) -> list[Decision]:
    """One decision for every class, in order of op, kind and size.

    Args:
        tables: folder of the tables as they are; one that it lacks is the package's own.
        replace: forget what another kind of device of this capability said about these ops.

    Raises:
        ValueError: a table is damaged, or holds another device's entries.
    """
    by_class: dict[Class, list[Race]] = {}
    for race in races:
        by_class.setdefault(race.of_class, []).append(race)
    known: dict[str, dict[str, dict[int, Order]]] = {}
    decisions = []
    for (op, kind, size), some in sorted(by_class.items()):
        if op not in known:
            table = _table(op, tables)
            if not replace:
                _check_device(op, table, machine, tables)
            path = _path(op, tables)
            known[op] = choice.orders(_kept(table, machine, replace), path).get(
                machine.capability, {}
            )
        sizes = known[op].get(kind, {})
        decisions.append(_decided(machine, some, choice.nearest(sizes, size), sizes.get(size)))
    return decisions


def write(
    machine: Machine,
    decisions: Sequence[Decision],
    tables: Path = TABLES,
    *,
    replace: bool = False,
) -> list[Path]:
    """Put the decisions into the tables, all or none; other entries stay. The paths written."""
    data: dict[str, dict[str, Any]] = {}
    for d in decisions:
        if d.after:
            table = data.setdefault(d.op, _kept(_table(d.op, tables), machine, replace))
            kinds = table.setdefault(machine.capability, {})
            kinds.setdefault(d.kind, {})[str(d.size)] = d.entry
    if not data:
        return []
    tables.mkdir(parents=True, exist_ok=True)
    paths = [tables / f"{op}.json" for op in data]
    with written_whole(paths) as partial:
        for path, table in zip(partial, data.values(), strict=True):
            path.write_text(json.dumps(_sorted(table), indent=1, allow_nan=False) + "\n")
    return paths


def _check_machine(path: Path, this: Machine, first_path: Path, first: Machine) -> None:
    if this.device != "cuda":
        raise ValueError(
            f"{path} was measured on {this.device} ({this.device_name}); backends are chosen by "
            f"races on a GPU"
        )
    if this.capability is None:
        raise ValueError(f"{path} does not say its device's compute capability; measure again")
    for name in SAME:
        if getattr(this, name) != getattr(first, name):
            raise ValueError(
                f"{path} was measured with {name} {getattr(this, name)}, {first_path} with "
                f"{getattr(first, name)}; give files of one device and one build at a time"
            )


def _races(path: Path, rows: Sequence[Row]) -> list[Race]:
    by_race: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row.name, row.site, row.dtype, *sorted(row.shape.items()))
        by_race.setdefault(key, []).append(row)
    return [_race(path, some) for some in by_race.values()]


def _race(path: Path, rows: Sequence[Row]) -> Race:
    row = rows[0]
    names = [r.backend for r in rows]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{path}: {twice[0]} ran twice in one race: {row.name} {row.site}")
    kind, size = problem(
        row.name, arguments(row.name, "meta", DTYPES[row.dtype], _case(path, row).geometry)
    )
    ms, out, others = {}, {}, {}
    for r in rows:
        name = REFERENCE if r.backend == REFERENCES.get(r.name, EAGER) else r.backend
        if name not in selectable(row.name):
            if r.timing is not None:
                others[name] = r.timing.median_ms
        elif (wrong := _why_out(r)) is not None:
            out[name] = wrong
        elif r.timing is not None:
            ms[name] = r.timing.median_ms
    return Race(
        *(path.name, row.name, kind, size, row.site, row.shape["size"], row.machine.utc),
        *(ms, out, frozenset(r.backend for r in rows if r.status == "refused"), others),
    )


def selectable(op: str) -> Order:
    """What can be chosen on a GPU where nothing is measured, as it is tried then, and what runs on
    request only."""
    # Asked with tensors on no device: those that offer themselves for some calls do so for calls
    # (a mask, a log-sum-exp) that are in no race.
    backends = [b for b in OPS[op].backends if b.name != "cpu"]
    offered = [b.name for b in backends if b.automatic is True]
    return (*offered, REFERENCE, *(b.name for b in backends if b.name not in offered))


def _case(path: Path, row: Row) -> Case:
    if row.name not in OPS:
        raise ValueError(f"{path}: no op {row.name!r}; ops are {', '.join(sorted(OPS))}")
    for case in cases(row.name, (row.shape["size"],), row.shape.get("scale", 1)):
        if f"{case.system}/{case.site}" == row.site and shape_of(case) == row.shape:
            return case
    raise ValueError(
        f"{path}: {row.name} {row.site} at {row.shape['size']} is no place of bench/shapes.py as "
        f"it is now; measure again"
    )


def _why_out(row: Row) -> str | None:
    """Why this may not be chosen for problems of this class, or None."""
    if row.status == "failed":
        return f"failed: {row.reason}"
    if row.status != "measured":
        return None
    if row.accuracy is None:
        return "its error was not measured"
    if not row.accuracy.of_budget <= 1:
        return f"its error is {row.accuracy.of_budget:.2g} of what is allowed"
    return None


def _decided(machine: Machine, races: Sequence[Race], now: Order, own: Order | None) -> Decision:
    op, kind, size = races[0].of_class
    out = {name: f"{name}: {why}" for race in races for name, why in race.out.items()}
    current = (*now, *(name for name in selectable(op) if name not in now))
    raced = [name for name in current if any(name in r.ms for r in races) and name not in out]
    whole = [r for r in races if all(name in r.ms for name in raced)]
    notes = list(out.values())
    absent = [n for n in own or () if not any(n in {*r.ms, *r.out, *r.refused} for r in races)]
    after: Order = ()
    gain = 1.0
    if absent:
        notes.append(f"{', '.join(absent)}, which the table lists, did not race")
    elif len(raced) < 2:
        notes.append(
            f"nothing to choose from: {raced[0] + ' alone' if raced else 'nothing'} was timed"
        )
    elif not whole:
        notes.append(f"no race has all of {', '.join(raced)}; time them in one run")
    else:
        mean = {name: _slowdown(name, raced, whole) for name in raced}
        after = ranked(raced, mean)
        gain = mean[raced[0]] / mean[after[0]]
        notes += _faster(after[0], whole)
    return Decision(
        *(op, kind, size, tuple(raced), after, gain, bool(after) and after == own, tuple(notes)),
        entry=_entry(machine, after, whole, out),
    )


def _slowdown(name: str, raced: Sequence[str], races: Sequence[Race]) -> float:
    ratios = (math.log(r.ms[name] / min(r.ms[n] for n in raced)) for r in races)
    return math.exp(sum(ratios) / len(races))


def ranked(current: Sequence[str], mean: Mapping[str, float]) -> Order:
    """`current` by time, each keeping its place unless one behind it is faster by `MARGIN`."""
    left, order = list(current), []
    while left:
        fastest = min(left, key=mean.__getitem__)
        taken = left[0] if mean[left[0]] <= MARGIN * mean[fastest] else fastest
        left.remove(taken)
        order.append(taken)
    return tuple(order)


def _faster(chosen: str, races: Sequence[Race]) -> list[str]:
    names = dict.fromkeys(name for race in races for name in race.others)
    found = []
    for name in names:
        both = [r.ms[chosen] / r.others[name] for r in races if name in r.others]
        ratio = math.exp(sum(map(math.log, both)) / len(both))
        if ratio > MARGIN:
            found.append(f"{name} is {ratio:.2f} x as fast, and no backend")
    return found


def _entry(
    machine: Machine, order: Order, races: Sequence[Race], out: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "order": list(order),
        "device": machine.device_name,
        "commit": machine.commit,
        "torch": machine.torch,
        "triton": machine.triton,
        "races": [
            {"file": r.file, "site": r.site, "size": r.pixels, "utc": r.utc, "ms": dict(r.ms)}
            for r in races
        ],
        "left_out": list(out.values()),
    }


def _path(op: str, tables: Path) -> Path:
    own = tables / f"{op}.json"
    return own if own.exists() else choice.path(op)


def _table(op: str, tables: Path) -> dict[str, Any]:
    path = _path(op, tables)
    data = choice.read(path)
    choice.orders(data, path)
    return data


def _kept(table: dict[str, Any], machine: Machine, replace: bool) -> dict[str, Any]:
    if replace and _devices(table, machine) - {machine.device_name}:
        return {c: kinds for c, kinds in table.items() if c != machine.capability}
    return table


def _devices(table: Mapping[str, Any], machine: Machine) -> set[str]:
    kinds = table.get(machine.capability, {})
    return {str(e.get("device")) for sizes in kinds.values() for e in sizes.values()}


def _check_device(op: str, table: Mapping[str, Any], machine: Machine, tables: Path) -> None:
    others = sorted(_devices(table, machine) - {machine.device_name})
    if others:
        raise ValueError(
            f"{_path(op, tables)}: {machine.capability} was measured on {others[0]}, these files "
            f"on {machine.device_name}; --replace forgets the former"
        )


def _sorted(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        capability: {
            kind: {size: sizes[size] for size in sorted(sizes, key=int)}
            for kind, sizes in sorted(table[capability].items())
        }
        for capability in sorted(table, key=_version)
    }


def _version(capability: str) -> tuple[int, ...]:
    return tuple(int(n) if n.isdigit() else -1 for n in capability.split("."))
