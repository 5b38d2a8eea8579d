"""The PiD network: goldens, what must and must not change its output, shapes, devices, memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_networks import CONFIGS, PLAIN, TINY, V1, V15, inputs, network
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from pixeldiff import ops
from pixeldiff.models import feed_forward
from pixeldiff.models.pid import PiDConfig, PiDNet
from pixeldiff.models.pid.lq_projection import LQProjection, SigmaGate
from pixeldiff.models.pid.samplers import network_time, student_times
from pixeldiff.ops.pixel_head_step import update
from pixeldiff.verify import NotUnderstood, verify_file
from pixeldiff.verify.golden import read_golden

each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# ---- Goldens ---------------------------------------------------------------------------------


def test_golden(pid_golden):
    report = verify_file(pid_golden)
    misses = [f"{r.key}: {r.error:.3g} > {r.tolerance:.3g}" for r in report.rows if not r.ok]
    assert report.ok, misses
    assert len(report.rows) >= 3


def test_training_goldens_are_refused(pid_training_golden):
    with pytest.raises(NotUnderstood, match="is not implemented"):
        verify_file(pid_training_golden)


def test_bf16_is_as_good_as_released(pid_golden, record_property):
    """Relative RMS error of bf16, in units of that of the released network under autocast."""
    golden = read_golden(pid_golden)
    autocast = golden.get("info.v_bf16ac")
    if autocast is None:
        pytest.skip("states no bf16 output")
    net = PiDNet(PiDConfig.from_dict(golden.meta["config"]))
    net.load_state_dict(golden.weights())
    x, t, y = (golden.tensors[f"in.{k}"] for k in "xty")
    latent, sigma = golden.get("in.lq_latent"), golden.get("in.degrade_sigma")
    v = net.bfloat16()(x, t, y, lq_latent=latent, degrade_sigma=sigma)
    want = golden.tensors["out.v"]
    ours, theirs = ((a - want).square().mean().sqrt() for a in (v, autocast))
    record_property("bf16_error_over_released", (ours / theirs).item())
    assert ours <= 1.25 * theirs
    assert ours > 0


# ---- Prepare and step ------------------------------------------------------------------------


@each_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_step_of_prepare(config, dtype):
    net, kw = network(config, dtype=dtype), inputs()
    condition = net.prepare(kw["lq_latent"], kw["y"], kw["degrade_sigma"], size=(16, 32))
    v = net(**kw)
    assert v.dtype == torch.float32
    assert torch.equal(net.step(kw["x"], kw["t"], condition), v)
    assert torch.equal(net.step(kw["x"], kw["t"], condition), v)  # nothing is used up


@each_config
@pytest.mark.parametrize("batch", [1, 3])
def test_prepared_timesteps(config, batch):
    """A prepared time, the same float unprepared, and the time as a tensor.

    In fp64: the prepared times share one GEMM, whose order of summation depends on how many there
    are, so that only rounding may tell them apart.
    """
    net, kw = network(config, dtype=torch.float64), inputs(batch)
    given = (kw["lq_latent"], kw["y"], kw["degrade_sigma"])
    ready = net.prepare(*given, size=(16, 32), timesteps=[342.0, 634.0])
    assert set(ready.modulations) == {634.0, 342.0}
    bare = net.prepare(*given, size=(16, 32))
    assert not bare.modulations
    v = net.step(kw["x"], 634.0, ready)
    as_tensor = net.step(kw["x"], torch.full((batch,), 634.0), bare)
    for other in (net.step(kw["x"], 634.0, bare), as_tensor):
        torch.testing.assert_close(other, v, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(net.step(kw["x"], 342.0, ready), v, atol=1e-3)


@each_config
def test_one_prepared_timestep_is_the_unprepared_one(config):
    net, kw = network(config), inputs(1)
    given = (kw["lq_latent"], kw["y"], kw["degrade_sigma"])
    ready = net.prepare(*given, size=(16, 32), timesteps=[634.0])
    bare = net.prepare(*given, size=(16, 32))
    v = net.step(kw["x"], 634.0, ready)
    assert torch.equal(net.step(kw["x"], 634.0, bare), v)
    assert torch.equal(net.step(kw["x"], torch.tensor([634.0]), bare), v)


@each_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sample_type", ["sde", "ode"])
def test_student_step_is_step_and_update(config, dtype, sample_type):
    net, kw, drawn = network(config, dtype=dtype), inputs(), []
    condition = net.prepare(kw["lq_latent"], kw["y"], kw["degrade_sigma"], size=(16, 32))
    noise = torch.randn(kw["x"].shape) if sample_type == "sde" else None

    def draw(shape):
        drawn.append(shape)
        return noise

    x, t, t_next = kw["x"], student_times()[1], student_times()[2]
    v = net.step(x, network_time(t), condition)
    want = update(x, v, noise, t, t_next, sample_type=sample_type)
    given = (condition, x, t, t_next, None if noise is None else draw)
    got = net.student_step(*given, sample_type=sample_type)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    x_next, x0 = net.student_step(*given, False, sample_type=sample_type)
    assert torch.equal(x_next, want[0])
    assert x0 is None
    assert drawn == [tuple(x.shape)] * (0 if noise is None else 2)


@each_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_made_anew_are_those_kept(config, dtype):
    net, kw = network(config, dtype=dtype), inputs()
    given = (kw["lq_latent"], kw["y"], kw["degrade_sigma"])
    kept = net.prepare(*given, size=(16, 32))
    lean = net.prepare(*given, size=(16, 32), keep_features=False)
    assert not lean.features
    assert not lean.logits
    v = net.step(kw["x"], kw["t"], kept)
    assert torch.equal(net.step(kw["x"], kw["t"], lean), v)
    assert torch.equal(net.step(kw["x"], kw["t"], net.recaption(lean, kw["y"])), v)
    none = net.prepare(None, kw["y"], size=(16, 32), keep_features=False)
    assert torch.equal(net.step(kw["x"], kw["t"], none), net(kw["x"], kw["t"], kw["y"]))


@each_config
def test_recaption(config):
    net, kw, other = network(config), inputs(), inputs(seed=7)["y"][:, :4]
    rest = {"lq_latent": kw["lq_latent"], "degrade_sigma": kw["degrade_sigma"]}
    condition = net.prepare(kw["lq_latent"], kw["y"], kw["degrade_sigma"], size=(16, 32))
    changed = net.recaption(condition, other)
    assert changed.features is condition.features
    assert torch.equal(net.step(kw["x"], kw["t"], changed), net(kw["x"], kw["t"], other, **rest))
    with pytest.raises(ValueError, match=r"^PiDNet.recaption: y must have batch size 2, got 1$"):
        net.recaption(condition, other[:1])


def test_tracing_changes_nothing():
    net, kw, names = network(V15), inputs(), []
    v = net(**kw, trace=lambda name, value: names.append(name))
    torch.testing.assert_close(v, net(**kw), rtol=1e-5, atol=1e-5)
    assert {"s_embed", "t_emb", "lq_features", "patch_blocks.2.y", "s_cond"} <= set(names)


@each_config
def test_projection_and_norm_are_one_op_where_it_is_named(config, monkeypatch):
    net, given = network(config), inputs()
    calls, op = [], ops.qkv_norm_rope
    monkeypatch.setattr(
        ops, "qkv_norm_rope", lambda *a, **k: calls.append(a[0].shape) or op(*a, **k)
    )
    with ops.backend("reference"):
        want = net(**given)
        assert not calls
        with ops.backend("reference", qkv_norm_rope="reference"):
            assert torch.equal(net(**given), want)
    assert len(calls) == config.patch_depth + config.pixel_depth


@each_config
def test_projection_and_norm_are_one_op_where_that_was_measured(config, measured, monkeypatch):
    from pixeldiff.ops.cuda import qkv_norm_rope as cuda

    net, given = network(config), inputs()
    want, calls = net(**given), []
    monkeypatch.setattr(cuda, "why_not", lambda *args: None)
    monkeypatch.setattr(
        cuda,
        "launch",
        lambda *args: calls.append(0) or ops.registry.OPS["qkv_norm_rope"].reference(*args),
    )
    dims = {m.q_norm_x.weight.numel() for m in net.modules() if hasattr(m, "q_norm_x")}
    dims |= {m.q_norm.weight.numel() for m in net.modules() if hasattr(m, "q_norm")}
    entry = {"2": {"order": ["cuda", "reference"]}}
    measured("qkv_norm_rope", {"9.0": {f"float32 d{d}": entry for d in dims}})
    torch.testing.assert_close(net(**given), want, rtol=1e-5, atol=1e-5)
    assert len(calls) == config.patch_depth + config.pixel_depth


# ---- What the output depends on --------------------------------------------------------------


@each_config
def test_zero_heads_are_no_latent(config):
    net, kw = network(config), inputs()
    heads = [*net.lq_proj.output_heads, *([net.lq_proj.pit_head] if config.pit_lq_inject else [])]
    for head in heads:
        head.weight.zero_(), head.bias.zero_()
    plain = net(kw["x"], kw["t"], kw["y"])
    for sigma in (0.0, 0.7):
        kw["degrade_sigma"] = torch.full((2,), sigma)
        assert torch.equal(net(**kw), plain)


@each_config
def test_no_latent_is_the_text_to_image_network(config):
    net, kw = network(config), inputs()
    plain = PiDNet(PLAIN)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if "lq" not in k})
    args = (kw["x"], kw["t"], kw["y"])
    assert torch.equal(plain(*args), net(*args))
    with pytest.raises(ValueError, match=r"^PiDNet: this network has no latent branch"):
        plain(*args, lq_latent=kw["lq_latent"])


@each_config
def test_zero_latent_is_not_no_latent(config):
    net, kw = network(config), inputs()
    kw["lq_latent"] = torch.zeros_like(kw["lq_latent"])
    assert (net(**kw) - net(kw["x"], kw["t"], kw["y"])).abs().max() > 1e-2


@each_config
def test_zero_final_linear_is_zero(config):
    net = network(config)
    net.final_layer.linear.weight.zero_(), net.final_layer.linear.bias.zero_()
    v = net(**inputs())
    assert torch.equal(v, torch.zeros_like(v))


@each_config
def test_huge_sigma_closes_the_gates_of_its_sample(config):
    net, kw = network(config), inputs()
    plain, kw["degrade_sigma"] = net(kw["x"], kw["t"], kw["y"]), torch.tensor([1e4, 0.6])
    closed, kw["degrade_sigma"] = net(**kw), torch.tensor([0.0, 0.6])
    opened = net(**kw)
    assert torch.equal(closed[0], plain[0])
    assert torch.equal(closed[1], opened[1])
    assert not torch.allclose(opened[0], plain[0], atol=1e-2)


@pytest.mark.parametrize("kind", ["sigma_aware_per_token", "sigma_aware_per_token_per_dim"])
def test_gates_fall_with_sigma(kind):
    gate = SigmaGate(8, kind)
    gate.log_alpha.fill_(0.5)
    x, ones = torch.zeros(1, 5, 8), torch.ones(1, 5, 8)
    values = torch.cat(
        [gate(x, ones, gate.lq_logit(ones, torch.tensor([s]))) for s in (0.0, 0.1, 0.4, 1.0)]
    )
    assert (values.diff(dim=0) < 0).all()
    logits = values.logit()
    step = torch.tensor([0.1, 0.3, 0.6])[:, None, None] * torch.tensor(0.5).exp()
    torch.testing.assert_close(-logits.diff(dim=0), step.expand(3, 5, 8), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["sigma_aware_per_token", "sigma_aware_per_token_per_dim"])
def test_gate_logit_takes_sigma_off_in_the_wider_type(kind, dtype):
    """Each image its own noise, taken off what the linear gave; one logit a token stays wide."""
    gate = SigmaGate(24, kind, dtype=dtype)
    torch.nn.init.normal_(gate.content_proj.weight)
    torch.nn.init.normal_(gate.content_proj.bias)
    feature, sigma = torch.randn(3, 5, 24, dtype=dtype), torch.tensor([0.0, 0.37, 1e4])
    content = linear(feature, gate.content_proj.weight[:, 24:], gate.content_proj.bias)
    want = content.to(torch.promote_types(dtype, torch.float32)) - sigma[:, None, None]
    got = gate.lq_logit(feature, sigma)
    assert torch.equal(got, want if kind == "sigma_aware_per_token" else want.to(dtype))


def test_gate_logit_makes_no_wide_copy():
    """In bf16 the logits of a gate are as large as its feature: one such tensor, never in fp32.

    A CPU casts in temporaries of its own; what PyTorch is asked for is what a GPU allocates.
    """

    class Seen(TorchDispatchMode):
        wide = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if result.dtype == torch.float32:
                self.wide = max(self.wide, result.numel())
            return result

    gate = SigmaGate(24, "sigma_aware_per_token_per_dim", dtype=torch.bfloat16)
    feature, sigma = torch.randn(3, 5, 24).bfloat16(), torch.tensor([0.0, 0.5, 1.0])
    with Seen() as seen:
        gate.lq_logit(feature, sigma)
    assert 0 < seen.wide <= 3


@each_config
def test_sigma_defaults_to_zero(config):
    net, kw = network(config), inputs()
    kw["degrade_sigma"] = None
    unsaid, kw["degrade_sigma"] = net(**kw), torch.zeros(2)
    assert torch.equal(net(**kw), unsaid)


@each_config
def test_samples_do_not_mix(config):
    net, kw = network(config, dtype=torch.float64), inputs(3)
    v = net(**kw)
    for i in range(3):
        alone = net(**{name: value[i : i + 1] for name, value in kw.items()})
        torch.testing.assert_close(alone[0], v[i], rtol=1e-11, atol=1e-11)


@each_config
def test_text_beyond_the_maximum_is_cut(config):
    net, kw = network(config), inputs()
    v = net(**kw)
    kw["y"] = torch.cat((kw["y"], torch.full((2, 3, 12), 9.0)), 1)
    assert torch.equal(net(**kw), v)
    kw["y"] = kw["y"][:, :5]
    assert not torch.allclose(net(**kw), v, atol=1e-3)


@each_config
def test_text_order_is_only_in_its_positions(config):
    net, kw = network(config), inputs()
    v, order = net(**kw), torch.tensor([4, 2, 0, 5, 1, 3])
    net.y_pos_embedding.copy_(net.y_pos_embedding[:, order].clone())
    shuffled = net.prepare(kw["lq_latent"], kw["y"][:, order], kw["degrade_sigma"], size=(16, 32))
    assert not torch.allclose(net.step(kw["x"], kw["t"], shuffled), v, atol=1e-4)
    cos, sin = shuffled.txt_rope
    shuffled = replace(shuffled, txt_rope=(cos[order], sin[order]))
    torch.testing.assert_close(net.step(kw["x"], kw["t"], shuffled), v, rtol=1e-5, atol=1e-5)


DEAD = ("attn.proj_y", "norm_y2", "mlp_y", "attn.q_norm_y")


def dead_parameters(config: PiDConfig) -> set[str]:
    """Parameters that no output depends on: the end of the text stream, and the RGB head."""
    last = f"patch_blocks.{config.patch_depth - 1}."
    return {
        name
        for name, _ in PiDNet(config, device="meta").named_parameters()
        if "lq_aux_rgb_head" in name or name.startswith(tuple(last + d for d in DEAD))
    }


@each_config
def test_dead_weights_change_nothing(config):
    net, kw = network(config), inputs()
    v, dim = net(**kw), config.hidden_size
    dead = dead_parameters(config)
    assert len(dead) == 7 + (6 if config.lq_aux_rgb_head else 0)
    for name, p in net.named_parameters():
        if name in dead:
            p.normal_()
    last = net.patch_blocks[-1]
    last.attn.qkv_y.weight[:dim].normal_()
    last.adaLN_modulation_txt[0].weight[2 * dim :].normal_()
    last.adaLN_modulation_txt[0].bias[2 * dim :].normal_()
    assert torch.equal(net(**kw), v)
    last.attn.qkv_y.weight[dim:].normal_()
    assert not torch.equal(net(**kw), v)


# ---- The latent's features -------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["replicate", "zeros"])
def test_constant_latent_gives_constant_features(mode):
    """Zero padding darkens the border by as many cells as there are convolutions."""
    projection = LQProjection(PiDConfig(**TINY, lq_conv_padding_mode=mode))
    latent = torch.arange(4.0)[None, :, None, None].expand(1, 4, 8, 7)
    features = projection.features(latent, (16, 14))
    middle = features[:, :, 5:-5, 5:-5]
    torch.testing.assert_close(middle, middle[:, :, :1, :1].expand_as(middle))
    constant = torch.allclose(features, features[:, :, 8:9, 7:8].expand_as(features), atol=1e-5)
    assert constant == (mode == "replicate")


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (2, 3)])
def test_align_replicates_cells(grid):
    latent = torch.arange(6.0).reshape(1, 1, 2, 3).expand(1, 4, 2, 3)
    aligned = LQProjection(V1).align(latent, grid)
    rows = [i * 2 // grid[0] for i in range(grid[0])]
    cols = [i * 3 // grid[1] for i in range(grid[1])]
    assert torch.equal(aligned, latent[:, :, rows][:, :, :, cols])


def test_align_at_ratio_one_is_the_identity():
    latent = torch.randn(2, 4, 3, 5)
    projection = LQProjection(PiDConfig(**{**TINY, "sr_scale": 1}))
    assert projection.align(latent, (3, 5)) is latent
    constant = torch.full((1, 4, 3, 5), 2.5)
    assert torch.equal(projection.align(constant, (6, 4)), torch.full((1, 4, 6, 4), 2.5))


def test_align_unfolds_and_folds_by_index():
    unfold = LQProjection(
        PiDConfig(**{**TINY, "lq_latent_channels": 8, "lq_latent_unpatchify_factor": 2})
    )
    packed = torch.randn(1, 8, 2, 3)
    wide = unfold.align(packed, (4, 6))
    fold = LQProjection(PiDConfig(**{**TINY, "latent_spatial_down_factor": 2}))
    latent = torch.randn(1, 4, 4, 6)
    narrow = fold.align(latent, (2, 3))
    assert (wide.shape, narrow.shape) == ((1, 2, 4, 6), (1, 16, 2, 3))
    for i, j, a, b in [(0, 0, 0, 1), (1, 2, 1, 0), (0, 1, 1, 1)]:
        for c in range(2):
            assert wide[0, c, 2 * i + a, 2 * j + b] == packed[0, 4 * c + 2 * a + b, i, j]
        for c in range(4):
            assert narrow[0, 4 * c + 2 * a + b, i, j] == latent[0, c, 2 * i + a, 2 * j + b]


def test_rgb_head_only_where_there_is_one():
    latent = torch.randn(1, 4, 1, 2)
    assert LQProjection(V15).predict_lq_rgb(latent, (2, 4)).shape == (1, 3, 8, 16)
    with pytest.raises(ValueError, match="this network has no RGB head"):
        LQProjection(V1).predict_lq_rgb(latent, (2, 4))


# ---- Feed-forward in pieces ------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 5, 7, 100])
@pytest.mark.parametrize("batch", [1, 3])
def test_feed_forward_in_pieces(piece, batch, monkeypatch):
    """Any piece gives x + gate * w2(silu(w1 h) * w3 h), written into x and nowhere else."""
    monkeypatch.setitem(feed_forward.FEED_FORWARD_PIECE, "cpu", piece)
    mlp = feed_forward.SwiGLU(12, 20).double()
    x, h, gate = torch.randn(batch, 7, 12), torch.randn(batch, 7, 12), torch.randn(batch, 12)
    x, h, gate = x.double(), h.double(), gate.double()
    a, b = h @ mlp.w1.weight.T, h @ mlp.w3.weight.T
    want = x + gate[:, None] * ((a * a.sigmoid() * b) @ mlp.w2.weight.T)
    given = h.clone(), gate.clone()
    y = mlp.add_gated(x, gate, h)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    assert y is x
    assert torch.equal(h, given[0])
    assert torch.equal(gate, given[1])


def test_feed_forward_with_gradients_keeps_its_input():
    mlp, (x, h), gate = feed_forward.SwiGLU(12, 20), torch.randn(2, 1, 7, 12), torch.randn(1, 12)
    before = x.clone()
    with torch.enable_grad():
        y = mlp.add_gated(x, gate, h)
    assert y.requires_grad
    assert torch.equal(x, before)
    torch.testing.assert_close(y.detach(), mlp.add_gated(x, gate, h))


@each_config
def test_step_changes_none_of_its_inputs(config):
    net, kw = network(config), inputs()
    condition = net.prepare(
        kw["lq_latent"], kw["y"], kw["degrade_sigma"], size=(16, 32), timesteps=[634.0]
    )
    mod = condition.modulations[634.0]
    held = [kw["x"], condition.text, mod.time, *mod.image, *mod.text]
    held += [*condition.features, *condition.logits, *condition.rope, condition.pos_x]
    before = [t.clone() for t in held]
    net.step(kw["x"], 634.0, condition)
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


# ---- Gradients -------------------------------------------------------------------------------


@each_config
def test_gradients_reach_every_live_parameter(config):
    net, kw = network(config), inputs()
    with torch.enable_grad():
        net(**kw).square().mean().backward()
    silent = {n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == dead_parameters(config)


@each_config
def test_gradients_are_the_slope(config):
    """fp64 central difference along a random direction of all parameters and of x."""
    net = network(config, dtype=torch.float64)
    kw = inputs()
    kw["x"] = kw["x"].double()
    weight = torch.randn(kw["x"].shape, dtype=torch.float64)
    live = [p for n, p in net.named_parameters() if n not in dead_parameters(config)]
    live.append(kw["x"].requires_grad_())
    with torch.enable_grad():
        gradients = torch.autograd.grad((net(**kw) * weight).mean(), live)
    directions = [torch.randn_like(p) * 1e-6 for p in live]
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))

    def moved(sign: int) -> torch.Tensor:
        for p, d in zip(live, directions, strict=True):
            p.data.add_(d, alpha=sign)
        return (net(**kw) * weight).mean()

    up = moved(1)
    moved(-1)
    torch.testing.assert_close((up - moved(-1)) / 2, slope, rtol=2e-3, atol=0)


# ---- Bad arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mask": torch.ones(2, 6)}, "PiDNet: mask must be None; the network attends to every"),
        (
            {"x": torch.zeros(2, 3, 16, 30)},
            "PiDNet: H and W must be positive multiples of 8, got 16x30",
        ),
        (
            {"x": torch.zeros(2, 3, 0, 8)},
            "PiDNet: H and W must be positive multiples of 8, got 0x8",
        ),
        (
            {"x": torch.zeros(2, 4, 16, 32)},
            r"PiDNet.step: x must be \(B, 3, H, W\) = \(2, 3, 16, 32\) as prepared, got \(2, 4, ",
        ),
        (
            {"x": torch.zeros(3, 3, 16, 32)},
            r"PiDNet.step: x must be \(B, 3, H, W\) = \(2, 3, 16, 32\) as prepared, got \(3, 3, ",
        ),
        ({"t": torch.zeros(1)}, r"PiDNet.step: t must be \(B,\) = \(2,\) or a float, got \(1,\)"),
        ({"y": torch.zeros(2, 6, 11)}, r"PiDNet: y must be \(B, T, 12\) caption embeddings with"),
        ({"y": torch.zeros(2, 0, 12)}, r"PiDNet: y must be \(B, T, 12\) caption embeddings with"),
        ({"lq_latent": torch.zeros(2, 5, 1, 2)}, r"PiDNet: lq_latent must be \(B, 4, zh, zw\)"),
        (
            {"lq_latent": torch.zeros(3, 4, 1, 2)},
            "PiDNet: lq_latent and y must have the same batch size, got 3 and 2",
        ),
        (
            {"degrade_sigma": torch.zeros(1)},
            r"PiDNet: degrade_sigma must be \(B,\) = \(2,\), got \(1,\)",
        ),
    ],
)
def test_errors(changed, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        network(V1)(**{**inputs(), **changed})


def test_step_wants_the_prepared_size():
    net, kw = network(V1), inputs()
    condition = net.prepare(kw["lq_latent"], kw["y"], size=(16, 32))
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 32\) as prepared, got \(2, 3, 32, 16\)$"):
        net.step(kw["x"].transpose(2, 3), kw["t"], condition)


# ---- State dict, meta device, compile, export ------------------------------------------------


@each_config
def test_state_dict_round_trip(config):
    net, other, kw = network(config), network(config, seed=5), inputs()
    assert not torch.equal(other(**kw), net(**kw))
    other.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(other(**kw), net(**kw))
    assert not dict(net.named_buffers())


RELEASED = {
    "v1 flux": (PiDConfig(), 1_362_348_170, 456),
    "v1.5 flux2": (
        PiDConfig(
            lq_latent_channels=128,
            latent_spatial_down_factor=16,
            lq_latent_unpatchify_factor=2,
            lq_hidden_dim=1024,
            rope_ref_h=2048,
            rope_ref_w=2048,
            lq_gate_type="sigma_aware_per_token",
            lq_conv_padding_mode="replicate",
            pit_lq_inject=True,
            lq_aux_rgb_head=True,
        ),
        1_401_447_619,
        467,
    ),
    "PixelDiT": (PiDConfig(lq_latent_channels=None), 1_302_470_787, 385),
}


@pytest.mark.parametrize(("config", "parameters", "tensors"), RELEASED.values(), ids=RELEASED)
def test_released_size_on_the_meta_device(config, parameters, tensors):
    net = PiDNet(config, device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(net.state_dict()) == tensors
    on_meta = {"device": "meta"}
    latent = None
    if config.lq_latent_channels is not None:
        cells = 2048 // config.pixels_per_latent_cell
        latent = torch.empty(1, config.lq_latent_channels, cells, cells, **on_meta)
    x, t = torch.empty(1, 3, 2048, 2048, **on_meta), torch.empty(1, **on_meta)
    v = net(x, t, torch.empty(1, 300, 2304, **on_meta), lq_latent=latent)
    assert (v.shape, v.dtype, v.device.type) == (x.shape, torch.float32, "meta")


def test_step_compiles_without_graph_breaks():
    torch._dynamo.reset()
    net, kw = network(V15), inputs()
    condition = net.prepare(
        kw["lq_latent"], kw["y"], kw["degrade_sigma"], size=(16, 32), timesteps=[634.0]
    )
    compiled = torch.compile(net.step, fullgraph=True, backend="aot_eager")
    v = compiled(kw["x"], 634.0, condition)
    torch.testing.assert_close(v, net.step(kw["x"], 634.0, condition), rtol=1e-5, atol=1e-5)


def test_step_exports():
    net, kw = network(V15), inputs()
    condition = net.prepare(kw["lq_latent"], kw["y"], kw["degrade_sigma"], size=(16, 32))

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x, t):
            return self.net.step(x, t, condition)

    exported = torch.export.export(Step(), (kw["x"], kw["t"])).module()
    v = exported(kw["x"] * 0.5, kw["t"])
    torch.testing.assert_close(v, net.step(kw["x"] * 0.5, kw["t"], condition), rtol=1e-5, atol=1e-5)


# ---- Memory ----------------------------------------------------------------------------------

ONE_STEP = """
import resource, time
import torch
from pixeldiff.models.pid import PiDConfig, PiDNet

