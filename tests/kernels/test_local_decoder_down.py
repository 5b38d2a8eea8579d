"""local_decoder_down against fp64: a 3x3 convolution written tap by tap, SiLU, 2x2 maximum."""

import re
from dataclasses import replace
from importlib import import_module

import aot
import harness
import pytest
import torch
from harness import (
    NAMES,
    TRITON,
    check_not_finite_like,
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
from torch.nn.functional import conv2d, max_pool2d, silu

import pixeldiff
from bench.shapes import SYSTEMS
from pixeldiff import native
from pixeldiff.ops import local_decoder_down
from pixeldiff.ops.examples import arguments as arguments_of

OP = "local_decoder_down"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (B, H, W, Ci, Co): the outermost levels of the four forms, inner ones, odd channels.
SHAPES = {
    "image-to-64": (1, 16, 24, 3, 64),
    "image-to-16": (2, 12, 20, 3, 16),
    "image-to-3": (1, 10, 14, 3, 3),
    "inner": (1, 6, 8, 128, 256),
    "primes": (3, 14, 22, 5, 7),
    "one": (1, 2, 2, 1, 1),
}
ODD = (SHAPES["primes"], SHAPES["one"])
CHANNELS = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 48, 64, 65]))
needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)


def arguments(dtype, shape, std=1.0):
    draw, (b, height, width, before, after) = Draw(dtype), shape
    weight = draw(after, before, 3, 3, std=(9 * before) ** -0.5)
    return draw(b, height, width, before, std=std), weight, draw(after, std=0.3 * std)


def oracle(x, weight, bias):
    y = convolved(f64(x), f64(weight)) + f64(bias)
    skip = y * sigmoid(y)
    b, height, width, channels = skip.shape
    return skip, skip.reshape(b, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def eager(x, weight, bias):
    skip = silu(conv2d(x.permute(0, 3, 1, 2).to(weight.dtype), weight, bias, padding=1))
    return skip.permute(0, 2, 3, 1), max_pool2d(skip, 2).permute(0, 2, 3, 1)


def check(got, args, rule=assert_within_twice_eager):
    for y, baseline, want in zip(got, eager(*args), oracle(*args), strict=True):
        assert y.is_contiguous()
        assert y.dtype == args[1].dtype
        rule(y, baseline, want)


@every_backend(OP)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, backend):
    if backend == "triton":
        pytest.skip("too slow in the interpreter; its smaller shapes are below")
    args = arguments(dtype, shape, std)
    with forced(OP, backend):
        got = local_decoder_down(*args)
    check(
        got,
        args,
        assert_within_twice_eager_or_spacing if shape in ODD else assert_within_twice_eager,
    )


@every_backend(OP)
def test_no_images(backend):
    with forced(OP, backend):
        skip, pooled = local_decoder_down(*arguments(torch.float32, (0, 4, 6, 3, 5)))
    assert skip.shape == (0, 4, 6, 5)
    assert pooled.shape == (0, 2, 3, 5)


@every_backend(OP)
def test_pooled_is_the_maximum_of_the_skip_as_stored(backend):
    args = arguments(torch.bfloat16, (2, 12, 20, 3, 16))
    with forced(OP, backend):
        skip, pooled = local_decoder_down(*args)
    assert_bitwise(pooled, skip.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).amax((2, 4)))


@every_backend(OP)
def test_negative_results_pool_too(backend):
    """SiLU is not monotonic: the maximum is of its results, whose least is -0.278."""
    x, weight, _ = arguments(torch.float32, (1, 4, 6, 3, 5))
    bias = torch.full((5,), -20.0)
    with forced(OP, backend):
        skip, pooled = local_decoder_down(x, weight, bias)
    assert (skip < 0).all()
    check((skip, pooled), (x, weight, bias))


@every_backend(OP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_fp32_image_channels_first(dtype, backend):
    """As the network gives it: a view of (B, 3, H, W), in another type than the weights."""
    _, weight, bias = arguments(dtype, (1, 1, 1, 3, 16))
    image = Draw()(2, 3, 6, 10)
    with forced(OP, backend):
        got = local_decoder_down(image.permute(0, 2, 3, 1), weight, bias)
        want = local_decoder_down(image.permute(0, 2, 3, 1).contiguous().to(dtype), weight, bias)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 4 * torch.finfo(dtype).eps * b.abs().max()
    check(got, (image.to(dtype).permute(0, 2, 3, 1), weight, bias))


@every_backend(OP)
@each_dtype
def test_not_finite(dtype, backend):
    """A NaN reaches the nine pixels around it in every channel, and their squares."""
    x, weight, bias = arguments(dtype, (1, 8, 8, 3, 5))
    x[0, 3, 4, 1] = torch.nan
    with forced(OP, backend):
        skip, pooled = local_decoder_down(x, weight, bias)
    where = torch.zeros(8, 8, dtype=torch.bool)
    where[2:5, 3:6] = True
    assert torch.equal(skip[0].isnan(), where[:, :, None].expand(-1, -1, 5))
    where = where.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).any(3).any(1)
    assert torch.equal(pooled[0].isnan(), where[:, :, None].expand(-1, -1, 5))


