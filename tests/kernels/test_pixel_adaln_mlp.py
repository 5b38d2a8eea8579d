"""pixel_adaln_mlp against fp64, with every modulation value found by its index."""

import math
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
from torch.nn.functional import gelu, linear, rms_norm

from pixeldiff.ops import pixel_adaln_mlp
from pixeldiff.ops.cpu import pixel_adaln

reference = import_module("pixeldiff.ops.pixel_adaln_mlp").reference

# (R, P*P, p, D, A); the MLP is 4p wide.
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
NAMES = [
    "q",
    "u",
    "attn",
    "expand_weight",
    "expand_bias",
    "ada_weight",
    "ada_bias",
    "norm_weight",
    "fc1_weight",
    "fc1_bias",
    "fc2_weight",
    "fc2_bias",
]
erf = np.vectorize(math.erf, otypes=[np.float64])


def arguments(dtype, shape, std=1.0):
    draw, (rows, pixels, p, d, a) = Draw(dtype), shape
    return (
        draw(rows, pixels, p, std=std),
        draw(rows, d, std=std),
        draw(rows, a, std=std),
        draw(pixels * p, a, std=a**-0.5),
        draw(pixels * p, std=std),
        draw(6 * p * pixels, d, std=d**-0.5),
        draw(6 * p * pixels, std=0.3),
        draw(p),
        draw(4 * p, p, std=p**-0.5),
        draw(4 * p),
        draw(p, 4 * p, std=(4 * p) ** -0.5),
        draw(p),
    )


def call(q, u, attn, expand_w, expand_b, ada_w, ada_b, norm_w, fc1_w, fc1_b, fc2_w, fc2_b):
    return pixel_adaln_mlp(
        q, u, attn, (expand_w, expand_b), (ada_w, ada_b), norm_w, (fc1_w, fc1_b), (fc2_w, fc2_b)
    )


def oracle(*tensors):
    q, u, attn, expand_w, expand_b, ada_w, ada_b, norm_w, fc1_w, fc1_b, fc2_w, fc2_b = f64(*tensors)
    pixels, p = q.shape[1:]

    def chunk(index):
        rows = np.arange(pixels)[:, None] * 6 * p + index * p + np.arange(p)
        return np.einsum("jid,rd->rji", ada_w[rows], u) + ada_b[rows]

    gate1, shift, scale, gate2 = (chunk(c) for c in (2, 3, 4, 5))
    q = q + gate1 * (attn @ expand_w.T + expand_b).reshape(q.shape)
    h = (rms(q) * norm_w * (1 + scale) + shift) @ fc1_w.T + fc1_b
    return q + gate2 * ((0.5 * h * (1 + erf(h / math.sqrt(2)))) @ fc2_w.T + fc2_b)


def eager(q, u, attn, expand_w, expand_b, ada_w, ada_b, norm_w, fc1_w, fc1_b, fc2_w, fc2_b):
    m = linear(u, ada_w, ada_b).reshape(*q.shape[:2], 6 * q.shape[2])
    _, _, gate1, shift, scale, gate2 = m.chunk(6, -1)
    q = q + gate1 * linear(attn, expand_w, expand_b).reshape(q.shape)
    h = rms_norm(q, q.shape[2:], norm_w, 1e-6) * (1 + scale) + shift
    return q + gate2 * linear(gelu(linear(h, fc1_w, fc1_b)), fc2_w, fc2_b)


@every_backend("pixel_adaln_mlp")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, backend):
    args = arguments(dtype, shape, std)
    with forced("pixel_adaln_mlp", backend):
        q = call(*args)
    assert q.dtype == dtype
    assert_within_twice_eager(q, eager(*args), oracle(*args))


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_instruction_set(dtype, shape, isa):
    launch, _ = launcher("pixel_adaln_mlp", f"cpu-{isa}")
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
    launch, _ = launcher("pixel_adaln_mlp", f"cpu-{draw(st.sampled_from(usable_isas()))}")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pixel_adaln, "CHUNK_BYTES", draw(st.sampled_from([1, 3000, 10000])))
        patched.setattr(pixel_adaln, "GROUP", draw(st.sampled_from([1, 5, 16, 40])))
        y = launch(*args, 1e-6)
    assert_within_twice_eager_or_spacing(y, eager(*args), oracle(*args))


