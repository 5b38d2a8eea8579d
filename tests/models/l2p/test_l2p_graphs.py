"""Captured steps on a CPU: the pixels of the steps without, whatever changes in between."""

from __future__ import annotations

import itertools
import threading
import warnings

import pytest
import torch
from tape import TapeRecorder
from tiny_l2p import LATENT, captions, config, draw, network
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pixeldiff
from pixeldiff.models.graphs import GRAPHS
from pixeldiff.models.l2p import L2PNet, L2PPipeline, bands
from pixeldiff.models.l2p.sampler import guided
from pixeldiff.models.l2p.scheduler import schedule
from pixeldiff.models.steps import Interrupted

SIZE = {"height": 32, "width": 48}
GUIDED = {"guidance_scale": 3.0, "negative_prompt_embeds": captions(9)}


class Pair:
    """One network, a pipeline that captures and one that does not."""

    def __init__(self, net, **options) -> None:
        self.net, self.tape = net, TapeRecorder()
        self.captures = L2PPipeline(net, **options)
        self.captures.graphs.recorder_for = lambda device: self.tape
        self.plain = L2PPipeline(net, cuda_graphs=False)

    def check(self, seed: int = 0, **options) -> torch.Tensor:
        """The same pixels from both, with another prompt for each seed."""
        given = {
            "prompt_embeds": draw(5, 20, seed=50 + seed),
            "num_inference_steps": 2,
            "seed": seed,
            "output_type": "pt",
            **SIZE,
        } | options
        got, want = self.captures(**given), self.plain(**given)
        assert torch.equal(got.images, want.images)
        assert got.metadata == want.metadata
        return got.images

    @property
    def captured(self) -> int:
        return len(self.tape.decodes)


@pytest.fixture
def net():
    return network(config(n_layers=1))


@pytest.fixture
def pair(net):
    return Pair(net)


def three_times(check, **options) -> None:
    images = [check(seed, **options) for seed in range(3)]
    for one, other in itertools.combinations(images, 2):
        assert not torch.equal(one, other)


# ---- The same pixels ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        GUIDED,
        {**GUIDED, "guidance_together": False},
        {**GUIDED, "negative_prompt_embeds": captions(40)[0]},  # longer: a key mask
        {"num_images_per_prompt": 2},
        {"height": 64, "width": 128},  # no padding: the noise refiner is shared
        {"image": draw(1, 3, 32, 48).clamp(-1, 1), "strength": 0.5},
    ],
    ids=["plain", "guided", "in-turn", "masked", "batch", "unpadded", "image"],
)
def test_options(pair, options):
    three_times(pair.check, **options)
    assert pair.captured == 1
    assert pair.tape.replays == 2 * 2  # the second and the third image's steps


@pytest.mark.parametrize("form", ["4k", "10k"])
def test_other_forms(form):
    pair = Pair(network(config(form, n_layers=1)))
    side = pair.net.config.size_multiple
    three_times(pair.check, **GUIDED, height=side, width=side, num_inference_steps=1)
    assert pair.captured == 1


def test_bf16():
    pair = Pair(network(config(n_layers=1), dtype=torch.bfloat16))
    three_times(pair.check, **GUIDED)
    assert pair.captured == 1


def test_the_decoder_in_tiles(pair, monkeypatch):
    """Inside the graph: how it is cut depends on shapes alone."""
    size, cuts = {"height": 128, "width": 96}, []
    what = bands.Load(pair.net.config.local_decoder, 3, (128, 96), 1, 1, 4)
    decode = bands.decode
    monkeypatch.setattr(bands, "decode", lambda *a: cuts.append(a[3].levels) or decode(*a))
    memory = what.memory(bands.Tiling(0, 128, 96)) // 2
    three_times(pair.check, **size, decoder_memory=memory)
    assert pair.captured == 1
    assert min(cuts) > 0


def test_steps_schedule_scale_and_prompts_are_of_one_kind(pair):
    for seed, options in enumerate(
        [
            {},
            {"num_inference_steps": 3},
            {"shift": 5.0},
            {"guidance_scale": 7.5},
            {"time_dtype": "bf16"},
            {"prompt_embeds": draw(31, 20, seed=8)},
            {"negative_prompt_embeds": draw(17, 20, seed=9)},
        ]
    ):
        pair.check(seed, **{**GUIDED, **options})
    assert pair.captured == 1


@pytest.mark.parametrize("together", [True, False])
def test_which_caption_is_the_longer_may_change(pair, together):
    """Positions and masks of the same shapes. One after the other, the longer one comes first."""
    lengths = [(40, 9), (9, 40)] if together else [(40, 9), (60, 20)]
    for seed, (positive, negative) in enumerate(2 * lengths):
        pair.check(
            seed,
            guidance_scale=3.0,
            guidance_together=together,
            prompt_embeds=draw(positive, 20, seed=seed),
            negative_prompt_embeds=draw(negative, 20, seed=seed),
        )
    assert pair.captured == 1


