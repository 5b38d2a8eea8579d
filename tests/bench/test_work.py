"""Bytes and FLOPs of every op, against counts that do not use the formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.shapes import PATCH, SYSTEMS, cases
from bench.work import WORK
from pixeldiff.ops.examples import Geometry, arguments
from pixeldiff.ops.registry import OPS

UNEQUAL = Geometry(
    grid=(3, 5), text=7, width=96, heads=3, head_dim=32, hidden=80, patch=4, pixel=8, attn=48
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def at(op: str, site: str, size: int) -> tuple:
    """Meta arguments of an op in bf16 at a real size: nothing is allocated."""
    (case,) = [c for c in cases(op, (size,)) if c.site == site]
    small = arguments(op, "meta", torch.bfloat16, case.geometry)
    return WORK[op].bytes(small), WORK[op].flops(small)


def test_every_op_has_an_entry():
    assert OPS.keys() <= WORK.keys()


@DTYPES
@pytest.mark.parametrize("op", sorted(OPS))
def test_bytes_are_those_of_the_arguments_and_the_result(op, dtype):
    """Read once, written once. The two halves of a PiT block read their part of the AdaLN weight:
    two and four of its six chunks."""
    args = arguments(op, "cpu", dtype, UNEQUAL)
    result = OPS[op].reference(*args)
    counted = [a for a in args if isinstance(a, Tensor)]
    counted += [result] if isinstance(result, Tensor) else list(result)
    total = sum(t.numel() * t.element_size() for t in counted)
    unread = {"pixel_adaln_compress": (2, 3, 4), "pixel_adaln_mlp": (5, 6, 2)}.get(op)
    if unread is not None:
        weight, bias, sixths = args[unread[0]], args[unread[1]], unread[2]
        total -= (weight.numel() + bias.numel()) * weight.element_size() * sixths // 6
    assert WORK[op].bytes(args) == total


@pytest.mark.parametrize(
    "op", ["joint_attention", "sigma_gate", "pixel_adaln_compress", "pixel_adaln_mlp"]
)
def test_flops_of_products_are_those_pytorch_counts(op):
    """What FlopCounterMode sees are the matrix products; the rest may add a few per cent."""
    args = arguments(op, "cpu", torch.float32, UNEQUAL)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        OPS[op].reference(*args)
    counted = counter.get_total_flops()
    assert counted > 0
    assert counted <= WORK[op].flops(args) <= 1.05 * counted


@pytest.mark.parametrize("op", ["pixel_embed", "pixel_head"])
def test_flops_of_small_products(op):
    args = arguments(op, "cpu", torch.float32, UNEQUAL)
    with FlopCounterMode(display=False) as counter:
        OPS[op].reference(*args)
    assert counter.get_total_flops() < WORK[op].flops(args) < 2 * counter.get_total_flops()


def test_the_published_arithmetic_at_2048():
    """14 blocks of attention 23.94 TFLOP, two PiT attentions 2.47, two AdaLN products 2.47 and
    the other products of the PiT blocks; the traffic of one swiglu 0.40 GB."""
    tera = 1e12
    assert 14 * at("joint_attention", "mmdit", 2048)[1] / tera == pytest.approx(23.94, abs=0.01)
    assert 2 * at("joint_attention", "pit", 2048)[1] / tera == pytest.approx(2.47, abs=0.01)
    compress, mlp = at("pixel_adaln_compress", "image", 2048), at("pixel_adaln_mlp", "image", 2048)
    products = 2 * (compress[1] + mlp[1]) / tera
    expected = 2 * 2 * 16384 * (24576 * 1536 + 2 * 4096 * 1152 + 2 * 256 * 16 * 64) / tera
    assert products == pytest.approx(expected, rel=1e-6)
    assert at("swiglu", "image", 2048)[0] == 3 * 16384 * 4096 * 2
    assert at("sigma_gate", "v1", 2048)[1] / tera == pytest.approx(0.54 / 7, rel=0.01)
    assert at("qk_norm_rope", "mmdit", 2048)[0] == pytest.approx(6 * 16684 * 1536 * 2, rel=0.03)


def test_real_shapes_are_those_of_the_released_network():
    """Arguments of the largest op, at the published widths."""
    (case,) = [c for c in cases("pixel_adaln_mlp", (2048,)) if c.site == "image"]
    q, u, attn, expand_weight, _, ada_weight, *_ = arguments(
        "pixel_adaln_mlp", "meta", torch.bfloat16, case.geometry
    )
    assert tuple(q.shape) == (16384, 256, 16)
    assert tuple(u.shape) == (16384, 1536)
    assert tuple(attn.shape) == (16384, 1152)
    assert tuple(expand_weight.shape) == (4096, 1152)
    assert tuple(ada_weight.shape) == (24576, 1536)
    (case,) = [c for c in cases("joint_attention", (2048,)) if c.site == "pit"]
    q, *_ = arguments("joint_attention", "meta", torch.bfloat16, case.geometry)
    assert tuple(q.shape) == (1, 16384, 16, 72)


def test_shapes_agree_with_the_model_configuration():
    from pixeldiff.models.pid import PiDConfig

    c, g = PiDConfig(), SYSTEMS["pid"].geometry
    assert (g.width, g.heads, g.head_dim) == (c.hidden_size, c.num_groups, c.head_dim)
    assert (g.hidden, g.text, PATCH) == (c.ffn_size, c.txt_max_length, c.patch_size)
    assert (g.pixel, g.attn) == (c.pixel_hidden_size, c.pixel_attn_hidden_size)
    pit = SYSTEMS["pid"].sites["joint_attention"]["pit"]
    assert (pit["heads"], pit["head_dim"]) == (c.pixel_num_groups, c.pixel_head_dim)


def test_the_local_decoder_at_its_outermost_level():
    """4K: enc0 3 -> 16 takes 14.5 GFLOP and leaves 512 MiB; up0 16 -> 16, of which the taps that
    meet one value are summed first, and dec0 32 -> 16 take 4/9 of 77.3 and 154.6 GFLOP."""
    down, up = at("local_decoder_down", "full", 4096), at("local_decoder_up", "full", 4096)
    assert down[1] / 1e9 == pytest.approx(14.5, abs=0.05)
    assert down[0] == pytest.approx(4096**2 * (3 * 4 + 1.25 * 16 * 2), rel=1e-4)
    assert up[1] / 1e9 == pytest.approx(77.3 * 4 / 9 + 154.6, abs=0.1)
    assert up[0] == pytest.approx(4096**2 * 16 * 2 * 2.25, rel=1e-4)


def test_the_local_decoder_beyond_4096():
    """8K: enc 3 -> 3 reads the image and leaves three channels, up takes them beside the 16 that it
    doubles. Below it is what 4K is."""
    down, up = at("local_decoder_down", "full", 8192), at("local_decoder_up", "full", 8192)
    assert down[0] == pytest.approx(8192**2 * (3 * 4 + 1.25 * 3 * 2), rel=1e-4)
    assert up[0] == pytest.approx(8192**2 * 2 * (16 / 4 + 3 + 16), rel=1e-4)
    assert up[1] == pytest.approx(8192**2 * 2 * 16 * (4 * 16 + 9 * 19), rel=1e-4)
    assert at("local_decoder_up", "half", 8192) == at("local_decoder_up", "full", 4096)


@pytest.mark.parametrize(("site", "side", "dec"), [("half", 2048, 77.3), ("quarter", 1024, 77.3)])
def test_the_local_decoder_further_in(site, side, dec):
    """4K: enc0b and enc1 take 38.7 GFLOP, up0b and up1 4/9 of 77.3, dec0b and dec1 77.3."""
    channels = {"half": (16, 32, 16), "quarter": (32, 64, 32)}[site]
    down, up = at("local_decoder_down", site, 4096), at("local_decoder_up", site, 4096)
    assert down[1] / 1e9 == pytest.approx(38.7, abs=0.1)
    assert down[0] == pytest.approx(side**2 * 2 * (channels[0] + 1.25 * channels[1]), rel=1e-3)
    assert up[1] / 1e9 == pytest.approx(77.3 * 4 / 9 + dec, abs=0.1)
    assert up[0] == pytest.approx(side**2 * 2 * (1.25 * channels[1] + channels[2]), rel=2e-3)


def test_the_trunk_is_measured_once_for_all_sizes():
    assert [c.site for c in cases("gated_norm_residual")] == ["trunk"]
    sites = ["full", "half", "quarter", "sixteenth"]
    assert [c.site for c in cases("local_decoder_up")] == [*sites[:3], *sites]


def test_shapes_agree_with_the_l2p_configuration():
    from pixeldiff.models.l2p import VARIANTS

    c, system = VARIANTS["4k"].config, SYSTEMS["l2p"]
    g = system.geometry
    assert (g.width, g.heads, g.head_dim) == (c.dim, c.n_heads, c.head_dim)
    assert g.hidden == c.ffn_hidden
    released = {
        v.native_size: v.config.patch_size for v in VARIANTS.values() if v.name != "z-image"
    }
    assert system.patches == released


@pytest.mark.parametrize("form", ["1k", "4k", "8k", "10k"])
def test_levels_of_the_local_decoder_are_the_released_ones(form):
    from pixeldiff.models.l2p import VARIANTS
    from pixeldiff.models.l2p.local_decoder import LocalDecoder

    variant = VARIANTS[form]
    config = variant.config.local_decoder
    decoder = LocalDecoder(config, 8, device="meta")
    g = SYSTEMS["l2p"].at(variant.native_size)
    assert g.bottleneck == config.bottleneck
    assert len(g.decoder) == len(config.levels)
    for i, level in enumerate(config.levels):
        side, here = variant.native_size >> i, replace(g, level=i)
        x, *down = arguments("local_decoder_down", "meta", geometry=here)
        below, skip, *up = arguments("local_decoder_up", "meta", geometry=here)
        enc = getattr(decoder, f"enc{level.name}")[0]
        doubled = getattr(decoder, f"up{level.name}")[1]
        joined = getattr(decoder, f"dec{level.name}")[0]
        want = (enc, doubled, joined)
        given = (down[0], up[0], up[2])
        assert [t.shape for t in given] == [conv.weight.shape for conv in want]
        assert x.shape == (1, side, side, enc.in_channels)
        assert skip.shape == (1, side, side, enc.out_channels)
        assert below.shape == (1, side // 2, side // 2, doubled.in_channels)
    (pixels, weight, *_) = arguments("local_decoder_pixels", "meta", geometry=g)
    assert (pixels.shape[3], weight.shape) == (weight.shape[1], decoder.out_conv.weight.shape[:2])


def test_scale_divides_the_side_and_is_kept():
    (case,) = [c for c in cases("swiglu", (2048,), 4) if c.site == "image"]
    assert case.geometry.grid == (32, 32)
    assert (case.size, case.scale) == (2048, 4)
    with pytest.raises(ValueError, match="must be a positive multiple of 16, got 1024 / 3"):
        cases("swiglu", (1024,), 3)


def test_text_rows_are_measured_once():
    assert [c.site for c in cases("swiglu")].count("text") == 1
    assert [c.site for c in cases("swiglu")].count("image") == 3


def test_an_op_nobody_lists_is_measured_at_the_image_tokens():
    assert [c.site for c in cases("pixel_new", (1024,))] == ["image"]
