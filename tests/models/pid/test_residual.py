"""The residual stream: updates made by the norm that follows, and by whoever reads the stream."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_networks import CONFIGS, inputs, network

import pixeldiff
from pixeldiff import ops
from pixeldiff.models import feed_forward
from pixeldiff.models.pid import residual
from pixeldiff.models.pid.residual import Stream

each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def normed(x, weight, scale, shift):
    h = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    return h * (1 + scale[:, None]) + shift[:, None]


def updates(batch: int, rows: int, dim: int):
    """Name -> (what leaves the update in a stream, x -> x after it)."""
    y, gate, feature = draw(batch, rows, dim), draw(batch, dim), draw(batch, rows, dim)
    weight, logit = draw(dim, dim), draw(batch, rows, dim)
    return {
        "none": (lambda stream: None, lambda x: x),
        "branch": (lambda stream: stream.add(gate, y), lambda x: x + gate[:, None] * y),
        "gate": (
            lambda stream: stream.inject(feature, weight, logit),
            lambda x: x + torch.sigmoid(x @ weight.T + logit) * feature,
        ),
    }


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("first", ["none", "branch", "gate"])
@pytest.mark.parametrize("second", ["none", "branch", "gate"])
def test_updates_are_made_in_their_order(first, second, batch):
    x, known = draw(batch, 5, 8), updates(batch, 5, 8)
    before, modulation = x.clone(), (draw(8), draw(batch, 8), draw(batch, 8))
    want = known[second][1](known[first][1](x))
    read, left = Stream(x), Stream(x)
    for stream in (read, left):
        known[first][0](stream)
        known[second][0](stream)
    torch.testing.assert_close(read.x, want)
    torch.testing.assert_close(left.norm(*modulation), normed(want, *modulation))
    torch.testing.assert_close(left.x, want)
    assert torch.equal(x, before), "the stream wrote into what it was given"
    assert torch.equal(left.x, left.x), "an update was made twice"


def test_no_update_is_lost_or_made_twice_over_several_layers():
    x, known, modulation = draw(1, 5, 8), updates(1, 5, 8), (draw(8), draw(1, 8), draw(1, 8))
    stream, want = Stream(x), x
    for name in ("gate", "branch", "branch", "gate", "none", "branch"):
        known[name][0](stream)
        want = known[name][1](want)
        torch.testing.assert_close(stream.norm(*modulation), normed(want, *modulation))
    torch.testing.assert_close(stream.x, want)


def test_gradients_pass_and_nothing_is_written():
    x, y, gate = draw(1, 5, 8), draw(1, 5, 8), draw(1, 8).requires_grad_()
    with torch.enable_grad():
        stream = Stream(x)
        kept = y * gate[:, None]
        stream.replace(kept)
        stream.add(gate, y)
        (slope,) = torch.autograd.grad(stream.x.sum(), gate)
    torch.testing.assert_close(slope, 2 * y.sum(1))
    assert torch.equal(kept, y * gate[:, None])


@each_config
@pytest.mark.parametrize("batch", [1, 3])
def test_norms_that_add_are_the_network(config, batch, monkeypatch):
    """As on a GPU: feed-forward in pieces into one buffer, added by the next block's norm."""
    net, kw = network(config, dtype=torch.float64), inputs(batch)
    want, calls = net(**kw), []
    monkeypatch.setattr(residual, "ADD_EACH_PIECE", ())
    monkeypatch.setitem(feed_forward.FEED_FORWARD_PIECE, "cpu", 3)
    for name in ("gated_residual_norm", "sigma_gate_norm", "rms_norm_modulate", "sigma_gate"):
        fused = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *a, name=name, fused=fused: calls.append(name) or fused(*a)
        )
    torch.testing.assert_close(net(**kw), want, rtol=1e-10, atol=1e-10)
    # 5 after attention (the last block's text stream ends), and before blocks 1 and 2 the text's
    # feed-forward; the image's before block 1 alone, as a gate of the latent stands before 2.
    assert calls.count("gated_residual_norm") == 5 + 2 + 1
    assert calls.count("sigma_gate_norm") == 2  # before blocks 0 and 2
    assert calls.count("rms_norm_modulate") == 1  # the text's first
    assert calls.count("sigma_gate") == config.pit_lq_inject
    traced = net(**kw, trace=lambda name, value: None)
    torch.testing.assert_close(traced, want, rtol=1e-10, atol=1e-10)


