"""The network and the decoder in fp8."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_networks import CONFIGS, inputs, network

import pixeldiff
from bench import models
from pixeldiff import ops
from pixeldiff.models import feed_forward, fp8
from pixeldiff.models.fp8 import Fp8Linear
from pixeldiff.models.pid import PiDDecoder, PiDNet, residual
from pixeldiff.models.pid import decoder as decoder_module

each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def relative(y, want) -> float:
    return ((y.double() - want.double()).norm() / want.double().norm()).item()


def quantized(config, dtype=torch.float32) -> tuple[PiDNet, PiDNet]:
    """A network and its fp8 copy."""
    net = network(config, dtype=dtype).requires_grad_(False)
    return net, copy.deepcopy(net).quantize_()


def names(net) -> set[str]:
    return {name for name, m in net.named_modules() if isinstance(m, Fp8Linear)}


# --- the network ----------------------------------------------------------------------------------


@each_config
def test_which_layers_are_quantised(config):
    net, low = quantized(config)
    assert not net.fp8
    assert low.fp8
    found = names(low)
    assert len(found) == 10 * config.patch_depth + 2 * config.pixel_depth
    for name in found:
        assert name.split(".")[2] in ("attn", "mlp_x", "mlp_y")
    plain = dict(net.named_parameters())
    for name, p in low.named_parameters():
        if name.rpartition(".")[0] not in found:
            assert torch.equal(p, plain[name]), name


def test_quantised_weights_are_half_of_those_in_bf16():
    net, low = quantized(CONFIGS["v1"], torch.bfloat16)
    for name in names(low):
        before, after = net.get_submodule(name).weight, low.get_submodule(name)
        scales = 4 * before.shape[0]
        assert after.weight.numel() * after.weight.element_size() == before.numel()
        assert sum(p.numel() * p.element_size() for p in after.parameters()) <= (
            before.numel() + scales + 2 * before.shape[0]
        )


@each_config
@pytest.mark.parametrize("batch", [1, 2])
def test_result_is_near_that_without_quantisation(config, batch):
    """A linear layer's error in e4m3 is 13 times that in bf16 (docs/precision.md), and part of the
    network stays as it is. These random ones multiply either: 2.5 % in bf16, 15 % in fp8."""
    net, low = quantized(config)
    kw = inputs(batch)
    want, got = net(**kw), low(**kw)
    assert got.dtype == want.dtype
    half = relative(copy.deepcopy(net).bfloat16()(**kw), want)
    assert half < relative(got, want) < 10 * half


@each_config
@pytest.mark.parametrize("packed", [False, True])
def test_norms_that_add_quantise_the_same(config, packed, monkeypatch):
    """As on a GPU: feed-forward in pieces from packed weights, added by the next block's norm."""
    _, low = quantized(config)
    kw, calls = inputs(3), []
    want = low(**kw)
    if packed:
        low.pack_()
    monkeypatch.setattr(residual, "ADD_EACH_PIECE", ())
    monkeypatch.setitem(feed_forward.FEED_FORWARD_PIECE, "cpu", 3)
    fused = ops.gated_residual_norm_fp8
    monkeypatch.setattr(ops, "gated_residual_norm_fp8", lambda *a: calls.append(a) or fused(*a))
    torch.testing.assert_close(low(**kw), want, rtol=2e-3, atol=2e-3 * want.abs().max().item())
    assert len(calls) == 5 + 2 + 1  # as without fp8, see test_residual.py
    assert layers_packed(low) == {packed}
    traced = low(**kw, trace=lambda name, value: None)
    torch.testing.assert_close(traced, want, rtol=2e-3, atol=2e-3 * want.abs().max().item())


def layers_packed(net) -> set[bool]:
    return {
        m._packed(m.w1.weight) is not None
        for m in net.modules()
        if isinstance(m, feed_forward.SwiGLU)
    }