def test_kinds(pair):
    kinds = [
        {},
        {"height": 48},
        {"num_images_per_prompt": 2},
        {"prompt_embeds": draw(33, 20)},
        {"decoder_memory": None},
        GUIDED,
        {**GUIDED, "guidance_together": False},
        {**GUIDED, "negative_prompt_embeds": draw(33, 20)},  # a mask, and longer captions
        {**GUIDED, "prompt_embeds": draw(33, 20), "negative_prompt_embeds": draw(33, 20)},
    ]
    pair.captures = L2PPipeline(pair.net, cuda_graphs=len(kinds))
    pair.captures.graphs.recorder_for = lambda device: pair.tape
    for seed in range(3):
        for kind in kinds:
            pair.check(seed, **kind, num_inference_steps=1)
    assert pair.captured == len(kinds)


def test_images_are_not_overwritten(pair):
    images = [pair.check(seed).clone() for seed in range(4)]
    kept = [pair.captures(prompt_embeds=captions(5), seed=s, num_inference_steps=1, **SIZE,
                          output_type="pt").images for s in range(2)]  # fmt: skip
    copies = [image.clone() for image in kept]
    assert all(torch.equal(pair.check(seed), image) for seed, image in enumerate(images))
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


# ---- Callbacks ---------------------------------------------------------------------------------


def test_previews_and_states_are_those_without_and_are_kept(pair):
    for _ in range(3):
        seen = [[], []]
        for pipe, values in zip((pair.captures, pair.plain), seen, strict=True):
            pipe(
                prompt_embeds=captions(5),
                seed=1,
                num_inference_steps=3,
                callback=lambda info, to=values: to.append(info.x0),
                callback_on_step_end=lambda p, i, t, v, to=values: to.append(v["latents"]),
                **SIZE,
            )
        assert len(seen[0]) == 6
        assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert pair.tape.replays == 2 * 3


def test_states_that_a_callback_replaces_or_writes_to(pair):
    def replaced(pipeline, step, timestep, values):
        return {"latents": values["latents"] * 0.5}

    def written(pipeline, step, timestep, values):
        values["latents"].mul_(0.5)

    images = [pair.check(1, callback_on_step_end=end) for end in 2 * (replaced, written)]
    assert all(torch.equal(image, images[0]) for image in images)
    assert not torch.equal(pair.check(1), images[0])


def test_interruption(pair):
    for _ in range(3):
        with pytest.raises(Interrupted):
            pair.check(callback=lambda info: False)
    assert pair.tape.replays == 2
    three_times(pair.check)


def test_a_callback_may_generate(pair):
    inner = []
    for _ in range(3):
        pair.check(callback=lambda info: inner.append(pair.check(seed=info.step)))
    assert len(inner) == 3 * 2 * 2
    assert pair.captured


def test_not_finite_is_still_an_error(pair):
    [pair.check() for _ in range(3)]
    bias = pair.net.local_decoder.out_conv.bias
    kept = bias.clone()
    bias.fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="the network returned NaN"):
        pair.captures(prompt_embeds=captions(5), seed=0, num_inference_steps=1, **SIZE)
    bias.copy_(kept)
    pair.check()
    assert pair.captured == 1


# ---- Which are captured ------------------------------------------------------------------------


def test_the_first_runs_without_the_second_captures(pair):
    for seed, (captured, replays) in enumerate([(0, 0), (1, 2), (1, 4)]):
        pair.check(seed)
        assert (pair.captured, pair.tape.replays) == (captured, replays)


def test_two_are_kept(pair):
    assert pair.captures.graphs.limit == GRAPHS == 2
    for width in (16, 32, 16, 32, 48, 48):
        pair.check(width=width)
    assert pair.captured == 3
    for width, captured in ((32, 3), (16, 4)):  # the one not used for longest went
        pair.check(width=width)
        assert pair.captured == captured


@pytest.mark.parametrize("off", [False, 0])
def test_off(net, off):
    pair = Pair(net, cuda_graphs=off)
    [pair.check(seed) for seed in range(2)]
    assert pair.tape.turns == 0


@pytest.mark.parametrize("value", [-1, 1.5, "yes", None])
def test_bad_limits(net, value, tmp_path):
    message = rf"^cuda_graphs must be a bool or an integer >= 0, got {value!r}$"
    with pytest.raises(ValueError, match=message):
        L2PPipeline(net, cuda_graphs=value)
    with pytest.raises(ValueError, match=message):
        L2PPipeline.from_pretrained(tmp_path / "x", device="cpu", cuda_graphs=value)


def test_no_recorder_for_cpus(net):
    pipe = L2PPipeline(net)
    for _ in range(3):
        pipe(prompt_embeds=captions(5), seed=0, num_inference_steps=1, **SIZE)
    assert len(pipe.graphs._captured) == 0


