"""joint_attention against fp64: softmax(scale q k^T) v for every head, and its log-sum-exp."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import aot
import emulated
import harness
import numpy as np
import pytest
import torch
from harness import NAMES, check_not_finite_like, launcher
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rules import (
    EPS32,
    Draw,
    assert_bitwise,
    assert_within_twice_eager,
    at_odd_stride,
    check_captures,
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
from pixeldiff.ops.registry import OPS

OP = "joint_attention"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")
# The op itself leaves processors without AVX2 to PyTorch.
needs_avx2 = pytest.mark.skipif(
    native.why_not() is not None or native.load().best_isa() == 0, reason="needs AVX2"
)
every_isa = pytest.mark.parametrize("isa", native.ISA_CODES)
TRITON = ["triton", pytest.param("triton-gpu", marks=pytest.mark.gpu)]
# The CUDA C++ kernels on a GPU (the device's own, and the one that every device runs), and the same
# sources on the emulator.
CUDA = ["sm90-emulated", "mma-emulated"]
CUDA += [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "cuda-mma")]
triton_kernel = pytest.mark.parametrize("backend", TRITON)
gpu_kernel = pytest.mark.parametrize("backend", [*TRITON, *CUDA])
every_kernel = pytest.mark.parametrize(
    "backend", [*(f"cpu-{isa}" for isa in native.ISA_CODES), *TRITON, *CUDA, "reference"]
)

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


def oracle(q, k, v, scale=None, key_mask=None):
    return oracles(q, k, v, scale, key_mask)[0]


def oracles(q, k, v, scale=None, key_mask=None):
    """(o, lse); an image without a key gives 0 and -inf."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = f64(q, k, v)
    logits = np.einsum("blgd,bsgd->bgls", q, k) * scale
    if key_mask is not None:
        logits = np.where(key_mask.numpy()[:, None, None], logits, -np.inf)
    most = np.maximum(logits.max(-1, keepdims=True), np.finfo(np.float64).min)
    weights = np.exp(logits - most)
    total = weights.sum(-1, keepdims=True)
    o = np.einsum("bgls,bsgd->blgd", weights / np.where(total == 0, 1, total), v)
    with np.errstate(divide="ignore"):
        return o, (most + np.log(total))[..., 0].swapaxes(1, 2)


def eager(q, k, v, key_mask=None):
    logits = torch.einsum("blgd,bsgd->bgls", q, k) * q.shape[-1] ** -0.5
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], -torch.inf)
    return torch.einsum("bgls,bsgd->blgd", logits.softmax(-1), v)


def eager_lse(q, k, key_mask=None):
    logits = torch.einsum("blgd,bsgd->blgs", q.float(), k.float()) * q.shape[-1] ** -0.5
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], -torch.inf)
    return logits.logsumexp(-1)


@every_backend("joint_attention")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, backend):
    if backend == "triton" and np.prod(shape) > 1_000_000:
        pytest.skip("too large for the interpreter; compiled for real on a GPU")
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
    return launch(*args, scale, None, False, isa=native.ISA_CODES[isa], **kwargs)[0]


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
        (0, 0),
        0,
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
    assert_bitwise(forced_cpu, launch(*args, 24**-0.5, None, False)[0])


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
        launch(q, k, v, 1.0, None, False, isa=9)
    with pytest.raises(ValueError, match="there must be a key"):
        launch(q, k[:, :0], v[:, :0], 1.0, None, False)


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


# --- the mask and the log-sum-exp -----------------------------------------------------------------