def test_chunks_do_not_change_the_result(monkeypatch):
    """Beyond the rounding of the GEMMs, whose order of summation may depend on their size."""
    launch, _ = launcher("pixel_adaln_mlp", f"cpu-{usable_isas()[-1]}")
    args = arguments(torch.float32, (37, 64, 8, 24, 40))
    whole = launch(*args, 1e-6)
    for chunk, group in ((1, 16), (20_000, 7), (50_000, 64)):
        monkeypatch.setattr(pixel_adaln, "CHUNK_BYTES", chunk)
        monkeypatch.setattr(pixel_adaln, "GROUP", group)
        torch.testing.assert_close(launch(*args, 1e-6), whole, rtol=1e-5, atol=1e-5)


@each_isa
def test_threads_do_not_change_the_result(isa):
    check_threads("pixel_adaln_mlp", isa, *arguments(torch.bfloat16, (300, 64, 8, 16, 24)), 1e-6)


@each_isa
def test_inference_mode(isa):
    launch, _ = launcher("pixel_adaln_mlp", f"cpu-{isa}")
    args = arguments(torch.float32, (3, 9, 8, 13, 11))
    want = launch(*args, 1e-6)
    with torch.inference_mode():
        assert_bitwise(launch(*args, 1e-6), want)


@each_isa
def test_not_finite(isa):
    """Of a pixel its own channels, of u and attn all that they reach."""
    launch, _ = launcher("pixel_adaln_mlp", f"cpu-{isa}")
    q, u, attn, *rest = arguments(torch.float32, (6, 16, 8, 24, 40))
    q[1, 5, 3], q[2, 15, 7], u[4, 0], attn[5, 1] = torch.nan, torch.inf, torch.inf, -torch.inf
    y = launch(q, u, attn, *rest, 1e-6)
    check_not_finite_like(y, reference(q, u, attn, *rest, 1e-6))
    assert (~y.isfinite()).any(2).sum(1).tolist() == [0, 1, 1, 0, 16, 16]


@each_isa
@pytest.mark.parametrize("std", [1e15, 1e-15])
def test_magnitudes(isa, std):
    launch, _ = launcher("pixel_adaln_mlp", f"cpu-{isa}")
    q, u, attn, *rest = arguments(torch.float32, (6, 16, 8, 24, 40))
    args = (q * std, u, attn, *rest)
    assert_within_twice_eager_or_spacing(launch(*args, 1e-6), eager(*args), oracle(*args))


@each_isa
def test_gelu_over_its_whole_range(isa):
    """With q = 0, scale = -1 and identities for the MLP the result is gelu(shift)."""
    launch, _ = launcher("pixel_adaln_mlp", f"cpu-{isa}")
    x = torch.cat([torch.linspace(-14, 14, 16300), torch.logspace(-30, 30, 84)])[:16384]
    x[-40::2] *= -1
    ada_bias = torch.zeros(4096, 6, 4)
    ada_bias[:, 3], ada_bias[:, 4], ada_bias[:, 5] = x.view(4096, 4), -1, 1
    zeros, one = torch.zeros, torch.eye(4)
    y = launch(
        zeros(1, 4096, 4), zeros(1, 1), zeros(1, 1), zeros(16384, 1), zeros(16384),
        zeros(6 * 16384, 1), ada_bias.flatten(), torch.ones(4), one, zeros(4), one, zeros(4), 1e-6,
    ).flatten()  # fmt: skip
    x, y = f64(x, y)
    want = x * np.vectorize(lambda t: 0.5 * math.erfc(-t / math.sqrt(2)))(x)
    error = np.abs(y - want)
    assert (error <= 1e-7 * np.maximum(np.abs(x), 0.1)).all()
    near = x > -1
    assert (error[near] <= 3e-7 * np.abs(want[near])).all()
    assert (y[x < -8] == 0).all()


