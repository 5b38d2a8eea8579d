"""local_decoder_up against fp64: doubling, convolution, concatenation, convolution, SiLU."""

from importlib import import_module

import aot
import harness
import numpy as np
import pytest
import torch
from harness import (
    NAMES,
    TRITON,
    check_threads,
    each_isa,
    guarded_outputs,
    launcher,
    on,
    usable_isas,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import (
    Draw,
    assert_bitwise,
    assert_within_twice_eager,
    assert_within_twice_eager_or_spacing,
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
    sigmoid,
)
from taps import convolved
from torch.nn.functional import conv2d, interpolate, silu

import pixeldiff
from bench.shapes import SYSTEMS
from pixeldiff import native
from pixeldiff.ops import local_decoder_up
from pixeldiff.ops.examples import arguments as arguments_of

OP = "local_decoder_up"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (B, S, h, w, Ci, Cu, Cs, Co) for an output of 2h x 2w: the outermost levels of the four forms,
# inner ones, the 10K form's deepest, odd channels.
SHAPES = {
    "1k-outermost": (1, 1, 8, 12, 64, 64, 64, 64),
    "4k-outermost": (2, 2, 6, 10, 16, 16, 16, 16),
    "8k-outermost": (1, 1, 5, 7, 16, 16, 3, 16),
    "10k-deepest": (1, 1, 3, 4, 512, 256, 256, 128),
    "shared-skip": (4, 2, 5, 7, 8, 6, 5, 4),
    "primes": (3, 3, 7, 11, 5, 7, 2, 3),
    "one": (1, 1, 1, 1, 1, 1, 1, 1),
}
ODD = (SHAPES["primes"], SHAPES["one"])
needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)


def arguments(dtype, shape, std=1.0):
    draw, (b, s, h, w, before, up, beside, out) = Draw(dtype), shape
    return (
        draw(b, h, w, before, std=std),
        draw(s, 2 * h, 2 * w, beside, std=std),
        draw(up, before, 3, 3, std=(9 * before) ** -0.5),
        draw(up, std=0.3 * std),
        draw(out, up + beside, 3, 3, std=(9 * (up + beside)) ** -0.5),
        draw(out, std=0.3 * std),
    )