started = time.perf_counter()
net = PiDNet(PiDConfig(), device="meta", dtype=torch.bfloat16).to_empty(device="cpu").eval()
row = torch.randn(1 << 16).mul_(0.02).bfloat16()
with torch.inference_mode():
    for p in net.parameters():  # distinct memory, without drawing 1.36 G normals
        flat = p.view(-1)
        whole = flat.numel() // row.numel() * row.numel()
        flat[:whole].view(-1, row.numel()).copy_(row)
        flat[whole:].copy_(row[: flat.numel() - whole])
    filled = time.perf_counter()
    v = net(
        torch.randn(1, 3, 256, 256),
        torch.tensor([999.0]),
        torch.randn(1, 300, 2304),
        lq_latent=torch.randn(1, 16, 8, 8),
        degrade_sigma=torch.zeros(1),
    )
assert v.shape == (1, 3, 256, 256) and torch.isfinite(v).all()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(peak, filled - started, time.perf_counter() - filled)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads ru_maxrss in KiB")
def test_released_size_runs_a_step_in_8_gb(record_property):
    """1.36 B parameters in bf16, one 256x256 step with 300 text tokens."""
    result = subprocess.run(
        [sys.executable, "-c", ONE_STEP],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    peak, filling, step = map(float, result.stdout.split())
    record_property("peak_rss_gb", peak / 1e9)
    record_property("seconds", (filling, step))
    print(f"peak {peak / 1e9:.2f} GB, weights {filling:.1f} s, step {step:.1f} s")
    assert 2.7e9 < peak < 8e9
