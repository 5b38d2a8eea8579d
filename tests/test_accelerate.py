"""accelerate: someone else's PiD network gives its own results, and is itself again afterwards."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import importlib
import inspect
import io
import pickle
import re
import threading
import weakref

import pytest
import torch
from plain_pid import PlainPiD
from torch import nn
from torch.nn.utils import parametrize

import pixeldiff
from bench import upstream
from pixeldiff.errors import AccelerationError, NotAcceleratedWarning
from pixeldiff.models.pid import PiDConfig, PiDNet, variant
from pixeldiff.models.pid.accelerate import Accelerated
from pixeldiff.models.pid.foreign_network import adopt

TINY = {
    "hidden_size": 16,
    "num_groups": 2,
    "patch_depth": 3,
    "pixel_depth": 1,
    "patch_size": 8,
    "pixel_hidden_size": 4,
    "pixel_attn_hidden_size": 16,
    "pixel_num_groups": 2,
    "txt_embed_dim": 12,
    "txt_max_length": 6,
    "rope_ref_h": 40,
    "rope_ref_w": 24,
}
LATENT = {
    "lq_latent_channels": 8,
    "lq_latent_unpatchify_factor": 2,
    "latent_spatial_down_factor": 8,
    "sr_scale": 4,
    "lq_hidden_dim": 8,
    "lq_num_res_blocks": 1,
}
V1 = PiDConfig(**TINY, **LATENT)
V15 = PiDConfig(
    **TINY,
    **LATENT,
    lq_gate_type="sigma_aware_per_token",
    lq_conv_padding_mode="replicate",
    pit_lq_inject=True,
    lq_aux_rgb_head=True,
)
PLAIN = PiDConfig(**TINY, lq_latent_channels=None, rope_mode="original")
CONFIGS = {"v1": V1, "v1.5": V15, "text-to-image": PLAIN}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def plain(config: PiDConfig = V1, make=PlainPiD, *, seed: int = 0) -> nn.Module:
    """A network with every parameter random and activations near 1."""
    return copy.deepcopy(_plain(config, make, seed))


@functools.cache
def _plain(config: PiDConfig, make: type[PlainPiD], seed: int) -> nn.Module:
    net, generator = make(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            fan_in = p[0].numel() if p.dim() > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator) * fan_in**-0.5)
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    return net.eval()


def inputs(config: PiDConfig = V1, *, batch: int = 2, size=(32, 64), seed: int = 1) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    given = {
        "x": draw(batch, 3, *size),
        "t": torch.linspace(866.0, 342.0, batch),
        "y": draw(batch, 7, 12),
    }
    if config.lq_latent_channels is not None:
        given["lq_latent"] = draw(batch, 8, size[0] // 32, size[1] // 32)
        given["degrade_sigma"] = torch.linspace(0.1, 0.6, batch)
    return given


def own(net: nn.Module, **kwargs):
    return type(net).forward(net, **kwargs)


def error(v: torch.Tensor, want: torch.Tensor) -> float:
    return (v.double() - want).square().mean().sqrt().item()


def assert_same(v: torch.Tensor, want: torch.Tensor) -> None:
    """To the rounding of two fp32 implementations."""
    assert (v.shape, v.dtype) == (want.shape, want.dtype)
    assert (v - want).abs().max() <= 2e-4
    assert error(v, want) <= 1e-5 * want.square().mean().sqrt()


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def prepared(monkeypatch):
    """How often a condition was computed, as the length of a list."""
    calls, prepare = [], PiDNet.prepare

    def counted(self, *args, **kwargs):
        calls.append(args)
        return prepare(self, *args, **kwargs)

    monkeypatch.setattr(PiDNet, "prepare", counted)
    return calls


# ---- The same results ------------------------------------------------------------------------


@each_config
@pytest.mark.parametrize("batch", [1, 2])
def test_results_are_its_own(config, batch, prepared):
    net, given = plain(config), inputs(config, batch=batch)
    want = own(net, **given)
    assert pixeldiff.accelerate(net) is net
    v = net(**given)
    assert len(prepared) == 1  # on pixeldiff's network
    assert v.dtype == want.dtype == torch.float32
    assert_same(v, want)
    other = inputs(config, batch=batch, size=(96, 32), seed=3)
    assert_same(net(**other), own(net, **other))


@each_config
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_its_own(config, dtype):
    net, given = plain(config), inputs(config)
    want = own(copy.deepcopy(net).double(), **{k: v.double() for k, v in given.items()})
    pixeldiff.accelerate(net)
    net.to(dtype)  # after it, and noticed
    low = {k: v if k in ("t", "degrade_sigma") else v.to(dtype) for k, v in given.items()}
    ours, theirs = net(**low), own(net, **low)
    assert ours.dtype == theirs.dtype == dtype
    assert 0 < error(ours, want) <= 1.5 * error(theirs, want)


@each_config
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_autocast_computes_and_returns_its_dtype(config, stored):
    net, given = plain(config), inputs(config)
    want = own(copy.deepcopy(net).double(), **{k: v.double() for k, v in given.items()})
    pixeldiff.accelerate(net.to(stored))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = net(**given), own(net, **given)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert 0 < error(ours, want) <= 1.5 * error(theirs, want)
    # Nothing of it is left to autocast: these are the results of the network in that dtype, even
    # where ops are plain PyTorch, whose fp32 products autocast would round.
    low = copy.deepcopy(net).bfloat16()
    assert torch.equal(low(**given), ours)
    with pixeldiff.backend("reference"):
        with torch.autocast("cpu", torch.bfloat16):
            v = net(**given)
        assert torch.equal(low(**given), v)
    assert {p.dtype for p in net.parameters()} == {stored}
    if stored == torch.float32:
        assert_same(net(**given), own(net, **given))


def test_autocast_of_a_disabled_region_is_none():
    net, given = pixeldiff.accelerate(plain()), inputs()
    want = net(**given)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert torch.equal(net(**given), want)


def test_arguments_by_position_and_in_the_shapes_the_gates_take():
    net, given = pixeldiff.accelerate(plain()), inputs()
    x, t, y, latent, sigma = given.values()
    want = net(**given)
    assert torch.equal(net(x, t, y, None, None, None, latent, None, sigma), want)
    assert torch.equal(net(x, t[:, None], y, lq_latent=latent, degrade_sigma=sigma[:, None]), want)
    for one in (torch.tensor(0.3), torch.tensor([0.3])):
        given["degrade_sigma"] = one
        assert_same(net(**given), own(net, **given))
    bare = {"x": x, "t": t, "y": y}
    assert_same(net(**bare), own(net, **bare))


SHALLOW = dataclasses.replace(V1, patch_depth=1, lq_num_res_blocks=0)


def test_compiled():
    """Compiled before it is accelerated: the compiler notices."""
    net, given, graphs = plain(SHALLOW), inputs(), []
    want = net(**given)

    def backend(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(net, backend=backend, fullgraph=True)
    assert torch.equal(compiled(**given), want)
    pixeldiff.accelerate(net).last_repa_tokens = None  # or its end would be one more graph
    assert_same(compiled(**given), want)
    assert ["pixeldiff.joint_attention.default" in targets for targets in graphs] == [False, True]
    net.s_embedder.proj.weight.mul_(2)
    v = compiled(**given)
    assert_same(v, net(**given))
    assert (v - want).abs().max() > 1e-3
    assert len(graphs) == 2


def test_what_cannot_be_compiled_runs_outside_the_graph():
    net, given = pixeldiff.accelerate(plain(SHALLOW)), inputs()
    compiled = torch.compile(net, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(**given), net(**given))
    hooked(net)
    compiled = torch.compile(net, backend="eager")
    with pytest.raises(AccelerationError, match="has a forward hook"):
        compiled(**given)


def test_threads():
    net, given, got = pixeldiff.accelerate(plain(), cache=True), inputs(), []
    copied = copy.deepcopy(net)  # adopted by whoever calls first
    want = net(**given)

    @torch.no_grad()
    def run():
        for _ in range(3):
            got.extend((net(**given), copied(**given)))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(got) == 18
    assert all(torch.equal(v, want) for v in got)


# ---- In place, and back ----------------------------------------------------------------------


def test_restore_puts_everything_back():
    net, given = plain(), inputs()
    want, attributes, keys = net(**given), dict(net.__dict__), list(net.state_dict())
    parameters, modules = list(net.parameters()), list(net.modules())
    pixeldiff.accelerate(net)
    assert isinstance(net.forward, Accelerated)
    assert list(net.state_dict()) == keys
    assert [id(p) for p in net.parameters()] == [id(p) for p in parameters]
    assert [id(m) for m in net.modules()] == [id(m) for m in modules]
    assert not torch.equal(net(**given), want)  # the same to rounding only
    assert pixeldiff.restore(net) is net
    attributes["last_repa_tokens"] = None
    assert net.__dict__ == attributes
    assert torch.equal(net(**given), want)
    assert pixeldiff.restore(net) is net


def test_twice_is_once():
    net = pixeldiff.accelerate(pixeldiff.accelerate(plain()), cache=True)
    assert_same(net(**inputs()), own(net, **inputs()))
    pixeldiff.restore(net)
    assert "forward" not in net.__dict__


def test_for_a_while():
    net, given = plain(), inputs()
    want = net(**given)
    with pixeldiff.accelerated(net, cache=True) as same:
        assert same is net
        kept = net.forward
        with pixeldiff.accelerated(net):
            assert net.forward is not kept
        assert net.forward is kept
    assert torch.equal(net(**given), want)
    with pytest.raises(ZeroDivisionError), pixeldiff.accelerated(net):
        raise ZeroDivisionError
    assert "forward" not in net.__dict__


def test_signature_and_stale_tokens():
    net = plain()
    signature = inspect.signature(net.forward)
    net(**inputs())
    assert net.last_repa_tokens is not None
    pixeldiff.accelerate(net)
    assert inspect.signature(net.forward) == signature
    assert net.forward.__doc__ == "A velocity."
    net(**inputs())
    assert net.last_repa_tokens is None


class Holder(nn.Module):
    def __init__(self, **networks: nn.Module) -> None:
        super().__init__()
        self.vae = nn.Conv2d(3, 3, 1)
        for name, net in networks.items():
            self.add_module(name, net)


def test_networks_inside_other_modules():
    given = inputs()
    student, teacher = plain(), plain(seed=4)
    holder = Holder(model=Holder(net=student), net_ema=teacher)
    want = [net(**given) for net in (student, teacher)]
    keys = list(holder.state_dict())
    assert pixeldiff.accelerate(holder) is holder
    for net, v in zip((student, teacher), want, strict=True):
        assert isinstance(net.forward, Accelerated)
        assert_same(net(**given), v)
    assert list(holder.state_dict()) == keys
    pixeldiff.restore(holder)
    assert torch.equal(teacher(**given), want[1])
    # All or none.
    teacher.s_embedder.proj.register_forward_hook(lambda *a: None)
    with pytest.raises(AccelerationError):
        pixeldiff.accelerate(holder)
    assert "forward" not in student.__dict__


def test_hooks_of_the_network_itself_run():
    net, seen = pixeldiff.accelerate(plain()), []
    net.register_forward_pre_hook(lambda m, args: seen.append("before"))
    net.register_forward_hook(lambda m, args, v: seen.append(tuple(v.shape)))
    net(*list(inputs().values())[:3])
    assert seen == ["before", (2, 3, 32, 64)]


def test_it_is_freed_like_any_module():
    gc.disable()
    try:
        net = pixeldiff.accelerate(plain(), cache=True)
        net(**inputs())
        gone, weight = weakref.ref(net), weakref.ref(net.s_embedder.proj.weight)
        forward = net.forward
        del net
        assert gone() is None
        with pytest.raises(AccelerationError, match="the network of this forward is gone"):
            forward(**inputs())
        del forward
        assert weight() is None
    finally:
        gc.enable()


# ---- One set of weights ----------------------------------------------------------------------


def test_weights_of_a_functional_call():
    net, given = pixeldiff.accelerate(plain()), inputs()
    other = plain(seed=8)
    v = torch.func.functional_call(net, dict(other.named_parameters()), kwargs=given)
    assert_same(v, own(other, **given))
    assert_same(net(**given), own(net, **given))
    values = {n: p.detach().clone() for n, p in other.named_parameters()}
    assert torch.equal(torch.func.functional_call(net, values, kwargs=given), v)


def test_weights_are_shared():
    net = plain()
    ours = adopt(net)
    theirs = dict(net.named_parameters())
    assert len(list(ours.parameters())) == len(theirs)
    for name, p in ours.named_parameters():
        assert p is theirs[name]


def changed_in_place(net):
    net.patch_blocks[1].mlp_x.w2.weight.add_(0.1)


def changed_past_autograd(net):
    net.patch_blocks[0].attn.qkv_x.weight.data.add_(0.1)


def loaded(net):
    net.load_state_dict(plain(seed=8).state_dict())


def loaded_by_assignment(net):
    net.load_state_dict(plain(seed=8).state_dict(), assign=True)


def stepped(net):
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimiser.step()


def parameter_replaced(net):
    net.y_pos_embedding = nn.Parameter(net.y_pos_embedding * 3)
    net.lq_proj.gate_modules[0].log_alpha = nn.Parameter(torch.tensor(-1.0))


def module_replaced(net):
    net.pixel_blocks[0].compress_to_attn = plain(seed=8).pixel_blocks[0].compress_to_attn


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        changed_in_place,
        changed_past_autograd,
        loaded,
        loaded_by_assignment,
        stepped,
        parameter_replaced,
        module_replaced,
    ],
    ids=lambda f: f.__name__,
)
def test_changed_weights_count_from_the_next_call(change, cache):
    net, given = pixeldiff.accelerate(plain(), cache=cache), inputs()
    before = net(**given)
    change(net)
    v = net(**given)
    assert_same(v, own(net, **given))
    assert (v - before).abs().max() > 1e-3


def test_deepcopy_is_accelerated_on_its_own_weights():
    net, given = pixeldiff.accelerate(plain(), cache=True), inputs()
    want = net(**given)
    holder = copy.deepcopy(Holder(net=net))
    copied = holder.net
    assert isinstance(copied.forward, Accelerated)
    assert copied.forward is not net.forward
    assert inspect.signature(copied.forward) == inspect.signature(net.forward)
    assert torch.equal(copied(**given), want)
    copied.final_layer.linear.bias.add_(1)
    assert torch.equal(net(**given), want)
    torch.testing.assert_close(copied(**given), want + 1, rtol=0, atol=1e-5)
    pixeldiff.restore(copied)
    assert "forward" not in copied.__dict__
    assert torch.equal(copy.deepcopy(net.forward)(**given), want)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_pickle_holds_the_network_as_it_was(how):
    net, given = plain(), inputs()
    want = net(**given)
    pixeldiff.accelerate(net)
    if how == "pickle":
        data = pickle.dumps(net)
        read = pickle.loads(data)
    else:
        file = io.BytesIO()
        torch.save(net, file)
        data = file.getvalue()
        read = torch.load(io.BytesIO(data), weights_only=False)
    assert b"pixeldiff.models.pid.accelerate" not in data
    assert torch.equal(read(**given), want)
    pixeldiff.accelerate(read)
    assert isinstance(read.forward, Accelerated)
    assert_same(read(**given), want)
    assert torch.equal(pixeldiff.restore(read)(**given), want)


# ---- Modules that are more than their weights ------------------------------------------------


class LowRank(nn.Module):
    """A wrapper around a linear, as adapters are added."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Quantised(nn.Linear):
    def forward(self, x):
        return super().forward(x.round())


