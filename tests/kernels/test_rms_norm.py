"""rms_norm against fp64: y = x / sqrt(mean x^2 + eps) * weight."""

import aot
import harness
import pytest
import torch
from harness import NAMES, launcher
from rules import (
    Draw,
    assert_bitwise,
    assert_one_rounding,
    at_odd_stride,
    check_compiles,
    check_gradients,
    check_meta,
    check_registered,
    check_repeatable,
    every_backend,
    f64,
    forced,
    precisions,
    rms,
)

import pixeldiff
from pixeldiff.ops import rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {"production": (2, 50, 1536), "primes": (3, 7, 13), "one": (1, 1, 1), "empty": (2, 0, 8)}


@every_backend("rms_norm")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, backend):
    draw = Draw(dtype)
    x, weight = draw(*shape, std=std), draw(shape[-1])
    with forced("rms_norm", backend):
        y = rms_norm(x, weight)
    assert_one_rounding(y, rms(f64(x)) * f64(weight))


def test_eps_is_inside_the_root():
    x, weight = torch.full((1, 4), 0.3), torch.ones(4)
    y = rms_norm(x, weight, eps=0.25)
    assert_one_rounding(y, rms(f64(x), 0.25))


def test_rounds_before_the_weight_and_promotes():
    """bf16 x, fp32 weight: the normalised value is a bf16 number, the product an fp32 one."""
    draw = Draw(torch.bfloat16)
    x, weight = draw(5, 64), Draw(torch.float32, seed=1)(64)
    y = rms_norm(x, weight)
    assert y.dtype == torch.float32
    normalised = rms_norm(x, torch.ones(64))
    assert_bitwise(normalised.bfloat16().float(), normalised)
    assert_bitwise(y, normalised * weight)
    assert_one_rounding(y, rms(f64(x)) * f64(weight), dtype=torch.bfloat16)


def test_strided():
    draw = Draw()
    x, weight = draw(3, 5, 24), draw(24)
    assert_bitwise(rms_norm(at_odd_stride(x), weight), rms_norm(x, weight))
    assert rms_norm(at_odd_stride(x), weight).is_contiguous()


def test_runs_everywhere():
    draw = Draw(torch.bfloat16)
    x, weight = draw(2, 3, 8), draw(8)
    check_registered("rms_norm", rms_norm, x, weight)
    check_compiles("rms_norm", rms_norm, (x, weight), (draw(4, 5, 8), weight))
    check_meta(rms_norm, x, weight)
    check_meta(rms_norm, x, weight.float())
    check_repeatable(rms_norm, x, weight)


def test_gradients():
    draw = Draw()
    check_gradients(rms_norm, draw(2, 3, 5), draw(5))


def test_errors():
    with pytest.raises(ValueError, match=r"^rms_norm: weight must be \(D,\) = \(8,\), got \(4,\)$"):
        rms_norm(torch.ones(2, 8), torch.ones(4))
    with pytest.raises(
        TypeError,
        match=r"^rms_norm: x must be float32, float16 or bfloat16, got torch.int64$",
    ):
        rms_norm(torch.ones(2, 8, dtype=torch.int64), torch.ones(8))


# --- the Triton kernel ----------------------------------------------------------------------------

each_triton = pytest.mark.parametrize(
    "backend", ["triton", pytest.param("triton-gpu", marks=pytest.mark.gpu)]
)
TRITON = "pixeldiff.triton_kernels.rms_norm"


