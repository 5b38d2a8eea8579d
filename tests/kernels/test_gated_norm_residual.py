"""gated_norm_residual against fp64: r = x + gate * rms(y) * weight, one gate per image."""

import pytest
import torch
from harness import NAMES, check_not_finite_like
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

from pixeldiff.ops import gated_norm_residual

OP = "gated_norm_residual"
EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "production": (2, 24, 3840),
    "primes": (3, 7, 257),
    "one": (1, 1, 1),
    "no-tokens": (2, 0, 6),
    "no-images": (0, 3, 6),
}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
gates = pytest.mark.parametrize("gated", [True, False], ids=["gate", "no-gate"])


def arguments(dtype, shape, std=1.0, vectors=None, gated=True):
    draw, (b, n, d) = Draw(dtype), shape
    few = Draw(vectors or dtype, seed=1)
    gate = few(b, d).tanh() if gated else None
    return draw(b, n, d, std=std), draw(b, n, d, std=std), few(d), gate


def oracle(x, y, weight, gate, eps=EPS):
    added = rms(f64(y), eps) * f64(weight)
    return f64(x) + (added if gate is None else added * f64(gate)[:, None])


@every_backend(OP)
@gates
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, gated, backend):
    args = arguments(dtype, shape, std, gated=gated)
    with forced(OP, backend):
        r = gated_norm_residual(*args, eps=EPS)
    assert r.dtype == dtype
    assert r.is_contiguous()
    assert_one_rounding(r, oracle(*args))


@every_backend(OP)
@each_dtype
@pytest.mark.parametrize("vectors", DTYPES, ids=NAMES.get)
def test_vectors_of_another_type(dtype, vectors, backend):
    args = arguments(dtype, (2, 5, 72), vectors=vectors)
    with forced(OP, backend):
        assert_one_rounding(gated_norm_residual(*args, eps=EPS), oracle(*args))


@every_backend(OP)
def test_eps_is_added_to_the_mean_square(backend):
    """Where it matters: y is as small as its root."""
    x, y, weight, gate = arguments(torch.float32, (2, 5, 72), std=1e-3)
    x = torch.zeros_like(x)
    for eps in (1e-5, 1e-3):
        with forced(OP, backend):
            r = gated_norm_residual(x, y, weight, gate, eps=eps)
        assert_one_rounding(r, oracle(x, y, weight, gate, eps))


@every_backend(OP)
def test_each_image_has_its_own_gate(backend):
    """One vector expanded to all images is the same as copies of it."""
    x, y, weight, gate = arguments(torch.bfloat16, (3, 5, 24))
    with forced(OP, backend):
        one = gated_norm_residual(x, y, weight, gate[:1].expand(3, -1))
        assert_bitwise(one, gated_norm_residual(x, y, weight, gate[:1].repeat(3, 1)))
        alone = gated_norm_residual(x[1:2], y[1:2], weight, gate[1:2])
        assert_bitwise(gated_norm_residual(x, y, weight, gate)[1:2], alone)


@every_backend(OP)
def test_strided(backend):
    """First rows of each image, as the last block of the trunk takes them."""
    x, y, weight, gate = arguments(torch.bfloat16, (3, 9, 24))
    with forced(OP, backend):
        want = gated_norm_residual(x[:, :5].contiguous(), y[:, :5].contiguous(), weight, gate)
        assert_bitwise(gated_norm_residual(x[:, :5], y[:, :5], weight, gate), want)
        views = (at_odd_stride(t) for t in (x[:, :5], y[:, :5]))
        assert_bitwise(gated_norm_residual(*views, weight, at_odd_stride(gate)), want)


@every_backend(OP)
@each_dtype
def test_not_finite(dtype, backend):
    """A NaN of x stays one element; one of y takes its row."""
    x, y, weight, gate = arguments(dtype, (2, 3, 37))
    x[0, 1, 5], x[1, 0, 2], y[1, 2, 36] = torch.nan, torch.inf, torch.nan
    with forced(OP, backend):
        r = gated_norm_residual(x, y, weight, gate)
    assert r.isnan().sum() == 38
    want = x.float() + gate.float()[:, None] * torch.nn.functional.rms_norm(
        y.float(), (37,), weight.float(), EPS
    )
    check_not_finite_like(r, want.to(dtype))


def test_runs_everywhere():
    args, other = arguments(torch.bfloat16, (2, 3, 8)), arguments(torch.bfloat16, (4, 5, 8))
    check_registered(OP, gated_norm_residual, *args)
    check_registered(OP, gated_norm_residual, *args[:3], None)
    check_compiles(OP, gated_norm_residual, args, other)
    check_meta(gated_norm_residual, *args)
    check_repeatable(gated_norm_residual, *args)


def test_gradients():
    check_gradients(gated_norm_residual, *arguments(torch.float32, (2, 3, 4)))


X = torch.ones(2, 3, 8)
W, G = torch.ones(8), torch.ones(2, 8)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((X[0], X[0], W, G), ValueError, r"x must be \(B, N, D\), 3 axes, got \(3, 8\)"),
        ((X, X[:, :2], W, G), ValueError, r"y must be \(B, N, D\) = \(2, 3, 8\), got \(2, 2, 8\)"),
        ((X, X.half(), W, G), TypeError, r"y must have the dtype of x, torch.float32, got .*16"),
        ((X, X, W[:7], G), ValueError, r"weight must be \(D,\) = \(8,\), got \(7,\)"),
        ((X, X, W, G[:1]), ValueError, r"gate must be \(B, D\) = \(2, 8\), got \(1, 8\)"),
        ((X, X, W, G.long()), TypeError, r"gate must be float32, .* got torch.int64"),
        ((X, X, W, G.to("meta")), ValueError, r"gate must be on cpu, got meta"),
        ((X.mT, X.mT, W[:3], None), ValueError, r"the last axis of x must be contiguous, got .*"),
    ],
)
def test_errors(args, error, text):
    with pytest.raises(error, match=f"^gated_norm_residual: {text}"):
        gated_norm_residual(*args)
