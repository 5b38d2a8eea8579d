"""PiD on a CUDA device: streams, modes, graphs, memory, and the first call of a size. Goldens:
test_goldens_on_devices.py."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch
from tiny_networks import CONFIGS, V15, inputs, network
from tiny_pid import tiny_caption, tiny_latent, tiny_net

from bench import models
from pixeldiff.models.pid import PiDNet
from pixeldiff.models.pid.decoder import Interrupted, PiDDecoder
from pixeldiff.models.pid.samplers import network_time, student_times

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
GOALS = {2048: 1.5e9, 4096: 6e9}


@pytest.fixture(autouse=True)
def _exact_and_alone():
    """fp32 convolutions in fp32, and no gradients."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


# ---- Streams, modes, moves, compilation ------------------------------------------------------


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def tiny(request):
    return tiny_net(dtype=request.param).to(DEVICE).pack_()


def pixels(decoder, seed: int = 0, **options) -> torch.Tensor:
    latent = options.pop("latent", tiny_latent(seed=seed)).to(DEVICE)
    caption = options.pop("caption", tiny_caption(seed=seed)).to(DEVICE)
    return decoder.decode(latent, caption=caption, seed=seed, output="pt", **options).images


def busy() -> None:
    """Half a millisecond or so of work ahead of what follows on the current stream."""
    a = torch.ones(2048, 2048, device=DEVICE)
    for _ in range(20):
        a = a @ a * 1e-4


@pytest.mark.parametrize("graphs", [False, True])
def test_any_stream(tiny, graphs):
    decoder, plain = (PiDDecoder(tiny, cuda_graphs=g) for g in (graphs, False))
    want = [pixels(plain, seed) for seed in range(8)]
    torch.cuda.synchronize()
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    for seed, stream in zip(range(8), itertools.cycle(streams)):
        with torch.cuda.stream(stream):
            busy()
            got = pixels(decoder, seed)
            same = torch.equal(got, want[seed])
        assert same


@pytest.mark.parametrize("graphs", [False, True])
def test_modes_of_the_caller(tiny, graphs):
    decoder = PiDDecoder(tiny, cuda_graphs=graphs)
    want = pixels(PiDDecoder(tiny, cuda_graphs=False))
    modes = [
        torch.no_grad,
        torch.inference_mode,
        torch.enable_grad,
        lambda: torch.autocast("cuda", torch.bfloat16),
        torch.inference_mode,
        torch.no_grad,
    ]
    for mode in modes:
        with mode():
            assert torch.equal(pixels(decoder), want)


def test_after_a_trip_to_the_cpu(tiny):
    decoder = PiDDecoder(tiny)
    want = pixels(decoder)
    for _ in range(2):
        tiny.to("cpu").to(DEVICE)
        for _ in range(3):  # two products where one was: other rounding
            assert (pixels(decoder) - want).square().mean().sqrt() < 0.05
        tiny.pack_()
        for _ in range(3):
            assert torch.equal(pixels(decoder), want)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_compiled_step(config):
    torch._dynamo.reset()
    net = network(config).to(DEVICE).requires_grad_(False)
    kw = {name: value.to(DEVICE) for name, value in inputs().items()}
    condition = net.prepare(
        kw["lq_latent"], kw["y"], kw["degrade_sigma"], size=(16, 32), timesteps=[634.0]
    )
    compiled = torch.compile(net.step, fullgraph=True)
    for x in (kw["x"], kw["x"] * 0.5):
        want = net.step(x, 634.0, condition)
        torch.testing.assert_close(compiled(x, 634.0, condition), want, rtol=1e-4, atol=1e-4)


def test_a_step_neither_waits_for_the_device_nor_makes_it_wait():
    net = network(V15).to(DEVICE).requires_grad_(False)
    kw = {name: value.to(DEVICE) for name, value in inputs().items()}
    t, t_next = student_times()[1:3]
    tables = net.tables((16, 32), kw["y"].shape[1], [network_time(t)])
    given, noise = (kw["lq_latent"], kw["y"], kw["degrade_sigma"]), torch.randn_like(kw["x"])

    def work():
        condition = net.prepare(*given, size=(16, 32), tables=tables)
        net.student_step(condition, kw["x"], t, t_next, lambda shape: noise)
        net.step(kw["x"], network_time(t), condition)

    work()  # compilation
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- Graphs ----------------------------------------------------------------------------------


def captured(decoder) -> int:
    return len(decoder.graphs._captured)