class Packed(torch.Tensor):
    pass


def hooked(net):
    net.patch_blocks[0].attn.qkv_x.register_forward_hook(lambda *a: None)
    return r"patch_blocks\.0\.attn\.qkv_x has a forward hook"


def block_hooked(net):
    net.patch_blocks[1].register_forward_pre_hook(lambda *a: None)
    return r"patch_blocks\.1 has a forward hook"


def forward_replaced(net):
    linear = net.patch_blocks[0].mlp_x.w1
    linear.forward = lambda x, old=linear.forward: old(x) * 2
    return r"patch_blocks\.0\.mlp_x\.w1 has had its forward replaced"


def wrapped(net):
    net.patch_blocks[0].attn.qkv_x = LowRank(net.patch_blocks[0].attn.qkv_x)
    return r"patch_blocks\.0\.attn\.qkv_x is test_accelerate\.LowRank, not torch\.nn\.Linear"


def all_wrapped(net):
    for block in net.patch_blocks:
        block.attn.qkv_x, block.mlp_x.w1 = LowRank(block.attn.qkv_x), LowRank(block.mlp_x.w1)
    return r"has 6 modules that pixeldiff's ops would pass by: .*; \.\.\.\. Merge or remove"


def quantised(net):
    old = net.s_embedder.proj
    net.s_embedder.proj = Quantised(old.in_features, old.out_features)
    return r"s_embedder\.proj is test_accelerate\.Quantised, not torch\.nn\.Linear"


