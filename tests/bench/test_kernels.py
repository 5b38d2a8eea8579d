"""The kernel benchmark: its rows, what is in them, and what an interruption leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import types
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from bench import resume, schema
from bench.__main__ import main
from bench.ceilings import Ceilings
from bench.kernels import Plan, measure, run
from bench.machine import machine
from bench.recorder import Recorder
from bench.resume import TIME_UP
from bench.shapes import cases
from bench.timing import summarise
from bench.work import WORK, Work
from pixeldiff import native
from pixeldiff.ops import registry
from pixeldiff.ops.examples import _ARGUMENTS
from pixeldiff.ops.registry import Backend

CPU = torch.device("cpu")
TOP = Ceilings(gb_s=10.0, tflop_s=0.1)
PLAN = Plan(CPU, sizes=(1024,), scale=16, rounds=3, seconds=0, compiled=False, matrix=64)


def rows_of(op: str, plan: Plan = PLAN, site: str = "image") -> dict[str, schema.Row]:
    (case,) = [c for c in cases(op, plan.sizes, plan.scale) if c.site == site]
    return {r.backend: r for r in measure(plan, case, "fp32", TOP)}


def test_every_backend_of_the_registry_has_a_row():
    rows = rows_of("gated_residual_norm")
    assert set(rows) == {"eager", "cuda", "triton", "cpu"}
    eager = rows["eager"]
    assert eager.status == "measured"
    assert eager.speedup_eager == 1
    assert eager.shape["scale"] == 16
    assert eager.shape["tokens"] == 16
    assert len(eager.timing.samples_ms) == 3
    assert eager.accuracy.of_budget <= 1
    for name in ("cuda", "triton"):
        if not torch.cuda.is_available():
            assert (rows[name].status, rows[name].timing) == ("refused", None)
            assert rows[name].reason
    if native.why_not() is None:
        assert rows["cpu"].status == "measured"
        assert rows["cpu"].speedup_eager == pytest.approx(
            eager.timing.median_ms / rows["cpu"].timing.median_ms
        )


def test_a_new_op_and_its_backends_need_one_entry(monkeypatch):
    """Registered here with three backends: one works, one refuses, one breaks."""

    def module(name, reason=None, error=None):
        m = types.ModuleType(name)
        m.why_not = lambda x: reason

        def launch(x):
            if error:
                raise RuntimeError(error)
            return x * 2

        m.launch = launch
        monkeypatch.setitem(__import__("sys").modules, name, m)
        return name

    registry.define(
        "bench_probe",
        "(Tensor x) -> Tensor",
        reference=lambda x: x * 2,
        fake=torch.empty_like,
        backends=(
            Backend("cuda", module("bench_probe_a", reason="takes nothing today")),
            Backend("triton", module("bench_probe_b", error="it broke\nhere"), automatic=False),
            Backend("cpu", module("bench_probe_c")),
        ),
    )
    try:
        monkeypatch.setitem(_ARGUMENTS, "bench_probe", lambda t, g: (t(1, g.tokens, g.width),))
        plan = Plan(CPU, ops=("bench_probe",), sizes=(256,), rounds=3, compiled=False, matrix=64)
        (row,) = list(run(plan))[1]
        assert (row.status, row.reason) == ("skipped", "no entry in bench/work.py")
        entry = Work(lambda a: 2 * a[0].numel() * 4, lambda a: a[0].numel(), "one rounding")
        monkeypatch.setitem(WORK, "bench_probe", entry)
        rows = {r.backend: r for r in list(run(plan))[1]}
        assert {n: r.status for n, r in rows.items()} == {
            "eager": "measured",
            "cuda": "refused",
            "triton": "failed",
            "cpu": "measured",
        }
        assert rows["cuda"].reason == "takes nothing today"
        assert rows["triton"].reason == "RuntimeError: it broke"
        assert rows["cpu"].accuracy.of_budget == 0
        assert rows["cpu"].rates.bytes == 2 * 256 * 1536 * 4
    finally:
        registry.OPS.pop("bench_probe")


@pytest.mark.slow
def test_the_compiled_baseline_is_compiled_before_it_is_timed():
    rows = rows_of("rms_norm_modulate", Plan(**{**PLAN.__dict__, "compiled": True}))
    compiled = rows["compiled"]
    assert compiled.status == "measured", compiled.reason
    assert compiled.timing.first_ms > 5 * compiled.timing.median_ms
    assert compiled.speedup_compiled == 1


def test_rates_are_work_over_time_and_percent_is_of_the_longer_floor():
    """1 GB in 200 ms is 5 GB/s, half of a 10 GB/s copy; 1 GFLOP takes a tenth of its floor."""
    memory = TOP.rates(10**9, 10**9, 200.0)
    assert memory.gb_s == pytest.approx(5.0)
    assert memory.tflop_s == pytest.approx(0.005)
    assert (memory.bound, memory.percent) == ("memory", pytest.approx(50.0))
    compute = TOP.rates(10**6, 10**11, 4000.0)
    assert (compute.bound, compute.percent) == ("compute", pytest.approx(25.0))


def test_ceilings_count_a_copy_as_read_and_written(monkeypatch):
    from bench import ceilings

    monkeypatch.setattr(ceilings, "_time", lambda *_: summarise([2.0, 1.0, 3.0]))
    monkeypatch.setattr(ceilings, "last_level_cache", lambda _: 2**20)
    top, rows = ceilings.measure(CPU, "bf16", torch.bfloat16, rounds=3, side=128)
    elements = rows[0].shape["elements"]
    assert elements * 2 == 2 * 2**20  # twice the cache
    assert top.gb_s == pytest.approx(2 * 2 * elements / 1e-3 / 1e9)  # the fastest sample
    assert top.tflop_s == pytest.approx(2 * 128**3 / 1e-3 / 1e12)
    assert rows[0].rates.gb_s == pytest.approx(top.gb_s / 2)  # the row has the median's
    assert [r.dtype for r in rows] == ["bf16", "bf16"]


def test_the_time_limit_leaves_rows_that_say_so():
    plan = Plan(CPU, ops=("swiglu",), sizes=(256,), limit=0.0, rounds=3, matrix=64)
    rows = [r for batch in run(plan) for r in batch if r.kind == "kernel"]
    assert {r.status for r in rows} == {"skipped"}
    assert rows[0].reason == "the time limit of 0 s was reached"


def test_a_run_goes_on_where_one_was_short_of_time(tmp_path):
    path = tmp_path / "r.json"
    arguments = ["kernels", "--quick", "--no-compile", "--op", "swiglu,rms_norm", "--device", "cpu"]
    arguments += ["--resume", "--json", str(path)]

    def went_on(*more: str) -> list[schema.Row]:
        done = CliRunner().invoke(main, [*arguments, *more])
        assert done.exit_code == (TIME_UP if more else 0), done.output
        return [r for r in schema.load(path) if r.kind == "kernel"]

    short = went_on("--limit", "0")
    assert {(r.name, r.status) for r in short} == {("swiglu", "skipped"), ("rms_norm", "skipped")}
    whole = went_on()
    assert "skipped" not in {r.status for r in whole}
    utc = machine(CPU).utc
    again = went_on()  # nothing is left to measure
    assert [r.timing for r in again] == [r.timing for r in whole]
    assert all(r.machine.utc <= utc for r in again)
    # Of other sources or another machine nothing is kept.
    here = machine(CPU)
    recorder = Recorder(path, json.loads(path.read_text())["command"])
    assert recorder.resume(here)
    assert Recorder(path, "python -m bench kernels --op swiglu").resume(here) == []
    assert recorder.resume(replace(here, driver="580.1", utc="2026-01-02T03:04:05+00:00"))
    assert recorder.resume(replace(here, commit="abc")) == []
    with pytest.raises(ValueError, match="--json names"):
        Recorder(None).resume(here)
    # A case of which rows are there is left out.
    case = [r for r in whole if (r.name, r.site) == ("swiglu", "pid/image")]
    sites = {r.site for rows in run(replace(PLAN, ops=("swiglu",)), case) for r in rows}
    assert sites == {"", "pid/text", "l2p/trunk"}


def test_a_kernel_that_takes_the_device_away_is_left_out_by_the_next_process(monkeypatch):
    """Nothing runs after it in its process; in the next one the rest of its case does."""
    lost = []

    def launched(op, args):
        if registry.forced_backend(op.name) == "triton":
            lost.append(True)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return op.reference(*args)

    monkeypatch.setattr(registry, "_run", launched)
    monkeypatch.setattr("bench.kernels._refusal", lambda *_: None)
    monkeypatch.setattr(resume, "_is_lost", lambda device: bool(lost))

    def process(before: list[schema.Row]) -> list[schema.Row]:
        lost.clear()
        rows = []
        with contextlib.suppress(resume.DeviceLost):
            for some in run(replace(PLAN, ops=("swiglu",)), before):
                rows += [r for r in some if r.kind == "kernel"]
        return rows

    first = process([])
    assert [(r.backend, r.status) for r in first] == [("triton", "failed")]
    assert first[0].reason.startswith("the device was lost: RuntimeError: CUDA error: an illegal")
    second = process(first)
    assert {r.backend: (r.site, r.status) for r in second} == {
        "eager": (first[0].site, "measured"),
        "cpu": (first[0].site, "measured"),
        "triton": ("pid/text", "failed"),  # breaks in the next of its places
    }
    third = process(first + second)
    assert first[0].site not in {r.site for r in third}


def test_a_kernel_that_never_ends_is_recorded_and_ends_the_process(tmp_path, monkeypatch):
    ended = threading.Event()

    def launched(op, args):
        if registry.forced_backend(op.name) == "triton":
            assert ended.wait(60)  # as in the driver: no Python of this thread runs meanwhile
        return op.reference(*args)

    monkeypatch.setattr(registry, "_run", launched)
    monkeypatch.setattr("bench.kernels._refusal", lambda *_: None)
    recorder, codes = Recorder(tmp_path / "r.json", "command"), []

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    watch = resume.Watchdog(1.0, recorder.add, end).around
    (case,) = [c for c in cases("swiglu", (1024,), 16) if c.site == "text"]
    measure(PLAN, case, "fp32", TOP, watch=watch)
    assert codes == [resume.DEVICE_LOST]
    (row,) = schema.load(tmp_path / "r.json")
    assert (row.backend, row.site, row.status) == ("triton", "pid/text", "failed")
    assert row.reason == "the device was lost: its first call did not end in 1 s"
    assert resume.losses([row]) == {"triton"}


def test_an_unknown_op_is_named():
    with pytest.raises(ValueError, match=r"no op 'swigloo'; ops are add_silu, .*, swiglu, "):
        next(run(Plan(CPU, ops=("swigloo",))))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interruption_keeps_the_rows_so_far(tmp_path, number):
    path = tmp_path / "r.json"
    recorder = Recorder(path, "command")
    row = rows_of("swiglu", site="image")["eager"]

    def measured():
        yield [row]
        os.kill(os.getpid(), number)
        yield [row]

    # A shell starts what it puts in the background with Ctrl-C ignored: the test may be there.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert recorder.record(measured(), lambda rows: None) is False
    finally:
        signal.signal(signal.SIGINT, before)
    assert [r.name for r in schema.load(path)] == ["swiglu"]


def test_command_line(tmp_path):
    path = tmp_path / "r.json"
    arguments = ["kernels", "--quick", "--no-compile", "--op", "swiglu,rms_norm", "--dtype", "bf16"]
    done = CliRunner().invoke(main, [*arguments, "--device", "cpu", "--json", str(path)])
    assert done.exit_code == 0, done.output
    rows = schema.load(path)
    assert {r.name for r in rows} == {"copy", "matmul", "swiglu", "rms_norm"}
    assert {r.dtype for r in rows} == {"bf16"}
    done = CliRunner().invoke(main, ["kernels", "--dtype", "bf17"])
    assert done.exit_code == 2
    assert "must be of fp32, bf16, fp16, got 'bf17'" in done.output
    done = CliRunner().invoke(main, ["kernels", "--json", str(tmp_path / "no" / "r.json")])
    assert done.exit_code == 1