@pytest.mark.parametrize("sample_type", ["sde", "ode"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_graphs_change_no_pixel(tiny, sample_type, steps, batch):
    decoder, plain = PiDDecoder(tiny), PiDDecoder(tiny, cuda_graphs=False)
    for seed in range(4):
        options = {
            "sample_type": sample_type,
            "steps": steps,
            "latent": tiny_latent(batch, seed=seed),
        }
        assert torch.equal(pixels(decoder, seed, **options), pixels(plain, seed, **options))
    assert captured(decoder) == 1
    sizes = [tiny_latent(1, 1, width) for width in (1, 2, 3)]
    for seed, latent in itertools.product(range(3), sizes):
        assert torch.equal(pixels(decoder, seed, latent=latent), pixels(plain, seed, latent=latent))
    for seed in range(3):  # the pool's memory was others' meanwhile
        assert torch.equal(pixels(decoder, seed), pixels(plain, seed))
    assert captured(decoder) == 2


def test_previews_and_interruption(tiny):
    decoder, plain = PiDDecoder(tiny), PiDDecoder(tiny, cuda_graphs=False)
    for _ in range(4):
        seen = [[], []]
        for some, infos in zip((decoder, plain), seen, strict=True):
            pixels(some, callback=infos.append)
        assert all(torch.equal(a.x0, b.x0) for a, b in zip(*seen, strict=True))
        with pytest.raises(Interrupted):
            pixels(decoder, callback=lambda info: info.step < 2)
    assert captured(decoder) == 1


def test_weights_changed_in_place_show(tiny):
    decoder, plain = PiDDecoder(tiny), PiDDecoder(tiny, cuda_graphs=False)
    before = [pixels(decoder) for _ in range(3)]
    for p in tiny.parameters():
        p.data.mul_(1.05)
    after = pixels(decoder)
    assert not torch.equal(after, before[0])
    assert torch.equal(after, pixels(plain))
    assert captured(decoder) == 1


def test_threads_on_their_own_streams(tiny):
    decoder, plain = PiDDecoder(tiny), PiDDecoder(tiny, cuda_graphs=False)
    want, wrong = [pixels(plain, seed) for seed in range(16)], []

    def work(first):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for seed in range(first, 16, 2):
                if not torch.equal(pixels(decoder, seed), want[seed]):
                    wrong.append(seed)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_a_capture_that_fails_leaves_all_usable(tiny, monkeypatch):
    """The device is waited for in the middle of a step, which no capture survives."""
    decoder, plain, step = (
        PiDDecoder(tiny),
        PiDDecoder(tiny, cuda_graphs=False),
        PiDNet.student_step,
    )

    def waits(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        torch.cuda.synchronize()
        return result

    want = pixels(plain)
    with monkeypatch.context() as patch:
        patch.setattr(PiDNet, "student_step", waits)
        assert torch.equal(pixels(decoder), want)
        with pytest.warns(RuntimeWarning, match="could not be captured as CUDA graphs"):
            assert torch.equal(pixels(decoder), want)
        assert torch.equal(pixels(decoder), want)
    assert captured(decoder) == 0
    for _ in range(3):
        assert torch.equal(pixels(decoder, steps=2), pixels(plain, steps=2))
    assert captured(decoder) == 1
    torch.randn(1000, device=DEVICE)  # the host's own generator is as it was


def test_inside_a_capture_of_the_caller_nothing_is_captured(tiny):
    decoder = PiDDecoder(tiny)
    recorder = decoder.graphs.recorder_for(DEVICE)
    assert recorder.why_not() is None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.zeros(1, device=DEVICE)
        assert recorder.why_not() == "the caller is capturing a graph"


# ---- At released size ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["flux-2k", "flux-v1.5"])
def released(request):
    with torch.no_grad():
        decoder = models.decoder(request.param, DEVICE, "bf16")
    decoder.net.pack_()
    yield decoder
    decoder.release_graphs()


def image(decoder, side: int, seed: int = 0) -> torch.Tensor:
    given = models.inputs(decoder.net.config, side, 1, DEVICE)
    return decoder.decode(given.latent, caption=given.caption, seed=seed, output="pt").images


@pytest.mark.filterwarnings("ignore::pixeldiff.errors.UntrainedSizeWarning")
def test_released_graphs_change_no_pixel(released):
    plain = PiDDecoder(released.net, variant=released.variant, cuda_graphs=False)
    released.release_graphs()
    for side, seed in itertools.product((512, 1024), range(3)):
        assert torch.equal(image(released, side, seed), image(plain, side, seed))
    assert captured(released) == 2


@pytest.mark.filterwarnings("ignore::pixeldiff.errors.UntrainedSizeWarning")
def test_released_first_call_of_a_new_size(released, record_property):
    """No kernel is compiled for a size: after one image, any other comes at once."""
    image(released, 512)
    for side in (544, 768, 1056):
        torch.cuda.synchronize()
        start = time.perf_counter()
        image(released, side)
        torch.cuda.synchronize()
        record_property(f"seconds_{side}", time.perf_counter() - start)
        assert time.perf_counter() - start < 2


def pool_bytes() -> int:
    """Memory that only graphs may use."""
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))


@pytest.mark.filterwarnings("ignore::pixeldiff.errors.UntrainedSizeWarning")
@pytest.mark.parametrize("side", GOALS)
def test_released_memory(released, side, record_property):
    plain = PiDDecoder(released.net, variant=released.variant, cuda_graphs=False)
    released.release_graphs()
    image(plain, 512)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    weights, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    image(plain, side)
    activations = torch.cuda.max_memory_allocated() - weights
    record_property("activations_gb", activations / 1e9)
    assert activations <= GOALS[side]

    torch.cuda.empty_cache()
    for _ in range(3):
        image(released, side)
    torch.cuda.empty_cache()
    fixed = torch.cuda.memory_allocated() - weights
    record_property("graphs_gb", (pool_bytes() + fixed) / 1e9)
    assert captured(released) == 1
    assert 0 < pool_bytes() + fixed <= GOALS[side] * 1.1  # whole segments, gaps included
    released.release_graphs()
    assert pool_bytes() == 0
    assert torch.cuda.memory_reserved() <= reserved + 200e6  # tables, workspaces