def whole(dtype, *shape):
    """Small whole numbers: their squares add up exactly, in whatever order a tile adds them."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@each_triton
@pytest.mark.parametrize("gain", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_triton_rounds_twice_and_promotes(dtype, gain, backend):
    """The weight multiplies the value as rounded, in the promoted type."""
    launch, device = launcher("rms_norm", backend)
    for width in (1, 31, 257, 1536):
        x, weight = whole(dtype, 3, 5, width).to(device), Draw(gain, seed=1)(width).to(device)
        normalised = launch(x, torch.ones(width, dtype=dtype, device=device), 1e-6)
        assert normalised.dtype == dtype
        assert_one_rounding(normalised.cpu(), rms(f64(x.cpu())))
        assert_bitwise(launch(x, weight, 1e-6), normalised * weight)


@each_triton
@pytest.mark.parametrize("leading", [(), (7,), (3, 5), (2, 3, 4)], ids=str)
def test_triton_leading_axes_and_strides(leading, backend):
    launch, device = launcher("rms_norm", backend)
    x, weight = whole(torch.bfloat16, *leading, 24).to(device), Draw()(24).to(device)
    want = launch(x.reshape(-1, 24), weight, 1e-6).view(x.shape)
    assert_one_rounding(want.cpu(), rms(f64(x.cpu())) * f64(weight.cpu()), torch.bfloat16)
    assert_bitwise(launch(x, weight, 1e-6), want)
    assert_bitwise(launch(at_odd_stride(x), weight, 1e-6), want)
    if len(leading) > 1:
        crossed = x.transpose(0, 1).contiguous().transpose(0, 1)
        assert_bitwise(launch(crossed, weight, 1e-6), want)


@each_triton
def test_triton_eps_is_inside_the_root(backend):
    launch, device = launcher("rms_norm", backend)
    x = torch.full((1, 4), 0.3, device=device)
    y = launch(x, torch.ones(4, device=device), 0.25)
    assert_one_rounding(y.cpu(), rms(f64(x.cpu()), 0.25))


@each_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_triton_not_finite(dtype, backend):
    launch, device = launcher("rms_norm", backend)
    x, weight = Draw(dtype)(2, 3, 37), Draw(dtype, seed=1)(37)
    x[0, 1, 5], x[1, 2, 36] = torch.nan, -torch.inf
    y = launch(x.to(device), weight.to(device), 1e-6).cpu()
    with pixeldiff.backend("reference"):
        want = rms_norm(x, weight)
    assert want.isnan().sum() == 38
    harness.check_not_finite_like(y, want)


@each_triton
@pytest.mark.parametrize("tile", [(1, 1), (4, 2), (64, 8)], ids=str)
def test_triton_every_tile(tile, backend):
    launch, device = launcher("rms_norm", backend)
    config = pytest.importorskip(TRITON).Config(*tile)
    x, weight = Draw()(2, 7, 45).to(device), Draw(seed=1)(45).to(device)
    y = launch(x, weight, 1e-6, config=config)
    assert_one_rounding(y.cpu(), rms(f64(x.cpu())) * f64(weight.cpu()))


@each_triton
@pytest.mark.parametrize("shape", [(3, 1, 24), (1, 3, 24)], ids=["images", "rows"])
def test_triton_offsets_past_two_to_the_31(shape, backend):
    """The third image, or row, 2^31 elements away from the first, at a stride of 32 bits."""
    launch, device = launcher("rms_norm", backend)
    x, weight = whole(torch.bfloat16, *shape).to(device), Draw()(24).to(device)
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    far = base.as_strided(shape, (2**30, 2**30, 1))
    far.copy_(x)
    assert_bitwise(launch(far, weight, 1e-6), launch(x, weight, 1e-6))


def test_triton_refuses():
    module = pytest.importorskip(TRITON)
    wide = torch.ones(2, 16385)
    assert module.why_not(wide, wide[0], 1e-6) == "takes at most 16384 channels, got 16385"


@pytest.mark.parametrize("target", aot.TARGETS)
def test_triton_compiles_ahead_of_time(target):
    sites = [{**site, "grid": (1, 300)} for site in aot.widths(16384)]
    aot.check_streams("rms_norm", target, sites)


def test_triton_compiles_once_for_all_sizes():
    calls = [aot.released("rms_norm", grid=(1, rows)) for rows in (300, 64, 17, 1)]
    aot.check_compiles_once("rms_norm", calls)


def test_triton_in_interpreter():
    harness.run_in_interpreter(__file__)
