"""qk_norm_rope against fp64: RMSNorm per head, rotation as a complex product, one buffer."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module

import aot
import harness
import numpy as np
import pytest
import torch
from harness import NAMES, launcher, one_rounding
from hypothesis import HealthCheck, given, settings
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
from bench.shapes import SYSTEMS
from pixeldiff import native
from pixeldiff.ops import examples, qk_norm_rope

OP = "qk_norm_rope"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")
every_isa = pytest.mark.parametrize("isa", native.ISA_CODES)

# (B, N, T, G, d); T = None has no text.
SHAPES = {
    "production": (1, 24, 10, 24, 64),
    "pit": (2, 15, None, 16, 72),
    "primes": (3, 7, 5, 11, 2),
    "one": (1, 1, 1, 1, 2),
    "no-image": (2, 0, 3, 2, 4),
    "no-text-rows": (2, 3, 0, 2, 4),
}


def stream(draw, b, n, g, d, std=1.0):
    """qkv, q_weight, k_weight, (cos, sin) of n rows."""
    angle = Draw(seed=n)(n, d // 2) * 3
    return draw(b, n, 3 * g * d, std=std), draw(d), draw(d), (angle.cos(), angle.sin())


def arguments(dtype, shape, std=1.0):
    draw, (b, n, t, g, d) = Draw(dtype), shape
    image = stream(draw, b, n, g, d, std)
    return image, None if t is None else stream(draw, b, t, g, d, std), g


def call(image, text, heads):
    return qk_norm_rope(*image, heads=heads, text=text)


def flat(heads):
    """The public function of tensors alone, as compile and gradcheck want it."""

    def fn(qkv, q_weight, k_weight, cos, sin, *text):
        text = (*text[:3], text[3:]) if text else None
        return qk_norm_rope(qkv, q_weight, k_weight, (cos, sin), heads=heads, text=text)

    return fn


def flattened(image, text, heads):
    streams = [image] if text is None else [image, text]
    return tuple(t for s in streams for t in (*s[:3], *s[3]))


def oracle(image, text, heads):
    rows = [_rows(*s, heads) for s in ([image] if text is None else [text, image])]
    return np.concatenate(rows, 2)


def _rows(qkv, q_weight, k_weight, rope, heads):
    turn = f64(rope[0]) + 1j * f64(rope[1])
    wide, d = f64(qkv), q_weight.numel()
    out = np.empty((3, *wide.shape[:2], heads, d))
    for part, weight in enumerate((q_weight, k_weight, None)):
        for head in range(heads):
            first = (part * heads + head) * d
            h = wide[..., first : first + d]
            if weight is not None:
                h = rms(h) * f64(weight)
                pair = (h[..., 0::2] + 1j * h[..., 1::2]) * turn
                h = np.stack((pair.real, pair.imag), -1).reshape(h.shape)
            out[part, :, :, head] = h
    return out


@every_backend("qk_norm_rope")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, backend):
    args = arguments(dtype, shape, std)
    with forced("qk_norm_rope", backend):
        out = call(*args)
    want = oracle(*args)
    assert_one_rounding(out[0], want[0])
    assert_one_rounding(out[1], want[1])
    assert_bitwise(out[2], torch.from_numpy(want[2]).to(dtype))


def test_text_rows_come_first():
    image, text, heads = arguments(torch.float32, (2, 4, 3, 2, 4))
    joint = call(image, text, heads)
    assert_bitwise(joint[:, :, :3], call(text, None, heads))
    assert_bitwise(joint[:, :, 3:], call(image, None, heads))


def test_strided_projection():
    image, text, heads = arguments(torch.bfloat16, (2, 4, 3, 2, 4))
    y = call((at_odd_stride(image[0]), *image[1:]), (at_odd_stride(text[0]), *text[1:]), heads)
    assert y.is_contiguous()
    assert_bitwise(y, call(image, text, heads))


# --- the CPU kernel -------------------------------------------------------------------------------


def run_isa(isa, image, text, heads, **kwargs):
    launcher(OP, f"cpu-{isa}")  # skips where this processor lacks it
    launch = import_module("pixeldiff.ops.cpu.qk_norm_rope").launch
    flat_text = (None,) * 5 if text is None else (*text[:3], *text[3])
    args = (*image[:3], *image[3], *flat_text, heads, 1e-6)
    return launch(*args, isa=native.ISA_CODES[isa], **kwargs)


def assert_matches(out, args):
    want = oracle(*args)
    assert out.is_contiguous()
    for part in range(2):
        assert one_rounding(out[part], torch.from_numpy(want[part])) <= 1
    assert_bitwise(out[2], torch.from_numpy(want[2]).to(out.dtype))


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("std", [1.0, 1e-3, 1e4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_instruction_set(shape, std, dtype, isa):
    args = arguments(dtype, shape, std)
    assert_matches(run_isa(isa, *args), args)


@needs_extension
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.tuples(
        st.integers(1, 3),
        st.integers(0, 6),
        st.one_of(st.none(), st.integers(0, 6)),
        st.integers(1, 4),
        st.integers(1, 40).map(lambda half: 2 * half),
    ),
    st.sampled_from([1.0, 1e-3, 100.0]),
    st.sampled_from(sorted(native.ISA_CODES)),
)
def test_random_shapes(dtype, weights, shape, std, isa):
    """Any shape, weights of any type, and rows and tables that start anywhere in memory."""
    if not native.load().isa_usable(native.ISA_CODES[isa]):
        return
    image, text, heads = arguments(dtype, shape, std)

    def strided(stream):
        qkv, q_weight, k_weight, rope = stream
        return (
            *(at_odd_stride(qkv), q_weight.to(weights), k_weight.to(weights)),
            tuple(map(at_odd_stride, rope)),
        )

    args = (strided(image), None if text is None else strided(text), heads)
    assert_matches(run_isa(isa, *args), args)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_not_finite(dtype, isa):
    """A NaN takes its head; an infinity takes its own channel pair, the rest of its head is 0."""
    image, text, heads = arguments(dtype, (2, 3, 2, 3, 22))
    image[0][0, 1, 22 + 5] = torch.nan  # q, head 1
    text[0][1, 0, 66 + 44 + 20] = torch.inf  # k, head 2, pair 20 and 21
    image[0][1, 2, 132 + 7] = torch.nan  # v
    out = run_isa(isa, image, text, heads)
    with pixeldiff.backend("reference"):
        want = call(image, text, heads)
    assert torch.equal(out.isnan(), want.isnan())
    assert out.isnan().sum() == 22 + 2 + 1
    assert (out[1, 1, 0, 2, :20] == 0).all()
    torch.testing.assert_close(out, want, equal_nan=True, rtol=2e-2, atol=1e-3)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_threads_do_not_change_the_result(dtype, isa):
    args = arguments(dtype, (2, 150, 31, 8, 72))
    one = run_isa(isa, *args, threads=1)
    for threads in (2, 7, 1000):
        assert_bitwise(run_isa(isa, *args, threads=threads), one)


@needs_extension
def test_concurrent_callers():
    inputs = [arguments(torch.float32, (1, 90 + i, 5, 4, 64)) for i in range(4)]
    with pixeldiff.backend("cpu"):
        want = [call(*args) for args in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got in [list(pool.map(lambda a: call(*a), inputs)) for _ in range(5)]:
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_writes_nothing_outside_its_rows(dtype, isa):
    (qkv, q_weight, k_weight, (cos, sin)), _, heads = args = arguments(dtype, (1, 3, None, 2, 22))
    want = run_isa(isa, *args)
    buffer = torch.full((64 + want.numel(),), 7.0, dtype=dtype)
    native.load().qk_norm_rope_cpu(
        (1, heads, 22),
        native.DTYPE_CODES[dtype],
        (0, (0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0), (0, 0)),
        (
            3,
            native.rows(qkv),
            native.vector(q_weight),
            native.vector(k_weight),
            (cos.data_ptr(), cos.stride(0)),
            (sin.data_ptr(), sin.stride(0)),
        ),
        buffer[32:].data_ptr(),
        1e-6,
        native.ISA_CODES[isa],
        2,
    )
    assert (buffer[:32] == 7).all()
    assert (buffer[-32:] == 7).all()
    assert_bitwise(buffer[32:-32].view(want.shape), want)


@needs_extension
def test_offsets_past_two_to_the_31():
    image, _, heads = arguments(torch.bfloat16, (2, 1, None, 2, 8))
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16)  # pages that are not touched cost nothing
    far = base.as_strided((2, 1, 48), (2**31, 48, 1))
    far.copy_(image[0])
    with pixeldiff.backend("cpu"):
        assert_bitwise(call((far, *image[1:]), None, heads), call(image, None, heads))


@needs_extension
@pytest.mark.parametrize("rows", [3, None], ids=["text", "no-text"])
def test_public_function_runs_the_cpu_kernel(rows):
    args = arguments(torch.bfloat16, (2, 5, rows, 2, 24))
    best = native.load().best_isa()
    name = next(name for name, code in native.ISA_CODES.items() if code == best)
    with pixeldiff.backend("cpu"):
        forced_cpu = call(*args)
    assert_bitwise(call(*args), forced_cpu)
    assert_bitwise(forced_cpu, run_isa(name, *args))


@needs_extension
def test_cpu_refuses_other_tables():
    """Tables in another type than fp32 run in the reference, and a forced kernel says so."""
    (qkv, q_weight, k_weight, rope), _, heads = arguments(torch.float32, (1, 3, None, 2, 8))
    image = (qkv, q_weight, k_weight, tuple(t.double() for t in rope))
    torch.testing.assert_close(
        call(image, None, heads), call((qkv, q_weight, k_weight, rope), None, heads)
    )
    text = r'qk_norm_rope\(backend="cpu"\): takes rotary tables in float32, got torch.float64'
    wide = (qkv, q_weight, k_weight, tuple(t.bfloat16() for t in rope))
    with pixeldiff.backend("cpu"), pytest.raises(NotImplementedError, match="in float32, got"):
        call(wide, None, heads)
    with pixeldiff.backend("cpu"), pytest.raises(NotImplementedError, match=text):
        call(image, None, heads)


# --- the Triton kernel ----------------------------------------------------------------------------

each_triton = pytest.mark.parametrize(
    "backend", ["triton", pytest.param("triton-gpu", marks=pytest.mark.gpu)]
)


def run_triton(backend, image, text, heads, prepare=lambda t: t, **kwargs):
    """The launch on this backend's device; `prepare` sees every tensor there."""
    launch, device = launcher(OP, backend)
    none = (None,) * 5
    tensors = (*flattened(image, None, heads), *(none if text is None else (*text[:3], *text[3])))
    args = [None if t is None else prepare(t.to(device)) for t in tensors]
    return launch(*args, heads, 1e-6, **kwargs).cpu()


