"""Measures the tiles a Triton kernel may use, at real shapes, and writes the fastest to its table.

A kernel's `key` names the class of problem that one tile serves, so cases of several sizes share
it: the tile kept has the least geometric mean of (its time / the best time) over them. The
heuristic's own tile is among the candidates and keeps its place unless another is faster by
`MARGIN`, so that noise does not rewrite a table.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pixeldiff.ops.examples import arguments
from pixeldiff.ops.registry import OPS
from pixeldiff.out_files import written_whole

from .accuracy import Judge
from .machine import DTYPES, ROOT, last_level_cache, machine
from .resume import (
    DeviceLost,
    Watch,
    by_case,
    case_of,
    check_not_lost,
    guarded,
    is_done,
    limit_reached,
    losses,
    reason,
    unwatched,
)
from .schema import Rates, Row
from .shapes import Case, cases
from .timing import Candidate, Rotation, clock_for, first_call, interleave
from .work import WORK

TABLES = ROOT / "triton_kernels"
MARGIN = 1.02


@dataclass(frozen=True)
class Plan:
    """What to tune.

    Args:
        ops: names; empty is every op whose Triton kernel has candidates.
        dtypes: of `DTYPES`.
        sizes, scale: as in `bench.kernels.Plan`.
        rounds, seconds: samples of each candidate, and time for those of one case.
        limit: seconds for the whole; an op that is not finished keeps its table.
        tables: folder of the `<op>.json` that are rewritten.
    """

    device: torch.device
    ops: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("bf16",)
    sizes: tuple[int, ...] = ()
    scale: int = 1
    rounds: int = 7
    seconds: float = 3.0
    limit: float | None = None
    tables: Path = TABLES


def tunable() -> dict[str, ModuleType]:
    """Op -> its Triton module, for those that have candidates."""
    found = {}
    for name, op in sorted(OPS.items()):
        for backend in op.backends:
            if backend.name == "triton" and hasattr(backend.load(), "candidates"):
                found[name] = backend.load()
    return found


def run(plan: Plan, before: Sequence[Row] = (), watch: Watch = unwatched) -> Iterator[list[Row]]:
    """The rows of one case after the other; each op's table is written when its cases are done.

    Args:
        before: rows that there are already (`resume.rows_before`); their cases are not measured
            again, and count as measured now.
        watch: around first calls, see `resume.Watchdog`.

    Raises:
        ValueError: an op that has nothing to tune, or a device that no Triton kernel runs on.
        DeviceLost: when the rows that say so have been yielded.
    """
    modules = tunable()
    for name in plan.ops:
        if name not in modules:
            raise ValueError(f"{name!r} has no tiles to choose; ops are {', '.join(modules)}")
    launching = importlib.import_module("pixeldiff.triton_kernels.launching")
    refusal = launching.why_not_device(torch.empty(0, device=plan.device))
    if refusal is not None:
        raise ValueError(f"tune: device {plan.device}: a Triton kernel {refusal}")
    major, minor = launching.capability(torch.empty(0, device=plan.device))
    start, known = time.perf_counter(), by_case(before)
    for op in plan.ops or tuple(modules):
        measured: dict[str, list[Mapping[Any, float]]] = {}
        defaults: dict[str, Any] = {}
        for dtype in plan.dtypes:
            for case in cases(op, plan.sizes, plan.scale):
                had = known.get(case_of(_row(plan, case, dtype, "-")), [])
                late = plan.limit is not None and time.perf_counter() - start > plan.limit
                if late and not is_done(had):
                    yield [_without(plan, case, dtype, "skipped", limit_reached(plan.limit))]
                    return
                args = arguments(op, plan.device, DTYPES[dtype], case.geometry)
                if modules[op].why_not(*args) is not None:
                    continue
                key = modules[op].key(*args)
                defaults.setdefault(key, modules[op].heuristic((major, minor), *args))
                tiles = tiles_of(modules[op], args, defaults[key])
                if not is_done(had):
                    left = [t for t in tiles if label(t) not in losses(had)]
                    try:
                        rows = guarded(
                            functools.partial(
                                measure, plan, case, dtype, modules[op], args, left, watch
                            ),
                            functools.partial(_without, plan, case, dtype, "failed"),
                            plan.device,
                        )
                    except DeviceLost as e:
                        yield e.rows
                        raise
                    yield rows
                    had = [*had, *rows]
                measured.setdefault(key, []).append(times_of(had, tiles))
        chosen = {k: best(runs, defaults[k]) for k, runs in measured.items()}
        update(plan.tables / f"{op}.json", f"{major}.{minor}", chosen)


def tiles_of(module: ModuleType, args: tuple[Any, ...], default: Any) -> list[Any]:
    return list(dict.fromkeys([default, *module.candidates(*args)]))


def times_of(rows: Sequence[Row], tiles: Sequence[Any]) -> dict[Any, float]:
    """ms of every tile that ran and was right."""
    found = {row.backend: row.timing.median_ms for row in rows if row.timing is not None}
    return {tile: found[label(tile)] for tile in tiles if label(tile) in found}


@torch.no_grad()
def measure(
    plan: Plan,
    case: Case,
    dtype: str,
    module: ModuleType,
    args: tuple[Any, ...],
    tiles: Sequence[Any],
    watch: Watch = unwatched,
) -> list[Row]:
    """One row for every tile.

    Raises:
        DeviceLost: with one of them; only its row is there.
    """
    op = case.op
    judge = Judge(op, WORK[op], args, OPS[op].reference)
    rotation, clock = Rotation(args, last_level_cache(plan.device)), clock_for(plan.device)
    rows: dict[Any, Row] = {}
    ready: dict[Any, Candidate] = {}
    firsts: dict[Any, float] = {}
    for tile in tiles:
        candidate = Candidate(label(tile), _launch(module, tile))
        row = rows[tile] = _row(plan, case, dtype, candidate.name)
        try:
            with watch(row):
                first = first_call(candidate, rotation, clock)
            row.accuracy = judge(candidate.call(*rotation.copies[0]))
            if row.accuracy.of_budget > 1:
                raise ArithmeticError(f"its error is {row.accuracy.of_budget:.2g} of the budget")
        except Exception as e:  # a tile that does not fit the device is one tile fewer
            row.status, row.accuracy = "failed", None
            row.reason = reason(e)
            check_not_lost(plan.device, row)
            continue
        ready[tile], firsts[tile] = candidate, first
    timings = interleave(
        list(ready.values()), rotation, clock, rounds=plan.rounds, seconds=plan.seconds
    )
    work = WORK[op].bytes(args), WORK[op].flops(args)
    for tile, candidate in ready.items():
        rows[tile].timing = timing = timings[candidate.name]
        timing.first_ms = firsts[tile]
        gb_s, tflop_s = work[0] / timing.median_ms / 1e6, work[1] / timing.median_ms / 1e9
        rows[tile].rates = Rates(*work, gb_s, tflop_s)
    return list(rows.values())


def _launch(module: ModuleType, tile: Any) -> Any:
    return lambda *args: module.launch(*args, config=tile)


def label(tile: Any) -> str:
    """ "block_m=128 num_warps=8" """
    return " ".join(f"{k}={v}" for k, v in dataclasses.asdict(tile).items())


def best(runs: list[Mapping[Any, float]], default: Any) -> Any:
    """The tile that ran in all cases with the least mean slowdown; `default` unless beaten."""
    everywhere = [t for t in runs[0] if all(t in times for times in runs)]
    if not everywhere:
        return default

    def slowdown(tile: Any) -> float:
        return math.prod(times[tile] / min(times.values()) for times in runs) ** (1 / len(runs))

    winner = min(everywhere, key=slowdown)
    if default in everywhere and slowdown(default) <= MARGIN * slowdown(winner):
        return default
    return winner


def update(path: Path, capability: str, chosen: Mapping[str, Any]) -> None:
    """Put the chosen tiles into a table; entries of other devices and problems stay.

    Raises:
        ValueError: the table is not JSON; it is left as it is.
    """
    if not chosen:
        return
    try:
        table = json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not a table of tiles: {e}") from e
    entries = table.setdefault(capability, {})
    entries.update({key: dataclasses.asdict(tile) for key, tile in chosen.items()})
    table = {c: dict(sorted(table[c].items())) for c in sorted(table)}
    with written_whole([path]) as (partial,):
        partial.write_text(json.dumps(table, indent=1) + "\n")


def _row(plan: Plan, case: Case, dtype: str, name: str) -> Row:
    return Row(
        kind="tile",
        name=case.op,
        site=f"{case.system}/{case.site}",
        shape={"size": case.size, "scale": case.scale, "tokens": case.geometry.tokens},
        dtype=dtype,
        backend=name,
        status="measured",
        machine=machine(plan.device),
    )


def _without(plan: Plan, case: Case, dtype: str, status: str, why: str) -> Row:
    row = _row(plan, case, dtype, "-")
    row.status, row.reason = status, why
    return row
