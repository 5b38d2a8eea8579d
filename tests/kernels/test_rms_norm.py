"""rms_norm against fp64: y = x / sqrt(mean x^2 + eps) * weight."""

import pytest
import torch
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

from pixeldiff.ops import rms_norm

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