def test_no_bf16_rows_reach_a_quantised_layer(monkeypatch):
    """Norms and gates quantise their own results; only attention's are quantised by an op of its
    own, and those of the pixel blocks."""
    _, low = quantized(CONFIGS["v1"])
    shapes, quantize = [], ops.quantize_rows
    monkeypatch.setattr(
        ops, "quantize_rows", lambda x: shapes.append(tuple(x.shape)) or quantize(x)
    )
    low(**inputs(1))
    c = low.config
    # proj_x and proj_y of every block but the last one's proj_y; qkv and proj of the pixel blocks.
    assert len(shapes) == 2 * c.patch_depth - 1 + 2 * c.pixel_depth
    assert {s[-1] for s in shapes} == {c.hidden_size, c.pixel_attn_hidden_size}


def test_state_dict_round_trip(tmp_path):
    _, low = quantized(CONFIGS["v1.5"])
    low.pack_()
    kw = inputs()
    want = low(**kw)
    save_file(low.state_dict(), tmp_path / "low.safetensors")
    empty = PiDNet(low.config, device="meta").quantize_()
    empty.load_state_dict(load_file(tmp_path / "low.safetensors"), strict=True, assign=True)
    torch.testing.assert_close(empty(**kw), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="weight_scale"):
        network(CONFIGS["v1.5"]).load_state_dict(low.state_dict())


def test_to_leaves_what_is_quantised():
    _, low = quantized(CONFIGS["v1"])
    kw = inputs()
    want = low(**kw)
    low.to(torch.bfloat16)
    assert low.dtype == torch.bfloat16
    assert {low.get_submodule(n).weight.dtype for n in names(low)} == {torch.float8_e4m3fn}
    assert relative(low(**kw), want) < 0.2
    low.to(torch.float32)
    assert relative(low(**kw), want) < 0.2  # the others were rounded to bf16 on the way


def test_compiles_in_one_graph():
    _, low = quantized(CONFIGS["v1"])
    kw = inputs()
    condition = low.prepare(kw["lq_latent"], kw["y"], kw["degrade_sigma"], size=(16, 32))
    torch._dynamo.reset()
    compiled = torch.compile(low.step, fullgraph=True, backend="aot_eager")
    want = low.step(kw["x"], kw["t"], condition)
    torch.testing.assert_close(compiled(kw["x"], kw["t"], condition), want, rtol=1e-3, atol=1e-3)


# --- the decoder ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoders():
    load = PiDDecoder.from_pretrained
    return {p: load("demo", device="cpu", precision=p) for p in ("fp32", "bf16", "fp8")}


def latent(seed=0, side=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 16, side, side, generator=generator)


def psnr(a, b) -> float:
    return 10 * math.log10(4 / (a.double() - b.double()).square().mean().item())


def test_demo_decode_is_near_that_in_fp32(decoders):
    """Measured: 55.5 dB in fp8, 55.7 in bf16, on random latents of several sizes."""
    for seed, side in ((0, 8), (1, 4)):
        images, kw = {}, {"caption": "a red circle", "seed": seed, "output": "pt"}
        for name, decoder in decoders.items():
            result = decoder.decode(latent(seed, side), **kw)
            assert result.metadata["precision"] == name
            images[name] = result.images
        low, half = (psnr(images[p], images["fp32"]) for p in ("fp8", "bf16"))
        assert low > 52
        assert half - 2 < low
        assert not torch.equal(images["fp8"], images["bf16"])


def test_decoder_says_its_precision_and_repeats(decoders):
    decoder = decoders["fp8"]
    assert decoder.precision == "fp8"
    assert decoder.net.dtype == torch.bfloat16
    first, second = (decoder.decode(latent(), seed=3, output="pt").images for _ in range(2))
    assert torch.equal(first, second)


