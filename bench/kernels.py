"""Every op against plain PyTorch, eager and compiled, at the shapes of real networks."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pixeldiff
from pixeldiff.ops import registry
from pixeldiff.ops.examples import arguments
from pixeldiff.ops.registry import OPS

from . import ceilings
from .accuracy import Judge
from .machine import DTYPES, last_level_cache, machine
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
from .rivals import RIVALS, refusal
from .schema import Memory, Row, Timing
from .shapes import Case, cases
from .timing import Candidate, Rotation, clock_for, first_call, interleave
from .work import WORK

EAGER, COMPILED = "eager", "compiled"


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        ops: names; empty is all.
        dtypes: of `DTYPES`.
        backends: fused backends to run beside eager and compiled; empty is all there are.
        sizes: pixels of a side; empty is each system's own.
        scale: divides the side of every image.
        rounds: samples of each candidate.
        seconds: for the samples of one case, roughly.
        limit: seconds for the whole; cases beyond it become rows that say so.
        compiled: whether to run the compiled baseline.
        rivals: whether to run those of `RIVALS`.
        matrix: side of the matrices of the compute ceiling.
    """

    device: torch.device
    ops: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("fp32",)
    backends: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    scale: int = 1
    rounds: int = 9
    seconds: float = 4.0
    limit: float | None = None
    compiled: bool = True
    rivals: bool = False
    matrix: int | None = None


def run(plan: Plan, before: Sequence[Row] = (), watch: Watch = unwatched) -> Iterator[list[Row]]:
    """The rows of one case after the other, as they are measured.

    Args:
        before: rows that there are already (`resume.rows_before`). Their cases are left out; one
            that a device was lost in is measured without what it was lost with.
        watch: around first calls, see `resume.Watchdog`.

    Raises:
        DeviceLost: when the rows that say so have been yielded.
    """
    unknown = sorted(set(plan.ops) - OPS.keys())
    if unknown:
        raise ValueError(f"no op {unknown[0]!r}; ops are {', '.join(sorted(OPS))}")
    start, known = time.perf_counter(), by_case(before)
    for name in plan.dtypes:
        top, rows = ceilings.measure(
            plan.device, name, DTYPES[name], rounds=plan.rounds, side=plan.matrix
        )
        yield rows
        for op in plan.ops or tuple(sorted(OPS)):
            for case in cases(op, plan.sizes, plan.scale):
                late = plan.limit is not None and time.perf_counter() - start > plan.limit
                had = known.get(case_of(_row(plan, case, name, "-", {}, "skipped", "")), [])
                if is_done(had):
                    continue
                if op not in WORK:
                    yield [_row(plan, case, name, "-", {}, "skipped", "no entry in bench/work.py")]
                elif late:
                    yield [_row(plan, case, name, "-", {}, "skipped", limit_reached(plan.limit))]
                else:
                    try:
                        yield guarded(
                            functools.partial(measure, plan, case, name, top, losses(had), watch),
                            functools.partial(_row, plan, case, name, "-", {}, "failed"),
                            plan.device,
                        )
                    except DeviceLost as e:
                        yield e.rows
                        raise