def oracle(x, skip, up_weight, up_bias, weight, bias):
    x, skip, up_weight, up_bias, weight, bias = f64(x, skip, up_weight, up_bias, weight, bias)
    raised = convolved(x.repeat(2, axis=1).repeat(2, axis=2), up_weight) + up_bias
    skip = np.concatenate([skip] * (len(x) // len(skip))) if len(skip) else skip
    y = convolved(np.concatenate([raised, skip], -1), weight) + bias
    return y * sigmoid(y)


def eager(x, skip, up_weight, up_bias, weight, bias):
    doubled = interpolate(x.permute(0, 3, 1, 2), scale_factor=2, mode="nearest")
    raised = conv2d(doubled, up_weight, up_bias, padding=1)
    skip = skip.repeat(len(x) // len(skip), 1, 1, 1).permute(0, 3, 1, 2)
    joined = torch.cat((raised, skip), 1)
    return silu(conv2d(joined, weight, bias, padding=1)).permute(0, 2, 3, 1)


@every_backend(OP)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, backend):
    if backend == "triton":
        pytest.skip("too slow in the interpreter; its smaller shapes are below")
    args = arguments(dtype, shape, std)
    with forced(OP, backend):
        y = local_decoder_up(*args)
    assert y.dtype == dtype
    assert y.is_contiguous()
    rule = assert_within_twice_eager_or_spacing if shape in ODD else assert_within_twice_eager
    rule(y, eager(*args), oracle(*args))


@every_backend(OP)
@pytest.mark.parametrize("skips", [0, 1])
def test_no_images(skips, backend):
    with forced(OP, backend):
        y = local_decoder_up(*arguments(torch.float32, (0, skips, 4, 6, 3, 5, 2, 4)))
    assert y.shape == (0, 8, 12, 4)


@every_backend(OP)
def test_image_b_reads_skip_b_modulo_s(backend):
    x, skip, *rest = arguments(torch.float32, (4, 2, 2, 3, 8, 6, 5, 4))
    with forced(OP, backend):
        y = local_decoder_up(x, skip, *rest)
        for b in range(4):
            alone = local_decoder_up(x[b : b + 1], skip[b % 2 : b % 2 + 1], *rest)
            torch.testing.assert_close(y[b : b + 1], alone, rtol=1e-5, atol=1e-5)


@every_backend(OP)
def test_strided(backend):
    """Views: channels first, and part of a wider tensor."""
    x, skip, *rest = arguments(torch.float32, (2, 2, 2, 3, 8, 6, 5, 4))
    with forced(OP, backend):
        want = local_decoder_up(x, skip, *rest)
        first = [t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for t in (x, skip)]
        wide = [torch.cat((t, t + 1), -1)[..., : t.shape[-1]] for t in (x, skip)]
        for views in (first, wide):
            y = local_decoder_up(*views, *rest)
            assert y.is_contiguous()
            torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


@every_backend(OP)
@each_dtype
def test_not_finite(dtype, backend):
    """A NaN of the skip reaches nine pixels; one of x four doubled ones and two around them."""
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("too slow in the interpreter; smaller tiles are below")
    args = arguments(dtype, (1, 1, 4, 4, 3, 4, 2, 5))
    with forced(OP, backend):
        for which, rows in ((1, slice(4, 7)), (0, slice(2, 8))):
            bad = [a.clone() for a in args]
            bad[which][0, 5 if which else 2, 5 if which else 2, 1] = torch.nan
            y = local_decoder_up(*bad)
            where = torch.zeros(8, 8, dtype=torch.bool)
            where[rows, rows] = True
            assert torch.equal(y[0].isnan(), where[:, :, None].expand(-1, -1, 5))


def phases(weight):
    """(2, 2, Cu, Ci, 2, 2): taps for even and odd rows, then columns, summed where they meet the
    same value of x: rows i-1 and i of x for row 2i of the result, i and i+1 for row 2i+1."""

    def halves(taps, axis):
        first, middle, last = taps.split(1, axis)
        return torch.cat((first, middle + last), axis), torch.cat((first + middle, last), axis)

    rows = [torch.stack(halves(row, 3)) for row in halves(weight, 2)]
    return torch.stack(rows)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_four_phases_are_the_first_convolution(shape):
    """What a kernel may compute instead, in fp64: zero padding maps exactly at every border."""
    x, _, weight, bias, *_ = (t.double() for t in arguments(torch.float32, shape))
    b, h, w, _ = x.shape
    padded = torch.nn.functional.pad(x.permute(0, 3, 1, 2), (1, 1, 1, 1))
    raised = torch.empty(b, weight.shape[0], 2 * h, 2 * w, dtype=torch.float64)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        window = padded[:, :, row : row + h + 1, column : column + w + 1]
        raised[:, :, row::2, column::2] = conv2d(window, phases(weight)[row, column], bias)
    want = convolved(f64(x).repeat(2, axis=1).repeat(2, axis=2), f64(weight)) + f64(bias)
    assert np.abs(f64(raised.permute(0, 2, 3, 1)) - want).max() < 1e-12 * max(1, np.abs(want).max())


def test_runs_everywhere():
    args = arguments(torch.bfloat16, (2, 1, 2, 3, 3, 4, 2, 5))
    check_registered(OP, local_decoder_up, *args)
    check_compiles(OP, local_decoder_up, args, arguments(torch.bfloat16, (2, 2, 4, 5, 3, 4, 2, 5)))
    check_meta(local_decoder_up, *args)
    check_repeatable(local_decoder_up, *args)


def test_gradients():
    check_gradients(local_decoder_up, *arguments(torch.float32, (2, 1, 2, 2, 2, 2, 1, 2)))


X, S = torch.ones(2, 2, 3, 4), torch.ones(2, 4, 6, 5)
U, V = torch.ones(6, 4, 3, 3), torch.ones(6)
W, B = torch.ones(7, 11, 3, 3), torch.ones(7)


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({0: X[0]}, ValueError, r"x must be \(B, H/2, W/2, Ci\), 4 axes, got \(2, 3, 4\)"),
        ({0: X[:, :0], 1: S[:, :0]}, ValueError, r"x must have rows and columns, got \(2, 0, 3"),
        ({1: S[:, :3]}, ValueError, r"skip must be \(S, H, W, Cs\) = \(2, 4, 6, 5\), got \(2, 3"),
        ({0: X[:1]}, ValueError, "skip must have S images, S a divisor of B = 1, got 2"),
        ({1: S[:0]}, ValueError, "skip must have S images, S a divisor of B = 2, got 0"),
        ({2: U[:, :3]}, ValueError, r"up_weight must be .* = \(6, 4, 3, 3\), got \(6, 3, 3, 3\)"),
        ({3: V[:5]}, ValueError, r"up_bias must be \(Cu,\) = \(6,\), got \(5,\)"),
        ({4: W[:, :10]}, ValueError, r"weight must be .* = \(7, 11, 3, 3\), got \(7, 10, 3, 3\)"),
        ({5: B[:5]}, ValueError, r"bias must be \(Co,\) = \(7,\), got \(5,\)"),
        ({1: S.half()}, TypeError, "skip must have the dtype of x, torch.float32, got"),
        ({5: B.long()}, TypeError, "bias must be float32, .* got torch.int64"),
        ({4: W.to("meta")}, ValueError, "weight must be on cpu, got meta"),
    ],
)
def test_errors(changed, error, text):
    args = [changed.get(i, t) for i, t in enumerate((X, S, U, V, W, B))]
    with pytest.raises(error, match=f"^local_decoder_up: {text}"):
        local_decoder_up(*args)