def parametrised(net):
    parametrize.register_parametrization(net.final_layer.linear, "weight", nn.Identity())
    return r"final_layer\.linear is torch\.nn\.utils\.parametrize\.ParametrizedLinear|lacks 1 of"


def other_group_norm(net):
    net.lq_proj.latent_proj[3].block[0].num_groups = 2
    return r"latent_proj\.3\.block\.0 has num_groups = 2, not 4"


def other_stride(net):
    net.lq_proj.latent_proj[2].stride = (2, 2)
    return r"latent_proj\.2 has stride = \(2, 2\), not \(1, 1\)"


def other_eps(net):
    net.patch_blocks[0].norm_x1.variance_epsilon = 1e-5
    return r"patch_blocks\.0\.norm_x1 has eps = 1e-05, not 1e-06"


def other_gelu(net):
    net.pixel_blocks[0].mlp.act = nn.GELU("tanh")
    return r"pixel_blocks\.0\.mlp\.act is GELU\(approximate='tanh'\)"


def dropping(net):
    net.patch_blocks[2].attn.attn_drop.p = 0.1
    return r"patch_blocks\.2\.attn\.attn_drop drops out with p = 0\.1"


CHANGES = [hooked, block_hooked, forward_replaced, wrapped, all_wrapped, quantised, parametrised]
SETTINGS = [other_group_norm, other_stride, other_eps, other_gelu, dropping]


