"""pixel_adaln_compress against fp64, with every modulation value found by its index."""

from importlib import import_module

import numpy as np
import pytest
import torch
from harness import check_not_finite_like, check_threads, each_isa, launcher, usable_isas
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import (
    Draw,
    assert_bitwise,
    assert_within_twice_eager,
    assert_within_twice_eager_or_spacing,
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
from torch.nn.functional import linear, rms_norm

from pixeldiff.ops import pixel_adaln_compress
from pixeldiff.ops.cpu import pixel_adaln

reference = import_module("pixeldiff.ops.pixel_adaln_compress").reference

# (R, P*P, p, D, A)
SHAPES = {
    "production": (6, 256, 16, 96, 288),
    "primes": (7, 9, 4, 13, 11),
    "one": (1, 1, 1, 1, 1),
    "patch8": (5, 64, 8, 32, 48),
    "p12": (3, 4, 12, 16, 20),
    "p20": (4, 25, 20, 9, 16),
    "one-patch": (1, 64, 8, 24, 40),
    "empty": (0, 4, 4, 8, 8),
}


def arguments(dtype, shape, std=1.0):
    draw, (rows, pixels, p, d, a) = Draw(dtype), shape
    return (
        draw(rows, pixels, p, std=std),
        draw(rows, d, std=std),
        draw(6 * p * pixels, d, std=d**-0.5),
        draw(6 * p * pixels),
        draw(p),
        draw(a, pixels * p, std=(pixels * p) ** -0.5),
        draw(a),
    )


def chunk(u, ada_weight, ada_bias, pixels, p, index):
    """(R, P*P, p): row j*6p + index*p + i of the projection, for pixel j and channel i."""
    rows = np.arange(pixels)[:, None] * 6 * p + index * p + np.arange(p)
    return np.einsum("jid,rd->rji", ada_weight[rows], u) + ada_bias[rows]


def oracle(q, u, ada_weight, ada_bias, norm_weight, weight, bias):
    q, u, ada_weight, ada_bias = f64(q, u, ada_weight, ada_bias)
    norm_weight, weight, bias = f64(norm_weight, weight, bias)
    shift, scale = (chunk(u, ada_weight, ada_bias, *q.shape[1:], c) for c in (0, 1))
    z = rms(q) * norm_weight * (1 + scale) + shift
    return np.einsum("rji,aji->ra", z, weight.reshape(-1, *q.shape[1:])) + bias


def eager(q, u, ada_weight, ada_bias, norm_weight, weight, bias):
    m = linear(u, ada_weight, ada_bias).reshape(*q.shape[:2], 6 * q.shape[2])
    shift, scale = m.chunk(6, -1)[:2]
    z = rms_norm(q, q.shape[2:], norm_weight, 1e-6) * (1 + scale) + shift
    return linear(z.flatten(1), weight, bias)


@every_backend("pixel_adaln_compress")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, backend):
    args = arguments(dtype, shape, std)
    with forced("pixel_adaln_compress", backend):
        a = pixel_adaln_compress(*args)
    assert a.dtype == dtype
    assert_within_twice_eager(a, eager(*args), oracle(*args))


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_instruction_set(dtype, shape, isa):
    launch, _ = launcher("pixel_adaln_compress", f"cpu-{isa}")
    if shape[2] % 4:
        pytest.skip("the kernels take multiples of 4 channels")
    args = arguments(dtype, shape)
    assert_within_twice_eager_or_spacing(launch(*args, 1e-6), eager(*args), oracle(*args))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_shapes(data):
    """Chunks of any number of patches, groups of pixels with and without a rest."""
    draw = data.draw
    p, patch = 4 * draw(st.integers(1, 5)), draw(st.integers(1, 9))
    # Enough results that the largest is not itself a sum that cancels.
    rows, d, a = draw(st.integers(4, 12)), draw(st.integers(1, 20)), draw(st.integers(8, 24))
    shape = (rows, patch**2, p, d, a)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    args = arguments(dtype, shape, draw(st.sampled_from([1.0, 1e-3, 30.0])))
    launch, _ = launcher("pixel_adaln_compress", f"cpu-{draw(st.sampled_from(usable_isas()))}")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pixel_adaln, "CHUNK_BYTES", draw(st.sampled_from([1, 3000, 10000])))
        patched.setattr(pixel_adaln, "GROUP", draw(st.sampled_from([1, 5, 16, 40])))
        y = launch(*args, 1e-6)
    assert_within_twice_eager_or_spacing(y, eager(*args), oracle(*args))