# --- the CPU kernel -------------------------------------------------------------------------------

# Strips are 118 pixels wide: one, with and without a rest, and several; odd numbers of channels.
CPU_SHAPES = {
    "least": (1, 1, 1, 1, 1, 1, 1, 1),
    "4k-outermost": (1, 1, 2, 60, 16, 16, 16, 16),
    "8k-outermost": (2, 1, 3, 59, 16, 16, 3, 16),
    "three-strips": (1, 1, 2, 121, 3, 5, 1, 19),
    "skips": (6, 2, 3, 5, 19, 7, 16, 5),
    "wide": (1, 1, 2, 3, 64, 130, 64, 67),
}


@each_isa
@pytest.mark.parametrize("std", [1.0, 1e-3])
@pytest.mark.parametrize("shape", CPU_SHAPES.values(), ids=CPU_SHAPES)
@each_dtype
def test_cpu_every_instruction_set(dtype, shape, std, isa):
    launch, _ = launcher(OP, f"cpu-{isa}")
    args = arguments(dtype, shape, std)
    assert_within_twice_eager_or_spacing(launch(*args), eager(*args), oracle(*args))


@each_isa
@each_dtype
@pytest.mark.parametrize("images", [(5, 1), (6, 3), (4, 4)], ids=str)
def test_cpu_an_image_alone_has_the_same_bits(images, dtype, isa):
    """Whichever others share its skip, and how many of them are worked on together."""
    launch, _ = launcher(OP, f"cpu-{isa}")
    (b, s), channels = images, (33, 18, 48, 19)
    x, skip, *rest = arguments(dtype, (b, s, 3, 5, *channels))
    y = launch(x, skip, *rest)
    for i in range(b):
        alone = launch(x[i : i + 1], skip[i % s : i % s + 1], *rest)
        assert_bitwise(y[i : i + 1], alone)


def views(t):
    """The same (B, H, W, C) values at other strides."""
    yield t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    yield t.transpose(1, 2).contiguous().transpose(1, 2)
    yield t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    yield at_odd_stride(t)
    yield torch.stack((t, t + 1), -1)[..., 0]


@each_isa
@each_dtype
def test_cpu_strides(dtype, isa):
    """Read as they lie: the bits of plain copies."""
    launch, _ = launcher(OP, f"cpu-{isa}")
    x, skip, *rest = arguments(dtype, (2, 2, 3, 65, 16, 4, 3, 5))
    want = launch(x, skip, *rest)
    for a, b in zip(views(x), views(skip), strict=True):
        assert_bitwise(launch(a, b, *rest), want)
    one, picture = x[:1], skip[:1]  # both images of a batch that only repeats them
    repeated = launch(one.expand(2, -1, -1, -1), picture.expand(2, -1, -1, -1), *rest)
    assert_bitwise(repeated, launch(one, picture, *rest).repeat(2, 1, 1, 1))


