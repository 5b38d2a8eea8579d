"""Captured decodes on a CPU: the pixels of the decode without them, whatever changes in between."""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings

import pytest
import torch
from tape import TapeRecorder
from tiny_networks import V1, network
from tiny_pid import tiny_caption, tiny_latent, tiny_net

import pixeldiff
from pixeldiff.models.graphs import GRAPHS
from pixeldiff.models.pid import PiDNet
from pixeldiff.models.pid.decoder import Interrupted, PiDDecoder
from pixeldiff.models.pid.samplers import STUDENT_T_LIST
from pixeldiff.models.pid.variants import SamplingSettings
from pixeldiff.models.recent import Recent


class Pair:
    """One network, a decoder that captures and one that does not."""

    def __init__(self, net, **options) -> None:
        self.net, self.tape = net.requires_grad_(False), TapeRecorder()
        self.captures = PiDDecoder(net, **options)
        self.captures.graphs.recorder_for = lambda device: self.tape
        self.plain = PiDDecoder(net, **{**options, "cuda_graphs": False})

    def check(self, seed: int = 0, **options) -> torch.Tensor:
        """The same pixels from both, with other values each time."""
        given = {
            "latent": tiny_latent(seed=seed),
            "caption": tiny_caption(seed=seed + 50),
            "sigma": 0.1 * (seed % 10),
            "seed": seed,
            "output": "pt",
        } | options
        latent = given.pop("latent")
        got = self.captures.decode(latent, **given)
        want = self.plain.decode(latent, **given)
        assert torch.equal(got.images, want.images)
        assert got.metadata == want.metadata
        return got.images


@pytest.fixture
def pair():
    return Pair(tiny_net())


def three_times(check, **options) -> None:
    images = [check(seed, **options) for seed in range(3)]
    for one, other in itertools.combinations(images, 2):
        assert not torch.equal(one, other)


# --- the same pixels


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("sample_type", ["sde", "ode"])
@pytest.mark.parametrize("state_dtype", ["fp64", "fp32"])
def test_samplers(pair, steps, sample_type, state_dtype):
    three_times(pair.check, steps=steps, sample_type=sample_type, state_dtype=state_dtype)
    assert len(pair.tape.decodes) == 1
    assert pair.tape.replays == 2 * (1 + steps)  # second and third decode: prepare and the steps


def test_network_that_predicts_the_image():
    sampling = SamplingSettings(
        steps=4, times=STUDENT_T_LIST, stochastic=True, cfg_scale=1.0, prediction_type="x0"
    )
    pair = Pair(tiny_net(), sampling=sampling)
    three_times(pair.check, sample_type="ode")
    assert len(pair.tape.decodes) == 1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 2)])
def test_sizes(pair, height, width):
    for seed in range(3):
        pair.check(seed, latent=tiny_latent(1, height, width, seed=seed))
    assert len(pair.tape.decodes) == 1


def test_gates_with_a_logit_for_each_channel():
    pair = Pair(network(V1))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        latent, y = (torch.randn(s, generator=generator) for s in ((1, 4, 2, 2), (1, 6, 12)))
        pair.check(seed, latent=latent, caption=y)
    assert len(pair.tape.decodes) == 1


def test_features_made_anew():
    pair = Pair(tiny_net(), low_memory=True)
    images = [pair.check(seed) for seed in range(3)]
    assert len(pair.tape.decodes) == 1
    pair.captures.low_memory = False
    for seed in range(3):
        assert torch.equal(pair.check(seed), images[seed])
    assert len(pair.tape.decodes) == 2


def test_patches_at_a_time():
    pair = Pair(tiny_net(), pixel_chunk=8)
    for seed in range(3):
        pair.check(seed)
    pair.captures.pixel_chunk = pair.plain.pixel_chunk = None
    for seed in range(3):
        pair.check(seed)
    assert len(pair.tape.decodes) == 2


def test_bf16():
    pair = Pair(tiny_net(dtype=torch.bfloat16))
    three_times(pair.check)
    assert len(pair.tape.decodes) == 1


def test_batches_with_shared_and_own_captions(pair):
    for captions in (1, 2):
        for seed in range(3):
            pair.check(
                seed,
                latent=tiny_latent(2, seed=seed),
                caption=tiny_caption(captions, seed=seed),
                sigma=[0.1 * seed, 0.5],
            )
    # Batches of one shape are of one kind, whether they share a caption or not.
    assert len(pair.tape.decodes) == 1