def test_runs_everywhere():
    args = arguments(torch.bfloat16, (2, 4, 6, 3, 5))
    check_registered(OP, local_decoder_down, *args)
    first, second = (lambda *a: local_decoder_down(*a)[0]), (lambda *a: local_decoder_down(*a)[1])
    for one in (first, second):
        check_meta(one, *args)
        check_repeatable(one, *args)
    compiled = torch.compile(local_decoder_down, fullgraph=True, backend="aot_eager")
    for size in ((4, 6), (8, 10)):
        args = arguments(torch.float32, (2, *size, 3, 5))
        for a, b in zip(compiled(*args), local_decoder_down(*args), strict=True):
            assert_bitwise(a, b)


def test_gradients():
    check_gradients(local_decoder_down, *arguments(torch.float32, (1, 4, 4, 2, 3)))


X, W, B = torch.ones(2, 4, 6, 3), torch.ones(5, 3, 3, 3), torch.ones(5)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((X[0], W, B), ValueError, r"x must be \(B, H, W, Ci\), 4 axes, got \(4, 6, 3\)"),
        ((X[:, :3], W, B), ValueError, "H and W of x must be positive and even, got 3x6"),
        ((X[:, :, :0], W, B), ValueError, "H and W of x must be positive and even, got 4x0"),
        ((X[..., :2], W, B), ValueError, r"weight must be \(Co, Ci, 3, 3\) = \(5, 2, 3, 3\), got"),
        ((X, W[..., :1], B), ValueError, r"weight must be .* got \(5, 3, 3, 1\)"),
        ((X, W, B[:4]), ValueError, r"bias must be \(Co,\) = \(5,\), got \(4,\)"),
        ((X, W, B.half()), TypeError, "bias must have the dtype of weight, torch.float32, got"),
        ((X.long(), W, B), TypeError, "x must be float32, .* got torch.int64"),
        ((X, W.to("meta"), B), ValueError, "weight must be on cpu, got meta"),
    ],
)
def test_errors(args, error, text):
    with pytest.raises(error, match=f"^local_decoder_down: {text}"):
        local_decoder_down(*args)


# --- the CPU kernel -------------------------------------------------------------------------------

# Strips are 120 pixels wide: one, with and without a rest, and several; every number of channels.
CPU_SHAPES = {
    "least": (1, 2, 2, 1, 1),
    "image-to-16": (2, 4, 122, 3, 16),
    "image-to-64": (1, 6, 10, 3, 64),
    "three-strips": (1, 4, 250, 5, 19),
    "one-strip": (1, 2, 120, 16, 32),
    "channels-first": (1, 8, 26, 64, 5),
    "wide": (1, 4, 6, 130, 67),
    "long-sums": SHAPES["inner"],
}


@each_isa
@pytest.mark.parametrize("std", [1.0, 1e-3])
@pytest.mark.parametrize("shape", CPU_SHAPES.values(), ids=CPU_SHAPES)
@each_dtype
def test_cpu_every_instruction_set(dtype, shape, std, isa):
    launch, _ = launcher(OP, f"cpu-{isa}")
    args = arguments(dtype, shape, std)
    got = launch(*args)
    odd = shape != SHAPES["inner"]
    check(got, args, assert_within_twice_eager_or_spacing if odd else assert_within_twice_eager)
    skip, pooled = got
    assert_bitwise(pooled, skip.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).amax((2, 4)))


def views(t):
    """The same (B, H, W, C) values at other strides."""
    yield t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    yield t.transpose(1, 2).contiguous().transpose(1, 2)
    yield t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    yield at_odd_stride(t)
    yield torch.stack((t, t + 1), -1)[..., 0]