@each_isa
@each_dtype
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_cpu_not_finite(bad, dtype, isa):
    """Not finite where the reference is not, at a border of strips, at a corner, in between. Where
    a sum of taps meets an infinity, its parts may have made a NaN of it in the reference."""
    launch, _ = launcher(OP, f"cpu-{isa}")
    for row, column in ((0, 0), (2, 58), (3, 59), (4, 60), (1, 30)):
        for which in (0, 1):
            args = [a.clone() for a in arguments(dtype, (1, 1, 5, 61, 3, 4, 2, 5))]
            args[which][0, row, column * (1 + which), 1] = bad
            with pixeldiff.backend("reference"):
                want = local_decoder_up(*(a.float() for a in args))
            y = launch(*args)
            assert not want.isfinite().all()
            assert torch.equal(y.isfinite(), want.isfinite())
            if bad != bad or which:
                assert torch.equal(y.isnan(), want.isnan())


@each_isa
def test_cpu_threads_do_not_change_the_result(isa):
    for dtype in (torch.float32, torch.bfloat16):
        check_threads(OP, isa, *arguments(dtype, (3, 1, 9, 121, 5, 6, 3, 19)))


@each_isa
@each_dtype
def test_cpu_writes_nothing_outside(dtype, isa):
    launch, _ = launcher(OP, f"cpu-{isa}")
    args = arguments(dtype, (2, 1, 3, 7, 5, 3, 2, 19))
    before = [t.clone() for t in args]
    with guarded_outputs():
        y = launch(*args)
    assert_within_twice_eager_or_spacing(y, eager(*args), oracle(*args))
    for tensor, old in zip(args, before, strict=True):
        assert_bitwise(tensor, old)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_cpu_random_shapes(data):
    draw, channels = data.draw, st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 48, 65]))
    s, size = draw(st.integers(1, 2)), st.integers(1, 5)
    shape = (
        *(s * draw(st.integers(1, 3)), s),
        *(draw(size), draw(st.one_of(size, st.integers(58, 61)))),
        *draw(st.tuples(channels, channels, channels, channels)),
    )
    args = arguments(draw(st.sampled_from(DTYPES)), shape, draw(st.sampled_from([1.0, 1e-3, 30.0])))
    launch, _ = launcher(OP, f"cpu-{draw(st.sampled_from(usable_isas()))}")
    assert_within_twice_eager_or_spacing(launch(*args), eager(*args), oracle(*args))


@needs_extension
def test_free_choice_runs_the_cpu_kernel():
    args = arguments(torch.bfloat16, SHAPES["shared-skip"])
    with forced(OP, "cpu"):
        want = local_decoder_up(*args)
    assert_bitwise(local_decoder_up(*args), want)
    assert_bitwise(import_module(f"pixeldiff.ops.cpu.{OP}").launch(*args), want)


@needs_extension
def test_refusals_of_the_cpu_kernel():
    why_not = import_module(f"pixeldiff.ops.cpu.{OP}").why_not
    x, skip, *weights = arguments(torch.float32, SHAPES["shared-skip"])
    assert why_not(x, skip, *weights) is None
    assert why_not(x.double(), skip, *weights).startswith("takes float32, bfloat16 and float16")
    wide = arguments(torch.float32, SHAPES["10k-deepest"])
    assert why_not(*wide).startswith(
        "takes up to 524288 weights (16*Ci*Cu + 9*(Cu + Cs)*Co), here 2"
    )
    assert why_not(*arguments(torch.float32, (1, 1, 1, 1, 128, 128, 128, 64))) is None
    assert why_not(x, skip[..., :0], *weights) == "needs at least one channel everywhere"


# --- Triton: in the interpreter and on a GPU ------------------------------------------------------