def test_gelu_is_the_exact_form():
    """The tanh approximation is off by up to 5e-4: far outside fp32."""
    q, u, attn, ew, eb, aw, ab, nw, fc1_w, fc1_b, fc2_w, fc2_b = arguments(
        torch.float32, (64, 1, 4, 1, 1)
    )
    rest = (ew, eb, aw, ab, nw, fc1_w * 2, fc1_b, fc2_w, fc2_b)
    np.testing.assert_allclose(f64(call(q, u, attn, *rest)), oracle(q, u, attn, *rest), atol=3e-6)


def test_closed_gates_return_q():
    q, u, attn, *rest = arguments(torch.bfloat16, (3, 4, 4, 8, 8))
    named = dict(zip(NAMES[3:], rest, strict=True))
    named["ada_weight"], named["ada_bias"] = (
        torch.zeros_like(named["ada_weight"]),
        torch.zeros_like(named["ada_bias"]),
    )
    assert_bitwise(call(q, u, attn, *named.values()), q)


def test_strided():
    q, u, attn, *rest = arguments(torch.float32, (7, 9, 4, 13, 11))
    y = call(at_odd_stride(q), at_odd_stride(u), at_odd_stride(attn), *rest)
    assert y.is_contiguous()
    torch.testing.assert_close(y, call(q, u, attn, *rest), rtol=1e-5, atol=1e-5)


def test_runs_everywhere():
    args = arguments(torch.bfloat16, (3, 4, 4, 8, 8))
    check_registered("pixel_adaln_mlp", call, *args)
    larger = (*arguments(torch.bfloat16, (5, 4, 4, 8, 8))[:3], *args[3:])
    check_compiles("pixel_adaln_mlp", call, args, larger)
    check_meta(call, *args)
    check_repeatable(call, *args)


def test_gradients():
    check_gradients(call, *arguments(torch.float32, (2, 2, 2, 3, 3)))


def test_errors():
    args = dict(zip(NAMES, arguments(torch.float32, (3, 4, 4, 8, 8)), strict=True))

    def raises(error, message, **changed):
        with pytest.raises(error, match=f"^pixel_adaln_mlp: {message}$"):
            call(*{**args, **changed}.values())

    raises(ValueError, r"u must be \(R, D\) = \(3, 8\), got \(2, 8\)", u=args["u"][:2])
    raises(ValueError, r"attn must be \(R, A\) = \(3, 8\), got \(2, 8\)", attn=args["attn"][:2])
    for name, message in (
        ("expand_weight", r"expand weight must be \(P\*P\*p, A\) = \(16, 8\), got \(15, 8\)"),
        ("expand_bias", r"expand bias must be \(P\*P\*p,\) = \(16,\), got \(15,\)"),
        ("ada_weight", r"ada_weight must be \(6\*p\*P\*P, D\) = \(96, 8\), got \(95, 8\)"),
        ("norm_weight", r"norm_weight must be \(p,\) = \(4,\), got \(3,\)"),
        ("fc1_bias", r"fc1 bias must be \(F,\) = \(16,\), got \(15,\)"),
        ("fc2_weight", r"fc2 weight must be \(p, F\) = \(4, 16\), got \(3, 16\)"),
        ("fc2_bias", r"fc2 bias must be \(p,\) = \(4,\), got \(3,\)"),
    ):
        raises(ValueError, message, **{name: args[name][1:]})
    raises(
        ValueError,
        r"fc1 weight must be \(F, p\) = \(16, 4\), got \(16, 3\)",
        fc1_weight=args["fc1_weight"][:, 1:],
    )
    raises(TypeError, r"attn must be float32, .* got torch.int64", attn=args["attn"].long())
    raises(
        TypeError,
        r"u must have the dtype of q, torch.float32, got torch.bfloat16",
        u=args["u"].bfloat16(),
    )