@pytest.mark.parametrize("change", [*CHANGES, *SETTINGS], ids=lambda f: f.__name__)
def test_modules_that_do_more_are_named(change):
    net = plain()
    message = change(net)
    with pytest.raises(AccelerationError, match=message):
        pixeldiff.accelerate(net)
    assert "forward" not in net.__dict__


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_modules_that_do_more_later_are_noticed(change):
    net, given = pixeldiff.accelerate(plain()), inputs()
    net(**given)
    message = change(net)
    with pytest.raises(AccelerationError, match=message):
        net(**given)
    net.forward._options["fallback"] = True
    assert torch.equal(net(**given), own(net, **given))


def test_a_removed_hook_is_noticed_too():
    net, given = pixeldiff.accelerate(plain()), inputs()
    handle = net.patch_blocks[0].register_forward_hook(lambda *a: None)
    with pytest.raises(AccelerationError, match="has a forward hook"):
        net(**given)
    handle.remove()
    assert_same(net(**given), own(net, **given))


def test_a_forward_replaced_by_others():
    net = plain()
    net.forward = lambda *a, **k: None
    with pytest.raises(AccelerationError, match="has been replaced on the instance by <function"):
        pixeldiff.accelerate(net)


def test_weights_that_are_no_plain_parameters():
    net, given = pixeldiff.accelerate(plain()), inputs()
    weight = net.t_embedder.mlp[0].weight
    net.t_embedder.mlp[0]._parameters["weight"] = weight.detach().as_subclass(Packed)
    with pytest.raises(AccelerationError, match=r"t_embedder\.mlp\.0\.weight is a Packed, not a"):
        net(**given)