@each_isa
@each_dtype
@pytest.mark.parametrize("of", DTYPES, ids=NAMES.get)
def test_cpu_strides_and_types_of_the_image(of, dtype, isa):
    """Read as it lies and rounded to the weight's type first: the bits of a plain copy."""
    launch, _ = launcher(OP, f"cpu-{isa}")
    for channels in (3, 16):
        x, _, _ = arguments(of, (2, 6, 130, channels, 1))
        _, weight, bias = arguments(dtype, (1, 1, 1, channels, 16))
        want = launch(x.to(dtype), weight, bias)
        for view in (x, *views(x)):
            for a, b in zip(launch(view, weight, bias), want, strict=True):
                assert_bitwise(a, b)


@each_isa
@each_dtype
def test_cpu_not_finite(dtype, isa):
    """As the reference, the maximum included, at every place of a square and beside a border.

    The reference in fp32: PyTorch's bf16 convolution lets a NaN near the end of a row reach one
    column too far.
    """
    launch, _ = launcher(OP, f"cpu-{isa}")
    for seed, (row, column) in enumerate(((0, 0), (3, 4), (2, 5), (7, 121), (6, 120))):
        x, weight, bias = arguments(dtype, (1, 8, 122, 3, 19))
        x[0, row, column, seed % 3] = torch.nan
        x[0, 5, 60 + seed, 1] = torch.inf if seed % 2 else -torch.inf
        got = launch(x, weight, bias)
        with pixeldiff.backend("reference"):
            want = local_decoder_down(x.float(), weight.float(), bias.float())
        for a, b in zip(got, want, strict=True):
            check_not_finite_like(a, b.to(dtype))


@each_isa
def test_cpu_threads_do_not_change_the_result(isa):
    check_threads(OP, isa, *arguments(torch.bfloat16, (2, 22, 250, 5, 19)))
    check_threads(OP, isa, *arguments(torch.float32, (2, 22, 250, 5, 19)))


@each_isa
@each_dtype
def test_cpu_writes_nothing_outside(dtype, isa):
    launch, _ = launcher(OP, f"cpu-{isa}")
    args = arguments(dtype, (1, 4, 14, 5, 19))
    before = [t.clone() for t in args]
    with guarded_outputs():
        got = launch(*args)
    check(got, args, assert_within_twice_eager_or_spacing)
    for tensor, old in zip(args, before, strict=True):
        assert_bitwise(tensor, old)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_cpu_random_shapes(data):
    draw = data.draw
    size = st.integers(1, 5).map(lambda n: 2 * n)
    width = st.one_of(size, st.sampled_from([118, 120, 122]))
    shape = (draw(st.integers(1, 2)), draw(size), draw(width), *draw(st.tuples(CHANNELS, CHANNELS)))
    args = arguments(draw(st.sampled_from(DTYPES)), shape, draw(st.sampled_from([1.0, 1e-3, 30.0])))
    launch, _ = launcher(OP, f"cpu-{draw(st.sampled_from(usable_isas()))}")
    check(launch(*args), args, assert_within_twice_eager_or_spacing)


@needs_extension
def test_free_choice_runs_the_cpu_kernel():
    args = arguments(torch.bfloat16, (1, 6, 10, 3, 16))
    with forced(OP, "cpu"):
        want = local_decoder_down(*args)
    launch = import_module(f"pixeldiff.ops.cpu.{OP}").launch
    for a, b, c in zip(local_decoder_down(*args), want, launch(*args), strict=True):
        assert_bitwise(a, b)
        assert_bitwise(a, c)


@needs_extension
def test_refusals_of_the_cpu_kernel(monkeypatch):
    why_not = import_module(f"pixeldiff.ops.cpu.{OP}").why_not
    x, weight, bias = arguments(torch.float32, (1, 4, 6, 3, 5))
    assert why_not(x, weight, bias) is None
    assert why_not(x.double(), weight, bias).startswith("takes float32, bfloat16 and float16, got")
    assert why_not(x[..., :0], weight[:, :0], bias) == "needs at least one channel everywhere"
    wide = arguments(torch.float32, (1, 2, 2, 128, 128))
    assert why_not(*wide).startswith("leaves 128 channels and more on both sides, here 128 to 128")
    assert why_not(*arguments(torch.float32, (1, 2, 2, 64, 128))) is None
    monkeypatch.setattr(native, "best_isa", lambda: native.ISA_CODES["portable"])
    assert why_not(x, weight, bias).startswith("needs AVX2")


# --- Triton: in the interpreter and on a GPU ------------------------------------------------------