@pytest.mark.parametrize("each", [False, True])
def test_generators_are_drawn_from_as_without(pair, each):
    states = []
    for decoder in (pair.captures, pair.plain):
        generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
        given = generators if each else generators[0]
        images = [
            decoder.decode(tiny_latent(2), caption=tiny_caption(), generator=given, output="pt")
            for _ in range(4)
        ]
        states.append((torch.cat([i.images for i in images]), *(g.get_state() for g in generators)))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert pair.tape.replays == 3 * 5


@pytest.mark.filterwarnings("ignore::pixeldiff.errors.UntrainedSizeWarning")
def test_other_captions_and_latents_of_other_length_and_type_are_other_kinds(pair):
    kinds = [
        {},
        {"caption": tiny_caption()[:, :4]},
        {"latent": tiny_latent().bfloat16()},
        {"latent": tiny_latent(1, 2, 3)},
        {"latent": tiny_latent(2)},
        {"size": (80, 64)},
        {"steps": 2},
        {"sample_type": "ode"},
        {"state_dtype": "fp32"},
        {"callback": lambda info: None},
    ]
    pair.captures.graphs = type(pair.captures.graphs)(len(kinds))
    pair.captures.graphs.recorder_for = lambda device: pair.tape
    for _ in range(3):
        for kind in kinds:
            pair.check(**kind)
    assert len(pair.tape.decodes) == len(kinds)


# --- policy


def test_the_first_runs_without_the_second_captures(pair):
    for seed, (decodes, replays) in enumerate([(0, 0), (1, 5), (1, 10), (1, 15)]):
        pair.check(seed)
        assert (len(pair.tape.decodes), pair.tape.replays) == (decodes, replays)


def test_least_recently_used_goes(pair):
    assert pair.captures.graphs.limit == GRAPHS == 2

    def decode(width: int) -> int:
        pair.check(latent=tiny_latent(1, 1, width))
        return len(pair.tape.decodes)

    assert [decode(w) for w in (1, 1, 2, 2, 1)] == [0, 1, 1, 2, 2]
    assert [decode(w) for w in (3, 3)] == [2, 3]  # 2 goes
    assert [decode(w) for w in (1, 3)] == [3, 3]
    assert decode(2) == 4  # seen before, so captured at once; 1 goes
    assert [decode(w) for w in (3, 2, 1)] == [4, 4, 5]
    assert pair.tape.releases == 1, "a pool is given back only when nothing is in it"


def test_room_for_one():
    pair = Pair(tiny_net(), cuda_graphs=1)
    for width in (1, 1, 1, 2, 2, 2, 1):
        pair.check(latent=tiny_latent(1, 1, width))
    assert len(pair.tape.decodes) == 3
    assert pair.tape.releases == 3, "the pool is given back before its last decode is replaced"


def test_release(pair):
    for seed in range(3):
        pair.check(seed)
    pair.captures.release_graphs()
    assert all(tape.released for tape in pair.tape.decodes[0])
    for seed in range(3):
        pair.check(seed)
    assert len(pair.tape.decodes) == 2


@pytest.mark.parametrize("off", [False, 0])
def test_off(off):
    pair = Pair(tiny_net(), cuda_graphs=off)
    three_times(pair.check)
    assert pair.tape.turns == 0


@pytest.mark.parametrize("value", [-1, 1.5, "yes", None])
def test_bad_limits(value):
    message = rf"^cuda_graphs must be a bool or an integer >= 0, got {value!r}$"
    with pytest.raises(ValueError, match=message):
        PiDDecoder(tiny_net(), cuda_graphs=value)
    with pytest.raises(ValueError, match=message):
        PiDDecoder.from_pretrained("demo", cuda_graphs=value)


def test_a_teacher_is_not_captured():
    teacher = SamplingSettings(steps=3, times=None, stochastic=False, cfg_scale=1.0, shift=3.0)
    pair = Pair(tiny_net(), sampling=teacher)
    three_times(pair.check)
    assert pair.tape.turns == 0


def test_no_recorder_for_cpus():
    decoder = PiDDecoder(tiny_net())
    for _ in range(3):
        decoder.decode(tiny_latent(), caption=tiny_caption(), seed=0)
    assert len(decoder.graphs._captured) == 0


# --- weights


