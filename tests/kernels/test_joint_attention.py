"""joint_attention against fp64: softmax(scale q k^T) v for every head."""

from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import numpy as np
import pytest
import torch
from harness import NAMES, launcher
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rules import (
    EPS32,
    Draw,
    assert_bitwise,
    assert_within_twice_eager,
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
)

import pixeldiff
from pixeldiff import native
from pixeldiff.ops import joint_attention

OP = "joint_attention"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")
# The op itself leaves processors without AVX2 to PyTorch.
needs_avx2 = pytest.mark.skipif(
    native.why_not() is not None or native.load().best_isa() == 0, reason="needs AVX2"
)
every_isa = pytest.mark.parametrize("isa", native.ISA_CODES)

# (B, L, S, G, d)
SHAPES = {
    "production": (1, 160, 190, 6, 64),
    "pit": (2, 48, 48, 4, 72),
    "primes": (3, 7, 13, 5, 11),
    "one": (1, 1, 1, 1, 1),
    "one-key": (2, 5, 1, 3, 8),
    "no-query": (2, 0, 4, 2, 8),
    "no-image": (0, 3, 4, 2, 8),
}


def arguments(dtype, shape, std=1.0):
    draw, (b, queries, keys, g, d) = Draw(dtype), shape
    return tuple(draw(b, rows, g, d, std=std) for rows in (queries, keys, keys))


def oracle(q, k, v, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = f64(q, k, v)
    logits = np.einsum("blgd,bsgd->bgls", q, k) * scale
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bgls,bsgd->blgd", weights, v)


def eager(q, k, v):
    logits = torch.einsum("blgd,bsgd->bgls", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bgls,bsgd->blgd", logits.softmax(-1), v)


@every_backend("joint_attention")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, backend):
    args = arguments(dtype, shape, std)
    with forced("joint_attention", backend):
        o = joint_attention(*args)
    assert_within_twice_eager(o, eager(*args), oracle(*args))


@every_backend("joint_attention")
@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_scale(scale, backend):
    q, k, v = arguments(torch.float32, (2, 5, 7, 3, 8))
    with forced("joint_attention", backend):
        o = joint_attention(q, k, v, scale=scale)
    same = eager(q * (scale * 8**0.5), k, v)
    assert_within_twice_eager(o, same, oracle(q, k, v, scale))


@every_backend("joint_attention")
def test_large_logits_do_not_overflow(backend):
    q, k, v = arguments(torch.float32, (1, 4, 6, 2, 8))
    with forced("joint_attention", backend):
        o = joint_attention(q * 300, k * 300, v)
    assert torch.isfinite(o).all()
    np.testing.assert_allclose(f64(o), oracle(q * 300, k * 300, v), atol=1e-2)


def test_views_of_the_joint_buffer():
    """q without its text rows, k and v whole, all views of one (3, B, T+N, G, d) buffer."""
    q, k, v = Draw()(3, 2, 9, 3, 8).unbind(0)
    o = joint_attention(q[:, 4:], k, v)
    assert o.is_contiguous()
    assert_bitwise(o, joint_attention(q[:, 4:].contiguous(), k.clone(), v.clone()))
    torch.testing.assert_close(o, joint_attention(q, k, v)[:, 4:], rtol=1e-5, atol=1e-6)
    odd = joint_attention(at_odd_stride(q), at_odd_stride(k), at_odd_stride(v))
    torch.testing.assert_close(odd, joint_attention(q, k, v), rtol=1e-5, atol=1e-6)


# --- the CPU kernel -------------------------------------------------------------------------------

# Around every boundary of the kernel: vectors of 8 and 16 queries, tiles of 24 and 48, work items
# of 384; 4 and 8 keys at a time, blocks of 128; pairs and groups of 4 and 8 channels.
TAILS = {
    "released": (1, 300, 333, 2, 64),
    "released-pit": (1, 256, 256, 2, 72),
    "l2p": (1, 40, 70, 2, 128),
    "demo": (2, 80, 80, 2, 32),
    "one-more": (1, 385, 129, 1, 65),
    "one-less": (1, 383, 127, 1, 63),
    "tile-and-one": (1, 49, 65, 3, 9),
    "vector-and-one": (3, 17, 9, 1, 3),
    "one-query": (2, 1, 131, 2, 40),
    "one-key": (2, 50, 1, 2, 8),
    "one-channel": (1, 25, 5, 2, 1),
    "two-keys": (1, 33, 2, 2, 2),
}


def run_isa(isa, *args, scale=None, **kwargs):
    launcher(OP, f"cpu-{isa}")  # skips where this processor lacks it
    launch = import_module("pixeldiff.ops.cpu.joint_attention").launch
    scale = args[0].shape[-1] ** -0.5 if scale is None else scale
    return launch(*args, scale, isa=native.ISA_CODES[isa], **kwargs)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("shape", TAILS.values(), ids=TAILS)
def test_every_instruction_set(shape, dtype, isa):
    args = arguments(dtype, shape)
    o = run_isa(isa, *args)
    assert o.dtype == dtype
    assert o.is_contiguous()
    assert_within_twice_eager(o, eager(*args), oracle(*args))


@needs_extension
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(DTYPES),
    st.tuples(
        st.integers(1, 2),
        st.integers(1, 210),
        st.integers(1, 140),
        st.integers(1, 3),
        st.integers(1, 80),
    ),
    st.sampled_from([1.0, 1e-3, 30.0]),
    st.booleans(),
    st.sampled_from(sorted(native.ISA_CODES)),
)
def test_random_shapes(dtype, shape, std, strided, isa):
    """Any shape and magnitude, and rows that start anywhere in memory."""
    if not native.load().isa_usable(native.ISA_CODES[isa]):
        return
    q, k, v = arguments(dtype, shape)
    v = v * std
    args = tuple(map(at_odd_stride, (q, k, v))) if strided else (q, k, v)
    o = run_isa(isa, *args)
    assert_within_twice_eager(o, eager(q, k, v), oracle(q, k, v))


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("std", [1e-3, 1e4])
def test_magnitudes(std, dtype, isa):
    """Logits of 1e-6 leave the mean of v; logits of 1e9 leave one v, unless the first two are as
    close as fp32 can see."""
    q, k, v = arguments(dtype, (1, 70, 150, 2, 64), std)
    o = run_isa(isa, q, k, v)
    want = oracle(q, k, v)
    if std < 1:
        assert_within_twice_eager(o, eager(q, k, v), want)
        return
    logits = np.sort(np.einsum("blgd,bsgd->blgs", *f64(q, k)) / 8, -1)
    clear = logits[..., -1] - logits[..., -2] > 1e-5 * np.abs(logits).max(-1)
    assert clear.mean() > 0.99
    assert np.array_equal(f64(o)[clear], want[clear])