def test_release(pair):
    [pair.check(seed) for seed in range(2)]
    pair.captures.release_graphs()
    assert all(tape.released for tape in pair.tape.decodes[0])
    [pair.check(seed) for seed in range(2)]
    assert pair.captured == 2


def test_weights_changed_in_place_show(pair):
    _, before = [pair.check() for _ in range(2)]
    with torch.no_grad():
        for p in pair.net.parameters():
            p.mul_(1.1)
    assert not torch.equal(pair.check(), before)
    assert pair.captured == 1


def test_weights_elsewhere_are_captured_anew(pair):
    [pair.check() for _ in range(2)]
    pair.net.pack_()
    [pair.check() for _ in range(2)]
    assert pair.captured == 2
    assert pair.tape.releases >= 1


@pytest.mark.parametrize("why", ["reference", "hook", "replaced", "trained"])
def test_runs_without(pair, why):
    [pair.check() for _ in range(2)]
    turns = pair.tape.turns
    if why == "reference":
        with pixeldiff.backend("reference"):
            [pair.check() for _ in range(2)]
    else:
        if why == "hook":
            pair.net.layers[0].register_forward_hook(lambda *a: None)
        elif why == "replaced":
            pair.net.local_decoder.pixels = pair.net.local_decoder.pixels
        else:
            pair.net.x_pad_token.requires_grad_()
        [pair.check() for _ in range(2)]
    assert pair.tape.turns == turns == 1


def test_a_capture_that_fails_is_told_once_and_leaves_all_usable(pair):
    pair.tape.fail = RuntimeError("operation not permitted\nlong text")
    pair.check()
    with pytest.warns(RuntimeWarning) as told:
        pair.check()
    assert [str(w.message) for w in told] == [
        "a step at 32 x 48 could not be captured as CUDA graphs and runs without them: "
        "operation not permitted"
    ]
    pair.tape.fail = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        three_times(pair.check)
        assert pair.captured == 0
        [pair.check(seed, width=64) for seed in range(2)]
    assert pair.captured == 1


def test_two_threads(pair):
    given = {"num_inference_steps": 2, "output_type": "pt", **SIZE, "prompt_embeds": captions(5)}
    want = [pair.plain(seed=i, **given).images for i in range(6)]
    got = [None] * len(want)

    def work(first):
        for i in range(first, len(want), 2):
            got[i] = pair.captures(seed=i, **given).images

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert pair.tape.replays


@pytest.mark.parametrize("capture", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("replay", [torch.enable_grad, torch.inference_mode])
def test_modes_of_the_caller(pair, capture, replay):
    masked = {**GUIDED, "negative_prompt_embeds": captions(40)[0]}
    for mode in (capture, capture, replay):
        with mode():
            pair.check(**masked)
    assert pair.tape.replays == 2 * 2


# ---- Nothing of a step is on the host ----------------------------------------------------------


class OnTheDevice(TorchDispatchMode):
    """Refuses tensors elsewhere: a host's tensor in a step is a copy that the device waits for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs or {}, result)):
            if isinstance(t, torch.Tensor):
                assert t.device.type == "meta", f"{func} of a tensor on {t.device}"
            else:
                assert t is None or t != torch.device("cpu"), f"{func} to the CPU"
        return result


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("form", ["1k", "4k", "8k", "10k", "latent"])
def test_a_step_makes_no_tensor_on_the_host(form, together):
    """On the meta device, where reading a value is an error too."""
    c = LATENT if form == "latent" else config(form)
    net = L2PNet(c, device="meta")
    if form == "latent" and not together:
        pytest.skip("the latent model has no local decoder to run for both branches")
    side = c.size_multiple
    x = torch.empty(1, c.in_channels, side, 2 * side, device="meta")
    positive, negative = (torch.empty(n, 20, device="meta") for n in (5, 40))
    times, size = schedule(3).times, (side, 2 * side)
    for scale in (1.0, 3.0):
        predict = guided(
            net, [positive], [negative], size, guidance_scale=scale, times=times, together=together
        )
        with torch.no_grad(), OnTheDevice():
            assert predict(x, times[1]).shape == x.shape
            predict(x, 0.123)  # not prepared
            net.step(x, torch.empty((), device="meta"), net_condition := predict.conditions[0])
            net.step(x, torch.empty(net_condition.batch, device="meta"), net_condition)


def test_a_host_tensor_in_a_step_would_show():
    net = L2PNet(config(), device="meta")
    condition = net.prepare([torch.empty(5, 20, device="meta")], (32, 48))
    x = torch.empty(1, 3, 32, 48, device="meta")
    with OnTheDevice(), pytest.raises(AssertionError, match="cpu"):
        net.step(x, torch.tensor(0.3), condition)