each_triton = pytest.mark.parametrize("backend", TRITON)
SQUARES = (True, 4, 8, 0, 0, 4, 1)  # 2 x 4 of them
PIXELS = (False, 4, 8, 16, 16, 4, 1)
bf16, fp32 = torch.bfloat16, torch.float32
# Config, (B, S, h, w, Ci, Cu, Cs, Co), dtype and std. Squares: every kind of them, and images of
# one row, one column or two. Pixels: one tile more than full, two blocks of channels.
TRITON_CASES = {
    "squares-of-every-kind": (SQUARES, (1, 1, 3, 5, 5, 6, 7, 4), bf16, 1.0),
    "squares-in-two-rows": (SQUARES, (2, 1, 2, 1, 4, 5, 6, 7), fp32, 1e-3),
    "packed-in-two-columns": (SQUARES, (1, 1, 1, 2, 5, 3, 3, 4), bf16, 1e-3),
    "packed-in-one-column": (SQUARES, (1, 1, 3, 1, 3, 4, 1, 3), fp32, 1.0),
    "pixels": (PIXELS, (1, 1, 5, 9, 5, 6, 20, 4), bf16, 1.0),
    "pixels-of-many-channels": (PIXELS, (1, 1, 1, 2, 20, 18, 3, 20), fp32, 1.0),
    "pixels-fp32": (PIXELS, (2, 1, 2, 2, 3, 4, 5, 6), fp32, 1e-3),
    "pixels-bf16": (PIXELS, (1, 1, 2, 2, 3, 4, 5, 6), bf16, 1e-3),
    "pixels-fp16": (PIXELS, (1, 1, 1, 1, 3, 4, 5, 6), torch.float16, 1.0),
}


def on_triton(backend, args, config=None):
    launch, device = launcher(OP, backend)
    module = pytest.importorskip("pixeldiff.triton_kernels.convolution")
    return launch(*on(device, args), config=config and module.Config(*config)).cpu()


@each_triton
@pytest.mark.parametrize(
    ("config", "shape", "dtype", "std"), TRITON_CASES.values(), ids=TRITON_CASES
)
def test_on_triton(config, shape, dtype, std, backend):
    args = arguments(dtype, shape, std)
    with guarded_outputs():
        y = on_triton(backend, args, config)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_within_twice_eager_or_spacing(y, eager(*args), oracle(*args))


@each_triton
@pytest.mark.parametrize("config", [SQUARES, PIXELS])
def test_shared_skips_on_triton(config, backend):
    args = arguments(torch.bfloat16, (4, 2, 1, 1, 5, 6, 4, 3))
    y = on_triton(backend, args, config)
    assert_within_twice_eager_or_spacing(y, eager(*args), oracle(*args))