@pytest.mark.parametrize("through_data", [False, True])
def test_weights_changed_in_place_show(pair, through_data):
    _, _, before = [pair.check() for _ in range(3)]
    with torch.no_grad():
        for p in pair.net.parameters():
            (p.data if through_data else p).mul_(1.1)
    assert not torch.equal(pair.check(), before)
    assert len(pair.tape.decodes) == 1


@pytest.mark.parametrize("change", ["to", "assign", "pack", "one"])
def test_weights_elsewhere_are_captured_anew(pair, change):
    [pair.check() for _ in range(3)]
    if change == "to":
        pair.net.to(torch.bfloat16).to(torch.float32)
    elif change == "assign":
        state = {k: v * 1.1 for k, v in pair.net.state_dict().items()}
        pair.net.load_state_dict(state, assign=True)
        pair.net.requires_grad_(False)
    elif change == "pack":
        pair.net.pack_()
    else:
        bias = pair.net.final_layer.linear.bias
        bias.data = bias.data + 0.5
    assert pair.tape.releases == 1
    for decodes in (1, 2, 2):
        pair.check()
        assert len(pair.tape.decodes) == decodes
        assert all(tape.released for tape in pair.tape.decodes[0]), "memory for nothing"


def test_parts_that_are_not_there(pair):
    pair.net.register_module("absent", None)
    pair.net.register_buffer("none", None)
    three_times(pair.check)
    assert len(pair.tape.decodes) == 1


def test_another_network_in_the_same_decoder(pair):
    [pair.check() for _ in range(3)]
    other = tiny_net()
    with torch.no_grad():
        other.final_layer.linear.bias.add_(0.5)
    pair.captures.net = pair.plain.net = other
    [pair.check() for _ in range(3)]
    assert len(pair.tape.decodes) == 2


# --- callbacks


def test_previews_are_those_without_and_are_kept(pair):
    for _ in range(3):
        seen, expected = [], []
        for decoder, infos in ((pair.captures, seen), (pair.plain, expected)):
            decoder.decode(
                tiny_latent(),
                caption=tiny_caption(),
                seed=1,
                callback=lambda i, to=infos: to.append(i),
            )
        assert [(i.step, i.steps, i.t) for i in seen] == [(i.step, i.steps, i.t) for i in expected]
        assert all(torch.equal(a.x0, b.x0) for a, b in zip(seen, expected, strict=True))
    assert pair.tape.replays == 10


def test_images_are_not_overwritten(pair):
    images = [pair.check(seed) for seed in range(4)]
    again = [pair.check(seed) for seed in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(images, again, strict=True))


@pytest.mark.parametrize("step", [1, 2, 4])
def test_interruption(pair, step):
    def callback(info):
        return info.step < step

    for _ in range(3):
        with pytest.raises(Interrupted):
            pair.check(callback=callback)
    assert pair.tape.replays == 2 * (1 + step)
    for seed in range(2):
        pair.check(seed, callback=lambda info: None)
    assert pair.tape.replays == 2 * (1 + step) + 10
    assert len(pair.tape.decodes) == 1


def test_what_a_callback_raises_passes_and_leaves_all_usable(pair):
    def callback(info):
        raise KeyError("mine")

    for _ in range(3):
        with pytest.raises(KeyError, match="mine"):
            pair.check(callback=callback)
    pair.check(callback=lambda info: None)


def test_a_callback_may_decode(pair):
    inner = []

    def callback(info):
        inner.append(pair.check(seed=info.step, callback=lambda info: None))

    for _ in range(3):
        pair.check(callback=callback)
    assert len(inner) == 4 * 2 * 3
    assert pair.tape.decodes


def test_nan_is_still_an_error(pair):
    [pair.check() for _ in range(3)]
    bias = pair.net.final_layer.linear.bias
    kept = bias.clone()
    bias.fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="the network returned NaN"):
        pair.captures.decode(tiny_latent(), caption=tiny_caption(), seed=0)
    bias.copy_(kept)
    pair.check()
    assert pair.tape.replays == 5 * 4


# --- threads, modes


def test_a_decode_beside_another_runs_without(pair):
    [pair.check() for _ in range(2)]
    replays, finished = pair.tape.replays, threading.Event()

    def other():
        pair.check(seed=7)
        finished.set()

    def callback(info):
        if info.step == 2:
            thread = threading.Thread(target=other)
            thread.start()
            assert finished.wait(30), "the second decode waits for the first"
            thread.join()

    pair.check(callback=callback)  # without: another kind for the first time
    finished.clear()
    pair.check(callback=callback)
    assert pair.tape.replays > replays


