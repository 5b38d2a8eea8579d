"""pixel_head against fp64: norm, linear, and every pixel back to its place."""

from importlib import import_module

import aot
import harness
import numpy as np
import pytest
import torch
from harness import (
    NAMES,
    TRITON,
    check_not_finite_like,
    check_threads,
    demo_weights,
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
    assert_one_rounding,
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
    rms,
)
from test_pixel_embed import each_refused_pixel

import pixeldiff
from pixeldiff import native
from pixeldiff.ops import pixel_head
from pixeldiff.ops.examples import Geometry
from pixeldiff.ops.examples import arguments as arguments_of

reference = import_module("pixeldiff.ops.pixel_head").reference

# (B, C, H, W, p, P)
SHAPES = {
    "production": (1, 3, 64, 96, 16, 16),
    "primes": (2, 5, 21, 35, 4, 7),
    "one": (1, 1, 1, 1, 1, 1),
    "released-patch8": (1, 3, 16, 48, 8, 8),
    "p12-patch2": (3, 1, 4, 10, 12, 2),
    "p20-patch19": (1, 4, 19, 38, 20, 19),
    "one-p4": (1, 1, 1, 1, 4, 1),
    "empty": (0, 3, 8, 12, 4, 4),
}


def arguments(dtype, shape, std=1.0):
    draw, (b, c, height, width, p, patch) = Draw(dtype), shape
    rows = b * (height // patch) * (width // patch)
    q = draw(rows, patch * patch, p, std=std)
    return q, draw(p), draw(c, p), draw(c), height, width, patch


def call(q, norm_weight, weight, bias, height, width, patch):
    return pixel_head(q, norm_weight, weight, bias, size=(height, width), patch=patch)


def oracle(q, norm_weight, weight, bias, height, width, patch):
    q, norm_weight, weight, bias = f64(q, norm_weight, weight, bias)
    h, w = height // patch, width // patch
    y = rms(q) * norm_weight @ weight.T + bias
    out = np.empty((q.shape[0] // (h * w), weight.shape[0], height, width))
    for row in range(height):
        for col in range(width):
            token = (row // patch) * w + col // patch
            out[:, :, row, col] = y[token :: h * w, (row % patch) * patch + col % patch]
    return out


@every_backend("pixel_head")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, backend):
    """fp32 out of a bf16 stream too: nothing is rounded to bf16."""
    args = arguments(dtype, shape, std)
    with forced("pixel_head", backend):
        v = call(*args)
    assert v.dtype == torch.float32
    assert_one_rounding(v, oracle(*args))


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_instruction_set(dtype, shape, isa):
    launch, _ = launcher("pixel_head", f"cpu-{isa}")
    if shape[4] % 4:
        pytest.skip("the kernels take multiples of 4 channels")
    args = arguments(dtype, shape)
    assert_one_rounding(launch(*args, 1e-6), oracle(*args))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_shapes(data):
    draw = data.draw
    p, patch = 4 * draw(st.integers(1, 6)), draw(st.integers(1, 17))
    # At least 8 x 8: the rule measures a sum that cancels by the largest of its neighbours.
    h, w = (patch * (8 // patch + draw(st.integers(1, 4))) for _ in range(2))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 4)), h, w, p, patch)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    args = arguments(dtype, shape, draw(st.sampled_from([1.0, 1e-3, 1e3])))
    launch, _ = launcher("pixel_head", f"cpu-{draw(st.sampled_from(usable_isas()))}")
    assert_one_rounding(launch(*args, 1e-6), oracle(*args))


@each_isa
def test_threads_do_not_change_the_result(isa):
    check_threads("pixel_head", isa, *arguments(torch.bfloat16, (2, 3, 96, 96, 8, 16)), 1e-6)


KERNELS = [*(f"cpu-{isa}" for isa in native.ISA_CODES), *TRITON]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("std", [1e15, 1e-15])
def test_magnitudes(backend, std):
    """Squares stay in fp32's range; below the root of eps the norm is x / sqrt(eps)."""
    launch, device = launcher("pixel_head", backend)
    args = arguments(torch.float32, (1, 3, 16, 32, 8, 16), std)
    assert_one_rounding(launch(*on(device, args), 1e-6).cpu(), oracle(*args))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("large", [1e30, 3e38])
def test_not_finite(backend, large):
    """Of one pixel only; squares that overflow give the bias, as in the reference."""
    launch, device = launcher("pixel_head", backend)
    q, *rest = on(device, arguments(torch.float32, (1, 3, 16, 32, 8, 16)))
    q[0, 5, 1], q[1, 255, 7], q[1, 0] = torch.nan, torch.inf, large
    v = launch(q, *rest, 1e-6)
    check_not_finite_like(v, reference(q, *rest, 1e-6))
    assert v.isfinite().sum() == (16 * 32 - 2) * 3
    assert torch.equal(v[0, :, 0, 16], rest[2])


def test_strided_stream():
    q, *rest = arguments(torch.float32, (2, 3, 8, 12, 4, 4))
    y = call(at_odd_stride(q), *rest)
    assert y.is_contiguous()
    torch.testing.assert_close(y, call(q, *rest), rtol=1e-6, atol=1e-6)


def test_runs_everywhere():
    args = arguments(torch.bfloat16, (2, 3, 8, 12, 4, 4))
    check_registered("pixel_head", call, *args)
    check_compiles("pixel_head", call, args, arguments(torch.bfloat16, (1, 3, 16, 4, 4, 4)))
    check_meta(call, *args)
    check_repeatable(call, *args)


def test_gradients():
    q, norm_weight, weight, bias, *rest = arguments(torch.float32, (1, 2, 2, 4, 3, 2))
    check_gradients(lambda *t: call(*t, *rest), q, norm_weight, weight, bias)


def test_fp64_stays_fp64():
    q, norm_weight, weight, bias, *rest = arguments(torch.float64, (1, 2, 2, 4, 3, 2))
    y = call(q, norm_weight, weight, bias, *rest)
    assert y.dtype == torch.float64
    np.testing.assert_allclose(y.numpy(), oracle(q, norm_weight, weight, bias, *rest), rtol=1e-13)


def test_errors():
    q, norm_weight, weight, bias, *_ = arguments(torch.float32, (2, 3, 8, 12, 4, 4))

    def raises(message, q=q, norm_weight=norm_weight, weight=weight, bias=bias, size=(8, 12)):
        with pytest.raises(ValueError, match=f"^pixel_head: {message}$"):
            pixel_head(q, norm_weight, weight, bias, size=size, patch=4)

    raises(r"size must be positive multiples of patch = 4, got \(8, 10\)", size=(8, 10))
    raises(r"size must be positive multiples of patch = 4, got \(0, 12\)", size=(0, 12))
    raises(
        r"q must be \(B\*N, P\*P, p\) with N = 6 and P\*P = 16, got \(11, 16, 4\)",
        q=q[:11],
    )
    raises(
        r"q must be \(B\*N, P\*P, p\) with N = 6 and P\*P = 16, got \(12, 15, 4\)",
        q=q[:, :15],
    )
    raises(r"q must be \(B\*N, P\*P, p\), 3 axes, got \(16, 4\)", q=q[0])
    raises(r"norm_weight must be \(p,\) = \(4,\), got \(3,\)", norm_weight=norm_weight[:3])
    raises(r"weight must be \(C, p\) = \(3, 4\), got \(3, 3\)", weight=weight[:, :3])
    raises(r"bias must be \(C,\) = \(3,\), got \(2,\)", bias=bias[:2])
    with pytest.raises(TypeError, match=r"^pixel_head: q must be float32, .* got torch.int64$"):
        pixel_head(q.long(), norm_weight, weight, bias, size=(8, 12), patch=4)


# --- Triton ---------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ODD = (2, 3, 10, 35, 6, 5)  # p and P are no powers of two, 35 pixels no whole tile


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle_on_the_gpu(dtype, std, shape):
    launch, device = launcher("pixel_head", "triton-gpu")
    args = arguments(dtype, shape, std)
    assert_one_rounding(launch(*on(device, args), 1e-6).cpu(), oracle(*args))


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("vectors", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_any_stream(dtype, vectors, backend):
    """Every pair of dtypes; one of different dtypes is read where it lies."""
    launch, device = launcher("pixel_head", backend)
    q, *weights, height, width, patch = on(device, arguments(dtype, ODD))
    q = q if dtype == vectors else at_odd_stride(q)
    args = (q, *(t.to(vectors) for t in weights), height, width, patch)
    with guarded_outputs():
        v = launch(*args, 1e-6)
    assert v.dtype == torch.float32
    assert_one_rounding(v.cpu(), oracle(*on("cpu", args)))


@pytest.mark.parametrize("backend", TRITON)
def test_every_tile(backend):
    launch, device = launcher("pixel_head", backend)
    module = import_module("pixeldiff.triton_kernels.pixel_head")
    args = arguments(torch.bfloat16, (1, 3, 8, 48, 16, 8))
    for config in module.candidates(*args):
        v = launch(*on(device, args), 1e-6, config=config)
        assert_one_rounding(v.cpu(), oracle(*args))


@pytest.mark.parametrize("backend", TRITON)
def test_the_demo_network_on_both_backends(backend):
    """In fp32, at the size of its pixels: CPU kernel and Triton differ by the order of sums."""
    usable_isas()
    launch, device = launcher("pixel_head", backend)
    weights = demo_weights("norm.weight", "linear.weight", "linear.bias", of="final_layer")
    q, *_, height, width, patch = arguments(torch.float32, (1, 3, 32, 48, len(weights[0]), 16))
    args = (q, *weights, height, width, patch)
    with pixeldiff.backend("cpu"):
        want = call(*args)
    assert_one_rounding(launch(*on(device, args), 1e-6).cpu(), f64(want))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_released_size_on_the_gpu(dtype):
    launch, device = launcher("pixel_head", "triton-gpu")
    *tensors, height, width, patch, eps = arguments_of(
        "pixel_head", device, dtype, Geometry(grid=(128, 128))
    )
    want = reference(*(t.double() for t in tensors), height, width, patch, eps)
    got = launch(*tensors, height, width, patch, eps)
    assert harness.one_rounding(got, want) <= 1


@pytest.mark.gpu
def test_captures_in_a_graph():
    launch, device = launcher("pixel_head", "triton-gpu")
    check_captures(launch, *on(device, arguments(torch.bfloat16, SHAPES["production"])), 1e-6)


def test_triton_in_interpreter():
    harness.run_in_interpreter(__file__)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_triton_compiles_ahead_of_time(target):
    module = pytest.importorskip("pixeldiff.triton_kernels.pixel_head")
    for dtype, pixel in ((torch.bfloat16, 16), (torch.float32, 16), (torch.bfloat16, 8)):
        args = aot.released("pixel_head", dtype, pixel=pixel)
        (kernel,) = aot.compile_launch(lambda args=args: module.launch(*args), target)
        aot.assert_lean(kernel)
        assert kernel.registers <= 128
        assert kernel.warps == 1  # which waits for no other
        tokens = 2 * pixel * dtype.itemsize // 16  # loads of two pixels a thread
        assert kernel.ptx.count("ld.global.v4.b32") >= tokens
        assert kernel.ptx.count("st.global.v2.b32") == 3  # the image, two pixels a thread


def test_every_tile_compiles_ahead_of_time():
    aot.check_candidates("pixel_head", *aot.released("pixel_head"))


def test_triton_compiles_once_for_all_sizes():
    aot.check_compiles_once("pixel_head", aot.released_sizes("pixel_head"))


@each_refused_pixel
def test_triton_refuses(change, reason):
    module = pytest.importorskip("pixeldiff.triton_kernels.pixel_head")
    dtype, p, c = ({"dtype": torch.float32, "p": 4, "c": 3} | change).values()
    assert module.why_not(*arguments(dtype, (1, c, 4, 4, p, 4)), 1e-6) == reason


def test_triton_refuses_channels_apart():
    module = pytest.importorskip("pixeldiff.triton_kernels.pixel_head")
    q, *rest = arguments(torch.float32, (1, 3, 4, 4, 4, 4))
    turned = q.mT.contiguous().mT
    assert "needs a contiguous last axis, got strides" in module.why_not(turned, *rest, 1e-6)
