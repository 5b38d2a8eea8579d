"""Whole decodes: the variants agree, their numbers are of the right span, and failures are rows."""

from __future__ import annotations

import dataclasses
import time
from typing import ClassVar

import numpy as np
import pytest
import torch
from tiny_pid import CONFIG, tiny_caption, tiny_latent, tiny_net

import pixeldiff
from bench import decode, models, upstream, variants
from bench.decode import Plan, psnr, run
from bench.energy import NoEnergy, joules, nvml_counter
from bench.memory import Meter
from bench.variants import Loaded, Spec, _compiled_step, choice
from bench.workers import Worker, WorkerFailed
from pixeldiff.models.pid import PiDNet
from pixeldiff.models.pid.variants import variant

CPU = torch.device("cpu")
SPEC = Spec("pixeldiff", "demo", "cpu", "fp32", steps=2, batch=1, threads=1)


@pytest.fixture(autouse=True)
def _threads_stay():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class FakeWorker:
    """Answers like a worker; `images` are the times of its images in order."""

    log: ClassVar[list[str]] = []

    def __init__(self, timeout):
        self.variant, self.ended, self.count = "", False, 0

    def ask(self, do, **request):
        if do == "load":
            self.variant = request["variant"]
            if self.variant == "compile":
                raise WorkerFailed("RuntimeError: no compiler")
            sizes = {"weight_bytes": 40, "base_bytes": 100, "loaded_bytes": 150}
            return {"load_ms": 9.0, "steps": 4, "parameters": 10, "memory_source": "test", **sizes}
        assert do == "image"
        FakeWorker.log.append(f"{self.variant} {request['side']}")
        self.count += 1
        if request.get("save"):
            image = np.zeros((1, 3, 4, 4), np.float32)
            np.save(request["save"], image + 0.02 * (self.variant == "pixeldiff"))
        base = 100.0 if self.variant == "pixeldiff" else 300.0
        ms = base + (5000 if self.count == 1 else self.count)
        peak = 900 if self.count == 1 else 400 + self.count
        return {"ms": ms, "prepare_ms": 8.0, "step_ms": [20.0, 22.0, 24.0], "peak_bytes": peak}

    def end(self):
        self.ended = True


@pytest.fixture
def fake(monkeypatch):
    FakeWorker.log = []
    monkeypatch.setattr(decode, "Worker", FakeWorker)
    return FakeWorker


def test_rows_of_faked_workers(fake):
    plan = Plan(
        "demo", 128, CPU, "fp32", ("reference", "compile", "upstream"), images=3, new_side=64
    )
    (rows,) = run(plan)
    ours, plain, compiled, original = rows
    assert [r.backend for r in rows] == ["pixeldiff", "reference", "compile", "upstream"]
    assert (compiled.status, compiled.reason) == ("failed", "load: RuntimeError: no compiler")
    if upstream.why_not() is not None:
        assert original.status == "skipped"
        assert "absent" in original.reason
    # The first image is not among the timed ones, neither in time nor in the peak.
    assert ours.timing.samples_ms == [102.0, 103.0, 104.0]
    assert ours.timing.first_ms == 5101 - 1
    assert plain.timing.median_ms == 303.0
    assert ours.speedup_eager == pytest.approx(303 / 103)
    assert ours.speedup_compiled is None
    m = ours.memory
    assert (m.peak_bytes, m.first_peak_bytes, m.weight_bytes) == (404, 900, 40)
    assert m.activation_bytes == 404 - 150
    d = ours.decode
    assert (d.step_ms, d.prepare_ms, d.steps) == (22.0, 8.0, 4)
    assert (d.new_size_first_ms, d.new_size_tenth_ms) == (105.0, 114.0)
    assert d.psnr_reference_db == pytest.approx(10 * np.log10(4 / 0.02**2), abs=1e-3)
    # Interleaved after the first of each: A B A B A B, then A B in the new size.
    turns = [entry for entry in fake.log if not entry.startswith("upstream")]
    assert turns[:2] == ["pixeldiff 128", "reference 128"]
    assert turns[2:8] == ["pixeldiff 128", "reference 128"] * 3
    assert turns[8:] == ["pixeldiff 64", "reference 64"] * 10


def test_tiles_are_the_decoders_own(fake):
    whole = Loaded(SPEC).image(128)[2]
    for name in ("pixeldiff", "reference"):
        loaded = Loaded(dataclasses.replace(SPEC, variant=name, tile=2))  # cells of 32 pixels
        _, spans, image = loaded.image(128)
        assert len(spans["step"]) > SPEC.steps  # a call for each tile
        assert image.shape == whole.shape
        assert not torch.equal(image, whole)
    with pytest.raises(ValueError, match="in tiles are pixeldiff's own"):
        Loaded(dataclasses.replace(SPEC, variant="compile", tile=2))
    (rows,) = run(Plan("demo", 128, CPU, "fp32", ("reference",), images=2, tile=64))
    assert all(r.shape["tile"] == 64 for r in rows)
    with pytest.raises(ValueError, match="tile must be smaller than the image's side 64, got 64"):
        list(run(Plan("demo", 64, CPU, "fp32", tile=64)))
    with pytest.raises(ValueError, match="multiple of 32"):
        list(run(Plan("demo", 128, CPU, "fp32", tile=40)))