@each_triton
@pytest.mark.parametrize("config", [SQUARES, PIXELS])
def test_any_strides_on_triton(config, backend):
    """Channels first, part of a wider tensor, every second row."""
    x, skip, *rest = arguments(torch.bfloat16, (2, 2, 1, 2, 5, 6, 4, 3))
    want = on_triton(backend, (x, skip, *rest), config)
    first = [t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for t in (x, skip)]
    wide = [torch.cat((t, t + 1), -1).repeat_interleave(2, 1)[:, ::2] for t in (x, skip)]
    for views in (first, [t[..., : t.shape[-1] // 2] for t in wide]):
        assert_bitwise(on_triton(backend, (*views, *rest), config), want)


@each_triton
@pytest.mark.parametrize(
    ("config", "beside"), [(SQUARES, 2), (SQUARES, 4), (PIXELS, 4)], ids=["packed", "", "pixels"]
)
def test_not_finite_on_triton(config, beside, backend):
    """An infinity of x becomes one of u's, of either sign, so that the result may be NaN or not."""
    for which, places in ((0, {(0, 0): torch.inf}), (1, {(3, 1): torch.nan, (0, 5): torch.inf})):
        args = arguments(torch.bfloat16, (1, 1, 2, 3, 3, 4, beside, 5))
        for (row, column), value in places.items():
            args[which][0, row, column, 1] = value
        y, want = on_triton(backend, args, config), eager(*(a.float() for a in args))
        assert torch.equal(y.isfinite(), want.isfinite())
        assert not want.isfinite().all()
        assert want.isfinite().any()
        if which:
            assert torch.equal(y.isnan(), want.isnan())


@each_triton
def test_refusals_of_triton(backend):
    launcher(OP, backend)
    why_not = pytest.importorskip("pixeldiff.triton_kernels.local_decoder_up").why_not
    args = arguments(torch.float32, (1, 1, 1, 1, 3, 4, 2, 5))
    assert why_not(*args) is None
    assert why_not(*(a.double() for a in args)) == (
        "takes float32, bfloat16, float16, got torch.float64"
    )


# Ci, Cu, Cs, Co
LEVELS = [
    (16, 16, 16, 16),
    (16, 16, 3, 16),
    (32, 32, 32, 16),
    (64, 64, 64, 32),
    (512, 256, 256, 128),
]


@pytest.mark.gpu
@pytest.mark.parametrize("channels", LEVELS)
@pytest.mark.parametrize("size", [(128, 160), (33, 17)])
def test_released_widths_on_triton_gpu(size, channels):
    args = arguments(torch.bfloat16, (2, 1, *size, *channels))
    y = on_triton("triton-gpu", args)
    assert_within_twice_eager(y, eager(*args), oracle(*args))


@pytest.mark.gpu
def test_every_candidate_on_triton_gpu():
    launch, device = launcher(OP, "triton-gpu")
    module = pytest.importorskip("pixeldiff.triton_kernels.local_decoder_up")
    for channels in LEVELS:
        args = arguments(torch.bfloat16, (1, 1, 32, 32, *channels))
        for config in module.candidates(*args):
            y = launch(*on(device, args), config=config).cpu()
            assert_within_twice_eager(y, eager(*args), oracle(*args))


@pytest.mark.gpu
def test_captured_on_triton_gpu():
    launch, device = launcher(OP, "triton-gpu")
    for channels in LEVELS:
        check_captures(launch, *on(device, arguments(torch.bfloat16, (2, 1, 32, 48, *channels))))


# --- Triton without a GPU -------------------------------------------------------------------------


def test_triton_in_interpreter():
    harness.run_in_interpreter(__file__)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("level", [0, 1, 2, 4])
def test_triton_compiles_ahead_of_time(level, target):
    """At 4096 x 4096 in bf16."""
    module = pytest.importorskip("pixeldiff.triton_kernels.local_decoder_up")
    args = aot.released(OP, system="l2p", patch=64, level=level)
    for kernel in aot.compile_launch(lambda: module.launch(*args), target):
        aot.assert_lean(kernel, tensor_cores=kernel.name != "sum_taps_kernel")
        if kernel.name == "up_squares_kernel":
            assert "ld.global.v4.b32" in kernel.ptx
            assert "st.global.v4.b32" in kernel.ptx
        if kernel.name in ("raise_kernel", "join_kernel"):
            assert kernel.ptx.count("cp.async.cg.shared.global") >= 2  # 16 bytes each


@pytest.mark.parametrize("target", aot.TARGETS)
def test_triton_compiles_three_channels_of_skip(target):
    """The outermost level at 8192 x 8192."""
    module = pytest.importorskip("pixeldiff.triton_kernels.local_decoder_up")
    args = arguments_of(OP, "meta", bf16, SYSTEMS["l2p"].at(8192))
    assert args[1].shape == (1, 8192, 8192, 3)
    for kernel in aot.compile_launch(lambda: module.launch(*args), target):
        aot.assert_lean(kernel, tensor_cores=kernel.name != "sum_taps_kernel")


@pytest.mark.parametrize("target", [100, 120])
def test_triton_compiles_every_candidate(target):
    """Where not all forms of a tile compile, and where the least shared memory is."""
    aot.check_candidates(OP, *aot.released(OP, system="l2p", patch=64), target=target)


def test_triton_compiles_for_fp32():
    module = pytest.importorskip("pixeldiff.triton_kernels.local_decoder_up")
    args = aot.released(OP, torch.float32, system="l2p", patch=64)
    for kernel in aot.compile_launch(lambda: module.launch(*args), 90):
        aot.assert_lean(kernel)
        assert not kernel.tensor_cores  # TF32 would be


@pytest.mark.parametrize(("level", "launches"), [(0, 2), (4, 3)])
def test_triton_compiles_once_for_all_sizes(level, launches):
    calls = [
        aot.released(OP, system="l2p", patch=64, level=level, grid=grid)
        for grid in ((64, 64), (64, 32), (3, 5), (1, 1))
    ]
    aot.check_compiles_once(OP, calls, launches=launches, compilations=launches)