@pytest.mark.parametrize("cache", [False, True])
def test_weights_that_are_gone(cache):
    net, given = pixeldiff.accelerate(plain(), cache=cache), inputs()
    weight = net.final_layer.linear.weight
    del net.final_layer.linear.weight
    net.final_layer.linear.weight = weight.detach()
    with pytest.raises(AccelerationError, match=r"final_layer\.linear\.weight is no parameter any"):
        net(**given)
    with torch.enable_grad(), pytest.raises(AccelerationError, match=r"is no parameter any more"):
        net(**given)
    net.forward._options["fallback"] = True
    assert torch.equal(net(**given), own(net, **given))


def test_weights_of_several_dtypes_and_places():
    net, given = pixeldiff.accelerate(plain()), inputs()
    net.final_layer.norm.bfloat16()
    with pytest.raises(AccelerationError) as e:
        net(**given)
    assert re.search(
        r"weights must have one dtype: y_pos_embedding has torch\.float32, "
        r"final_layer\.norm\.weight torch\.bfloat16; use module\.to\(\.\.\.\)$",
        str(e.value),
    )
    net.float()
    net(**given)
    net.final_layer.norm.to("meta")
    with pytest.raises(AccelerationError, match="must have one device: y_pos_embedding has cpu"):
        net(**given)
    net = pixeldiff.accelerate(plain())
    with pytest.raises(AccelerationError, match="x must be on cpu as the weights are, got meta"):
        net(**{**given, "x": given["x"].to("meta")})


# ---- Gradients -------------------------------------------------------------------------------


@torch.enable_grad()
@pytest.mark.filterwarnings("error")
def test_training_runs_its_own_forward():
    net, given = plain().train(), inputs()
    own(net, **given).square().sum().backward()
    want = {n: p.grad for n, p in net.named_parameters()}
    net.zero_grad()
    pixeldiff.accelerate(net)
    net(**given).square().sum().backward()
    for name, p in net.named_parameters():
        assert torch.equal(p.grad, want[name]) if want[name] is not None else p.grad is None
    assert net.last_repa_tokens is not None


@torch.enable_grad()
@pytest.mark.parametrize("who", ["weights", "x", "lq_latent"])
def test_gradients_in_evaluation_mode_warn(who, prepared):
    net, given = pixeldiff.accelerate(plain()), inputs()
    if who != "weights":
        net.requires_grad_(False)
        net(**given)
        assert len(prepared) == 1
        given[who].requires_grad_()
    with pytest.warns(NotAcceleratedWarning, match=r"own forward.*torch\.no_grad") as seen:
        v = net(**given)
    assert seen[0].filename == __file__
    assert v.requires_grad
    assert torch.equal(v, own(net, **given))
    assert len(prepared) == (who != "weights")


# ---- What is kept between calls --------------------------------------------------------------


def test_nothing_that_depends_on_inputs_is_kept_by_default(prepared):
    net, given = pixeldiff.accelerate(plain()), inputs()
    assert torch.equal(net(**given), net(**given))
    assert len(prepared) == 2
    cache = net.forward._cache
    assert cache._condition is None
    assert cache._tables is not None
    net.forward.clear()
    assert cache._tables is None


def test_position_tables_are_made_once_a_size(monkeypatch):
    net, sizes, made = pixeldiff.accelerate(plain()), [], PiDNet.tables

    def counted(self, *args):
        sizes.append(args)
        return made(self, *args)

    monkeypatch.setattr(PiDNet, "tables", counted)
    for given in (inputs(), inputs(seed=2), inputs(size=(32, 32)), inputs(size=(32, 32))):
        net(**given)
    short = inputs(size=(32, 32))
    short["y"] = short["y"][:, :2]
    assert_same(net(**short), own(net, **short))
    assert sizes == [((32, 64), 6), ((32, 32), 6), ((32, 32), 2)]


def test_cache_is_used_for_the_same_tensors(prepared):
    net, given = pixeldiff.accelerate(plain(), cache=True), inputs()
    want = net(**given)
    for x in (given["x"], given["x"] * 2):
        v = net(**{**given, "x": x, "t": given["t"] - 100})
        assert_same(v, own(net, **{**given, "x": x, "t": given["t"] - 100}))
    assert torch.equal(net(**given), want)
    assert len(prepared) == 1


@pytest.mark.parametrize("name", ["y", "lq_latent", "degrade_sigma"])
@pytest.mark.parametrize("how", ["in place", "through a view", "another", "other memory"])
def test_cache_sees_changed_inputs(name, how, prepared):
    net, given = pixeldiff.accelerate(plain(), cache=True), inputs()
    before = net(**given)
    if how == "in place":
        given[name].mul_(0.3)
    elif how == "through a view":
        given[name][1:].mul_(0.3)
    elif how == "another":
        given[name] = given[name] * 0.3
    else:
        given[name].data = given[name] * 0.3
    v = net(**given)
    assert_same(v, own(net, **given))
    assert (v - before).abs().max() > 1e-3
    assert len(prepared) == 2


def test_cache_sees_another_parameter_in_the_same_memory(prepared):
    net, given = pixeldiff.accelerate(plain(), cache=True), inputs()
    linear = net.y_embedder.proj
    linear.weight = nn.Parameter(linear.weight.clone())
    before, old = net(**given), linear.weight
    linear.weight = nn.Parameter(old.data.mul_(3).data)
    new = linear.weight
    assert (new._version, new.data_ptr()) == (old._version, old.data_ptr())
    v = net(**given)
    assert_same(v, own(net, **given))
    assert (v - before).abs().max() > 1e-3
    assert len(prepared) == 2


