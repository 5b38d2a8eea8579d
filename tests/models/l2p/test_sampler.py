"""Euler steps and guidance: the sampling goldens, and what holds for every network."""

from __future__ import annotations

import pytest
import torch
from tiny_l2p import captions, config, draw, network, relative

from pixeldiff.images import to_uint8
from pixeldiff.models.l2p.sampler import guided, sample, start
from pixeldiff.models.l2p.scheduler import schedule
from pixeldiff.models.steps import Interrupted
from pixeldiff.verify.golden import read_golden
from pixeldiff.verify.l2p_inputs import stated_network

SAMPLES = (
    *("sample_p16_1step_A", "sample_p16_4step_A", "sample_p16_4step_cfg4_shift5_A"),
    *("sample_p16_6step_cfg_A", "sample_p16_img2img_A", "sample_p64_3step_cfg"),
)


@pytest.mark.parametrize("together", [True, False], ids=["together", "in-turn"])
@pytest.mark.parametrize("name", SAMPLES)
def test_goldens(golden_dir, name, together):
    path = golden_dir / "l2p" / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip("not among the files that are committed")
    g = read_golden(path)
    case, bound = g.meta["case"], g.tolerance("")["relative_to_max"]
    net = stated_network(g).requires_grad_(False)
    plan = schedule(case["steps"], shift=case["shift"], strength=case["strength"])
    assert torch.equal(torch.tensor(plan.sigmas[:-1]), g.tensors["sigmas"])
    assert torch.equal(torch.tensor(plan.timesteps), g.tensors["timesteps"])
    negative = g.get("caption_neg")
    predict = guided(
        net,
        [g.tensors["caption"].float()],
        None if negative is None else [negative.float()],
        (case["H"], case["W"]),
        guidance_scale=case["cfg_scale"],
        times=plan.times,
        together=together,
    )
    x = start(g.tensors["noise"].float(), plan, g.get("init_image"))
    if "x_start" in g.tensors:
        assert relative(x, g.tensors["x_start"]) <= 1e-6
    assert relative(-predict(x, plan.times[0]), g.tensors["v.0"]) <= bound
    states = {}

    def keep(step, timestep, x, x0):
        states[f"x.{step + 1}"] = x
        return x

    result = sample(predict, x, plan, replace=keep)
    for state in [name for name in g.tensors if name.startswith("x.")]:
        assert relative(states[state], g.tensors[state]) <= bound
    assert relative(result, g.tensors["x_final"]) <= bound
    difference = to_uint8(result, rounded=True)[0].astype(int) - g.tensors["image_uint8"].numpy()
    assert abs(difference).max() <= 1
    assert (difference != 0).mean() < 1e-3  # a value that lay between two


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_a_constant_velocity_is_followed_to_its_end(steps, shift):
    noise, u = draw(1, 3, 4, 6), draw(1, 3, 4, 6, seed=2)
    result = sample(lambda x, t: u, noise, schedule(steps, shift=shift))
    torch.testing.assert_close(result, noise + u, rtol=0, atol=5e-6)


def test_the_exact_velocity_of_one_image_gives_it_and_every_estimate_is_it():
    noise, image = draw(1, 3, 4, 6), draw(1, 3, 4, 6, seed=2).clamp(-1, 1)
    plan, seen = schedule(5, strength=0.6), []
    x = start(noise, plan, image)
    sigma = plan.sigmas[0]
    torch.testing.assert_close(x, (1 - sigma) * image + sigma * noise)
    result = sample(lambda x, t: image - noise, x, plan, callback=seen.append)
    torch.testing.assert_close(result, image, rtol=0, atol=1e-5)
    assert [(s.step, s.steps, s.t) for s in seen] == [
        (i + 1, 5, sigma) for i, sigma in enumerate(plan.sigmas[:-1])
    ]
    for info in seen:
        torch.testing.assert_close(info.x0, image, rtol=0, atol=1e-5)


def test_arguments_are_not_written_to():
    noise, u = draw(1, 3, 4, 6), draw(1, 3, 4, 6, seed=2)
    kept = noise.clone(), u.clone()
    sample(lambda x, t: u, noise, schedule(3), callback=lambda info: None)
    assert torch.equal(noise, kept[0])
    assert torch.equal(u, kept[1])