@pytest.mark.parametrize(
    ("variant", "mode"), [("compile", "default"), ("compile-max-autotune", "max-autotune")]
)
def test_the_mode_of_compilation(monkeypatch, variant, mode):
    modes = []

    def compiled(step, **options):
        modes.append(options)
        return step

    monkeypatch.setattr(torch, "compile", compiled)
    image = Loaded(dataclasses.replace(SPEC, variant=variant)).image(64)[2]
    assert modes == [{"dynamic": False, "fullgraph": True, "mode": mode}]
    plain = Loaded(dataclasses.replace(SPEC, variant="reference")).image(64)[2]
    value = psnr(image.numpy(), plain.numpy().astype(np.float64))
    assert value is None or value > 80


def test_psnr():
    assert psnr(np.zeros(8), np.zeros(8)) is None
    assert psnr(np.ones(8), -np.ones(8)) == pytest.approx(0.0)
    assert psnr(np.full(8, 0.2), np.zeros(8)) == pytest.approx(20.0)


def test_a_real_worker_decodes_the_demo():
    (rows,) = run(
        Plan("demo", 64, CPU, "fp32", ("reference",), steps=1, images=2, threads=1, timeout=200)
    )
    ours, plain = rows
    assert ours.status == plain.status == "measured", (ours.reason, plain.reason)
    for row in rows:
        d, m = row.decode, row.memory
        assert d.steps == 1
        assert d.parameters > 5e6
        assert 0 < d.step_ms < row.timing.max_ms
        assert d.step_ms + d.prepare_ms <= row.timing.max_ms
        assert m.weight_bytes == 4 * d.parameters
        assert m.peak_bytes > m.weight_bytes
    psnr_db = ours.decode.psnr_reference_db
    assert psnr_db is None or psnr_db > 80


def test_a_worker_that_dies_or_hangs_is_a_reason():
    worker = Worker(timeout=100)
    with pytest.raises(WorkerFailed, match="nosuch"):
        worker.ask("load", **{**dataclasses.asdict(SPEC), "config": "nosuch"})
    worker.process.kill()
    with pytest.raises(WorkerFailed, match="was killed, most likely for want of memory"):
        worker.ask("image", side=64)
    slow = Worker(timeout=0.05)
    with pytest.raises(WorkerFailed, match=r"no answer in 0\.05 s"):
        slow.ask("load", **dataclasses.asdict(SPEC))
    assert slow.process.poll() is not None


def test_the_compiled_step_is_one_graph_with_the_same_result(monkeypatch):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **o: compiled(f, **{**o, "backend": keep}))
    torch._dynamo.reset()
    net = tiny_net()
    step = _compiled_step(net)
    times = [999.0, 866.0, 634.0]
    condition = net.prepare(tiny_latent(), tiny_caption(), size=(64, 64), timesteps=times)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for t in times:
            torch.testing.assert_close(step(x, t, condition), net.step(x, t, condition))
    assert len(graphs) == 1


def test_fp32_baseline_of_a_bf16_run():
    spec = dataclasses.replace(SPEC, precision="bf16")
    narrow = Loaded(dataclasses.replace(spec, variant="reference"))
    wide = Loaded(dataclasses.replace(spec, variant="reference-fp32"))
    assert narrow.net.dtype == torch.bfloat16
    assert wide.net.dtype == torch.float32
    assert wide.weight_bytes > 1.9 * narrow.weight_bytes
    assert variants.precision("reference-fp32", "bf16") == "fp32"
    assert variants.precision("reference", "bf16") == "bf16"


def test_the_compiled_variant_makes_the_same_image(monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **o: compiled(f, **{**o, "backend": "eager"}))
    torch._dynamo.reset()
    plain = Loaded(dataclasses.replace(SPEC, variant="reference")).image(64)[2]
    loaded = Loaded(dataclasses.replace(SPEC, variant="compile"))
    _, spans, image = loaded.image(64)
    assert len(spans["step"]) == 2
    assert len(spans["prepare"]) == 1
    value = psnr(image.numpy(), plain.numpy())
    assert value is None or value > 100


