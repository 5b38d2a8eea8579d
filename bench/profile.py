"""One step of a network, kernel by kernel: where its time goes, and how far each part is from its
floor.

Warm, with random weights of the released size. The step is timed without the profiler, with CUDA
graphs and without in turn; then it is recorded. Without graphs every kernel is traced to the call
that launched it; a replay launches all at once, so its kernels are told by those of the other.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from pixeldiff.models.graphs import GRAPHS
from pixeldiff.models.pid.decoder import PRECISIONS

from . import ceilings, forward, models, trace
from .calls import Call, Calls, Numbers
from .ceilings import Ceilings, gb_s, tflop_s
from .machine import machine
from .resume import reason
from .schema import Kernel, Profile, Rates, Row
from .timing import summarise

WITH, WITHOUT = "pixeldiff", "pixeldiff-no-graphs"
STEP, BETWEEN = "step", "between kernels"
SPIN_MS = 50.0  # ahead of a step: longer than the host needs to launch it, annotated
SPIN_CYCLES = 2_000_000  # of `torch.cuda._sleep` in a millisecond, at the highest clock
LEAST_IMAGES = 3


@dataclass(frozen=True)
class Plan:
    """What to profile.

    Args:
        config: "demo" or a released network of PiD; or of `bench.forward.NETWORKS`.
        side: pixels of the square image; 0 is an L2P network's own.
        images: how many are timed and how many are recorded; of L2P as many calls.
        matrix: see `ceilings.measure`.
    """

    config: str
    side: int
    device: torch.device
    precision: str
    images: int = 5
    threads: int | None = None
    matrix: int | None = None


Around = Callable[[Callable[[], Any]], Any]


class Target(Protocol):
    side: int

    def run(self, graphs: bool, around: Around) -> None:
        """Make one image; each step is made by `around`, which is given it as a function."""


class Decode:
    """Images of a distilled PiD network, four steps each."""

    def __init__(self, plan: Plan) -> None:
        self.side = plan.side
        self.decoder = models.decoder(plan.config, plan.device, plan.precision)
        if not self.decoder.distilled:
            raise ValueError(f"only distilled networks are profiled, {plan.config} is none")
        self._inputs = models.inputs(self.decoder.net.config, plan.side, 1, plan.device)
        self._run = self.decoder.graphs.run

    def run(self, graphs: bool, around: Around) -> None:
        @contextlib.contextmanager
        def steps(*job: Any) -> Iterator[Callable]:
            with self._run(*job) as advance:
                yield lambda *given: around(lambda: advance(*given))

        self.decoder.graphs.limit = GRAPHS if graphs else 0
        self.decoder.graphs.run = steps
        given = self._inputs
        self.decoder.decode(given.latent, caption=given.caption, seed=0, output="pt")


class Forward:
    """Network calls of L2P."""

    def __init__(self, plan: Plan) -> None:
        side = plan.side or forward.NETWORKS[plan.config][0]
        asked = forward.Plan(plan.config, side, plan.device, plan.precision)
        geometry = forward.geometry_of(asked, WITH)
        net = forward.network(geometry, plan.device, PRECISIONS[plan.precision])
        self.side, self._x = side, forward.image_of(asked, geometry)
        self._variants = {}
        for graphs, name in ((True, WITH), (False, WITHOUT)):
            self._variants[graphs] = v = forward.Variant(forward.row_of(asked, name), net)
            forward.prepare(asked, v)

    def run(self, graphs: bool, around: Around) -> None:
        v = self._variants[graphs]
        with v.around():
            around(lambda: v.call(self._x))


def run(plan: Plan) -> Iterator[list[Row]]:
    """The ceilings; then for each way of running the step a row of it and one of each part, from
    the largest gap down.

    Raises:
        ValueError: an unknown config, or a size it cannot make.
    """
    if plan.threads:
        torch.set_num_threads(plan.threads)
    l2p = plan.config in forward.NETWORKS
    if not l2p:
        models.resolve(plan.config)
    dtype = PRECISIONS[plan.precision]
    name = "fp32" if dtype == torch.float32 else "bf16"
    with torch.no_grad():
        target = Forward(plan) if l2p else Decode(plan)
        top, rows = ceilings.measure(plan.device, name, dtype, rounds=5, side=plan.matrix)
        yield rows
        yield from _measure(plan, target, top)


def _measure(plan: Plan, target: Target, top: Ceilings) -> Iterator[list[Row]]:
    device, replayed = plan.device, _row(plan, target, WITH)
    for _ in range(3):
        target.run(False, lambda step: step())
    if device.type != "cuda":
        replayed.status, replayed.reason = "skipped", "CUDA graphs want a CUDA device"
    else:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", ".*could not be captured", RuntimeWarning)
                for _ in range(3):  # kernel by kernel, captured, replayed
                    target.run(True, lambda step: step())
        except RuntimeWarning as e:
            _fail(replayed, e)
    ways = (False, True) if replayed.status == "measured" else (False,)
    clock = Clock(device)
    for _ in range(plan.images):
        for graphs in ways:
            clock.image(graphs)
            target.run(graphs, clock)

    calls = Calls()
    target.run(False, _inside(device, lambda: calls))
    made = calls.made

    def record(graphs: bool, images: int) -> list[trace.Step]:
        def work() -> None:
            for _ in range(images):
                numbers = contextlib.nullcontext() if graphs else Numbers(made)
                target.run(graphs, _inside(device, lambda numbers=numbers: numbers, trace.step))

        return trace.record(work, device)

    try:
        record(False, 1)  # the profiler's own start
        steps = record(False, plan.images)
    except trace.TraceError as e:
        if replayed.status == "measured":
            replayed.status, replayed.reason = "skipped", "it is told by the kernels without graphs"
        yield [_fail(_row(plan, target, WITHOUT), e), replayed]
        return
    yield rows_of(_row(plan, target, WITHOUT), clock.of(False), steps, made, top)
    if True not in ways:
        yield [replayed]
        return
    try:
        told = told_by(record(True, plan.images), steps, made, len(steps) // plan.images)
    except trace.TraceError as e:
        yield [_fail(replayed, e)]
        return
    yield rows_of(replayed, clock.of(True), told, made, top)


def _inside(device: torch.device, *contexts: Callable) -> Around:
    def around(step: Callable[[], Any]) -> Any:
        spin(device)
        with contextlib.ExitStack() as stack:
            for context in reversed(contexts):
                stack.enter_context(context())
            return step()

    return around


def _fail(row: Row, error: Exception) -> Row:
    row.status, row.reason = "failed", reason(error)
    return row


class Clock:
    """Times every step it is given, without the profiler; means over the steps of each image."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._steps: dict[bool, list[list[float]]] = defaultdict(list)

    def image(self, graphs: bool) -> None:
        """What follows is of another image."""
        self._now = []
        self._steps[graphs].append(self._now)

    def of(self, graphs: bool) -> list[float]:
        return [statistics.fmean(steps) for steps in self._steps[graphs]]

    def __call__(self, step: Callable[[], Any]) -> Any:
        if self.device.type != "cuda":
            start = time.perf_counter()
            result = step()
            self._now.append(1e3 * (time.perf_counter() - start))
            return result
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        spin(self.device)
        start.record()
        result = step()
        end.record()
        end.synchronize()
        self._now.append(start.elapsed_time(end))
        return result