@torch.no_grad()
def measure(
    plan: Plan,
    case: Case,
    dtype: str,
    top: ceilings.Ceilings,
    without: Collection[str] = (),
    watch: Watch = unwatched,
) -> list[Row]:
    """One row for every implementation of one op in one place, interleaved, but those `without`.

    Raises:
        DeviceLost: with one of them; only its row is there.
    """
    op, work = OPS[case.op], WORK[case.op]
    args = arguments(case.op, plan.device, DTYPES[dtype], case.geometry)
    shape = shape_of(case)
    judge = Judge(case.op, work, args, op.reference)
    rotation = Rotation(args, last_level_cache(plan.device))
    args = rotation.copies[0]  # strides and alignment as in every timed call
    clock = clock_for(plan.device)
    torch._dynamo.reset()  # each case compiles for its own shape, as a user's first call would

    rows: list[Row] = []
    ready: list[tuple[Candidate, Row, float]] = []
    for candidate in _candidates(case.op, plan):
        if candidate.name in without:
            continue
        row = _row(plan, case, dtype, candidate.name, shape, "measured", None)
        rows.append(row)
        refusal = _refusal(case.op, candidate.name, args)
        if refusal is not None:
            row.status, row.reason = "refused", refusal
            continue
        try:
            # What is compiled whole may take its time.
            with (unwatched if candidate.name == COMPILED else watch)(row):
                first = first_call(candidate, rotation, clock)
            with candidate.context():
                row.accuracy = judge(candidate.call(*args))
                row.memory = _memory(candidate, args, plan.device)
        except Exception as e:  # whatever a candidate raises is its row's reason
            row.status, row.reason = "failed", reason(e)
            check_not_lost(plan.device, row)
            continue
        ready.append((candidate, row, first))

    timings = interleave(
        [c for c, *_ in ready], rotation, clock, rounds=plan.rounds, seconds=plan.seconds
    )
    for candidate, row, first in ready:
        timing = row.timing = timings[candidate.name]
        timing.first_ms = first
        row.rates = top.rates(
            work.bytes(args), work.flops(args), timing.median_ms, speed=work.speed
        )
        row.speedup_eager = _speedup(timings.get(EAGER), timing)
        row.speedup_compiled = _speedup(timings.get(COMPILED), timing)
    return rows


def _candidates(op: str, plan: Plan) -> list[Candidate]:
    reference = OPS[op].reference

    def plain(*args: Any) -> Any:
        return _contiguous(reference(*args))

    found = [Candidate(EAGER, plain)]
    if plan.compiled:
        found.append(Candidate(COMPILED, torch.compile(plain, dynamic=False, fullgraph=True)))
    registered = getattr(torch.ops.pixeldiff, op).default
    for backend in OPS[op].backends:
        if plan.backends and backend.name not in plan.backends:
            continue
        context = _forced(op, backend.name)
        found.append(Candidate(backend.name, registered, context))
    if plan.rivals:
        rivals = RIVALS.get(op, {}).items()
        found += [Candidate(name, rival.call, rival.context) for name, rival in rivals]
    return found


def _forced(op: str, backend: str) -> Callable:
    return lambda: pixeldiff.backend(**{op: backend})


def _refusal(op: str, backend: str, args: tuple[Any, ...]) -> str | None:
    rival = RIVALS.get(op, {}).get(backend)
    if rival is not None:
        return refusal(op, rival, args)
    return dict(registry.explain(op, *args)).get(backend)


def _contiguous(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.contiguous()
    return tuple(r.contiguous() for r in result)


def _memory(candidate: Candidate, args: tuple[Any, ...], device: torch.device) -> Memory | None:
    """Peak of one call, result included. None on a CPU, whose allocator does not tell."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    candidate.call(*args)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    return Memory(peak, peak - before, source="CUDA allocator")


def _speedup(base: Timing | None, timing: Timing) -> float | None:
    return None if base is None else base.median_ms / timing.median_ms


def shape_of(case: Case) -> dict[str, int]:
    g = case.geometry
    return {
        "size": case.size,
        "scale": case.scale,
        "tokens": g.tokens,
        "text": g.text,
        "width": g.width,
        "heads": g.heads,
        "head_dim": g.head_dim,
    }


def _row(
    plan: Plan,
    case: Case,
    dtype: str,
    backend: str,
    shape: dict[str, int],
    status: str,
    reason: str | None,
) -> Row:
    return Row(
        kind="kernel",
        name=case.op,
        site=f"{case.system}/{case.site}",
        shape=shape or shape_of(case),
        dtype=dtype,
        backend=backend,
        status=status,
        reason=reason,
        machine=machine(plan.device),
    )