@every_isa
def test_small_weights_keep_their_relative_accuracy(isa):
    """Two keys with logits 0 and x: the second weighs 1 / (1 + e^-x), however little that is."""
    x = torch.linspace(-80, 0, 4001)
    q = torch.ones(1, 1, 4001, 1)
    k = torch.stack((torch.zeros(4001), x)).reshape(1, 2, 4001, 1)
    v = torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1).expand(1, 2, 4001, 1).contiguous()
    o = f64(run_isa(isa, q, k, v, scale=1.0)).ravel()
    want = 1 / (1 + np.exp(-f64(x)))
    # Two ulp of the exponential, one of the sum, one of the quotient; the rounding of x log2(e).
    budget = (4 + np.abs(f64(x)) * 1.5) * EPS32 / 2 * want
    assert (np.abs(o - want) <= budget).all(), np.max(np.abs(o - want) / budget)


@every_isa
@pytest.mark.parametrize("keys", [1, 5, 13, 129])
def test_equal_logits_far_below_zero(keys, isa):
    """Keys that only pad a group have logit 0: they must not become the maximum."""
    _, _, v = arguments(torch.float32, (1, 20, keys, 2, 8))
    q, k = torch.full((1, 20, 2, 8), -100.0), torch.ones(1, keys, 2, 8)
    o = run_isa(isa, q, k, v)
    torch.testing.assert_close(o, v.mean(1, keepdim=True).expand_as(o))


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_not_finite(dtype, isa):
    """NaN and infinities reach the rows and channels they reach in PyTorch."""
    q, k, v = arguments(dtype, (1, 60, 150, 1, 16))
    k = k.abs()
    q[0, 3, 0, 5] = torch.nan
    q[0, 50, 0, 2] = torch.inf  # every logit +inf
    q[0, 7, 0, 2] = -torch.inf  # every logit -inf
    v[0, 130, 0, 4] = torch.nan
    v[0, 149, 0, 9] = -torch.inf
    o = run_isa(isa, q, k, v)
    with pixeldiff.backend("reference"):
        want = joint_attention(q, k, v)
    assert torch.equal(o.isnan(), want.isnan())
    assert o.isnan().sum() == 2 * 16 + 58 + 1  # row 7 is 0 except where 0 * v is NaN
    assert (o[0, 7, 0, :4] == 0).all()
    assert torch.equal(o.isinf(), want.isinf())
    torch.testing.assert_close(o, want, equal_nan=True, rtol=2e-2, atol=1e-2)


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_keys_that_are_infinitely_far(dtype, isa):
    """A whole block of logits at -inf weighs nothing, first or last; a NaN key takes every row."""
    q, k, v = arguments(dtype, (1, 20, 300, 1, 16))
    q[..., 0], k[..., 0] = 1, 0
    want = run_isa(isa, q, k[:, 140:160].contiguous(), v[:, 140:160].contiguous())
    k[:, :140, :, 0] = -torch.inf
    k[:, 160:, :, 0] = -torch.inf
    torch.testing.assert_close(run_isa(isa, q, k, v), want, rtol=1e-2, atol=1e-2)
    k[0, 150, 0, 3] = torch.nan
    assert run_isa(isa, q, k, v).isnan().all()


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_threads_do_not_change_the_result(dtype, isa):
    args = arguments(dtype, (2, 400, 70, 3, 24))
    one = run_isa(isa, *args, threads=1)
    for threads in (2, 5, 1000):
        assert_bitwise(run_isa(isa, *args, threads=threads), one)