def test_the_state_may_be_kept_at_one_place():
    """Then no step makes another one, and the noise stays as it is."""
    noise, u, state, places = (
        draw(1, 3, 4, 6),
        draw(1, 3, 4, 6, seed=2),
        torch.empty(1, 3, 4, 6),
        [],
    )
    kept, want = noise.clone(), sample(lambda x, t: u * x, noise, schedule(3))

    def predict(x, t):
        places.append(x.data_ptr())
        return u * x

    result = sample(predict, noise, schedule(3), state=state)
    assert result is state
    assert set(places) == {state.data_ptr()}
    assert torch.equal(result, want)
    assert torch.equal(noise, kept)


def test_the_state_can_be_replaced_and_the_callback_stops():
    calls = []

    def replace(step, timestep, x, x0):
        calls.append((step, timestep))
        return torch.zeros_like(x)

    u = draw(1, 3, 4, 6)
    result = sample(lambda x, t: u + x, draw(1, 3, 4, 6), schedule(4), replace=replace)
    assert torch.equal(result, torch.zeros_like(u))
    assert calls == list(enumerate(schedule(4).timesteps))
    with pytest.raises(Interrupted, match=r"^stopped by the callback after step 2 of 4$"):
        sample(lambda x, t: u, u, schedule(4), callback=lambda info: info.step < 2)


# 2x3 patches are padded to 32 rows, 4x8 are not: then the noise refiner is shared too.
SIZES = [(32, 48), (64, 128)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lengths", [(5, 9, 12, 3), (5, 40, 33, 3)], ids=["equal", "masked"])
def test_both_ways_of_guidance_are_two_separate_calls(size, lengths):
    net = network(config())
    y = captions(*lengths)
    positive, negative = y[:2], y[2:]
    x, t = draw(2, 3, *size), schedule(4).times[1]
    v_pos, v_neg = (
        torch.cat([net(x[i : i + 1], t, [c[i]]) for i in range(2)]) for c in (positive, negative)
    )
    expected = v_neg + 3.5 * (v_pos - v_neg)
    for together in (True, False):
        predict = guided(
            net, positive, negative, size, guidance_scale=3.5, times=(t,), together=together
        )
        assert relative(predict(x, t), expected) < 2e-5


def test_guidance_1_is_the_positive_branch_and_equal_prompts_need_none():
    net, size = network(config()), (64, 128)
    y, other = captions(7, 11)
    x = draw(1, 3, *size)
    alone = guided(net, [y], None, size)(x, 0.3)
    assert torch.equal(guided(net, [y], [other], size)(x, 0.3), alone)
    for together in (True, False):
        for scale in (0.0, 2.0, 7.5):
            both = guided(net, [y], [y], size, guidance_scale=scale, together=together)(x, 0.3)
            assert relative(both, alone) < 1e-5
        nothing = guided(net, [other], [y], size, guidance_scale=0.0, together=together)(x, 0.3)
        assert relative(nothing, alone) < 1e-5


def test_one_branch_where_there_is_no_guidance(monkeypatch):
    net, batches = network(config()), []
    step = net.step
    monkeypatch.setattr(
        net, "step", lambda x, t, c, **o: batches.append(c.batch) or step(x, t, c, **o)
    )
    y, other = captions(7, 11)
    for scale in (1.0, 2.0):
        guided(net, [y], [other], (32, 48), guidance_scale=scale)(draw(1, 3, 32, 48), 0.3)
    assert batches == [1, 2]


def test_the_half_of_the_decoder_that_sees_the_image_only_runs_once(monkeypatch):
    net, y = network(config()), captions(7, 11)
    encode, calls = net.local_decoder.encode, []
    monkeypatch.setattr(
        net.local_decoder, "encode", lambda x, **o: calls.append(len(x)) or encode(x, **o)
    )
    for together in (True, False):
        predict = guided(net, y[:1], y[1:], (32, 48), guidance_scale=2.0, together=together)
        predict(draw(1, 3, 32, 48), 0.3)
    assert calls == [1, 1]


def test_errors():
    net, y = network(config()), captions(7, 11)
    with pytest.raises(ValueError, match=r"guidance_scale = 2.0 needs the negative prompt's"):
        guided(net, y, None, (32, 48), guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"as many as the positive ones, 2, got 1"):
        guided(net, y, y[:1], (32, 48), guidance_scale=2.0)