def test_two_threads(pair):
    latents = [tiny_latent(seed=s) for s in range(12)]
    kw = {"caption": tiny_caption(), "output": "pt"}
    want = [pair.plain.decode(x, seed=i, **kw).images for i, x in enumerate(latents)]
    got = [None] * len(latents)

    def work(first):
        for i in range(first, len(latents), 2):
            got[i] = pair.captures.decode(latents[i], seed=i, **kw).images

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert pair.tape.replays


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("capture", [torch.no_grad, torch.inference_mode, autocast])
@pytest.mark.parametrize("replay", [torch.enable_grad, torch.inference_mode, autocast])
def test_modes_of_the_caller(pair, capture, replay):
    for mode in (capture, capture, replay, capture, replay):
        with mode():
            pair.check()
    assert pair.tape.replays == 4 * 5


# --- what runs without


def hook(net):
    net.patch_blocks[0].register_forward_hook(lambda *a: None)
    return contextlib.nullcontext()


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def replaced(net):
    net.student_step = net.student_step
    return contextlib.nullcontext()


def trained(net):
    net.final_layer.linear.bias.requires_grad_()
    return contextlib.nullcontext()


def subclassed(net):
    class Other(torch.nn.Parameter):
        pass

    norm = net.final_layer.norm
    norm.weight = Other(norm.weight.detach(), requires_grad=False)
    return contextlib.nullcontext()


NOT_CAPTURED = {
    "reference": lambda net: pixeldiff.backend("reference"),
    "one op's reference": lambda net: pixeldiff.backend(swiglu="reference"),
    "dispatch mode": lambda net: Watch(),
    "hook": hook,
    "replaced": replaced,
    "trained": trained,
    "subclass": subclassed,
}


@pytest.mark.parametrize("why", NOT_CAPTURED.values(), ids=NOT_CAPTURED)
def test_runs_without(pair, why):
    [pair.check() for _ in range(2)]
    before = pair.tape.turns
    with why(pair.net):
        [pair.check(seed) for seed in range(3)]
    assert pair.tape.turns == before == 1
    assert len(pair.tape.decodes) == 1


def test_a_recorder_that_cannot_now(pair):
    pair.tape.refuse = "the caller is capturing a graph"
    three_times(pair.check)
    assert pair.tape.turns == 0
    pair.tape.refuse = None
    three_times(pair.check)
    assert len(pair.tape.decodes) == 1


def test_settings_make_another_kind(pair):
    [pair.check() for _ in range(2)]
    with pixeldiff.backend(swiglu="cpu"):
        [pair.check() for _ in range(3)]
    assert len(pair.tape.decodes) == 2
    torch.use_deterministic_algorithms(True)
    try:
        [pair.check() for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(pair.tape.decodes) == 3


def test_a_capture_that_fails_is_told_once_and_not_tried_again(pair):
    pair.tape.fail = RuntimeError("operation not permitted\nlong text")
    pair.check()
    with pytest.warns(RuntimeWarning) as told:
        pair.check()
    assert [str(w.message) for w in told] == [
        "a decode at 64 x 64 could not be captured as CUDA graphs and runs without them: "
        "operation not permitted"
    ]
    pair.tape.fail = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        three_times(pair.check)
        assert not pair.tape.decodes
        for seed in range(3):
            pair.check(seed, steps=2)
    assert len(pair.tape.decodes) == 1


# --- recent values, tables


def test_recent_keeps_the_last_used():
    recent, made = Recent(2), []

    def get(key):
        return recent.made(key, lambda: made.append(key) or key.upper())

    assert [get(k) for k in "aabacab"] == list("AABACAB")
    assert made == list("abcb")
    assert "c" not in recent
    recent.make_room()
    assert len(recent) == 1
    recent.clear()
    assert recent.get("a") is None


def test_tables_are_made_once_for_a_size(pair, monkeypatch):
    made, make = [], PiDNet.tables
    monkeypatch.setattr(PiDNet, "tables", lambda *args: made.append(args[1]) or make(*args))
    for width in (1, 2, 1, 2):
        pair.plain.decode(tiny_latent(1, 1, width), caption=tiny_caption(), seed=0)
    assert made == [(32, 32), (32, 64)]
    pair.plain.decode(tiny_latent(1, 1, 1), caption=tiny_caption()[:, :3], seed=0)
    pair.plain.decode(tiny_latent(1, 1, 1), caption=tiny_caption(), seed=0, steps=2)
    assert len(made) == 4