def test_cache_sees_other_sizes_and_no_latent(prepared):
    net, given = pixeldiff.accelerate(plain(), cache=True), inputs(size=(32, 32))
    net(**given)
    wide = {**given, "x": inputs()["x"]}
    assert_same(net(**wide), own(net, **wide))
    bare = {k: given[k] for k in "xty"}
    assert_same(net(**bare), own(net, **bare))
    assert len(prepared) == 3


@pytest.mark.parametrize("name", ["y", "lq_latent", "degrade_sigma"])
def test_cache_ends_with_its_inputs(name):
    net, given = pixeldiff.accelerate(plain(), cache=True), inputs()
    net(**given)
    cache = net.forward._cache
    feature = weakref.ref(cache._condition[3].features[0])
    given.pop(name)
    assert cache._condition is None
    assert feature() is None


def test_cache_of_tensors_without_versions(prepared):
    net = pixeldiff.accelerate(plain(), cache=True)
    with torch.inference_mode():
        given = inputs()
        before = net(**given)
        given["lq_latent"].mul_(0.3)
        v = net(**given)
        assert_same(v, own(net, **given))
    assert not torch.equal(v, before)
    assert len(prepared) == 2


def test_cache_of_cast_weights():
    net, given = pixeldiff.accelerate(plain(), cache=True), inputs()
    cache = net.forward._cache
    with torch.autocast("cpu", torch.bfloat16):
        before = net(**given)
        cast = cache._cast[2]
        assert cast.s_embedder.proj.weight.dtype == torch.bfloat16
        assert torch.equal(net(**given), before)
        assert cache._cast[2] is cast
        net.patch_blocks[0].mlp_x.w2.weight.add_(0.2)
        changed = net(**given)
        assert cache._cast[2] is not cast
        assert (changed - before).abs().max() > 1e-2
    net(**given)
    assert cache._cast is None
    pixeldiff.accelerate(net)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(**given), changed)
    assert net.forward._cache._cast is None  # nothing without cache=True


# ---- Calls and modules that cannot be taken over ---------------------------------------------


UNUSED = {
    "s": torch.zeros(2, 32, 16),
    "mask": torch.ones(2, 7),
    "lq_video_or_image": torch.zeros(2, 3, 8, 8),
    "lq_mask": torch.ones(2),
    "feature_indices": {1},
    "return_features_early": True,
    "return_lq_aux": True,
}


@pytest.mark.parametrize("name", UNUSED)
def test_arguments_without_effect_are_refused(name):
    net, given = pixeldiff.accelerate(plain()), inputs()
    default = inspect.signature(net.forward).parameters[name].default
    want = net(**given)
    assert torch.equal(net(**given, **{name: default}), want)
    with pytest.raises(
        AccelerationError,
        match=rf"^accelerate: plain_pid\.PlainPiD: {name} must be {default}, got .*: .*\. "
        r"pixeldiff\.accelerate\(module, fallback=True\) runs such calls on the module's own",
    ):
        net(**given, **{name: UNUSED[name]})
    pixeldiff.accelerate(net, fallback=True)
    assert torch.equal(net(**given), want)
    assert torch.equal(net(**given, **{name: UNUSED[name]}), own(net, **given))


def test_every_argument_of_the_published_forward_is_accounted_for():
    from pixeldiff.models.pid.foreign_call import OPTIONAL, REQUIRED
    from pixeldiff.models.pid.foreign_call import UNUSED as named

    assert {*REQUIRED, *OPTIONAL, *named} == set(inspect.signature(plain().forward).parameters)


def test_wrong_calls_fail_as_on_the_network_itself():
    net, given = pixeldiff.accelerate(plain(), fallback=True), inputs()
    for args, kwargs in [
        ((), {}),
        ((given["x"],), {"x": given["x"]}),
        ((), {**given, "fps": 24}),
        ((None,) * 13, {}),
    ]:
        with pytest.raises(TypeError) as theirs:
            inspect.signature(net.forward).bind(*args, **kwargs)
        with pytest.raises(TypeError, match=re.escape(str(theirs.value))):
            net(*args, **kwargs)


def test_degrade_sigma_belongs_to_the_latent():
    net, given = pixeldiff.accelerate(plain()), inputs()
    given["degrade_sigma"] = None
    with pytest.raises(AccelerationError, match="degrade_sigma must be given with lq_latent"):
        net(**given)


SIGMA = torch.tensor(0.4)


class AnyName(PlainPiD):
    def forward(self, x, t, y, scale=1.0, *, lq_latent=None, degrade_sigma=SIGMA, **kwargs):
        return super().forward(x, t, y, lq_latent=lq_latent, degrade_sigma=degrade_sigma) * scale


