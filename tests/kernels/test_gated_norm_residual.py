"""gated_norm_residual against fp64: r = x + gate * rms(y) * weight, one gate per image."""

import aot
import harness
import pytest
import torch
from harness import NAMES, check_not_finite_like, each_isa, launcher, one_rounding
from hypothesis import given, settings
from hypothesis import strategies as st
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
from pixeldiff import native
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
needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")
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


# --- the kernels ----------------------------------------------------------------------------------

TRITON = "pixeldiff.triton_kernels.gated_norm_residual"
# Tails of every length class, the width of the demo and of the released network.
WIDTHS = [1, 3, 8, 15, 16, 17, 31, 257, 3840]


def exact(x, y, weight, gate, eps=EPS):
    """The definition in fp64, wherever the tensors are."""
    x, y, weight = x.double(), y.double(), weight.double()
    h = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    return x + (h if gate is None else h * gate.double()[:, None])


def to(device, args):
    return tuple(None if t is None else t.to(device) for t in args)


@pytest.mark.parametrize("backend", harness.BACKENDS[:-1])  # no CUDA kernel
@gates
@each_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_kernel_one_rounding(width, dtype, gated, backend):
    """Rows that start anywhere, gates that are a chunk of a wider projection."""
    launch, device = launcher(OP, backend)
    for std in (1.0, 1e-3):
        x, y, weight, gate = arguments(dtype, (2, 5, width), std, torch.float32, gated)
        if gated:
            gate = torch.cat([gate.flip(1), gate], 1).chunk(2, -1)[1]
        args = (at_odd_stride(x), at_odd_stride(y), weight, gate)
        args = to(device, args)
        r = launch(*args, EPS)
        assert r.dtype == dtype
        assert r.is_contiguous()
        assert one_rounding(r, exact(*args)) <= 1


@pytest.mark.parametrize("backend", harness.BACKENDS[:-1])
@each_dtype
@pytest.mark.parametrize("vectors", DTYPES, ids=NAMES.get)
def test_kernel_vectors_of_another_type(vectors, dtype, backend):
    launch, device = launcher(OP, backend)
    args = to(device, arguments(dtype, (2, 5, 72), vectors=vectors))
    assert one_rounding(launch(*args, EPS), exact(*args)) <= 1


@pytest.mark.parametrize("backend", harness.BACKENDS[:-1])
@each_dtype
def test_kernel_not_finite(dtype, backend):
    launch, device = launcher(OP, backend)
    x, y, weight, gate = arguments(dtype, (3, 3, 37))
    x[0, 1, 5], x[1, 0, 2] = torch.nan, torch.inf
    y[1, 2, 36], y[2, 0, 3] = torch.nan, -torch.inf
    gate[2, 7] = torch.inf
    with pixeldiff.backend("reference"):
        want = gated_norm_residual(x, y, weight, gate, eps=EPS)
    check_not_finite_like(launch(*to(device, (x, y, weight, gate)), EPS).cpu(), want)


@pytest.mark.parametrize("backend", harness.BACKENDS[:-1])
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_kernel_empty(shape, backend):
    launch, device = launcher(OP, backend)
    assert launch(*to(device, arguments(torch.bfloat16, shape)), EPS).shape == shape


@pytest.mark.parametrize("backend", harness.BACKENDS[:-1])
@each_dtype
def test_kernel_writes_nothing_outside(dtype, backend):
    launch, device = launcher(OP, backend)
    args = to(device, arguments(dtype, (2, 3, 19)))
    before = [t.clone() for t in args]
    with harness.guarded_outputs():
        r = launch(*args, EPS)
    assert one_rounding(r, exact(*args)) <= 1
    for tensor, old in zip(args, before, strict=True):
        assert_bitwise(tensor, old)


# --- the CPU kernel -------------------------------------------------------------------------------


@needs_extension
@each_isa
@gates
def test_cpu_threads_do_not_change_the_result(gated, isa):
    args = arguments(torch.bfloat16, (3, 101, 700), gated=gated)
    harness.check_threads(OP, isa, *args, EPS)