@each_config
def test_gradients_where_norms_add(config, monkeypatch):
    net, kw = network(config, dtype=torch.float64), inputs()
    slopes = []
    for add_each_piece in (("cpu",), ()):
        monkeypatch.setattr(residual, "ADD_EACH_PIECE", add_each_piece)
        with torch.enable_grad():
            net.zero_grad()
            net(**kw).square().mean().backward()
        slopes.append([None if p.grad is None else p.grad.clone() for p in net.parameters()])
    for a, b in zip(*slopes, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("piece", [1, 4, 100])
def test_feed_forward_pieces_into_one_buffer(batch, piece, monkeypatch):
    monkeypatch.setitem(feed_forward.FEED_FORWARD_PIECE, "cpu", piece)
    mlp, h = feed_forward.SwiGLU(12, 20).double(), draw(batch, 7, 12)
    a, b = h @ mlp.w1.weight.T, h @ mlp.w3.weight.T
    want = (a * a.sigmoid() * b) @ mlp.w2.weight.T
    torch.testing.assert_close(mlp(h), want)
    torch.testing.assert_close(mlp.pack_()(h), want)


# ---- Weights packed into one buffer ----------------------------------------------------------


def is_packed(net) -> set[bool]:
    return {
        m._packed(m.w1.weight) is not None
        for m in net.modules()
        if isinstance(m, feed_forward.SwiGLU)
    }


@each_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_changes_no_parameter(config, dtype):
    net, kw = network(config, dtype=dtype), inputs()
    names, values = list(net.state_dict()), [p.clone() for p in net.parameters()]
    want, tensors = net(**kw), list(net.parameters())
    assert is_packed(net) == {False}
    net.pack_()
    assert is_packed(net) == {True}
    assert list(net.state_dict()) == names
    for p, tensor, value in zip(net.parameters(), tensors, values, strict=True):
        assert p is tensor
        assert torch.equal(p, value)
    scale = want.abs().max()
    assert (net(**kw) - want).abs().max() <= scale * (1e-5 if dtype == torch.float32 else 5e-2)
    where = [p.data_ptr() for p in net.parameters()]
    net.pack_()  # nothing to do
    assert [p.data_ptr() for p in net.parameters()] == where


def test_packed_weights_are_changed_saved_and_loaded_as_any(tmp_path):
    net, other, kw = network(CONFIGS["v1"]), network(CONFIGS["v1"], seed=3), inputs()
    want = other(**kw)
    assert is_packed(net.pack_()) == {True}
    net.load_state_dict(other.state_dict())
    assert is_packed(net) == {True}
    torch.testing.assert_close(net(**kw), want, rtol=1e-5, atol=1e-5)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    saved = load_file(tmp_path / "net.safetensors")
    torch.save(net.state_dict(), tmp_path / "net.pt")
    pickled = torch.load(tmp_path / "net.pt", weights_only=True)
    for name, value in other.state_dict().items():
        assert torch.equal(saved[name], value)
        assert torch.equal(pickled[name], value)
    net.patch_blocks[0].mlp_x.w1.weight.mul_(2)
    assert not torch.allclose(net(**kw), want, atol=1e-3)


@pytest.mark.parametrize("change", ["to", "deepcopy", "assign", "data", "another half"])
def test_what_moves_weights_ends_the_packing(change):
    net, kw = network(CONFIGS["v1"]), inputs()
    want = net(**kw)
    net.pack_()
    if change == "to":
        net.to(torch.float64).to(torch.float32)
    elif change == "deepcopy":
        net = copy.deepcopy(net)
    elif change == "assign":
        state = {k: v.clone() for k, v in net.state_dict().items()}
        net.load_state_dict(state, assign=True)
    else:
        for module in net.modules():
            if isinstance(module, feed_forward.SwiGLU):
                w3 = module.w3.weight
                half = torch.cat((w3, w3)).chunk(2)[1]  # begins where a packed one does
                w3.data = w3.data.clone() if change == "data" else half
    assert is_packed(net) == {False}
    torch.testing.assert_close(net(**kw), want, rtol=1e-5, atol=1e-5)
    assert is_packed(net.pack_()) == {True}


def test_swapped_halves_are_not_taken_for_packed():
    mlp = feed_forward.SwiGLU(12, 20)
    both = torch.cat((mlp.w3.weight, mlp.w1.weight))
    mlp.w3.weight.data, mlp.w1.weight.data = both.chunk(2)
    h = torch.randn(1, 7, 12)
    with pixeldiff.backend("reference"):
        want = mlp.w2(ops.swiglu(mlp.w1(h), mlp.w3(h)))
        assert torch.equal(mlp(h), want)


def test_packed_weights_take_gradients_and_compile():
    net, kw = network(CONFIGS["v1"]), inputs()
    net.pack_()
    with torch.enable_grad():
        net(**kw).square().mean().backward()
    assert all(net.patch_blocks[0].mlp_x.w3.weight.grad.flatten()[:5] != 0)
    torch._dynamo.reset()
    condition = net.prepare(kw["lq_latent"], kw["y"], kw["degrade_sigma"], size=(16, 32))
    compiled = torch.compile(net.step, fullgraph=True, backend="aot_eager")
    want = net.step(kw["x"], kw["t"], condition)
    torch.testing.assert_close(compiled(kw["x"], kw["t"], condition), want, rtol=1e-5, atol=1e-5)


def test_nothing_is_done_by_a_setter():
    """torch 2.11's compiler loses it, and computes something else without a word."""
    members = [vars(Stream)[name] for name in vars(Stream)]
    properties = [m for m in members if isinstance(m, property)]
    assert properties
    assert all(p.fset is None for p in properties)