def test_a_host_with_arguments_of_its_own():
    net, given = pixeldiff.accelerate(plain(make=AnyName)), inputs()
    want = own(net, **given)
    assert_same(net(**given, fps=None, scale=1.0), want)
    del given["degrade_sigma"]
    assert_same(net(**given), own(net, **given))
    for name, value in (("fps", 24), ("scale", 2.0)):
        with pytest.raises(AccelerationError, match=f"{name} must be .*got {value}: pixeldiff"):
            net(**given, **{name: value})


class Renamed(PlainPiD):
    def forward(self, x, timesteps, context=None, transformer_options=None):
        raise NotImplementedError


class Demanding(PlainPiD):
    def forward(self, x, t, y, fps):
        raise NotImplementedError


def test_another_call_is_refused():
    net = plain(make=Renamed)
    wrapped(net)  # not what matters first
    with pytest.raises(AccelerationError, match=r"is not called as a PiD.*it takes no t, y$"):
        pixeldiff.accelerate(net)
    with pytest.raises(AccelerationError, match=r"needs an argument 'fps' that PiD networks"):
        pixeldiff.accelerate(plain(make=Demanding))


def test_context_parallelism_is_refused():
    net, given = plain(), inputs()
    net._cp_group = None
    pixeldiff.accelerate(net)(**given)
    net._cp_group = object()
    with pytest.raises(AccelerationError, match="has context parallelism enabled"):
        net(**given)


def test_not_a_pid_network():
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got str; pass"):
        pixeldiff.accelerate("net")
    with pytest.raises(
        AccelerationError,
        match=r"no PiD network in torch\.nn\.modules\.linear\.Linear: looked for a module with the "
        r"children pixel_embedder, .*final_layer; no module in it has any of them",
    ):
        pixeldiff.accelerate(nn.Linear(2, 2))
    holder = Holder(net=plain())
    del holder.net.t_embedder, holder.net.final_layer
    with pytest.raises(
        AccelerationError,
        match=r"; the nearest is net \(plain_pid\.PlainPiD\), which lacks t_embedder, final_layer$",
    ):
        pixeldiff.accelerate(holder)
    ours = PiDNet(V1)
    with pytest.raises(AccelerationError, match=r"PiDNet runs on pixeldiff's ops already"):
        pixeldiff.accelerate(ours)
    net = plain()
    pixeldiff.accelerate(Holder(ours=ours, net=net))
    assert isinstance(net.forward, Accelerated)
    assert "forward" not in ours.__dict__


def test_other_parameters_are_named():
    net = plain()
    net.patch_blocks[0].extra = nn.Linear(2, 2)
    net.final_layer.linear.register_parameter("bias", None)
    with pytest.raises(
        AccelerationError,
        match=r"PlainPiD lacks 1 of \d+ parameters \(final_layer\.linear\.bias\) and holds 2 that "
        r"a PiD network does not have \(patch_blocks\.0\.extra\.weight, patch_blocks\.0\.extra",
    ):
        pixeldiff.accelerate(net)
    net = plain()
    net.pixel_blocks[0].mlp.fc2 = nn.Linear(16, 5)
    with pytest.raises(
        AccelerationError,
        match=r"pixel_blocks\.0\.mlp\.fc2\.weight must be \(4, 16\), got \(5, 16\); 2 parameters",
    ):
        pixeldiff.accelerate(net)


# ---- Geometry --------------------------------------------------------------------------------


HIDDEN = ("rope_mode", "rope_ref_grid_h", "rope_ref_grid_w", "text_rope_theta")
HIDDEN_LATENT = (
    "latent_channels",
    "interval",
    "sr_scale",
    "latent_spatial_down_factor",
    "latent_unpatchify_factor",
)


def without_attributes(config: PiDConfig) -> nn.Module:
    with torch.device("meta"):
        net = PlainPiD(config)
    for name in HIDDEN:
        delattr(net, name)
    if config.lq_latent_channels is not None:
        for name in HIDDEN_LATENT:
            delattr(net.lq_proj, name)
    return net


@each_config
def test_geometry_from_attributes(config):
    assert adopt(plain(config)).config == dataclasses.replace(config, lq_aux_rgb_head=False)


@pytest.mark.parametrize("name", ["siglip-2k", "flux2-v1.5", "pixeldit"])
def test_geometry_of_released_networks_needs_no_attributes(name):
    config = variant(name).inference_config
    assert adopt(without_attributes(config)).config == config


def test_attributes_win_over_the_released_geometry():
    net = without_attributes(variant("sd3-2k").inference_config)
    net.rope_ref_grid_h = 32
    assert adopt(net).config.rope_ref_h == 512


def test_unknown_geometry_is_asked_for():
    net = without_attributes(V1)
    with pytest.raises(
        AccelerationError,
        match=r"nothing says text_rope_theta, rope_mode, .*lq_interval of plain_pid\.PlainPiD: .* "
        r"Pass config=pixeldiff\.models\.pid\.PiDConfig\(\.\.\.\)$",
    ):
        pixeldiff.accelerate(net)
    assert adopt(net, V1).config == V1
    with pytest.raises(AccelerationError, match=r"lacks .*pit_lq_gate"):
        adopt(net, V15)