def spin(device: torch.device) -> None:
    """Keep an idle device busy, so that the host is ahead of it when the step begins."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda._sleep(int(SPIN_MS * SPIN_CYCLES))


def told_by(
    graphed: Sequence[trace.Step],
    steps: Sequence[trace.Step],
    calls: Sequence[Call],
    every: int,
) -> list[trace.Step]:
    """The steps of replays, their kernels given the calls of those recorded without graphs.

    The n-th kernel of a name belongs to the call that launched the n-th of that name in the same
    step of an image. Where their numbers differ, all belong to the one kind of call that launches
    it, or to none.

    Args:
        every: steps of an image.
    """
    found = []
    for i, step in enumerate(graphed):
        like: dict[str, list[int | None]] = defaultdict(list)
        for k in steps[i % every].kernels:
            like[k.name].append(k.call)
        count, seen, kernels = Counter(k.name for k in step.kernels), Counter(), []
        for k in step.kernels:
            having = like[k.name]
            if len(having) == count[k.name]:
                call = having[seen[k.name]]
            else:
                places = {None if c is None else (calls[c].op, calls[c].site) for c in having}
                call = having[0] if len(places) == 1 else None
            seen[k.name] += 1
            kernels.append(trace.Kernel(k.name, k.start, k.end, call))
        found.append(trace.Step(step.start, step.end, tuple(kernels)))
    return found


@dataclass
class _Group:
    """Calls of one op with the same shapes. `ms` is of each image, a mean over its steps."""

    ms: list[float]
    launches: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    calls: int = 0
    bytes: int = 0
    flops: int = 0
    speed: float = 1.0
    memory_ms: float = 0.0
    floor_ms: float = 0.0


def rows_of(
    base: Row,
    times: Sequence[float],
    steps: Sequence[trace.Step],
    calls: Sequence[Call],
    top: Ceilings,
) -> list[Row]:
    """The row of the step, that of the time between its kernels, and one for each group of calls.

    Args:
        base: what they have in common.
        times: of the step without the profiler, one an image.
        steps: as recorded, as many of each image.
    """
    every = len(steps) // len(times)
    groups: dict[tuple[str, str], _Group] = {}
    between = [0.0] * len(times)
    for i, step in enumerate(steps):
        between[i // every] += (step.ms - step.busy_ms) / every
        met: set[int] = set()
        for k in step.kernels:
            call = None if k.call is None else calls[k.call]
            key = (k.name, "") if call is None else (call.op, call.site)
            group = groups.setdefault(key, _Group([0.0] * len(times)))
            group.ms[i // every] += k.ms / every
            name = k.name if call is None or not k.name.startswith(trace.CALL) else call.op
            group.launches[name].append(k.ms)
            if call is None or k.call in met:
                group.calls += call is None
                continue
            met.add(k.call)
            _add(group, call, top)
    means = [statistics.fmean(s.ms for s in steps[i : i + every]) for i in _starts(steps, every)]
    # One image stands for all, so that its parts add up: the one whose steps took the median time.
    image = sorted(range(len(means)), key=means.__getitem__)[(len(means) - 1) // 2]
    whole, total = means[image], statistics.median(times)
    parts = [_part(base, key, g, image, whole, len(steps), top) for key, g in groups.items()]
    floor = sum(p.profile.floor_ms for p in parts)
    work = [round(sum(getattr(g, w) for g in groups.values()) / len(steps)) for w in _WORK]
    rates = Rates(
        *work,
        *(gb_s(work[0], total), tflop_s(work[1], total), top.gb_s, top.tflop_s),
        percent=100 * floor / total,
    )
    covered = Profile(1.0, 100 * (1 - between[image] / whole), whole, floor, total - floor)
    of_step = _with(base, STEP, "", times, rates, covered)
    if between[image] > 0:
        ms = between[image]
        idle = Profile(1.0, 100 * ms / whole, whole, 0.0, ms)
        nothing = Rates(0, 0, 0.0, 0.0, percent=0.0)
        parts.append(_with(base, BETWEEN, "", between, nothing, idle))
    parts.sort(key=lambda row: -row.profile.gap_ms)
    return [of_step, *parts]


_WORK = ("bytes", "flops")


def _starts(steps: Sequence[trace.Step], every: int) -> range:
    return range(0, len(steps), every)


def _add(group: _Group, call: Call, top: Ceilings) -> None:
    memory = call.bytes / top.gb_s / 1e6
    group.calls += 1
    group.bytes += call.bytes
    group.flops += call.flops
    group.speed = call.speed
    group.memory_ms += memory
    group.floor_ms += max(memory, call.flops / (top.tflop_s * call.speed) / 1e9)


def _part(
    base: Row,
    key: tuple[str, str],
    g: _Group,
    image: int,
    whole: float,
    steps: int,
    top: Ceilings,
) -> Row:
    ms, floor = g.ms[image], g.floor_ms / steps
    usual = statistics.median(filter(None, g.ms))
    moved, flops = round(g.bytes / steps), round(g.flops / steps)
    rates = Rates(
        *(moved, flops, gb_s(moved, usual), tflop_s(flops, usual)),
        *(top.gb_s, top.tflop_s * g.speed),
        bound="memory" if g.memory_ms >= g.floor_ms else "compute",
        percent=100 * floor / usual,
    )
    kernels = [Kernel(n, len(v) / steps, sum(v) / steps) for n, v in g.launches.items()]
    kernels.sort(key=lambda k: -k.ms)
    part = Profile(g.calls / steps, 100 * ms / whole, whole, floor, ms - floor, kernels)
    return _with(base, *key, g.ms, rates, part)


def _with(
    base: Row, name: str, site: str, times: Sequence[float], rates: Rates, found: Profile
) -> Row:
    row = Row(**vars(base))
    row.name, row.site = name, f"{base.site}/{site}" if site else base.site
    row.timing, row.rates, row.profile = summarise([*filter(None, times)]), rates, found
    return row


def _row(plan: Plan, target: Target, variant: str) -> Row:
    return Row(
        kind="profile",
        name=STEP,
        site=plan.config,
        shape={"height": target.side, "width": target.side, "batch": 1},
        dtype=plan.precision,
        backend=variant,
        status="measured",
        machine=machine(plan.device),
    )