each_triton = pytest.mark.parametrize("backend", TRITON)
SQUARES = (True, 8, 16, 0, 0, 4, 1)  # 4 x 8 of them
THIN = (True, 2, 16, 0, 0, 4, 1)  # a row of 8, of few channels
PIXELS = (False, 8, 8, 16, 16, 4, 1)  # 4 x 4 of them: two eights, in the order of a pool
# Config and (B, H, W, Ci, Co): one tile more than full along each axis, or two blocks of channels.
TRITON_CASES = {
    "packed": (SQUARES, (1, 6, 18, 3, 5)),
    "squares": (SQUARES, (2, 10, 4, 5, 7)),
    "pixels": (PIXELS, (1, 10, 6, 20, 20)),
    "pixels-of-two-images": (PIXELS, (2, 4, 2, 3, 3)),
    "thin": (THIN, (2, 6, 18, 3, 3)),
    "thin-to-four": (THIN, (1, 4, 10, 2, 4)),
    "thin-to-one": (THIN, (1, 2, 2, 1, 1)),
}


def on_triton(backend, args, config=None):
    launch, device = launcher(OP, backend)
    module = pytest.importorskip("pixeldiff.triton_kernels.convolution")
    got = launch(*on(device, args), config=config and module.Config(*config))
    return tuple(y.cpu() for y in got)


@each_triton
@pytest.mark.parametrize(("config", "shape"), TRITON_CASES.values(), ids=TRITON_CASES)
@precisions
def test_on_triton(dtype, std, config, shape, backend):
    args = arguments(dtype, shape, std)
    with guarded_outputs():
        got = on_triton(backend, args, config)
    check(got, args, assert_within_twice_eager_or_spacing)


@each_triton
def test_fp16_on_triton(backend):
    args = arguments(torch.float16, (1, 2, 4, 3, 16))
    check(on_triton(backend, args), args, assert_within_twice_eager_or_spacing)


@each_triton
@pytest.mark.parametrize(("config", "channels"), [(SQUARES, 3), (SQUARES, 4), (PIXELS, 4)])
def test_any_strides_on_triton(config, channels, backend):
    """Channels first in another dtype, rows apart, every second column."""
    _, weight, bias = arguments(torch.bfloat16, (1, 1, 1, channels, 5))
    wide = Draw()(1, channels, 6, 20)
    x = wide.permute(0, 2, 3, 1)[:, :4, ::2]
    got = on_triton(backend, (x, weight, bias), config)
    rounded = x.to(torch.bfloat16).contiguous()
    check(got, (rounded, weight, bias), assert_within_twice_eager_or_spacing)


@each_triton
@pytest.mark.parametrize(("config", "channels"), [(SQUARES, 3), (SQUARES, 4), (PIXELS, 4)])
def test_not_finite_on_triton(config, channels, backend):
    """In the nine pixels around each and in their squares, and nowhere else."""
    x, weight, bias = arguments(torch.bfloat16, (1, 8, 16, channels, 5))
    x[0, 0, 0, 1], x[0, 5, 6, 2], x[0, 6, 12, 0] = torch.nan, torch.inf, -torch.inf
    got = on_triton(backend, (x, weight, bias), config)
    # In fp32, as PyTorch's own bf16 convolution on a CPU multiplies infinities by zeros of padding.
    for y, want in zip(got, eager(x.float(), weight.float(), bias.float()), strict=True):
        check_not_finite_like(y, want.bfloat16())


@each_triton
@pytest.mark.parametrize(("config", "channels"), [(SQUARES, 3), (SQUARES, 4), (PIXELS, 4)])
def test_not_finite_weights_on_triton(config, channels, backend):
    """What a product reads of the next channel's weights, it reads as zeros."""
    x, weight, bias = arguments(torch.bfloat16, (1, 2, 2, channels, 5))
    weight[2, 0, 0, 0] = torch.nan
    for y in on_triton(backend, (x, weight, bias), config):
        assert torch.equal(y.isnan().any(2).any(1)[0], torch.arange(5) == 2)


@each_triton
def test_channels_last_weights_on_triton(backend):
    x, weight, bias = arguments(torch.bfloat16, (1, 2, 4, 4, 5))
    want = on_triton(backend, (x, weight, bias))
    got = on_triton(backend, (x, weight.to(memory_format=torch.channels_last), bias))
    for y, expected in zip(got, want, strict=True):
        assert_bitwise(y, expected)


