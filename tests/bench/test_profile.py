"""Profiles: traces as CUDA's come, invented here; floors; what is told by what; a real one."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from click.testing import CliRunner
from rows import MACHINE, kernel_row

from bench import profile, schema, trace
from bench.__main__ import main
from bench.calls import VIEWS, Call, Calls, Numbers
from bench.ceilings import Ceilings
from bench.profile import BETWEEN, STEP, rows_of, told_by
from bench.report import page
from bench.trace import Kernel, Step, TraceError, read
from bench.work import WORK
from pixeldiff import ops
from pixeldiff.ops.examples import arguments

TOP = Ceilings(gb_s=1000.0, tflop_s=1.0)  # a GB and a TFLOP a second and ms


def event(cat: str, name: str, ts: float, dur: float, correlation: int | None = None) -> dict:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


def launched(name: str, at: float, start: float, dur: float, number: int, **kind) -> list[dict]:
    """A kernel and its launch; microseconds, as all times of a trace."""
    cat = kind.get("cat", "kernel")
    return [
        event(kind.get("by", "cuda_runtime"), "launch", at, 2, number),
        event(cat, name, start, dur, number),
    ]


TRACE = [
    {"ph": "M", "name": "process_name"},
    *launched("spin_kernel", 5, 6, 90, 1),
    event("user_annotation", trace.STEP, 10, 80),
    event("gpu_user_annotation", trace.STEP, 100, 60),
    event("user_annotation", f"{trace.CALL}0", 11, 10),
    *launched("norm_kernel", 12, 100, 20, 2, by="cuda_driver"),
    event("user_annotation", f"{trace.CALL}1", 22, 20),
    *launched("gemm", 24, 125, 10, 3),
    *launched("gemm", 30, 130, 20, 4),  # beside the first for 5 us
    *launched("Memset (Device)", 45, 155, 5, 5, cat="gpu_memset"),
    *launched("spin_kernel", 195, 196, 90, 6),
    event("user_annotation", trace.STEP, 200, 50),
    event("user_annotation", f"{trace.CALL}0", 201, 10),
    *launched("norm_kernel", 203, 300, 40, 7),
    event("kernel", "lost", 345, 5, 99),  # its launch is not in the trace
]


def test_a_trace_of_a_gpu():
    first, second = read(TRACE[:-1], on_device=True)
    assert [(k.name, k.call) for k in first.kernels] == [
        *(("norm_kernel", 0), ("gemm", 1), ("gemm", 1), ("Memset (Device)", None))
    ]
    # From the first kernel to the last, not what the host or the spin took.
    assert (first.start, first.end) == (0.1, 0.16)
    assert first.ms == pytest.approx(0.06)
    assert first.busy_ms == pytest.approx(0.020 + 0.025 + 0.005)
    assert [(k.name, k.call) for k in second.kernels] == [("norm_kernel", 0)]
    # By its own time a kernel without a launch is in no step here: the host's end before it.
    (*_, last) = read(TRACE, on_device=True)
    assert [k.name for k in last.kernels] == ["norm_kernel"]


def test_traces_without_what_is_looked_for():
    with pytest.raises(TraceError, match="no step"):
        read(TRACE[:2], on_device=True)
    with pytest.raises(TraceError, match="no kernel in 1 steps"):
        read([event("user_annotation", trace.STEP, 10, 80)], on_device=True)


def step(*kernels: tuple[str, float, float, int | None]) -> Step:
    found = tuple(Kernel(*k) for k in kernels)
    return Step(found[0].start, max(k.end for k in found), found)


CALLS = [
    Call("norm", "4x8", 10**8, 0),  # 0.1 ms
    Call("mm", "4x8 8x8", 0, 10**9),  # 1 ms
    Call("mm", "4x8 8x8", 0, 10**9),
    Call("mm", "fp8", 0, 10**9, 2.0),  # 0.5 ms
]
EAGER = step(("n", 0, 1, 0), ("gemm", 1, 3, 1), ("gemm", 3, 6, 2), ("split", 6, 7, 3))


def test_replays_are_told_by_the_kernels_before():
    replay = step(
        ("n", 0, 1, None), ("gemm", 1, 3, None), ("gemm", 3, 6, None), ("split", 6, 7, None)
    )
    (told,) = told_by([replay], [EAGER], CALLS, 1)
    assert [k.call for k in told.kernels] == [0, 1, 2, 3]
    assert (told.start, told.end) == (0, 7)
    # One more of a name, all of one kind of call; and one that was not there.
    replay = step(*((n, i, i + 1, None) for i, n in enumerate(["gemm", "gemm", "gemm", "copy"])))
    (told,) = told_by([replay], [EAGER], CALLS, 1)
    assert [k.call for k in told.kernels] == [1, 1, 1, None]
    # Of several kinds of call: whose it is is not known.
    mixed = step(("gemm", 0, 1, 0), ("gemm", 1, 2, 3))
    (told,) = told_by([step(("gemm", 0, 1, None))], [mixed], CALLS, 1)
    assert [k.call for k in told.kernels] == [None]
    # The second step of an image by the second.
    other = step(("gemm", 0, 1, 3))
    told = told_by([replay, step(("gemm", 0, 1, None))], [EAGER, other], CALLS, 2)
    assert [k.call for k in told[1].kernels] == [3]


def base():
    return kernel_row(kind="profile", name=STEP, site="demo", shape={"height": 64}, profile=None)


def test_rows_add_up_to_the_step():
    last = step(("n", 0, 2, 0), ("gemm", 3, 5, 1), ("gemm", 5, 7, 1), ("copy", 8, 9, None))
    steps = [EAGER, last]
    rows = rows_of(base(), [3.5, 4.5], steps, CALLS, TOP)  # two images of a step each
    whole, *parts = rows
    assert (whole.name, whole.site, whole.timing.median_ms) == (STEP, "demo", 4.0)
    p = whole.profile
    assert p.step_ms == 7.0  # of 7 and 9, the image that stands for both
    assert p.share == 100
    by_name = {(r.name, r.site): r for r in parts}
    mm = by_name["mm", "demo/4x8 8x8"]
    assert mm.timing.samples_ms == [5.0, 4.0]
    assert mm.profile.calls == 1.5
    assert mm.profile.floor_ms == pytest.approx(1.5)
    assert mm.profile.gap_ms == pytest.approx(5.0 - 1.5)
    assert mm.rates.bound == "compute"
    assert by_name["norm", "demo/4x8"].profile.floor_ms == pytest.approx(0.1)
    assert by_name["norm", "demo/4x8"].rates.bound == "memory"
    assert by_name["mm", "demo/fp8"].profile.floor_ms == pytest.approx(0.25)
    assert by_name["copy", "demo"].profile.floor_ms == 0
    assert p.floor_ms == pytest.approx(sum(r.profile.floor_ms for r in parts))
    gaps = [r.profile.gap_ms for r in parts]
    assert gaps == sorted(gaps, reverse=True)
    schema.validate(schema.to_dict(rows, "command"))
    assert (BETWEEN, "demo") not in by_name  # that image had none
    assert sum(r.profile.share for r in parts) == pytest.approx(100)


def test_time_between_kernels_is_a_part():
    steps = [step(("n", 0, 1, 0), ("n", 3, 4, 0))] * 2
    rows = rows_of(base(), [4.0, 4.0], steps, CALLS, TOP)
    (between,) = (r for r in rows if r.name == BETWEEN)
    assert (between.timing.median_ms, between.profile.share) == (2.0, 50.0)
    assert rows[0].profile.share == 50.0


class Pretended:
    """A target whose step is one operator, on a device that is not there."""

    side = 64

    def __init__(self, capture: bool = True) -> None:
        self.capture, self.ran = capture, []

    def run(self, graphs, around) -> None:
        if graphs and not self.capture:
            warnings.warn("a decode could not be captured", RuntimeWarning, 2)
        self.ran.append(graphs)
        around(lambda: torch.ones(2).mul(2))


@pytest.fixture
def on_a_pretended_gpu(monkeypatch):
    """on_a_pretended_gpu(target, *traces): its rows, where the profiler gives these traces."""

    def run(target: Pretended, *traces):
        left = list(traces)

        def record(work, device):
            work()
            found = left.pop(0)
            if isinstance(found, Exception):
                raise found
            return found

        class NoClock(profile.Clock):
            def __call__(self, step):
                self._now.append(2.0)
                return step()

        monkeypatch.setattr(profile.trace, "record", record)
        monkeypatch.setattr(profile, "Clock", NoClock)
        monkeypatch.setattr(profile, "spin", lambda device: None)
        monkeypatch.setattr(profile, "machine", lambda device: MACHINE)
        plan = profile.Plan("demo", 64, torch.device("cuda"), "bf16", images=3)
        rows = [rows[0] for rows in profile._measure(plan, target, TOP)]
        schema.validate(schema.to_dict(rows, "command"))
        return rows

    return run


ONE = step(("ones", 0, 1, 0), ("mul", 1, 2, 1))
REPLAY = step(("ones", 0, 0.5, None), ("mul", 0.5, 1, None))


def test_with_graphs_and_without(on_a_pretended_gpu):
    target = Pretended()
    plain, replayed = on_a_pretended_gpu(target, [ONE], [ONE] * 3, [REPLAY] * 3)
    assert (plain.backend, plain.profile.step_ms) == ("pixeldiff-no-graphs", 2.0)
    assert (replayed.backend, replayed.profile.step_ms) == ("pixeldiff", 1.0)
    assert plain.timing.median_ms == replayed.timing.median_ms == 2.0
    # Warm, in turn, the calls noted; then recorded: once to start the profiler, and each way.
    warm, turns = [False] * 3 + [True] * 3, [False, True] * 3
    assert target.ran == [*warm, *turns, False, False, *[False] * 3, *[True] * 3]


def test_a_step_that_cannot_be_captured(on_a_pretended_gpu):
    target = Pretended(capture=False)
    plain, replayed = on_a_pretended_gpu(target, [ONE], [ONE] * 3)
    assert plain.status == "measured"
    assert replayed.status == "failed"
    assert "could not be captured" in replayed.reason
    assert not any(target.ran)


def test_a_trace_that_is_empty(on_a_pretended_gpu):
    lost = TraceError("the profiler saw no kernel in 3 steps")
    plain, replayed = on_a_pretended_gpu(Pretended(), [ONE], [ONE] * 3, lost)
    assert (plain.status, replayed.status) == ("measured", "failed")
    (plain,) = on_a_pretended_gpu(Pretended(), lost)
    assert (plain.status, plain.reason) == ("failed", f"TraceError: {lost}")


def test_calls_and_their_work():
    args = arguments("swiglu")
    a, b = torch.randn(4, 8), torch.randn(8, 16)
    with Calls() as calls:
        c = a @ b
        c.view(-1)
        c.add_(c[:1].expand(4, 16))
        ops.swiglu(*args)
        torch.empty(3)
    named = {c.op: c for c in calls.made}
    assert named["mm"] == Call("mm", "4x8 8x16", 4 * (32 + 128 + 64), 2 * 4 * 8 * 16)
    # A row that is repeated is read once: c, the row, and c again.
    assert named["add_"].bytes == 4 * (64 + 16 + 64)
    assert named["swiglu"].bytes == WORK["swiglu"].bytes(args)
    assert sum(c.op == VIEWS for c in calls.made) == 4
    assert named[VIEWS].bytes == named[VIEWS].flops == 0


def test_other_calls_than_before_are_noticed():
    with Calls() as calls:
        torch.ones(2).mul(2)
    with pytest.raises(TraceError, match="called where mul was"), Numbers(calls.made):
        torch.ones(2).add(2)
    with pytest.raises(TraceError, match="called where None was"), Numbers(calls.made):
        torch.ones(2).mul(2).mul(2)


@pytest.mark.parametrize("config", ["demo", "tiny"])
def test_a_profile_of_a_real_step(tmp_path, config):
    path = tmp_path / "profile.json"
    command = ["profile", "--config", config, "--size", "64", "--device", "cpu", "--images", "3"]
    done = CliRunner().invoke(main, [*command, "--quick", "--json", str(path)])
    assert done.exit_code == 0, done.output
    rows = [r for r in schema.load(path) if r.kind == "profile"]
    skipped = rows.pop()
    assert (skipped.backend, skipped.status) == ("pixeldiff", "skipped")
    whole, *parts = rows
    assert whole.name == STEP
    fused = {"demo": "pixel_adaln_mlp", "tiny": "local_decoder_up"}[config]
    assert {"joint_attention", fused} <= {r.name for r in parts}
    # What is listed is the step.
    assert sum(r.profile.share for r in parts) == pytest.approx(100)
    assert whole.profile.floor_ms == pytest.approx(sum(r.profile.floor_ms for r in parts))
    text = page(rows, [path], [])
    assert "### A step, part by part" in text
    assert f"**{config} 64x64, fp32, pixeldiff-no-graphs**" in text
    assert json.loads(path.read_text())["rows"][2]["machine"]["device"] == "cpu"
    assert MACHINE.device == "cpu"