@every_isa
def test_a_row_does_not_depend_on_its_neighbours(isa):
    q, k, v = arguments(torch.float32, (1, 201, 70, 2, 24))
    whole = run_isa(isa, q, k, v)
    for rows in (slice(0, 1), slice(7, 60), slice(200, 201)):
        assert_bitwise(run_isa(isa, q[:, rows], k, v), whole[:, rows])


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_strided_views(dtype, isa):
    q, k, v = Draw(dtype)(3, 2, 75, 3, 11).unbind(0)
    want = run_isa(isa, q[:, 5:].contiguous(), k, v)
    assert_bitwise(run_isa(isa, q[:, 5:], k, v), want)
    assert_bitwise(run_isa(isa, at_odd_stride(q[:, 5:]), at_odd_stride(k), at_odd_stride(v)), want)
    heads_first = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q[:, 5:], k, v))
    assert_bitwise(run_isa(isa, *heads_first), want)


@needs_avx2
def test_concurrent_callers():
    inputs = [arguments(torch.float32, (1, 100 + i, 90, 2, 16)) for i in range(4)]
    best = native.load().best_isa()
    name = next(name for name, code in native.ISA_CODES.items() if code == best)
    want = [run_isa(name, *args, threads=1) for args in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got in [list(pool.map(lambda a: joint_attention(*a), inputs)) for _ in range(5)]:
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def heads_of(t):
    return t.data_ptr(), *t.stride()[:3]


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_writes_nothing_outside_its_rows(dtype, isa):
    want = run_isa(isa, *arguments(dtype, (1, 5, 9, 2, 11)))
    q, k, v = arguments(dtype, (1, 5, 9, 2, 11))
    buffer = torch.full((64 + 110,), 7.0, dtype=dtype)
    native.load().joint_attention_cpu(
        (1, 5, 9, 2, 11),
        native.DTYPE_CODES[dtype],
        heads_of(q),
        heads_of(k),
        heads_of(v),
        buffer[32:].data_ptr(),
        11**-0.5,
        native.ISA_CODES[isa],
        2,
    )
    assert (buffer[:32] == 7).all()
    assert (buffer[142:] == 7).all()
    assert_bitwise(buffer[32:142].view(want.shape), want)


@needs_avx2
def test_offsets_past_two_to_the_31():
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16)  # pages that are not touched cost nothing
    far = base.as_strided((1, 2, 1, 64), (2**32, 2**31, 64, 1))
    near = Draw(torch.bfloat16)(1, 2, 1, 64)
    far.copy_(near)
    with pixeldiff.backend("cpu"):
        assert_bitwise(joint_attention(far, far, far), joint_attention(near, near, near))


