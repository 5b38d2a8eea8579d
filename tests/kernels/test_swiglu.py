"""swiglu against fp64: y = a sigmoid(a) b."""

import pytest
import torch
from rules import (
    Draw,
    assert_bitwise,
    assert_one_rounding,
    check_compiles,
    check_gradients,
    check_meta,
    check_registered,
    check_repeatable,
    every_backend,
    f64,
    forced,
    precisions,
    sigmoid,
)

from pixeldiff.ops import swiglu

SHAPES = {"production": (2, 40, 4096), "primes": (3, 7, 11), "one": (1, 1, 1), "empty": (2, 0, 6)}


@every_backend("swiglu")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, backend):
    draw = Draw(dtype)
    a, b = draw(*shape, std=std), draw(*shape, std=std)
    with forced("swiglu", backend):
        y = swiglu(a, b)
    assert_one_rounding(y, f64(a) * sigmoid(f64(a)) * f64(b))


def test_rounds_once():
    """Half a unit in the last place: rounding silu(a) to bf16 first would double it."""
    a, b = Draw(torch.bfloat16)(2, 50, 64)
    oracle = f64(a) * sigmoid(f64(a)) * f64(b)
    error = abs(f64(swiglu(a, b)) - oracle)
    assert (error <= 0.501 * torch.finfo(torch.bfloat16).eps * abs(oracle)).all()


@every_backend("swiglu")
def test_saturates_without_nan(backend):
    a = torch.tensor([-200.0, -60.0, 0.0, 60.0, 200.0])
    with forced("swiglu", backend):
        y = swiglu(a, torch.full((5,), 2.0))
    assert_one_rounding(y, f64(a) * sigmoid(f64(a)) * 2)


def test_halves_of_a_fused_projection():
    a, b = Draw(torch.bfloat16)(2, 3, 10).chunk(2, -1)
    y = swiglu(a, b)
    assert y.is_contiguous()
    assert_bitwise(y, swiglu(a.contiguous(), b.contiguous()))


def test_runs_everywhere():
    draw = Draw(torch.bfloat16)
    a, b = draw(2, 3, 8), draw(2, 3, 8)
    check_registered("swiglu", swiglu, a, b)
    check_compiles("swiglu", swiglu, (a, b), (draw(4, 5, 8), draw(4, 5, 8)))
    check_meta(swiglu, a, b)
    check_repeatable(swiglu, a, b)


def test_gradients():
    draw = Draw()
    check_gradients(swiglu, draw(2, 3), draw(2, 3))


def test_errors():
    with pytest.raises(
        ValueError, match=r"^swiglu: b must be shape of a = \(2, 8\), got \(2, 4\)$"
    ):
        swiglu(torch.ones(2, 8), torch.ones(2, 4))
    with pytest.raises(
        TypeError, match=r"^swiglu: b must have the dtype of a, torch.float32, got torch.float16$"
    ):
        swiglu(torch.ones(2, 8), torch.ones(2, 8, dtype=torch.float16))
    with pytest.raises(TypeError, match=r"^swiglu: a must be .* got torch.int32$"):
        swiglu(torch.ones(2, dtype=torch.int32), torch.ones(2))