# Channels of a head: the released ones, tiles with idle lanes, one pair, the most.
@each_triton
@pytest.mark.parametrize("d", [2, 6, 22, 64, 72, 128, 130, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_triton_heads(dtype, d, backend):
    for std in (1.0, 1e-3, 1e4):
        args = arguments(dtype, (2, 7, 3, 5, d), std)
        assert_matches(run_triton(backend, *args), args)


@each_triton
@pytest.mark.parametrize("small", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_triton_strides_and_types(dtype, small, backend):
    """Rows that start anywhere, weights and tables of any type."""
    image, text, heads = arguments(dtype, (2, 5, 4, 3, 24))

    def cast(stream):
        qkv, q_weight, k_weight, rope = stream
        rope = tuple(t.to(small) for t in rope)
        return (qkv, q_weight.to(small), k_weight.to(small), rope)

    args = (cast(image), cast(text), heads)
    assert_matches(run_triton(backend, *args, prepare=at_odd_stride), args)


@each_triton
@pytest.mark.parametrize(("heads", "warps"), [(1, 1), (4, 2), (64, 8)])
def test_triton_every_tile_gives_the_same(heads, warps, backend):
    module = pytest.importorskip("pixeldiff.triton_kernels.qk_norm_rope")
    args = arguments(torch.bfloat16, (3, 5, 2, 3, 22))
    out = run_triton(backend, *args, config=module.Config(heads, warps))
    assert_matches(out, args)


@each_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_triton_not_finite(dtype, backend):
    """A NaN takes its head; an infinity takes its own channel pair, the rest of its head is 0."""
    image, text, heads = arguments(dtype, (2, 3, 2, 3, 22))
    image[0][0, 1, 22 + 5] = torch.nan  # q, head 1
    text[0][1, 0, 66 + 44 + 20] = torch.inf  # k, head 2, pair 20 and 21
    image[0][1, 2, 132 + 7] = torch.nan  # v
    out = run_triton(backend, image, text, heads)
    with pixeldiff.backend("reference"):
        want = call(image, text, heads)
    assert torch.equal(out.isnan(), want.isnan())
    assert out.isnan().sum() == 22 + 2 + 1
    assert (out[1, 1, 0, 2, :20] == 0).all()
    torch.testing.assert_close(out, want, equal_nan=True, rtol=2e-2, atol=1e-3)


@each_triton
def test_triton_writes_nothing_outside_its_rows(backend):
    """Rows 2 to 4 of 8 in a buffer: neither the others nor anything beyond it."""
    _, device = launcher(OP, backend)
    module = import_module("pixeldiff.triton_kernels.qk_norm_rope")
    (qkv, q_weight, k_weight, rope), _, heads = args = arguments(torch.float32, (2, 3, None, 3, 22))
    shape = (3, 2, 8, heads, 22)
    buffer = torch.full((np.prod(shape) + 64,), 7.0, device=device)
    out = buffer[32:-32].view(shape)
    tensors = (t.to(device) for t in (qkv, q_weight, k_weight, *rope))
    module._launch_rows(*tensors, out, 2, 1e-6, module.Config(4, 4))
    assert_matches(out[:, :, 2:5].contiguous().cpu(), args)
    out[:, :, 2:5] = 7
    assert (buffer == 7).all()


@each_triton
@pytest.mark.parametrize("axis", ["images", "rows"])
def test_triton_offsets_past_two_to_the_31(axis, backend):
    """The third image, or row, 2^31 elements away from the first, at a stride of 32 bits."""
    launch, device = launcher(OP, backend)
    shape = (3, 1) if axis == "images" else (1, 3)
    image, _, heads = args = arguments(torch.bfloat16, (*shape, None, 2, 8))
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    far = base.as_strided((*shape, 48), (2**30, 2**30, 1))
    far.copy_(image[0])
    rest = (*(t.to(device) for t in (*image[1:3], *image[3])), *(None,) * 5, heads, 1e-6)
    assert_matches(launch(far, *rest).cpu(), args)


@each_triton
def test_triton_repeats_bitwise_and_leaves_its_inputs(backend):
    image, text, heads = arguments(torch.bfloat16, (2, 9, 4, 3, 64))
    before = [t.clone() for t in flattened(image, text, heads)]
    first, second = (run_triton(backend, image, text, heads) for _ in range(2))
    assert_bitwise(first, second)
    for a, b in zip(before, flattened(image, text, heads), strict=True):
        assert_bitwise(a, b)


def test_triton_refuses():
    module = pytest.importorskip("pixeldiff.triton_kernels.qk_norm_rope")
    image, _, heads = arguments(torch.float32, (1, 3, None, 2, 258))
    none = (None,) * 5
    reason = module.why_not(*image[:3], *image[3], *none, heads, 1e-6)
    assert reason == "takes heads of at most 256 channels, got 258"
    image, _, heads = arguments(torch.float32, (1, 3, None, 2, 8))
    wide = [t.double() for t in image[3]]
    reason = module.why_not(*image[:3], *wide, *none, heads, 1e-6)
    assert reason == "takes float32, bfloat16, float16, got torch.float64"
    huge = torch.empty(1, 2**30, 48, device="meta")
    reason = module.why_not(huge, *image[1:3], *image[3], *none, heads, 1e-6)
    assert reason == f"takes fewer than 2^31 heads an image, got {2**30} rows of 2"


PIT = {"width": 1152, "heads": 16, "head_dim": 72, "text": 0}


@pytest.mark.gpu
@pytest.mark.parametrize("grid", [(128, 128), (256, 256)], ids=["2048", "4096"])
@pytest.mark.parametrize("site", [{}, PIT], ids=["mmdit", "pit"])
def test_released_shapes(site, grid):
    """Released widths on a GPU: the rule on rows drawn at random, v on all of them."""
    launch, device = launcher(OP, "triton-gpu")
    geometry = replace(SYSTEMS["pid"].geometry, grid=grid, **site)
    args = examples.arguments(OP, device, torch.bfloat16, geometry)
    out = launch(*args)
    qkv, *rest, heads, _ = args
    text = 0 if rest[4] is None else rest[4].shape[1]
    v = qkv[..., 2 * qkv.shape[-1] // 3 :].unflatten(-1, (heads, -1))
    assert_bitwise(out[2, :, text:], v)
    rows = torch.randint(qkv.shape[1], (500,), generator=torch.Generator().manual_seed(0))
    rows[:2] = torch.tensor([0, qkv.shape[1] - 1])
    image = (qkv[:, rows], *rest[:2], tuple(t[rows] for t in rest[2:4]))
    assert_matches(out[:, :, text + rows.to(device)].cpu(), _on_cpu(image, None, heads))
    if text:
        first = out[:, :, :text].contiguous().cpu()
        assert_matches(first, _on_cpu((*rest[4:7], tuple(rest[7:])), None, heads))


def _on_cpu(image, text, heads):
    return (*(t.cpu() for t in image[:3]), tuple(t.cpu() for t in image[3])), text, heads


@pytest.mark.parametrize("target", aot.TARGETS)
def test_triton_compiles_ahead_of_time(target):
    module = pytest.importorskip("pixeldiff.triton_kernels.qk_norm_rope")
    # L2P has its caption among the other rows.
    l2p = {"system": "l2p", "text": 0}
    for dtype, site in ((torch.bfloat16, {}), (torch.bfloat16, PIT), (torch.bfloat16, l2p),
                        (torch.float32, {})):  # fmt: skip
        args = aot.released(OP, dtype, **site)
        for kernel in aot.compile_launch(lambda args=args: module.launch(*args), target):
            aot.assert_lean(kernel)
            assert kernel.registers <= 128
            # Of q, k, v, cos and sin (and the gains); of q, k and v.
            assert kernel.ptx.count("ld.global.v4.b32") >= 5
            assert kernel.ptx.count("st.global.v4.b32") >= 3
            assert "st.global.b16" not in kernel.ptx
            if dtype == torch.bfloat16:
                assert aot.narrow(kernel) == []
                # Pairs are split and joined, and meet their gains, within a thread.
                assert kernel.shared == 0
                assert "bar.sync" not in kernel.ptx


def test_triton_compiles_once_for_all_sizes():
    texts = (300, 300, 17, 1)
    calls = [aot.released(OP, grid=g, text=n) for g, n in zip(aot.GRIDS, texts, strict=True)]
    aot.check_compiles_once(OP, calls, launches=2)


def test_triton_in_interpreter():
    harness.run_in_interpreter(__file__)


@pytest.mark.parametrize("rows", [3, None], ids=["text", "no-text"])
def test_runs_everywhere(rows):
    fn = flat(2)
    small, large = (
        flattened(*arguments(torch.bfloat16, (b, n, rows, 2, 4))) for b, n in ((2, 5), (3, 8))
    )
    check_registered("qk_norm_rope", fn, *small)
    check_compiles("qk_norm_rope", fn, small, large)
    check_meta(fn, *small)
    check_repeatable(fn, *small)


def test_gradients():
    check_gradients(flat(2), *flattened(*arguments(torch.float32, (1, 3, 2, 2, 4))))


def test_errors():
    (qkv, q_weight, k_weight, rope), text, heads = arguments(torch.float32, (2, 4, 3, 2, 4))

    def raises(error, message, image=(qkv, q_weight, k_weight, rope), text=None, heads=heads):
        with pytest.raises(error, match=f"^qk_norm_rope: {message}$"):
            qk_norm_rope(*image, heads=heads, text=text)

    raises(
        ValueError,
        r"qkv must have 3\*G\*d channels with even d and G = 5 heads, got 24",
        heads=5,
    )
    raises(ValueError, r"qkv must have 3\*G\*d channels .* G = 0 heads, got 24", heads=0)
    raises(
        ValueError,
        r"q_weight must be \(d,\) = \(4,\), got \(3,\)",
        (qkv, q_weight[:3], k_weight, rope),
    )
    raises(
        ValueError,
        r"k_weight must be \(d,\) = \(4,\), got \(3,\)",
        (qkv, q_weight, k_weight[:3], rope),
    )
    raises(
        ValueError,
        r"sin must be \(N, d/2\) = \(4, 2\), got \(3, 2\)",
        (qkv, q_weight, k_weight, (rope[0], rope[1][:3])),
    )
    raises(
        ValueError,
        r"the last axis of qkv must be contiguous, got strides .*; call \.contiguous\(\)",
        (qkv.transpose(1, 2).contiguous().transpose(1, 2), q_weight, k_weight, rope),
    )
    raises(
        ValueError,
        r"qkv must be \(B, N, 3\*G\*d\), 3 axes, got \(4, 24\)",
        (qkv[0], q_weight, k_weight, rope),
    )
    raises(
        TypeError,
        r"qkv must be float32, .* got torch.int64",
        (qkv.long(), q_weight, k_weight, rope),
    )
    raises(
        ValueError,
        r"text qkv must be \(B, T, 3\*G\*d\) with B = 2 and 3\*G\*d = 24, got \(1, 3, 24\)",
        text=(text[0][:1], *text[1:]),
    )
    raises(
        TypeError,
        r"text qkv must have the dtype of qkv, torch.float32, got torch.bfloat16",
        text=(text[0].bfloat16(), *text[1:]),
    )
    raises(
        ValueError,
        r"text cos must be \(N, d/2\) = \(3, 2\), got \(4, 2\)",
        text=(*text[:3], rope),
    )