def test_chunks_do_not_change_the_result(monkeypatch):
    """Beyond the rounding of the GEMMs, whose order of summation may depend on their size."""
    launch, _ = launcher("pixel_adaln_compress", f"cpu-{usable_isas()[-1]}")
    args = arguments(torch.float32, (37, 64, 8, 24, 40))
    whole = launch(*args, 1e-6)
    for chunk, group in ((1, 16), (20_000, 7), (50_000, 64)):
        monkeypatch.setattr(pixel_adaln, "CHUNK_BYTES", chunk)
        monkeypatch.setattr(pixel_adaln, "GROUP", group)
        torch.testing.assert_close(launch(*args, 1e-6), whole, rtol=1e-5, atol=1e-5)


@each_isa
def test_threads_do_not_change_the_result(isa):
    check_threads(
        "pixel_adaln_compress", isa, *arguments(torch.bfloat16, (300, 64, 8, 16, 24)), 1e-6
    )


@each_isa
def test_inference_mode(isa):
    launch, _ = launcher("pixel_adaln_compress", f"cpu-{isa}")
    args = arguments(torch.float32, (3, 9, 8, 13, 11))
    want = launch(*args, 1e-6)
    with torch.inference_mode():
        assert_bitwise(launch(*args, 1e-6), want)


@each_isa
def test_not_finite(isa):
    """A pixel's NaN or infinity, and one in u, take the tokens of their patches."""
    launch, _ = launcher("pixel_adaln_compress", f"cpu-{isa}")
    q, u, *rest = arguments(torch.float32, (6, 16, 8, 24, 40))
    q[1, 5, 3], q[2, 15, 7], u[4, 0] = torch.nan, torch.inf, torch.inf
    a = launch(q, u, *rest, 1e-6)
    check_not_finite_like(a, reference(q, u, *rest, 1e-6))
    assert a.isfinite().all(1).tolist() == [True, False, False, True, False, True]


@each_isa
@pytest.mark.parametrize("std", [1e15, 1e-15])
def test_magnitudes(isa, std):
    launch, _ = launcher("pixel_adaln_compress", f"cpu-{isa}")
    q, u, *rest = arguments(torch.float32, (6, 16, 8, 24, 40))
    args = (q * std, u, *rest)
    assert_within_twice_eager_or_spacing(launch(*args, 1e-6), eager(*args), oracle(*args))


def test_strided():
    q, u, *rest = arguments(torch.float32, (7, 9, 4, 13, 11))
    a = pixel_adaln_compress(at_odd_stride(q), at_odd_stride(u), *rest)
    assert a.is_contiguous()
    torch.testing.assert_close(a, pixel_adaln_compress(q, u, *rest), rtol=1e-5, atol=1e-5)


def test_runs_everywhere():
    args = arguments(torch.bfloat16, (3, 4, 4, 8, 8))
    check_registered("pixel_adaln_compress", pixel_adaln_compress, *args)
    larger = (*arguments(torch.bfloat16, (5, 4, 4, 8, 8))[:2], *args[2:])
    check_compiles("pixel_adaln_compress", pixel_adaln_compress, args, larger)
    check_meta(pixel_adaln_compress, *args)
    check_repeatable(pixel_adaln_compress, *args)


def test_gradients():
    check_gradients(pixel_adaln_compress, *arguments(torch.float32, (2, 2, 2, 3, 3)))


def test_errors():
    args = dict(
        zip(
            ("q", "u", "ada_weight", "ada_bias", "norm_weight", "weight", "bias"),
            arguments(torch.float32, (3, 4, 4, 8, 8)),
            strict=True,
        )
    )

    def raises(error, message, **changed):
        with pytest.raises(error, match=f"^pixel_adaln_compress: {message}$"):
            pixel_adaln_compress(**{**args, **changed})

    raises(ValueError, r"q must be \(R, P\*P, p\), 3 axes, got \(4, 4\)", q=args["q"][0])
    raises(ValueError, r"u must be \(R, D\) = \(3, 8\), got \(2, 8\)", u=args["u"][:2])
    raises(
        ValueError,
        r"ada_weight must be \(6\*p\*P\*P, D\) = \(96, 8\), got \(95, 8\)",
        ada_weight=args["ada_weight"][1:],
    )
    raises(
        ValueError,
        r"ada_bias must be \(6\*p\*P\*P,\) = \(96,\), got \(95,\)",
        ada_bias=args["ada_bias"][1:],
    )
    raises(
        ValueError,
        r"norm_weight must be \(p,\) = \(4,\), got \(3,\)",
        norm_weight=args["norm_weight"][1:],
    )
    raises(
        ValueError,
        r"weight must be \(A, P\*P\*p\) = \(8, 16\), got \(8, 15\)",
        weight=args["weight"][:, 1:],
    )
    raises(ValueError, r"bias must be \(A,\) = \(8,\), got \(7,\)", bias=args["bias"][1:])
    raises(TypeError, r"weight must be float32, .* got torch.int64", weight=args["weight"].long())
    raises(
        TypeError,
        r"u must have the dtype of q, torch.float32, got torch.bfloat16",
        u=args["u"].bfloat16(),
    )