def test_random_weights_depend_on_names_only_and_stay_in_their_dtype():
    nets = [
        PiDNet(CONFIG, device="meta", dtype=torch.bfloat16).to_empty(device="cpu") for _ in "ab"
    ]
    for net in nets:
        models.fill(net, torch.bfloat16)
    wide = PiDNet(CONFIG)
    models.fill(wide, torch.bfloat16)
    for (name, a), b, c in zip(
        nets[0].named_parameters(), nets[1].parameters(), wide.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert (a.dtype, c.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(a.float(), c), name
    with torch.no_grad():
        y = wide(torch.randn(1, 3, 64, 64), torch.ones(1), tiny_caption(), lq_latent=tiny_latent())
    assert 1e-2 < y.std() < 1e2


def test_released_networks_have_their_real_size():
    from pixeldiff.models.pid.variants import variants as released

    assert set(models.names()) == {"demo", *(v.name for v in released() if v.name != "pixeldit")}
    net = PiDNet(models.resolve("flux-2k").inference_config, device="meta")
    assert sum(p.numel() for p in net.parameters()) == 1_362_348_170
    with pytest.raises(ValueError, match="has no latent to decode"):
        models.resolve("pixeldit")


def test_inputs_of_a_size():
    c = variant("flux-2k").config
    made = models.inputs(c, 2048, 2, CPU)
    assert tuple(made.latent.shape) == (2, 16, 64, 64)
    assert tuple(made.caption.shape) == (1, 300, 2304)
    with pytest.raises(ValueError, match="size must be a positive multiple of 32"):
        models.inputs(c, 1000, 1, CPU)


def test_choice_of_backends():
    assert choice(("cpu",)) == {"rms_norm_modulate": "cpu", "gated_residual_norm": "cpu"} | {
        op: "cpu" for op, o in variants.OPS.items() if "cpu" in {b.name for b in o.backends}
    }
    assert choice(("auto",)) == {}
    assert choice(("cpu", "swiglu=reference"))["swiglu"] == "reference"
    with pytest.raises(ValueError, match="no op has a backend 'tpu'"):
        choice(("tpu",))
    with pytest.raises(ValueError, match="no op 'swigloo'"):
        choice(("swigloo=cpu",))


def test_more_weights_than_memory_is_refused_before_it_starts(monkeypatch):
    monkeypatch.setattr(decode.os, "sysconf", lambda name: 10**5)  # 10 GB free
    plan = Plan("flux-2k", 256, CPU, "fp32", ("reference",))
    with pytest.raises(ValueError, match=r"2 variants need 10\.9 GB, 10\.0 GB are free"):
        next(run(plan))


def test_spans_are_inside_the_image():
    loaded = Loaded(dataclasses.replace(SPEC, steps=2))
    loaded.image(64)
    ms, spans, image = loaded.image(64)
    assert len(spans["step"]) == 2
    assert len(spans["prepare"]) == 1
    assert sum(spans["step"]) + sum(spans["prepare"]) <= ms
    assert tuple(image.shape) == (1, 3, 64, 64)


@pytest.mark.skipif(Meter(CPU).now() is None, reason="no /proc here")
def test_the_peak_is_that_since_the_reset():
    meter = Meter(CPU)
    base = meter.now()
    block = torch.ones(50_000_000)
    del block
    assert meter.peak() >= base + 190e6
    meter.reset()
    assert meter.peak() < base + 100e6


def test_energy_is_per_image_and_watts_over_the_time():
    """A counter of 300 W: 0.5 s of work is 150 J; a factor of 1000 or the count would show."""
    now = [0.0]

    def work():
        now[0] += 0.5

    each, watts = joules(work, lambda: 7 + 300 * now[0], least_seconds=2.0, clock=lambda: now[0])
    assert (each, watts) == (pytest.approx(150), pytest.approx(300))
    assert now[0] == 2.0


def test_no_energy_on_a_cpu():
    with pytest.raises(NoEnergy, match="NVIDIA GPUs only"):
        nvml_counter(CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_energy_counter_of_a_gpu_counts_joules():
    pytest.importorskip("pynvml")
    counter = nvml_counter(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    before, start = counter(), time.perf_counter()
    while time.perf_counter() - start < 2:
        x @ x
        torch.cuda.synchronize()
    assert 20 < (counter() - before) / 2 < 2000


def test_the_original_is_a_row_that_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(upstream, "CHECKOUT", tmp_path)
    assert "put a checkout of github.com/nv-tlabs/PiD in .upstream/PiD" in upstream.why_not()
    with pytest.raises(ImportError, match="absent"):
        upstream.network(CONFIG, CPU)


needs_original = pytest.mark.skipif(
    upstream.why_not() is not None, reason=f"original {upstream.why_not()}"
)


@needs_original
def test_the_original_makes_the_same_image():
    ours = Loaded(dataclasses.replace(SPEC, steps=2, variant="reference")).image(64)[2]
    theirs = Loaded(dataclasses.replace(SPEC, steps=2, variant="upstream")).image(64)[2]
    value = psnr(theirs.numpy(), ours.numpy().astype(np.float64))
    assert value is None or value > 60


@needs_original
def test_the_accelerated_original_makes_its_own_image():
    loaded = Loaded(dataclasses.replace(SPEC, steps=1, variant="upstream+accelerate"))
    assert "forward" in loaded.net.__dict__
    image = loaded.image(64)[2]
    pixeldiff.restore(loaded.net)
    value = psnr(image.numpy(), loaded.image(64)[2].numpy().astype(np.float64))
    assert 60 < value < 200  # by other kernels