def test_a_config_must_not_contradict_the_network():
    with pytest.raises(
        AccelerationError,
        match=r"config\.rope_ref_h is 16, but rope_ref_grid_h of plain_pid\.PlainPiD says 40",
    ):
        pixeldiff.accelerate(plain(), config=dataclasses.replace(V1, rope_ref_h=16))
    with pytest.raises(AccelerationError, match=r"lq_conv_padding_mode is 'reflect', but lq_proj"):
        pixeldiff.accelerate(
            plain(), config=dataclasses.replace(V1, lq_conv_padding_mode="reflect")
        )
    net = plain(V15)
    net.lq_proj.latent_proj[2].padding_mode = "zeros"
    with pytest.raises(AccelerationError, match=r"latent_proj\.2 must have padding_mode 'replic"):
        pixeldiff.accelerate(net)
    net = plain()
    net.use_text_rope = False
    with pytest.raises(AccelerationError, match="use_text_rope=False, which no release has"):
        pixeldiff.accelerate(net)


# ---- Verified by a call ----------------------------------------------------------------------


class OtherActivation(PlainPiD):
    """Changed where no name, shape or setting tells."""

    def __init__(self, config: PiDConfig) -> None:
        super().__init__(config)
        for block in self.pixel_blocks:
            block.mlp.act = nn.SiLU()


class OtherPeriod(PlainPiD):
    def text_angles(self, length):
        return super().text_angles(length) * 1.1


@each_config
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_verified(config, dtype):
    net = pixeldiff.accelerate(plain(config).to(dtype), verify=True)
    assert isinstance(net.forward, Accelerated)
    assert net.forward._cache._tables is None


@pytest.mark.parametrize("make", [OtherActivation, OtherPeriod])
def test_a_changed_copy_fails_to_verify(make):
    net = plain(make=make)
    with pytest.raises(
        AccelerationError,
        match=r"^accelerate\(verify=True\): .* computes something else .*: relative difference 0\."
        r"\d+, expected at most 0\.001$",
    ):
        pixeldiff.accelerate(net, verify=True)
    assert "forward" not in net.__dict__


@pytest.mark.parametrize(("value", "what"), [(0.0, "zeros"), (torch.nan, "NaN or infinity")])
def test_results_that_verify_nothing(value, what):
    net = plain()
    net.final_layer.linear.weight.fill_(value)
    net.final_layer.linear.bias.zero_()
    with pytest.raises(AccelerationError, match=f"returns {what}, which verifies nothing"):
        pixeldiff.accelerate(net, verify=True)


# ---- The published implementation ------------------------------------------------------------


needs_upstream = pytest.mark.skipif(
    upstream.why_not() is not None, reason=f"published implementation {upstream.why_not()}"
)


def published(config: PiDConfig) -> nn.Module:
    net = upstream.network(config, torch.device("cpu"))
    net.load_state_dict(plain(config).state_dict())
    return net


@needs_upstream
@pytest.mark.parametrize("config", [V1, V15], ids=["v1", "v1.5"])
def test_the_published_network(config, prepared):
    net, given = published(config), inputs(config)
    want = net(**given)
    with torch.autocast("cpu", torch.bfloat16):
        low = net(**given)
    pixeldiff.accelerate(net, verify=True)
    assert len(prepared) == 1
    assert adopt(net).config == dataclasses.replace(config, lq_aux_rgb_head=False)
    v = net(**given)
    # At such times an ulp of a time frequency shows; near t = 0 it does not.
    torch.testing.assert_close(v, want, rtol=0, atol=1e-3)
    late = {**given, "t": torch.tensor([9.0, 2.0])}
    assert_same(net(**late), own(net, **late))
    with torch.autocast("cpu", torch.bfloat16):
        ours = net(**given)
    assert ours.dtype == low.dtype
    assert error(ours, want) <= 1.5 * error(low, want)
    assert len(prepared) == 4
    for name in UNUSED:
        with pytest.raises(AccelerationError, match=f"{name} must be"):
            net(**given, **{name: UNUSED[name]})
    assert set(inspect.signature(net.forward).parameters) == {*given, *UNUSED}
    copied, read = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    assert torch.equal(copied(**given), v)
    assert torch.equal(read(**given), want)
    assert torch.equal(pixeldiff.restore(net)(**given), want)


@needs_upstream
def test_the_published_text_to_image_network(prepared):
    published(V1)  # so that it can be imported
    module = importlib.import_module("pid._src.networks.pixeldit_official")
    taken = inspect.signature(module.PixDiT_T2I).parameters
    fields = {k: v for k, v in PLAIN.to_dict().items() if k in taken}
    net, given = module.PixDiT_T2I(**fields).eval(), inputs(PLAIN)
    net.load_state_dict(plain(PLAIN).state_dict())
    given["t"] = torch.tensor([9.0, 2.0])
    pixeldiff.accelerate(net, verify=True)
    assert adopt(net).config == PLAIN
    assert_same(net(**given), own(net, **given))
    assert len(prepared) == 2


@needs_upstream
@torch.enable_grad()
def test_the_published_network_trains():
    net, given = published(V15).requires_grad_(True).train(), inputs(V15)
    pixeldiff.accelerate(net)
    v, aux = net(**given, return_lq_aux=True)
    assert v.requires_grad
    assert aux["pred_lq_rgb"].shape == (2, 3, 8, 16)
