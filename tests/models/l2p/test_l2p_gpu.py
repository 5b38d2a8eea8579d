"""L2P on a CUDA device: streams, modes, graphs, memory. Goldens: test_l2p_goldens_on_devices.py."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch
from tiny_l2p import captions, draw, fill, relative

from bench import forward
from pixeldiff.models.l2p import VARIANTS, L2PConfig, L2PNet, L2PPipeline, bands
from pixeldiff.models.l2p.config import DECODERS
from pixeldiff.models.l2p.sampler import guided
from pixeldiff.models.steps import Interrupted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
FP32, BF16 = torch.float32, torch.bfloat16
SIZE = {"height": 128, "width": 192}
# Released widths of a head and of the local decoder, so that the kernels meet their own shapes.
SMALL = {"dim": 256, "n_heads": 2, "n_layers": 2, "n_refiner_layers": 1, "cap_feat_dim": 20}
GUIDED = {"guidance_scale": 3.0, "negative_prompt_embeds": captions(9)}


@pytest.fixture(autouse=True)
def _exact_and_alone():
    """fp32 convolutions in fp32, and no gradients."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


# ---- Streams, modes, compilation ---------------------------------------------------------------


def small(form: str = "1k", dtype: torch.dtype = BF16) -> L2PNet:
    patch = {"1k": 16, "4k": 64, "8k": 128, "10k": 160}[form]
    net = L2PNet(L2PConfig(patch_size=patch, local_decoder=DECODERS[form], **SMALL))
    fill(net)
    return net.to(DEVICE, dtype).eval().requires_grad_(False).pack_()


@pytest.fixture(params=[FP32, BF16], ids=["fp32", "bf16"])
def net(request):
    return small(dtype=request.param)


def pixels(pipe, seed: int = 0, **options) -> torch.Tensor:
    given = {"prompt_embeds": draw(5, 20, seed=50 + seed), "num_inference_steps": 3, "seed": seed}
    return pipe(**{**given, **SIZE, "output_type": "pt", **options}).images


def busy() -> None:
    """Half a millisecond or so of work ahead of what follows on the current stream."""
    a = torch.ones(2048, 2048, device=DEVICE)
    for _ in range(20):
        a = a @ a * 1e-4


@pytest.mark.parametrize("graphs", [False, True])
def test_any_stream(net, graphs):
    pipe, plain = (L2PPipeline(net, cuda_graphs=g) for g in (graphs, False))
    want = [pixels(plain, seed, **GUIDED) for seed in range(8)]
    torch.cuda.synchronize()
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    for seed, stream in zip(range(8), itertools.cycle(streams)):
        with torch.cuda.stream(stream):
            busy()
            got = pixels(pipe, seed, **GUIDED)
            same = torch.equal(got, want[seed])
        assert same


def test_modes_of_the_caller(net):
    pipe, want = L2PPipeline(net), pixels(L2PPipeline(net, cuda_graphs=False), **GUIDED)
    modes = [
        torch.no_grad,
        torch.inference_mode,
        torch.enable_grad,
        lambda: torch.autocast("cuda", BF16),
        torch.inference_mode,
    ]
    for mode in modes:
        with mode():
            assert torch.equal(pixels(pipe, **GUIDED), want)


@pytest.mark.parametrize("form", ["1k", "10k"])
def test_compiled_step(form):
    torch._dynamo.reset()
    net = small(form, FP32)
    side = net.config.size_multiple
    condition = net.prepare(captions(5, 40), (side, side), times=[0.3])
    x, g = draw(1, 3, side, side).to(DEVICE), torch.tensor(3.0, device=DEVICE)
    compiled = torch.compile(net.step, fullgraph=True)
    for given in (x, x * 0.5):
        want = net.step(given, 0.3, condition, guidance=g)
        assert relative(compiled(given, 0.3, condition, guidance=g), want) < 1e-3


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("form", ["1k", "4k", "8k", "10k"])
def test_a_step_neither_waits_for_the_device_nor_makes_it_wait(form, together):
    net = small(form)
    side = net.config.size_multiple
    x, y, negative = draw(1, 3, side, side).to(DEVICE), captions(5), captions(40)
    for scale in (1.0, 3.0):
        predict = guided(
            net,
            *(y, negative, (side, side)),
            guidance_scale=scale,
            times=[0.3],
            together=together,
        )
        t = torch.full((), 0.7, device=DEVICE)

        def work(predict=predict, t=t):
            predict(x, 0.3)
            predict(x, 0.4)  # not prepared
            net.step(x, t, predict.conditions[0])

        work()  # compilation
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- Graphs ------------------------------------------------------------------------------------


def captured(pipe) -> int:
    return len(pipe.graphs._captured)


@pytest.mark.parametrize(
    "options",
    [
        {},
        GUIDED,
        {**GUIDED, "guidance_together": False},
        {**GUIDED, "negative_prompt_embeds": captions(40)[0]},
        {"num_images_per_prompt": 2},
        {"height": 128, "width": 256},
        {"image": draw(1, 3, 128, 192).clamp(-1, 1), "strength": 0.5},
    ],
    ids=["plain", "guided", "in-turn", "masked", "batch", "unpadded", "image"],
)
def test_graphs_change_no_pixel(net, options):
    pipe, plain = L2PPipeline(net), L2PPipeline(net, cuda_graphs=False)
    for seed in range(4):
        assert torch.equal(pixels(pipe, seed, **options), pixels(plain, seed, **options))
    assert captured(pipe) == 1
    for seed, width in itertools.product(range(3), (64, 128, 320)):  # others use the pool
        assert torch.equal(pixels(pipe, seed, width=width), pixels(plain, seed, width=width))
    for seed in range(3):
        assert torch.equal(pixels(pipe, seed, **options), pixels(plain, seed, **options))
    assert captured(pipe) == 2