@needs_avx2
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_public_function_runs_the_cpu_kernel(dtype):
    args = arguments(dtype, (1, 40, 60, 2, 24))
    launch = import_module("pixeldiff.ops.cpu.joint_attention").launch
    with pixeldiff.backend("cpu"):
        forced_cpu = joint_attention(*args)
    assert_bitwise(joint_attention(*args), forced_cpu)
    assert_bitwise(forced_cpu, launch(*args, 24**-0.5))


@needs_extension
def test_processors_without_avx2_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(native, "best_isa", lambda: native.ISA_CODES["portable"])
    args = arguments(torch.float32, (1, 4, 6, 2, 8))
    with pixeldiff.backend("cpu"), pytest.raises(NotImplementedError, match="needs AVX2"):
        joint_attention(*args)
    with pixeldiff.backend("reference"):
        want = joint_attention(*args)
    assert_bitwise(joint_attention(*args), want)


@needs_extension
def test_forced_cpu_refuses_fp64():
    args = arguments(torch.float64, (1, 4, 6, 2, 8))
    text = r'joint_attention\(backend="cpu"\): takes float32, bfloat16 and float16, got .*float64'
    with pixeldiff.backend("cpu"), pytest.raises(NotImplementedError, match=text):
        joint_attention(*args)


@needs_extension
def test_the_extension_guards_memory():
    q, k, v = arguments(torch.float32, (1, 4, 6, 2, 8))
    launch = import_module("pixeldiff.ops.cpu.joint_attention").launch
    with pytest.raises(ValueError, match="instruction set 9 was not compiled in"):
        launch(q, k, v, 1.0, isa=9)
    with pytest.raises(ValueError, match="there must be a key"):
        launch(q, k[:, :0], v[:, :0], 1.0)


# --- the registered op and the public function ----------------------------------------------------


def test_runs_everywhere():
    args = arguments(torch.bfloat16, (2, 5, 7, 3, 8))
    check_registered("joint_attention", joint_attention, *args)
    check_compiles(
        "joint_attention", joint_attention, args, arguments(torch.bfloat16, (1, 6, 9, 3, 8))
    )
    check_meta(joint_attention, *args)
    check_repeatable(joint_attention, *args)


def test_gradients():
    check_gradients(joint_attention, *arguments(torch.float32, (1, 2, 3, 2, 3)))


def test_errors():
    q, k, v = arguments(torch.float32, (2, 5, 7, 3, 8))

    def raises(error, message, *args):
        with pytest.raises(error, match=f"^joint_attention: {message}$"):
            joint_attention(*args)

    raises(ValueError, r"q must be \(B, L, G, d\), 4 axes, got \(5, 3, 8\)", q[0], k, v)
    raises(
        ValueError,
        r"k must be \(B, S, G, d\) = \(2, 7, 3, 8\), got \(2, 7, 2, 8\)",
        q,
        k[:, :, :2],
        v,
    )
    raises(
        ValueError, r"v must be \(B, S, G, d\) = \(2, 7, 3, 8\), got \(2, 6, 3, 8\)", q, k, v[:, 1:]
    )
    raises(
        ValueError,
        r"k must have at least one row, got \(2, 0, 3, 8\)",
        q,
        k[:, :0],
        v[:, :0],
    )
    raises(
        TypeError,
        r"k and v must have the dtype of q, torch.float32, got torch.float32, torch.bfloat16",
        q,
        k,
        v.bfloat16(),
    )
    raises(TypeError, r"q must be float32, .* got torch.int32", q.int(), k, v)
    raises(
        ValueError,
        r"the last axis of v must be contiguous, got strides .*; call \.contiguous\(\)",
        q,
        k,
        v.transpose(2, 3).contiguous().transpose(2, 3),
    )