def on(backend, q, k, v, scale=None, key_mask=None, return_lse=False):
    """(o, lse) on the CPU, of one backend's own launch function."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "reference":
        return import_module("pixeldiff.ops.joint_attention").reference(
            q, k, v, scale, key_mask, return_lse
        )
    if backend.endswith("-emulated"):
        skip_if(import_module("pixeldiff.ops.cuda.joint_attention").why_not_call(q, k, v, scale))
        kernel = backend.removesuffix("-emulated")
        return emulated.attention(q, k, v, scale, key_mask, return_lse, kernel=kernel)
    launch, device = launcher(OP, backend)
    if device == "cuda":
        q, k, v = to_cuda(q, k, v)
        key_mask = None if key_mask is None else key_mask.cuda()
    if backend.startswith("cuda"):
        module = import_module("pixeldiff.ops.cuda.joint_attention")
        skip_if(module.why_not(q, k, v, scale, key_mask, return_lse))
        launch = cuda_launch(backend)
    o, lse = launch(q, k, v, scale, key_mask, return_lse)
    return o.cpu(), lse.cpu()


def cuda_launch(backend):
    launch = import_module("pixeldiff.ops.cuda.joint_attention").launch
    return partial(launch, kernel="mma") if backend == "cuda-mma" else launch


def skip_if(reason):
    if reason is not None:
        pytest.skip(reason)


def to_cuda(*tensors):
    """The same values at the same strides."""
    return tuple(
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda").copy_(t)
        for t in tensors
    )


def masks(b, keys):
    """By name, (B, S): one end, the other, some of each image, all of them."""
    position = torch.arange(keys).expand(b, keys)
    scattered = torch.rand(b, keys, generator=torch.Generator().manual_seed(keys)) < 0.5
    scattered[:, keys // 2] = True
    return {
        "leading": position >= keys // 3,
        "trailing": position <= keys // 2,
        "scattered": scattered,
        "one-key": position == keys - 1,
        "all": position >= 0,
    }


MASK_SHAPES = {
    "head-64": (2, 5, 131, 1, 64),
    "head-72": (2, 9, 65, 1, 72),
    "head-128": (1, 3, 64, 1, 128),
    "one-key": (2, 3, 1, 1, 16),
}


@every_kernel
@pytest.mark.parametrize("kind", masks(1, 1))
@pytest.mark.parametrize("shape", MASK_SHAPES.values(), ids=MASK_SHAPES)
@precisions
def test_mask_and_lse(dtype, std, shape, kind, backend):
    q, k, v = arguments(dtype, shape, std)
    mask = masks(shape[0], shape[2])[kind]
    if not mask.any():
        mask = ~mask
    o, lse = on(backend, q, k, v, key_mask=mask, return_lse=True)
    want, want_lse = oracles(q, k, v, key_mask=mask)
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    assert backend == "reference" or (o.is_contiguous() and lse.is_contiguous())
    assert_within_twice_eager(o, eager(q, k, v, mask), want)
    assert_within_twice_eager(lse, eager_lse(q, k, mask), want_lse)


@every_kernel
def test_lse_is_empty_unless_wanted(backend):
    q, k, v = arguments(torch.bfloat16, (2, 5, 70, 2, 16))
    for mask in (None, masks(2, 70)["scattered"]):
        want, _ = on(backend, q, k, v, key_mask=mask, return_lse=True)
        o, lse = on(backend, q, k, v, key_mask=mask)
        assert_bitwise(o, want)
        assert lse.shape == (0,)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_masked_keys_have_no_influence(dtype, backend):
    """Whatever the rows hold that are left out, the first, the last and whole blocks among them."""
    q, k, v = arguments(dtype, (2, 3, 150, 1, 24))
    mask = masks(2, 150)["scattered"]
    mask[0, :70], mask[1, 60:] = False, False
    want, want_lse = on(backend, q, k, v, key_mask=mask, return_lse=True)
    for garbage in (torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max):
        for t in (k, v):
            t[~mask] = garbage
        o, lse = on(backend, q, k, v, key_mask=mask, return_lse=True)
        assert_bitwise(o, want)
        assert_bitwise(lse, want_lse)
    assert want.isfinite().all()


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_the_cpu_kernel_skips_what_is_masked(dtype, isa):
    """As if only the others had been passed, bit for bit."""
    q, k, v = arguments(dtype, (1, 50, 300, 2, 24))
    mask = masks(1, 300)["scattered"]
    o, lse = on(f"cpu-{isa}", q, k, v, key_mask=mask, return_lse=True)
    few = (t[:, mask[0]] for t in (k, v))
    for a, b in zip((o, lse), on(f"cpu-{isa}", q, *few, return_lse=True), strict=True):
        assert_bitwise(a, b)


@every_kernel
def test_no_key_at_all(backend):
    """Zeros and -inf for that image, and nothing changes for the others."""
    q, k, v = arguments(torch.float32, (3, 5, 70, 2, 16))
    mask = masks(3, 70)["trailing"].clone()
    want, want_lse = on(backend, q, k, v, key_mask=mask, return_lse=True)
    mask[1] = False
    o, lse = on(backend, q, k, v, key_mask=mask, return_lse=True)
    assert (o[1] == 0).all()
    assert (lse[1] == -torch.inf).all()
    assert_bitwise(o[::2], want[::2])
    assert_bitwise(lse[::2], want_lse[::2])


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_halves_of_the_keys_merge(dtype, backend):
    q, k, v = arguments(dtype, (2, 9, 150, 2, 24))
    mask = masks(2, 150)["scattered"]
    mask[1, :50] = False  # the first half of that image has no key
    parts = [
        on(backend, q, k[:, rows], v[:, rows], key_mask=mask[:, rows], return_lse=True)
        for rows in (slice(0, 50), slice(50, 150))
    ]
    (o1, lse1), (o2, lse2) = parts
    lse = torch.logaddexp(lse1, lse2)
    w1, w2 = ((part - lse).exp()[..., None] for part in (lse1, lse2))
    want, want_lse = oracles(q, k, v, key_mask=mask)
    assert_within_twice_eager(lse, eager_lse(q, k, mask), want_lse)
    assert_within_twice_eager((w1 * o1 + w2 * o2).to(dtype), eager(q, k, v, mask), want)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_lse_not_finite(dtype, backend):
    """NaN and +inf among the logits make the lse NaN, as they make the row; -inf adds nothing."""
    q, k, v = arguments(dtype, (1, 9, 150, 1, 16))
    k = k.abs()
    q[0, 3, 0, 5] = torch.nan
    q[0, 5, 0, 2] = torch.inf  # every logit +inf
    q[0, 7, 0, 2] = -torch.inf  # every logit -inf
    o, lse = on(backend, q, k, v, return_lse=True)
    assert lse[0, :, 0].isnan().nonzero().flatten().tolist() == [3, 5]
    assert lse[0, 7, 0] == -torch.inf
    assert_bitwise(o[0, :, 0].isnan().any(-1), lse[0, :, 0].isnan())
    clean = [0, 1, 2, 4, 6, 8]
    _, want = on(backend, q[:, clean], k, v, return_lse=True)
    assert_bitwise(lse[:, clean], want)


# --- the kernels for a GPU ------------------------------------------------------------------------

# Around every boundary: tiles of 128 queries and of 16, 32 and 64 keys; both parts of a head dim.
EDGES = {
    "released": (1, 130, 70, 1, 64),
    "released-pit": (1, 40, 40, 2, 72),
    "l2p": (1, 9, 70, 1, 128),
    "keys-15": (1, 3, 15, 1, 40),
    "keys-16": (2, 3, 16, 1, 8),
    "keys-17": (1, 3, 17, 2, 24),
    "keys-63": (1, 1, 63, 1, 80),
    "keys-64": (1, 2, 64, 1, 96),
    "keys-65": (1, 33, 65, 1, 104),
    "queries-127": (1, 127, 5, 1, 56),
    "queries-128": (1, 128, 33, 1, 16),
    "queries-129": (2, 129, 66, 1, 120),
    "one": (1, 1, 1, 1, 8),
}


@gpu_kernel
@pytest.mark.parametrize("shape", EDGES.values(), ids=EDGES)
@pytest.mark.parametrize("std", [1.0, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_edges(dtype, std, shape, backend):
    args = arguments(dtype, shape, std)
    o, lse = on(backend, *args, return_lse=True)
    want, want_lse = oracles(*args)
    assert_within_twice_eager(o, eager(*args), want)
    assert_within_twice_eager(lse, eager_lse(*args[:2]), want_lse)


@gpu_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_one_key_takes_all(dtype, backend):
    """Logits so far apart that each row is one row of v, exactly; and their lse."""
    _, _, v = arguments(dtype, (1, 1, 100, 2, 16))
    k = torch.eye(100)[None, :, None].expand(1, 100, 2, 100)[..., :96].to(dtype) * 200
    v = v.repeat(1, 1, 1, 6)
    o, lse = on(backend, k[:, :96].contiguous(), k.contiguous(), v, scale=1.0, return_lse=True)
    assert_bitwise(o, v[:, :96])
    assert (lse == 40000).all()


@gpu_kernel
@pytest.mark.parametrize("std", [1e3, 1e4, 1e15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_huge_logits(dtype, std, backend):
    """However large, the weights are at most 1: rows of v where one key is clearly the first."""
    q, k, v = arguments(dtype, (1, 20, 70, 2, 64))
    q, k = q * std, k * std
    o, lse = on(backend, q, k, v, return_lse=True)
    assert o.isfinite().all()
    assert lse.isfinite().all()
    logits = np.sort(np.einsum("blgd,bsgd->blgs", *f64(q, k)) / 8, -1)
    clear = logits[..., -1] - logits[..., -2] > 1e-5 * np.abs(logits).max(-1)
    assert clear.mean() > 0.99
    assert np.array_equal(f64(o)[clear], oracle(q, k, v)[clear])


@gpu_kernel
@pytest.mark.parametrize("keys", [1, 5, 64, 129])
def test_equal_logits(keys, backend):
    """The mean of v, far below zero too: what pads a tile must not become the maximum."""
    _, _, v = arguments(torch.float32, (1, 20, keys, 2, 8))
    for value in (-100.0, 0.0, 100.0):
        q, k = torch.full((1, 20, 2, 8), value), torch.ones(1, keys, 2, 8)
        o, lse = on(backend, q, k, v, scale=1.0, return_lse=True)
        torch.testing.assert_close(o, v.mean(1, keepdim=True).expand_as(o))
        torch.testing.assert_close(lse, torch.full_like(lse, 8 * value + np.log(keys)))


@gpu_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_not_finite_on_a_gpu(dtype, backend):
    """NaN and infinities reach the rows and channels they reach in PyTorch."""
    q, k, v = arguments(dtype, (1, 60, 150, 1, 16))
    k = k.abs()
    q[0, 3, 0, 5] = torch.nan
    q[0, 50, 0, 2] = torch.inf
    q[0, 7, 0, 2] = -torch.inf
    v[0, 130, 0, 4] = torch.nan
    v[0, 149, 0, 9] = -torch.inf
    o, _ = on(backend, q, k, v)
    with pixeldiff.backend("reference"):
        want = joint_attention(q, k, v)
    assert o.isnan().sum() == 2 * 16 + 58 + 1
    check_not_finite_like(o, want)


@gpu_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_keys_that_are_infinitely_far_on_a_gpu(dtype, backend):
    """Whole tiles of logits at -inf weigh nothing, first or last."""
    q, k, v = arguments(dtype, (1, 20, 300, 1, 16))
    q[..., 0], k[..., 0] = 1, 0
    want = on(backend, q, k[:, 140:160].contiguous(), v[:, 140:160].contiguous(), return_lse=True)
    k[:, :140, :, 0] = -torch.inf
    k[:, 160:, :, 0] = -torch.inf
    got = on(backend, q, k, v, return_lse=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@gpu_kernel
@pytest.mark.parametrize("d", [64, 72])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_reads_views_in_place(dtype, d, backend):
    q, k, v = Draw(dtype)(3, 2, 37, 2, d).unbind(0)
    mask = masks(2, 40)["scattered"][:, 3:]
    want = on(backend, q[:, 5:].contiguous(), k.clone(), v.clone(), None, mask.clone(), True)
    heads_first = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q[:, 5:], k, v))
    odd = (at_odd_stride(q[:, 5:]), at_odd_stride(k), at_odd_stride(v))
    for views in ((q[:, 5:], k, v), heads_first, odd):
        if views is odd and backend.startswith(("sm90", "mma", "cuda")):
            continue  # they take strides of 16 bytes
        for a, b in zip(on(backend, *views, None, mask, True), want, strict=True):
            assert_bitwise(a, b)


@pytest.mark.parametrize(
    "backend",
    [*TRITON, *(pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "cuda-mma"))],
)
def test_gpu_kernels_offsets_past_two_to_the_31(backend):
    launch, device = launcher_for(backend, *arguments(torch.bfloat16, (1, 1, 1, 1, 64)))
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 5 << 30:
        pytest.skip("needs 5 GiB of GPU memory")
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    far = base.as_strided((2, 1, 1, 64), (2**31, 64, 64, 1))  # the second image lies beyond
    near = Draw(torch.bfloat16)(2, 1, 1, 64).to(device)
    far.copy_(near)
    assert_bitwise(launch(far, far, far, 0.125, None, False)[0], near)


@gpu_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_repeats_and_leaves_its_inputs(dtype, backend):
    args = arguments(dtype, (2, 20, 70, 1, 72))
    mask = masks(2, 70)["leading"]
    before = [t.clone() for t in args]
    for a, b in zip(
        on(backend, *args, key_mask=mask, return_lse=True),
        on(backend, *args, key_mask=mask, return_lse=True),
        strict=True,
    ):
        assert_bitwise(a, b)
    assert all(map(torch.equal, args, before))


@triton_kernel
def test_triton_why_not(backend):
    launcher(OP, backend)
    module = import_module("pixeldiff.triton_kernels.joint_attention")
    device = "cuda" if backend == "triton-gpu" else "cpu"

    def reason(d=64, scale=0.125, stretch=1):
        q, k, v = (torch.zeros(1, 2, 1, d * stretch, device=device)[..., :d] for _ in range(3))
        return module.why_not(q, k, v, scale, None, False)

    assert reason() is None
    for d in (4, 12, 136):
        assert reason(d) == f"takes head dims that are multiples of 8 up to 128, got {d}"
    assert reason(scale=0.0) == "takes a positive scale, got 0.0"
    assert reason(scale=-1.0) == "takes a positive scale, got -1.0"
    assert "rows of k and v less than 16777216 elements apart" in reason(8, stretch=1 << 21)


# (B, L, S, G, d): PiD at 2048 and 4096, two images, L2P.
RELEASED = {
    "mmdit-2048": (1, 16684, 16684, 24, 64),
    "mmdit-2048-batch": (2, 16684, 16684, 24, 64),
    "pit-2048": (1, 16384, 16384, 16, 72),
    "mmdit-4096": (1, 65836, 65836, 24, 64),
    "l2p": (1, 4224, 4224, 30, 128),
}


on_a_gpu = pytest.mark.parametrize("backend", ["triton-gpu", "cuda", "cuda-mma"])


def launcher_for(backend, *args):
    """As `launcher`, of a kernel that takes tensors like these."""
    launch, device = launcher(OP, backend)
    if backend.startswith("cuda"):
        tensors = (t.to(device) for t in args)
        why_not = import_module("pixeldiff.ops.cuda.joint_attention").why_not
        skip_if(why_not(*tensors, 1.0, None, False))
        launch = cuda_launch(backend)
    return launch, device


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("masked", [False, True], ids=["all-keys", "masked"])
@pytest.mark.parametrize("shape", RELEASED.values(), ids=RELEASED)
def test_at_released_shapes(shape, masked, backend):
    """All rows run; some of them are judged."""
    small = arguments(torch.bfloat16, (1, 1, 1, 1, shape[-1]))
    launch, device = launcher_for(backend, *small)
    b, rows, keys, g, d = shape
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = torch.randn(
        3, b, rows, g, d, generator=generator, device=device, dtype=torch.bfloat16
    ).unbind(0)
    mask = torch.rand(b, keys, generator=generator, device=device) < 0.7 if masked else None
    o, lse = launch(q, k, v, d**-0.5, mask, True)
    some = torch.linspace(0, rows - 1, 48, device=device).long()
    reference = import_module("pixeldiff.ops.joint_attention").reference
    q, o, lse = (t[:, some] for t in (q, o, lse))
    plain = [t.cpu() for t in reference(q, k, v, d**-0.5, mask, True)]
    exact = reference(q.double(), k.double(), v.double(), d**-0.5, mask, True)
    for got, base, want in zip((o, lse), plain, exact, strict=True):
        assert_within_twice_eager(got.cpu(), base, f64(want.cpu()))


@pytest.mark.gpu
@on_a_gpu
def test_under_graph_capture(backend):
    args = arguments(torch.bfloat16, (1, 200, 300, 2, 72))
    launch, device = launcher_for(backend, *args)
    args = [t.to(device) for t in args]
    check_captures(launch, *args, 0.1, masks(1, 300)["scattered"].to(device), True)


# --- without a GPU --------------------------------------------------------------------------------


def test_triton_in_interpreter():
    harness.run_in_interpreter(__file__)


def on_meta(shape, dtype=torch.bfloat16, masked=False):
    b, rows, keys, g, d = shape
    q, k, v = torch.empty(3, b, keys, g, d, device="meta", dtype=dtype).unbind(0)
    mask = torch.empty(b, keys, device="meta", dtype=torch.bool) if masked else None
    return q[:, keys - rows :], k, v, d**-0.5, mask, masked


@pytest.mark.parametrize("masked", [False, True], ids=["all-keys", "masked"])
@pytest.mark.parametrize("target", aot.TARGETS)
def test_triton_compiles_ahead_of_time(target, masked):
    module = pytest.importorskip("pixeldiff.triton_kernels.joint_attention")
    for shape in RELEASED.values():
        args = on_meta(shape, masked=masked)
        (kernel,) = aot.compile_launch(lambda args=args: module.launch(*args), target)
        aot.assert_lean(kernel, tensor_cores=True)
        if target == 90:
            assert kernel.tensor_cores == {"HGMMA"}
            # The instructions of a product follow each other: ptxas may fall back to a wait behind
            # every single one, where it takes their sums for anybody else's.
            assert 2 * kernel.sass.count("WARPGROUP.DEPBAR") < kernel.sass.count("HGMMA")
            # Two programs on a multiprocessor; with a mask too where nothing would spill.
            narrow = shape[4] <= 64 or (shape[4] == 72 and not masked)
            assert kernel.registers <= 128 or not narrow
        # Keys and values on their way while others are multiplied, 16 bytes at a time.
        assert "cp.async.cg.shared.global" in kernel.ptx
        assert "ld.global.v4.b32" in kernel.ptx
        assert "st.global.v4.b32" in kernel.ptx


@pytest.mark.parametrize("target", aot.TARGETS)
def test_triton_compiles_ahead_of_time_as_l2p_calls_it(target):
    """A mask without lse; the image rows alone ask."""
    module = pytest.importorskip("pixeldiff.triton_kernels.joint_attention")
    q, k, v, scale, *_ = aot.released(OP, system="l2p")
    mask = torch.empty(k.shape[:2], device="meta", dtype=torch.bool)
    args = (q[:, :4096], k, v, scale, mask, False)
    (kernel,) = aot.compile_launch(lambda: module.launch(*args), target)
    aot.assert_lean(kernel, tensor_cores=True)
    assert "cp.async.cg.shared.global" in kernel.ptx


@pytest.mark.parametrize("target", aot.TARGETS)
def test_triton_compiles_ahead_of_time_in_fp32(target):
    module = pytest.importorskip("pixeldiff.triton_kernels.joint_attention")
    for shape in (RELEASED["mmdit-2048"], RELEASED["pit-2048"], RELEASED["l2p"]):
        args = on_meta(shape, torch.float32, masked=True)
        (kernel,) = aot.compile_launch(lambda args=args: module.launch(*args), target)
        aot.assert_lean(kernel)


@pytest.mark.parametrize(("d", "masked"), [(64, False), (64, True), (72, False)])
def test_triton_compiles_once_for_all_sizes(d, masked):
    sizes = [(1, 16384, 16684), (1, 65536, 65836), (2, 1517, 1594), (1, 1, 1)]
    calls = [on_meta((*size, 16, d), masked=masked) for size in sizes]
    aot.check_compiles_once(OP, calls)


# --- who takes which call -------------------------------------------------------------------------


def test_a_gpu_takes_triton_where_pytorch_has_no_fused_attention():
    triton = OPS[OP].backends[0]
    gpu = SimpleNamespace(is_cuda=True)
    assert triton.name == "triton"
    assert not triton.offers(gpu, gpu, gpu, 1.0, None, False)
    assert triton.offers(gpu, gpu, gpu, 1.0, gpu, False)
    assert triton.offers(gpu, gpu, gpu, 1.0, None, True)
    q, k, v = arguments(torch.float32, (1, 2, 3, 1, 8))
    assert not triton.offers(q, k, v, 1.0, masks(1, 3)["all"], True)


def test_mask_and_lse_run_everywhere():
    q, k, v = arguments(torch.bfloat16, (2, 5, 7, 3, 8))
    mask = masks(2, 7)["scattered"]

    def masked(q, k, v, mask):
        return joint_attention(q, k, v, key_mask=mask)

    def with_lse(q, k, v, mask):
        return joint_attention(q, k, v, key_mask=mask, return_lse=True)

    check_registered(OP, with_lse, q, k, v, mask)
    check_compiles(
        OP,
        masked,
        (q, k, v, mask),
        (*arguments(torch.bfloat16, (1, 6, 9, 3, 8)), masks(1, 9)["leading"]),
    )
    check_meta(masked, q, k, v, mask)
    o, lse = with_lse(q, k, v, mask)
    assert_bitwise(o, masked(q, k, v, mask))
    meta = with_lse(*(t.to("meta") for t in (q, k, v, mask)))
    for a, b in zip((o, lse), meta, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_gradients_with_mask_and_lse():
    """Of an image without keys too: zeros, not NaN."""
    mask = torch.tensor([[True, False, True], [False, False, False]])

    def masked(q, k, v):
        o, lse = joint_attention(q, k, v, key_mask=mask, return_lse=True)
        return o, lse[:1]

    check_gradients(masked, *arguments(torch.float32, (2, 2, 3, 2, 3)))


def test_reference_lse_by_chunks(monkeypatch):
    module = import_module("pixeldiff.ops.joint_attention")
    q, k, v = arguments(torch.float32, (2, 10, 7, 3, 8))
    whole = module.reference(q, k, v, 0.3, None, True)[1]
    monkeypatch.setattr(module, "CHUNK", 3 * 2 * 7 * 3)
    torch.testing.assert_close(module.reference(q, k, v, 0.3, None, True)[1], whole)


def test_errors_of_the_mask():
    q, k, v = arguments(torch.float32, (2, 5, 7, 3, 8))
    mask = torch.ones(2, 7, dtype=torch.bool)
    for bad, error, text in (
        (mask.float(), TypeError, r"key_mask must be torch.bool, got torch.float32"),
        (mask[:, :6], ValueError, r"key_mask must be \(B, S\) = \(2, 7\), got \(2, 6\)"),
        (mask.to("meta"), ValueError, r"key_mask must be on cpu, got meta"),
        (
            torch.ones(7, 2, dtype=torch.bool).T,
            ValueError,
            r"the last axis of key_mask must be contiguous, got strides \(1, 2\); .*",
        ),
    ):
        with pytest.raises(error, match=f"^joint_attention: {text}$"):
            joint_attention(q, k, v, key_mask=bad)
    with pytest.raises(ValueError, match=r"q must have at least one channel, got \(2, 5, 3, 0\)"):
        joint_attention(q[..., :0], k[..., :0], v[..., :0])