def test_weights_take_less_memory(decoders):
    size = {
        p: sum(q.numel() * q.element_size() for q in d.net.parameters())
        for p, d in decoders.items()
    }
    low = decoders["fp8"].net
    quantised = sum(low.get_submodule(n).weight.numel() for n in names(low))
    scales = sum(low.get_submodule(n).weight_scale.numel() for n in names(low))
    assert size["bf16"] - size["fp8"] == quantised - 4 * scales
    assert quantised > 400_000


def test_a_nan_is_caught():
    broken = PiDDecoder.from_pretrained("demo", device="cpu", precision="fp8")
    broken.net.patch_blocks[0].mlp_x.w1.weight_scale[5] = torch.nan
    with pytest.raises(
        ArithmeticError,
        match=r"NaN at 128 x 128 in fp8, first in step 1 of 4 .*; try precision=.fp32",
    ):
        broken.decode(latent(), seed=0)


def test_a_device_without_e4m3_is_refused_before_loading(monkeypatch):
    monkeypatch.setattr(fp8, "why_not", lambda device: "e4m3 needs compute capability 8.9, ...")
    monkeypatch.setattr(decoder_module, "read_checkpoint", lambda *a, **k: pytest.fail("loaded"))
    text = r'^precision = "fp8" cannot be used on cpu: e4m3 needs .*; use precision="bf16"$'
    with pytest.raises(ValueError, match=text):
        PiDDecoder.from_pretrained("demo", device="cpu", precision="fp8")


def test_never_a_second_copy_of_the_weights(monkeypatch):
    """Each layer is replaced before the next is quantised."""
    net = network(CONFIGS["v1"], dtype=torch.bfloat16).requires_grad_(False)
    order, of = [], Fp8Linear.of.__func__

    def record(cls, linear):
        order.append(len(names(net)))
        return of(cls, linear)

    monkeypatch.setattr(Fp8Linear, "of", classmethod(record))
    net.quantize_()
    assert order == list(range(len(names(net))))


# --- on a GPU -------------------------------------------------------------------------------------

on_gpu = pytest.mark.gpu


def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    device = torch.device("cuda")
    if fp8.why_not(device) is not None:
        pytest.skip(fp8.why_not(device))
    return device


@on_gpu
def test_fused_network_is_near_the_reference():
    device = gpu()
    net = models.decoder("demo", device, "fp8").net
    kw = {
        "x": torch.randn(2, 3, 128, 128, device=device),
        "t": torch.tensor([866.0, 342.0], device=device),
        "y": torch.randn(2, net.config.txt_max_length, net.config.txt_embed_dim, device=device),
        "lq_latent": torch.randn(2, 16, 4, 4, device=device),
    }
    got = net(**kw)
    with pixeldiff.backend("reference"):
        want = net(**kw)
    assert relative(got, want) < 0.02


@on_gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_demo_decode_on_a_gpu_is_near_that_in_fp32(cuda_graphs):
    """Beside the fp32 decode from the same noise; captured decodes are the first one again."""
    device = gpu()
    noise = {"seed": 0, "caption": "a red circle", "output": "pt"}
    exact = PiDDecoder.from_pretrained("demo", device=device, precision="fp32")
    want = exact.decode(latent(0, 8), **noise).images.cpu()
    decoder = PiDDecoder.from_pretrained(
        "demo", device=device, precision="fp8", cuda_graphs=cuda_graphs
    )
    first, *others = (decoder.decode(latent(0, 8), **noise).images.cpu() for _ in range(3))
    assert psnr(first, want) > 50
    assert all(torch.equal(first, image) for image in others)


@on_gpu
def test_released_weights_in_memory():
    """flux-2k: 1.36 billion parameters, of which 0.80 are quantised, in the text's stream too."""
    device = gpu()
    sizes = {}
    for precision in ("bf16", "fp8"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        decoder = models.decoder("flux-2k", device, precision)
        sizes[precision] = torch.cuda.memory_allocated(device) - before
        del decoder
    assert sizes["bf16"] - sizes["fp8"] > 0.78e9
