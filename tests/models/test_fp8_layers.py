"""Fp8Linear: what it computes, where it may be moved, and how layers are replaced by it."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pixeldiff
from pixeldiff import ops
from pixeldiff.models import fp8
from pixeldiff.models.fp8 import Fp8Linear, Rows, quantize_

E4M3 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _seeded():
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def layer(bias=True, dtype=torch.float32) -> nn.Linear:
    return nn.Linear(48, 32, bias=bias, dtype=dtype).requires_grad_(False)


def values(linear: Fp8Linear) -> torch.Tensor:
    return linear.weight.double() * linear.weight_scale.double()[:, None]


# --- rows -----------------------------------------------------------------------------------------


def test_rows_stand_for_their_tensor():
    x = torch.randn(2, 5, 48, dtype=torch.bfloat16)
    rows = Rows.of(x)
    assert (rows.shape, rows.dtype, rows.device) == (x.shape, x.dtype, x.device)
    spacing = x.float().abs().amax(-1, keepdim=True) / 448
    assert ((rows.multiplied().float() - x.float()).abs() <= 17 * spacing).all()
    piece = rows[:, 1:3]
    assert torch.equal(piece.multiplied(), rows.multiplied()[:, 1:3])
    flat = rows.flatten(0, -2)
    assert flat.shape == (10, 48)
    assert torch.equal(flat[3:7].multiplied(), rows.multiplied().flatten(0, 1)[3:7])
    with pytest.raises(ValueError, match=r"rows stay whole: \(0, -2\), got \(1, -1\)"):
        rows.flatten(1, -1)


# --- the layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_linear_layer(bias, dtype):
    plain = layer(bias, dtype)
    low = Fp8Linear.of(plain)
    assert (low.weight.dtype, low.weight_scale.dtype) == (E4M3, torch.float32)
    assert (low.in_features, low.out_features) == (48, 32)
    w = plain.weight.double()
    assert ((values(low) - w).abs() <= w.abs().amax(1, keepdim=True) / 448 * 16.001).all()
    x = torch.randn(3, 7, 48, dtype=dtype)
    y, exact = low(x), plain.double()(x.double())
    assert (y.shape, y.dtype) == (exact.shape, dtype)
    # Two operands of 3 mantissa bits: 2.6 % of noise each.
    relative = (y - exact).norm() / exact.norm()
    assert 0.02 < relative < 0.05
    assert torch.equal(low(Rows.of(x)), y)
    with pixeldiff.backend("reference"):
        assert torch.equal(low(x), y)


def test_every_output_channel_has_its_scale():
    """A scale of the whole matrix would leave nothing of the small channel."""
    plain = layer(bias=False)
    plain.weight[3] *= 1e-6
    low = Fp8Linear.of(plain)
    error = (values(low)[3] - plain.weight[3]).norm() / plain.weight[3].norm()
    assert error < 0.05
    x = torch.randn(5, 48)
    exact = plain(x)
    assert ((low(x) - exact)[:, 3].norm() / exact[:, 3].norm()) < 0.1


def test_state_dict_round_trip(tmp_path):
    low = Fp8Linear.of(layer())
    state = low.state_dict()
    assert sorted(state) == ["bias", "weight", "weight_scale"]
    other = Fp8Linear.of(layer())
    other.load_state_dict(state)
    x = torch.randn(2, 48)
    assert torch.equal(other(x), low(x))
    save_file(state, tmp_path / "low.safetensors")
    empty = Fp8Linear.of(nn.Linear(48, 32, device="meta"))
    empty.load_state_dict(load_file(tmp_path / "low.safetensors"), assign=True)
    assert torch.equal(empty(x), low(x))


def test_weights_of_a_plain_layer_are_not_taken_for_quantised_ones():
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_scale"):
        Fp8Linear.of(layer()).load_state_dict(layer().state_dict())


@pytest.mark.parametrize("change", [lambda m: m.to(torch.bfloat16), nn.Module.half, nn.Module.cpu])
def test_changes_of_dtype_leave_weights_and_scales(change):
    low = Fp8Linear.of(layer())
    before = copy.deepcopy(low.state_dict())
    change(nn.Sequential(low))
    assert torch.equal(low.weight.view(torch.uint8), before["weight"].view(torch.uint8))
    assert torch.equal(low.weight_scale, before["weight_scale"])
    assert (low.weight.dtype, low.weight_scale.dtype) == (E4M3, torch.float32)
    assert not low.weight.requires_grad


def test_moves_and_copies():
    low = Fp8Linear.of(layer())
    x = torch.randn(2, 48)
    assert torch.equal(copy.deepcopy(low)(x), low(x))
    away = copy.deepcopy(low).to("meta")
    assert {p.device.type for p in away.parameters()} == {"meta"}
    assert (away.weight.dtype, away.weight_scale.dtype) == (E4M3, torch.float32)
    assert away(x.to("meta")).shape == (2, 32)
    back = away.to_empty(device="cpu")
    back.load_state_dict(low.state_dict())
    assert torch.equal(back(x), low(x))


@pytest.mark.parametrize("where", ["weight", "x"])
def test_nan_is_not_lost(where):
    plain, x = layer(), torch.randn(3, 48)
    (plain.weight if where == "weight" else x)[1, 5] = torch.nan
    y = Fp8Linear.of(plain)(x)
    lost = y[:, 1] if where == "weight" else y[1]
    assert lost.isnan().all()
    assert y.isnan().sum() == lost.numel()


def test_compiles_in_one_graph():
    low = Fp8Linear.of(layer())
    torch._dynamo.reset()
    compiled = torch.compile(low, fullgraph=True, backend="aot_eager")
    for n in (3, 8):
        x = torch.randn(n, 48)
        assert torch.equal(compiled(x), low(x))


# --- replacing layers -----------------------------------------------------------------------------


def test_quantize_replaces_by_name_and_frees():
    net = nn.Sequential(layer(), nn.Sequential(layer(), nn.SiLU()))
    kept, gone = net[0], weakref.ref(net[1][0].weight)
    quantize_(net, "1.0")
    assert net[0] is kept
    assert isinstance(net[1][0], Fp8Linear)
    gc.collect()
    assert gone() is None
    low = net[1][0]
    quantize_(net, "1.0")
    assert net[1][0] is low
    with pytest.raises(TypeError, match=r"quantize_: 1.1 must be a torch.nn.Linear, got SiLU"):
        quantize_(net, "1.1")


# --- devices --------------------------------------------------------------------------------------


def test_devices(monkeypatch):
    assert fp8.why_not(torch.device("cpu")) is None
    assert fp8.why_not(torch.device("mps")) == "runs on cuda and cpu, not on mps"
    rows = [("cuda", "e4m3 needs compute capability 8.9, this device is 8.0"), ("reference", None)]
    monkeypatch.setattr(fp8, "arguments", lambda *args: ())
    monkeypatch.setattr(ops, "explain", lambda *args: rows)
    assert fp8.why_not(torch.device("cuda")) == rows[0][1]
    monkeypatch.setattr(ops, "explain", lambda *args: [("cuda", None), ("reference", None)])
    assert fp8.why_not(torch.device("cuda")) is None