@pytest.mark.parametrize("form", ["4k", "8k", "10k"])
def test_graphs_of_other_forms(form):
    net = small(form)
    side = {"height": net.config.size_multiple, "width": 2 * net.config.size_multiple}
    pipe, plain = L2PPipeline(net), L2PPipeline(net, cuda_graphs=False)
    for seed in range(3):
        images = [pixels(p, seed, **side, **GUIDED) for p in (pipe, plain)]
        assert torch.equal(*images)
    assert captured(pipe) == 1


def test_graphs_with_the_decoder_in_tiles(net):
    pipe, plain = L2PPipeline(net), L2PPipeline(net, cuda_graphs=False)
    what = bands.Load(net.config.local_decoder, 3, (256, 256), 1, 2, net.dtype.itemsize)
    memory = what.memory(bands.Tiling(0, 256, 256)) // 2
    assert bands.plan(what, memory).levels > 0
    given = {"height": 256, "width": 256, "decoder_memory": memory, **GUIDED}
    for seed in range(3):
        assert torch.equal(pixels(pipe, seed, **given), pixels(plain, seed, **given))
    assert captured(pipe) == 1


def test_steps_schedule_scale_and_prompts_are_of_one_kind(net):
    pipe, plain = L2PPipeline(net), L2PPipeline(net, cuda_graphs=False)
    changes = [{}, {"num_inference_steps": 5}, {"shift": 5.0}, {"guidance_scale": 7.5}]
    changes += [{"prompt_embeds": draw(31, 20, seed=8)}]
    for seed, change in enumerate(changes):
        options = {**GUIDED, **change}
        assert torch.equal(pixels(pipe, seed, **options), pixels(plain, seed, **options))
    assert captured(pipe) == 1


def test_previews_and_interruption(net):
    pipe, plain = L2PPipeline(net), L2PPipeline(net, cuda_graphs=False)
    for _ in range(3):
        seen = [[], []]
        for some, values in zip((pipe, plain), seen, strict=True):
            pixels(some, callback=lambda info, to=values: to.append(info.x0))
        assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
        with pytest.raises(Interrupted):
            pixels(pipe, callback=lambda info: info.step < 2)
    assert captured(pipe) == 1


def test_weights_changed_in_place_show(net):
    pipe, plain = L2PPipeline(net), L2PPipeline(net, cuda_graphs=False)
    before = [pixels(pipe) for _ in range(3)]
    for p in net.parameters():
        p.data.mul_(1.05)
    after = pixels(pipe)
    assert not torch.equal(after, before[0])
    assert torch.equal(after, pixels(plain))
    assert captured(pipe) == 1


def test_threads_on_their_own_streams(net):
    pipe, plain = L2PPipeline(net), L2PPipeline(net, cuda_graphs=False)
    want, wrong = [pixels(plain, seed) for seed in range(16)], []

    def work(first):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for seed in range(first, 16, 2):
                if not torch.equal(pixels(pipe, seed), want[seed]):
                    wrong.append(seed)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong
    assert captured(pipe) == 1


def test_a_capture_that_fails_leaves_all_usable(net, monkeypatch):
    """The device is waited for in the middle of a step, which no capture survives."""
    pipe, plain, step = L2PPipeline(net), L2PPipeline(net, cuda_graphs=False), L2PNet.step

    def waits(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        torch.cuda.synchronize()
        return result

    want = pixels(plain)
    with monkeypatch.context() as patch:
        patch.setattr(L2PNet, "step", waits)
        assert torch.equal(pixels(pipe), want)
        with pytest.warns(RuntimeWarning, match="a step at 128 x 192 could not be captured"):
            assert torch.equal(pixels(pipe), want)
        assert torch.equal(pixels(pipe), want)
    assert captured(pipe) == 0
    for _ in range(3):
        assert torch.equal(pixels(pipe, width=64), pixels(plain, width=64))
    assert captured(pipe) == 1
    torch.randn(1000, device=DEVICE)  # the host's own generator is as it was


def pool_bytes() -> int:
    """Memory that only graphs may use."""
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))


def test_released_graphs_give_their_memory_back(net):
    pipe = L2PPipeline(net)
    pixels(pipe)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        pixels(pipe)
    assert pool_bytes() > 0
    pipe.release_graphs()
    assert pool_bytes() == 0
    assert torch.cuda.memory_allocated() <= before + 64e6  # workspaces


# ---- At released size --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["4k", "8k"])
def test_released(name, record_property):
    """Random weights: graphs change nothing, the peak is within its goal, a new size comes at
    once."""
    variant = VARIANTS[name]
    net, side = forward.network(variant.config, DEVICE, BF16), variant.native_size
    pipe, plain = L2PPipeline(net), L2PPipeline(net, cuda_graphs=False)
    y = torch.randn(100, 2560, generator=torch.Generator().manual_seed(1))
    given = {"prompt_embeds": y, "num_inference_steps": 1, "height": side, "width": side}
    want = pixels(plain, **given)
    del want
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    want = pixels(plain, **given)
    record_property("peak_gb", torch.cuda.max_memory_allocated() / 1e9)
    for _ in range(3):
        assert torch.equal(pixels(pipe, **given), want)
    assert captured(pipe) == 1
    record_property("graphs_gb", pool_bytes() / 1e9)
    pipe.release_graphs()
    del want
    other = {**given, "height": side // 2, "width": side}
    torch.cuda.synchronize()
    begin = time.perf_counter()
    pixels(plain, **other)
    torch.cuda.synchronize()
    record_property("new_size_seconds", time.perf_counter() - begin)
    assert time.perf_counter() - begin < 2