@each_triton
def test_refusals_of_triton(backend):
    launcher(OP, backend)
    why_not = pytest.importorskip("pixeldiff.triton_kernels.local_decoder_down").why_not
    args = arguments(torch.float32, (1, 2, 2, 3, 5))
    assert why_not(*args) is None
    assert why_not(args[0].double(), *args[1:]) == (
        "takes float32, bfloat16, float16, got torch.float64"
    )


LEVELS = [(3, 16), (3, 3), (16, 32), (32, 64), (64, 128), (256, 512), (3, 64)]


@pytest.mark.gpu
@pytest.mark.parametrize("channels", LEVELS)
@pytest.mark.parametrize("size", [(256, 320), (66, 34)])
def test_released_widths_on_triton_gpu(size, channels):
    args = arguments(torch.bfloat16, (2, *size, *channels))
    check(on_triton("triton-gpu", args), args)


@pytest.mark.gpu
def test_every_candidate_on_triton_gpu():
    module = pytest.importorskip("pixeldiff.triton_kernels.local_decoder_down")
    for channels in LEVELS:
        args = arguments(torch.bfloat16, (1, 64, 64, *channels))
        for config in module.candidates(*args):
            launch, device = launcher(OP, "triton-gpu")
            check(tuple(y.cpu() for y in launch(*on(device, args), config=config)), args)


@pytest.mark.gpu
def test_captured_on_triton_gpu():
    launch, device = launcher(OP, "triton-gpu")
    for channels in ((3, 16), (64, 128)):
        check_captures(launch, *on(device, arguments(torch.bfloat16, (1, 64, 96, *channels))))


# --- Triton without a GPU -------------------------------------------------------------------------


def test_triton_in_interpreter():
    harness.run_in_interpreter(__file__)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("level", [0, 1, 2, 4])
def test_triton_compiles_ahead_of_time(level, target):
    """At 4096 x 4096 in bf16."""
    module = pytest.importorskip("pixeldiff.triton_kernels.local_decoder_down")
    args = aot.released(OP, system="l2p", patch=64, level=level)
    (kernel,) = aot.compile_launch(lambda: module.launch(*args), target)
    aot.assert_lean(kernel, tensor_cores=True)
    # The interpreter's maximum of either kind keeps a NaN.
    maxima = re.findall(r"\bmax\.[\w.]*f(?:32|16|16x2)\b", kernel.ptx)
    assert maxima
    assert all(".NaN." in m for m in maxima), maxima
    assert "st.global.v4.b32" in kernel.ptx
    if level > 1:
        assert kernel.ptx.count("cp.async.cg.shared.global") >= 2  # 16 bytes each
    elif level:
        assert "ld.global.v4.b32" in kernel.ptx


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("target", aot.TARGETS)
def test_triton_compiles_three_channels(target, level):
    """At 8192 x 8192: the image to three channels, and those to sixteen."""
    module = pytest.importorskip("pixeldiff.triton_kernels.local_decoder_down")
    args = arguments_of(OP, "meta", torch.bfloat16, replace(SYSTEMS["l2p"].at(8192), level=level))
    assert (args[0].shape[3], args[1].shape[0]) == (3, 16 if level else 3)
    (kernel,) = aot.compile_launch(lambda: module.launch(*args), target)
    aot.assert_lean(kernel, tensor_cores=bool(level))
    # Three products of 9 values a pixel and channel, and no zeros beside them.
    if level == 0:
        assert len(re.findall(r"\bfma\.rn\.f32\b", kernel.ptx)) % (4 * 3 * 27) == 0
        assert not re.findall(r"\bst\.global[.\w]*\.b16\b", kernel.ptx.split("st.global.b32")[-1])


@pytest.mark.parametrize("target", [100, 120])
def test_triton_compiles_every_candidate(target):
    """Where not all forms of a tile compile, and where the least shared memory is."""
    aot.check_candidates(OP, *aot.released(OP, system="l2p", patch=64), target=target)


def test_triton_compiles_for_fp32():
    module = pytest.importorskip("pixeldiff.triton_kernels.local_decoder_down")
    args = aot.released(OP, torch.float32, system="l2p", patch=64)
    (kernel,) = aot.compile_launch(lambda: module.launch(*args), 90)
    aot.assert_lean(kernel)
    assert not kernel.tensor_cores  # TF32 would be


@pytest.mark.parametrize("level", [0, 2, 4])
def test_triton_compiles_once_for_all_sizes(level):
    calls = [
        aot.released(OP, system="l2p", patch=64, level=level, grid=grid)
        for grid in ((64, 64), (64, 32), (3, 5), (1, 1))
    ]
    aot.check_compiles_once(OP, calls)