@needs_extension
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 200)),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from([1.0, 1e-3, 100.0]),
    st.sampled_from(sorted(native.ISA_CODES)),
)
def test_cpu_random_shapes(dtype, vectors, shape, offset, gated, std, isa):
    """Any shape, and rows that start anywhere in memory."""
    if not native.load().isa_usable(native.ISA_CODES[isa]):
        return
    b, n, d = shape
    x, y, weight, gate = arguments(dtype, (b, n, d + 5), std, vectors, gated)
    part = slice(offset, offset + d)
    args = (x[..., part], y[..., part], weight[part], None if gate is None else gate[:, part])
    r = _cpu().launch(*args, EPS, isa=native.ISA_CODES[isa])
    assert one_rounding(r, exact(*args)) <= 1


@needs_extension
def test_free_choice_runs_the_cpu_kernel():
    args = arguments(torch.bfloat16, (2, 5, 72))
    with pixeldiff.backend("cpu"):
        forced_result = gated_norm_residual(*args, eps=EPS)
    assert_bitwise(gated_norm_residual(*args, eps=EPS), forced_result)
    assert_bitwise(forced_result, _cpu().launch(*args, EPS))


# --- the Triton kernel ----------------------------------------------------------------------------

each_triton = pytest.mark.parametrize("backend", harness.TRITON)


@each_triton
@pytest.mark.parametrize("tile", [(1, 1), (2, 4), (8, 8)], ids=str)
def test_triton_every_tile_obeys_the_rule(tile, backend):
    """More rows than a tile has, and a tile that crosses from one image to the next."""
    launch, device = launcher(OP, backend)
    config = pytest.importorskip(TRITON).Config(*tile)
    args = to(device, arguments(torch.bfloat16, (3, 7, 45)))
    assert one_rounding(launch(*args, EPS, config=config), exact(*args)) <= 1


@each_triton
@pytest.mark.parametrize("shape", [(3, 1, 24), (1, 3, 24)], ids=["images", "rows"])
def test_triton_offsets_past_two_to_the_31(shape, backend):
    """The third image, or row, 2^31 elements away from the first, at a stride of 32 bits."""
    launch, device = launcher(OP, backend)
    x, y, weight, gate = to(device, arguments(torch.bfloat16, shape))
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    far = base.as_strided(shape, (2**30, 2**30, 1))
    want = launch(x, y, weight, gate, EPS)
    far.copy_(x)
    assert_bitwise(launch(far, y, weight, gate, EPS), want)
    far.copy_(y)
    assert_bitwise(launch(x, far, weight, gate, EPS), want)


@each_triton
def test_triton_refuses_rows_that_do_not_fit(backend):
    _, device = launcher(OP, backend)
    args = to(device, arguments(torch.bfloat16, (1, 1, 16385)))
    reason = pytest.importorskip(TRITON).why_not(*args, EPS)
    assert reason == "takes at most 16384 channels, got 16385"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_released_shape(dtype):
    launch, device = launcher(OP, "triton-gpu")
    x, y = torch.randn(2, 1, 4096 + 128, 3840, device=device).to(dtype)
    weight, gate = torch.randn(3840, device=device), torch.randn(1, 3840, device=device).tanh()
    args = (x, y, weight.to(dtype), gate.to(dtype))
    assert one_rounding(launch(*args, EPS), exact(*args)) <= 1


@pytest.mark.parametrize("target", aot.TARGETS)
def test_triton_compiles_ahead_of_time(target):
    module = pytest.importorskip(TRITON)
    widest = module.norm_rows.MAX_D
    for dtype, width in ((torch.bfloat16, 3840), (torch.float32, 3840), (torch.bfloat16, widest)):
        x, y, weight, gate, eps = aot.released(OP, dtype, system="l2p", width=width)
        args = (x, y, weight, gate.float(), eps)  # the network makes its gates in fp32
        (kernel,) = aot.compile_launch(lambda args=args: module.launch(*args), target)
        aot.assert_lean(kernel)
        assert aot.narrow(kernel) == []


def test_triton_compiles_once_for_all_sizes():
    module = pytest.importorskip(TRITON)
    grids = ((64, 64), (128, 128), (37, 41), (1, 1))
    keys = [
        key
        for grid in grids
        for key in aot.keys(
            lambda grid=grid: module.launch(*aot.released(OP, system="l2p", grid=grid))
        )
    ]
    assert len(keys) == len(grids)
    assert len(set(keys)) == 1


def test_triton_in_interpreter():
    harness.run_in_interpreter(__file__)


def _cpu():
    return pixeldiff.ops.registry.OPS[OP].backends[-1].load()
