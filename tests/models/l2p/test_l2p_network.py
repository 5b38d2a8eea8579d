"""The L2P network: goldens, what must and must not change its output, sizes, shared work."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_l2p import LATENT, captions, config, draw, network, relative
from torch.nn import functional

from pixeldiff import ops
from pixeldiff.errors import SizeError
from pixeldiff.memory.live import LiveMemory
from pixeldiff.models.l2p import VARIANTS, L2PNet, bands
from pixeldiff.models.l2p.block import Block
from pixeldiff.models.l2p.positions import caption_positions, image_positions, rope_3d
from pixeldiff.models.l2p.sampler import guided, sample
from pixeldiff.models.l2p.scheduler import schedule
from pixeldiff.models.l2p.sizes import check_size
from pixeldiff.verify import verify_file

TINY = config()


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def test_golden(l2p_golden):
    if l2p_golden.stem.startswith("text_encoder"):
        pytest.importorskip("transformers", minversion="4.51")
    report = verify_file(l2p_golden)
    misses = [f"{r.key}: {r.error:.3g} > {r.tolerance:.3g}" for r in report.rows if not r.ok]
    assert report.ok, misses


# ---- Prepare and step --------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["1k", "4k", "8k", "10k"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_step_of_prepare(form, dtype):
    net = network(config(form), dtype=dtype)
    step = net.config.size_multiple
    x, y = draw(1, 3, step, 2 * step), captions(5)
    condition = net.prepare(y, (step, 2 * step))
    u = net(x, torch.tensor([0.3]), y)
    assert u.dtype == torch.float32
    assert u.shape == x.shape
    assert u.is_contiguous()
    assert torch.equal(net.step(x, torch.tensor([0.3]), condition), u)
    assert torch.equal(net.step(x, torch.tensor([0.3]), condition), u)  # nothing is used up


def test_a_geometrys_own_rotary_base_and_time_scale_count():
    net = network(config(rope_theta=40.0, t_scale=500.0))
    condition = net.prepare(captions(5), (32, 48))
    where = torch.cat((image_positions((2, 3), 32, 33), caption_positions(32)))
    for got, want in zip(condition.joint_rope, rope_3d(where, (8, 8, 8), theta=40.0), strict=True):
        assert torch.equal(got, want)
    times = [n.modulation(torch.tensor([t])).time for n, t in ((net, 0.5), (network(TINY), 0.25))]
    assert torch.equal(*times)


def test_latent_model():
    net = network(LATENT)
    x, y = draw(2, 16, 8, 12), captions(5, 40)
    u = net(x, torch.tensor([0.3, 0.8]), y)
    assert u.shape == x.shape
    for b in range(2):
        alone = net(x[b : b + 1], 0.3 if b == 0 else 0.8, y[b : b + 1])
        assert relative(u[b : b + 1], alone) < 1e-5


@pytest.mark.parametrize("times", [[0.0, 0.3, 1.0], [0.3]])
def test_prepared_times(times):
    """A prepared time, the same float unprepared, and the time as a tensor of either shape.

    In fp64: the prepared times share one GEMM, so that only rounding may tell them apart.
    """
    net = network(TINY, dtype=torch.float64)
    x, y = draw(2, 3, 32, 48).double(), captions(5, 9)
    ready, bare = net.prepare(y, (32, 48), times=times), net.prepare(y, (32, 48))
    assert list(ready.modulations) == times
    u = net.step(x, 0.3, ready)
    for t in (0.3, torch.tensor(0.3), torch.tensor([0.3, 0.3])):
        # A time is an fp32 number wherever it comes from.
        torch.testing.assert_close(net.step(x, t, bare), u, rtol=1e-9, atol=1e-9)
    assert relative(net.step(x, 0.4, ready), u) > 1e-3


def test_the_last_block_leaves_out_rows_nobody_reads():
    """A trace asks for all of them; the result is the same."""
    net, seen = network(TINY, dtype=torch.float64), {}
    x, y = draw(2, 3, 80, 112).double(), captions(5, 40)
    t = torch.tensor([0.3, 0.7])
    u = net(x, t, y, trace=lambda name, value: seen.__setitem__(name, value))
    torch.testing.assert_close(net(x, t, y), u, rtol=1e-10, atol=1e-10)
    fed, inner = [], net.layers[1].feed_forward
    hook = inner.register_forward_pre_hook(lambda _, given: fed.append(given[0].shape[1]))
    features = net.features(x, t, net.prepare(y, (80, 112)))
    hook.remove()
    assert fed == [35]  # of 64 rows of the image and as many of the longer caption
    assert features.shape == (2, 35, 48)
    want = seen["layers.1"][:, :35]
    torch.testing.assert_close(features, want, rtol=1e-10, atol=1e-10)


def test_packed_weights_change_nothing():
    net = network(TINY)
    x, y = draw(1, 3, 32, 48), captions(5)
    u, state = net(x, 0.3, y), {k: v.clone() for k, v in net.state_dict().items()}
    assert net.pack_() is net
    attention = net.layers[0].attention
    q, k = attention.to_q.weight, attention.to_k.weight
    assert k.data_ptr() == q.data_ptr() + q.numel() * q.element_size()
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert relative(net(x, 0.3, y), u) < 1e-5


def test_projection_and_norm_are_one_op_where_it_is_named(monkeypatch):
    net, x, y = network(TINY).pack_(), draw(1, 3, 64, 96), captions(5)
    calls, op = [], ops.qkv_norm_rope
    monkeypatch.setattr(
        ops, "qkv_norm_rope", lambda *a, **k: calls.append(a[0].shape) or op(*a, **k)
    )
    with ops.backend("reference"):
        want = net(x, 0.3, y)
        assert not calls
        with ops.backend("reference", qkv_norm_rope="reference"):
            assert torch.equal(net(x, 0.3, y), want)
    assert len(calls) == sum(isinstance(m, Block) for m in net.modules())


def test_projection_and_norm_are_one_op_where_that_was_measured(measured, monkeypatch):
    from pixeldiff.ops.cuda import qkv_norm_rope as cuda

    net, x, y = network(TINY).pack_(), draw(1, 3, 64, 96), captions(5)
    reference = ops.registry.OPS["qkv_norm_rope"].reference
    want, calls = net(x, 0.3, y), []
    monkeypatch.setattr(cuda, "why_not", lambda *args: None)
    monkeypatch.setattr(cuda, "launch", lambda *args: calls.append(0) or reference(*args))
    blocks = [m for m in net.modules() if isinstance(m, Block)]
    kind = f"float32 d{blocks[0].attention.norm_q.weight.numel()}"
    measured("qkv_norm_rope", {"9.0": {kind: {"8": {"order": ["cuda", "reference"]}}}})
    assert relative(net(x, 0.3, y), want) < 1e-5
    assert len(calls) == len(blocks)


def test_gradients_reach_every_parameter():
    net = network(TINY).requires_grad_(True)
    with torch.enable_grad():
        net(draw(1, 3, 32, 48), torch.tensor([0.3]), captions(5)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_bf16_is_near_fp32():
    """Of the released width per block, the specification expects 1e-2; here it is the whole."""
    net = network(TINY)
    x, y = draw(1, 3, 64, 96), captions(37)
    u = net(x, 0.3, y)
    error = net.bfloat16()(x, 0.3, y) - u
    assert error.square().mean().sqrt() < 2e-2 * u.square().mean().sqrt()
    assert error.any()


def test_step_compiles_without_graph_breaks():
    """Guided, masked, with a prepared time: one graph."""
    torch._dynamo.reset()
    net = network(config(n_layers=1))
    condition = net.prepare(captions(5, 40), (32, 48), times=[0.3])
    x = draw(1, 3, 32, 48)
    compiled = torch.compile(net.step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, 0.3, condition), net.step(x, 0.3, condition))


@pytest.mark.parametrize("name", VARIANTS)
def test_released_networks_at_their_own_size(name):
    """On the meta device, guided: shapes and types through every op, nothing allocated."""
    variant = VARIANTS[name]
    net = L2PNet(variant.config, device="meta", dtype=torch.bfloat16)
    channels, side = variant.config.in_channels, variant.native_size
    if variant.config.local_decoder is None:
        side //= 8  # cells of its latent
    given = [torch.empty(n, 2560, device="meta") for n in (60, 8)]
    condition = net.prepare(given, (side, side), times=[0.0, 0.5])
    assert condition.modulations[0.5].blocks.shape == (1, 32, 4, 3840)
    x = torch.empty(1, channels, side, side, device="meta")
    u = net.step(x, 0.5, condition)
    assert (u.shape, u.dtype) == ((2, channels, side, side), torch.float32)
    assert net.features(x, 0.5, condition).shape == (2, 4096, 3840)


# ---- Batches and sharing -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 128), (80, 112)], ids=["32-tokens", "35-tokens"])
def test_a_masked_batch_is_its_items_one_by_one(size):
    net = network(TINY)
    x, t, y = draw(3, 3, *size), torch.tensor([0.9, 0.05, 0.5]), captions(5, 33, 96)
    condition = net.prepare(y, size)
    assert condition.lengths == (32, 64, 96)
    assert condition.key_mask is not None
    u = net.step(x, t, condition)
    for b in range(3):
        alone = net(x[b : b + 1], t[b : b + 1], y[b : b + 1])
        assert relative(u[b : b + 1], alone) < 1e-5


def test_equal_lengths_need_no_mask():
    """Nor do different captions whose padded lengths agree."""
    net = network(TINY)
    assert net.prepare(captions(3, 32, 17), (32, 48)).key_mask is None
    assert net.prepare(draw(2, 7, 20), (32, 48)).lengths == (32, 32)


@pytest.mark.parametrize("size", [(64, 128), (80, 112)], ids=["32-tokens", "35-tokens"])
@pytest.mark.parametrize("shape", ["float", "scalar", "per-caption"])
def test_captions_share_an_image(size, shape):
    """Positive and negative captions of two images: x has two images, the captions are four."""
    net = network(TINY)
    x, y = draw(2, 3, *size), captions(5, 9, 40, 70)
    t = {"float": 0.3, "scalar": torch.tensor(0.3), "per-caption": torch.full((4,), 0.3)}[shape]
    u = net.step(x, t, net.prepare(y, size))
    assert u.shape == (4, 3, *size)
    for b in range(4):
        alone = net(x[b % 2 : b % 2 + 1], 0.3, y[b : b + 1])
        assert relative(u[b : b + 1], alone) < 1e-5


@pytest.mark.parametrize(("size", "rows"), [((64, 128), 1), ((80, 112), 2)])
def test_shared_work_is_done_once(size, rows, monkeypatch):
    net, batches = network(TINY), []
    refiner = net.noise_refiner[0]
    monkeypatch.setattr(refiner, "forward", lambda h, *a: batches.append(h.shape[0]) or h)
    encode = net.local_decoder.encode

    def counted(x, **kwargs):
        batches.append(x.shape[0])
        return encode(x, **kwargs)

    monkeypatch.setattr(net.local_decoder, "encode", counted)
    embedded = count_rows(net.all_x_embedder["16-1"])
    net.step(draw(1, 3, *size), 0.3, net.prepare(captions(5, 40), size))
    assert batches == [rows, 1]
    assert embedded == [1]


def count_rows(module: torch.nn.Module) -> list[int]:
    """Filled with the batch of every call of it."""
    calls: list[int] = []
    module.register_forward_pre_hook(lambda _, given: calls.append(given[0].shape[0]))
    return calls


@pytest.mark.parametrize("together", [True, False])
def test_what_a_schedule_needs_once_is_made_once(together):
    """Captions, and all modulation vectors for all steps in one pass over their weights."""
    net, plan = network(TINY), schedule(4)
    blocks = (*net.noise_refiner, *net.layers)
    refined = count_rows(net.context_refiner[0])
    embedded, times = count_rows(net.cap_embedder), count_rows(net.t_embedder)
    made = []
    for block in blocks:
        project = block.modulation
        block.modulation = lambda e, project=project: made.append(len(e)) or project(e)
    predict = guided(
        net,
        *(captions(5), captions(9), (32, 48)),
        guidance_scale=2.0,
        times=plan.times,
        together=together,
    )
    sample(predict, draw(1, 3, 32, 48), plan)
    assert refined == ([2] if together else [1, 1])
    assert embedded == [1, 1]
    assert times == [4]
    assert made == [4] * len(blocks)


# ---- Guidance ----------------------------------------------------------------------------------


def halves(net, x, condition, g: float, **options) -> torch.Tensor:
    positive, negative = net.step(x, 0.3, condition, **options).chunk(2)
    return negative + g * (positive - negative)


@pytest.mark.parametrize("size", [(64, 128), (80, 112)], ids=["32-tokens", "35-tokens"])
def test_guidance_inside_a_step_is_that_outside(size):
    """Whole, in tiles, and traced: two images, their positive captions, then their negative."""
    net = network(TINY, dtype=torch.float64)
    x, y = draw(2, 3, *size).double(), captions(5, 9, 40, 70)
    condition, g = net.prepare(y, size), torch.tensor(3.5)
    want = halves(net, x, condition, 3.5)
    what = bands.Load(TINY.local_decoder, 3, size, 2, 4, 8)
    tiles = {"decoder_memory": what.memory(bands.Tiling(0, *size)) // 2}
    assert bands.plan(what, tiles["decoder_memory"]).levels > 0
    for options in ({}, tiles, {"trace": lambda name, value: None}, {"decoder_memory": None}):
        u = net.step(x, 0.3, condition, guidance=g, **options)
        assert u.shape == x.shape
        assert u.is_contiguous()
        assert relative(u, want) < 1e-12


def test_guidance_of_the_latent_model():
    net = network(LATENT, dtype=torch.float64)
    x, condition = draw(1, 16, 8, 12).double(), net.prepare(captions(5, 40), (8, 12))
    u = net.step(x, 0.3, condition, guidance=torch.tensor(3.5))
    assert relative(u, halves(net, x, condition, 3.5)) < 1e-6  # its result is fp32 in any case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_guidance_is_mixed_in_fp32(dtype):
    """Held against the mixture, in fp64, of what the network gives without it."""
    net, size = network(TINY, dtype=dtype), (64, 128)
    x, condition = draw(1, 3, *size), net.prepare(captions(5, 9), size)
    positive, negative = net.step(x, 0.3, condition).double().chunk(2)
    u = net.step(x, 0.3, condition, guidance=torch.tensor(7.5))
    want = negative + 7.5 * (positive - negative)
    bound = 20 * torch.finfo(torch.float32).eps * torch.maximum(positive.abs(), negative.abs())
    assert u.dtype == torch.float32
    assert ((u - want).abs() <= bound).all()


def test_guidance_between_equal_captions_is_none():
    net = network(TINY)
    y = captions(5)
    condition = net.prepare([*y, *y], (32, 48))
    x, g = draw(1, 3, 32, 48), torch.tensor(7.5)
    both = net.step(x, 0.3, condition)
    assert torch.equal(net.step(x, 0.3, condition, guidance=g), both[:1])


def test_guidance_wants_a_negative_for_each_positive():
    net, g = network(TINY), torch.tensor(2.0)
    for images, count in ((1, 3), (2, 2)):
        condition = net.prepare(captions(*range(5, 5 + count)), (32, 48))
        x = draw(images, 3, 32, 48)
        message = rf"as many negative captions as positive ones, of each of the {images} images, "
        with pytest.raises(ValueError, match=f"^L2PNet: guidance takes {message}got {count} "):
            net.step(x, 0.3, condition, guidance=g)
        with pytest.raises(ValueError, match=f"^L2PNet: guidance takes {message}got {count} "):
            net.decoded(x, draw(count, 2, 3, 48), guidance=g)


# ---- What the output depends on ----------------------------------------------------------------


def test_pad_tokens_count_where_there_is_padding():
    net = network(TINY)
    x35, x32 = draw(1, 3, 80, 112), draw(1, 3, 64, 128)
    short, full = captions(31), captions(32)
    before = {(i, j): net(x, 0.3, y) for i, x in enumerate((x35, x32))
              for j, y in enumerate((short, full))}  # fmt: skip
    net.x_pad_token.add_(1)
    assert not torch.equal(net(x35, 0.3, full), before[0, 1])
    assert torch.equal(net(x32, 0.3, full), before[1, 1])
    assert torch.equal(net(x32, 0.3, short), before[1, 0])
    net.x_pad_token.sub_(1), net.cap_pad_token.add_(1)
    assert not torch.equal(net(x32, 0.3, short), before[1, 0])
    assert torch.equal(net(x32, 0.3, full), before[1, 1])


def test_padding_rows_hold_the_pad_token_whatever_lies_there():
    seen = {}
    net = network(TINY)
    net.prepare(captions(5, 40), (32, 48), trace=lambda name, value: seen.setdefault(name, value))
    embedded = seen["cap_embed"]
    assert (embedded[0, 5:32] == net.cap_pad_token).all()
    assert (embedded[0, 32:] == 0).all()
    assert (embedded[1, 40:] == net.cap_pad_token).all()


def test_captions_do_not_depend_on_time_or_image():
    net = network(TINY)
    y = captions(5)
    kept = net.prepare(y, (32, 48)).captions.clone()
    condition = net.prepare(y, (64, 96), times=[0.1])
    net.step(draw(1, 3, 64, 96), 0.1, condition)
    assert torch.equal(condition.captions, kept)


def test_the_order_of_image_and_caption_rows_does_not_matter():
    block = network(TINY).layers[0].double()
    mod = block.modulation(draw(1, 48).double())
    x = draw(1, 64, 48).double()
    where = torch.cat((image_positions((4, 8), 32, 33), caption_positions(32)))
    order = torch.cat((torch.arange(32, 64), torch.arange(32)))
    y = block(x, mod, rope_3d(where, (8, 8, 8)))
    swapped = block(x[:, order], mod, rope_3d(where[order], (8, 8, 8)))
    torch.testing.assert_close(swapped[:, 32:], y[:, :32], rtol=1e-10, atol=1e-10)


def test_blocks_without_modulation_are_the_identity():
    net = network(TINY)
    for block in (*net.noise_refiner, *net.layers):
        for p in block.adaLN_modulation.parameters():
            p.zero_()
    seen = {}
    net(draw(1, 3, 32, 48), 0.3, captions(5), trace=seen.__setitem__)
    assert torch.equal(seen["noise_refiner.0"], seen["x_embed"])
    assert torch.equal(seen["layers.1"], seen["unified"])


def test_modulation_is_scale_and_tanh_of_the_gate():
    block = Block(24, 2, 64, 8, 1e-5)
    e = draw(3, 8)
    project = block.adaLN_modulation[0]
    plain = functional.linear(e, project.weight, project.bias).chunk(4, -1)
    want = torch.stack((plain[0], plain[1].tanh(), plain[2], plain[3].tanh()), 1)
    torch.testing.assert_close(block.modulation(e), want)


# ---- What it refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "size", "text"),
    [
        ("1k", (40, 64), r"multiples of 16, got \(40, 64\); nearest: H 32 or 48, W 64"),
        ("1k", (8, 64), r"multiples of 16, got \(8, 64\); nearest: H 16, W 64"),
        ("4k", (64, 100), r"multiples of 64, got \(64, 100\); nearest: H 64, W 64 or 128"),
        ("8k", (192, 128), r"multiples of 128, .*: H 128 or 256, W 128"),
        ("10k", (320, 480), r"multiples of 320, .*: H 320, W 320 or 640"),
        ("1k", (0, 64), r"two positive integers \(H, W\), got \(0, 64\)"),
        ("1k", (64.0, 64), r"two positive integers"),
        ("1k", (16, 16 * 513), r"W must be at most 8192 \(the network has 512 rotary positions"),
    ],
)
def test_sizes(form, size, text):
    net = L2PNet(config(form), device="meta")
    with pytest.raises(SizeError, match=f"^L2PNet: .*{text}"):
        net.prepare(captions(5), size)


def test_the_largest_size_named_is_one_it_takes():
    odd = config("10k", axes_lens=(1024, 7, 7))  # 7 patches of 160, where sizes go by two of them
    with pytest.raises(SizeError, match="H must be at most 960 "):
        check_size(odd, (1280, 320))
    assert check_size(odd, (960, 960)) == (6, 6)


def test_size_rules_of_the_released_networks():
    multiples = {name: v.config.size_multiple for name, v in VARIANTS.items()}
    assert multiples == {"z-image": 2, "1k": 16, "4k": 64, "8k": 128, "10k": 320}
    for variant in VARIANTS.values():
        tokens = variant.native_size // variant.config.patch_size
        assert tokens == (512 if variant.name == "z-image" else 64)
    assert VARIANTS["1k"].config.max_caption_tokens == 992


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([], "captions must hold at least one caption, got none"),
        ([draw(5, 21)], r"captions\[0\] must be \(T, 20\) .* got \(5, 21\)"),
        ([draw(5, 20), draw(0, 20)], r"captions\[1\] must be \(T, 20\) .* T >= 1, got \(0, 20\)"),
        ([draw(993, 20)], r"captions\[0\] must have at most 992 tokens, .*; got 993"),
    ],
)
def test_captions_it_refuses(given, text):
    with pytest.raises(ValueError, match=f"^L2PNet: {text}"):
        network(TINY).prepare(given, (32, 48))


def test_inputs_it_refuses():
    net = network(TINY)
    condition = net.prepare(captions(5, 9), (32, 48))
    for x in (draw(2, 3, 32, 32), draw(3, 3, 32, 48), draw(2, 4, 32, 48), draw(3, 32, 48)):
        with pytest.raises(ValueError, match=r"^L2PNet.step: x must be \(S, 3, H, W\) = .* the 2 "):
            net.step(x, 0.3, condition)
    with pytest.raises(ValueError, match=r"^L2PNet.step: t must be a float, .* \(2,\), got \(3,\)"):
        net.step(draw(2, 3, 32, 48), torch.zeros(3), condition)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"n_heads": 5}, "dim must be divisible by n_heads = 5, got 48"),
        (
            {"axes_dims": (8, 8, 10)},
            r"axes_dims must be three even numbers .* 24, got \(8, 8, 10\)",
        ),
        ({"axes_lens": (8, 8)}, "axes_lens must be three positive integers"),
        ({"n_layers": 0}, "n_layers must be an integer >= 1, got 0"),
    ],
)
def test_configs_it_refuses(changes, text):
    with pytest.raises(ValueError, match=f"^L2PConfig: {text}"):
        config(**changes)


def test_the_patches_do_not_last_through_the_trunk():
    """At 8192 x 8192 they are 0.4 GB in bf16, and all else of the trunk 0.7 GB under guidance."""
    released = VARIANTS["8k"].config
    shallow = dataclasses.replace(released, n_layers=2, n_refiner_layers=1)
    net = L2PNet(shallow, device="meta", dtype=torch.bfloat16).requires_grad_(False)
    x = torch.empty(1, 3, 8192, 8192, device="meta")
    with torch.no_grad():
        y = [torch.empty(128, shallow.cap_feat_dim, device="meta")] * 2
        condition = net.prepare(y, (8192, 8192), times=[0.5])
        with LiveMemory() as memory:
            net.features(x, 0.5, condition)
    assert memory.peak < 0.75e9, memory.table()
