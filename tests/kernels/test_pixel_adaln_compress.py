"""pixel_adaln_compress against fp64, with every modulation value found by its index."""

from importlib import import_module

import aot
import numpy as np
import pixel_adaln_rules
import pytest
import torch
from harness import (
    NAMES,
    TRITON,
    check_not_finite_like,
    check_threads,
    each_isa,
    launcher,
    on,
    run_in_interpreter,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pixel_adaln_rules import SHAPES
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
    rms,
)
from torch.nn.functional import linear, rms_norm

from pixeldiff.ops import pixel_adaln_compress

OP = "pixel_adaln_compress"
reference = import_module("pixeldiff.ops.pixel_adaln_compress").reference


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


DEFINITION = pixel_adaln_rules.Definition(OP, arguments, eager, oracle)


@every_backend("pixel_adaln_compress")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, backend):
    if backend == "triton" and shape == SHAPES["production"]:
        pytest.skip("too large for the interpreter; its smaller shapes are below")
    args = arguments(dtype, shape, std)
    with forced("pixel_adaln_compress", backend):
        a = pixel_adaln_compress(*args)
    assert a.dtype == dtype
    assert_within_twice_eager(a, eager(*args), oracle(*args))


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_instruction_set(dtype, shape, isa):
    pixel_adaln_rules.check_instruction_set(DEFINITION, dtype, shape, isa)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_shapes(data):
    pixel_adaln_rules.check_random_shape(DEFINITION, data)


def test_chunks_do_not_change_the_result(monkeypatch):
    pixel_adaln_rules.check_chunks(DEFINITION, monkeypatch)


@each_isa
def test_threads_do_not_change_the_result(isa):
    check_threads(
        "pixel_adaln_compress", isa, *arguments(torch.bfloat16, (300, 64, 8, 16, 24)), 1e-6
    )


@each_isa
def test_inference_mode(isa):
    pixel_adaln_rules.check_inference_mode(DEFINITION, isa)


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
    pixel_adaln_rules.check_magnitude(DEFINITION, std, f"cpu-{isa}")


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


# --- Triton: in the interpreter and on a GPU ------------------------------------------------------

each_triton = pytest.mark.parametrize("backend", TRITON)
TRITON_SHAPES = {
    **pixel_adaln_rules.TRITON_SHAPES,
    "next-pixel": (2, 5, 16, 64, 32),  # one more than a tile of pixels
}


@each_triton
@pytest.mark.parametrize("shape", TRITON_SHAPES.values(), ids=TRITON_SHAPES)
@pytest.mark.parametrize("std", [1.0, 1e-3])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_on_triton(dtype, std, shape, backend):
    pixel_adaln_rules.check_on_triton(DEFINITION, dtype, std, shape, backend)


@each_triton
def test_no_pixels_on_triton(backend):
    launch, device = launcher(OP, backend)
    zeros, bias = torch.zeros, torch.arange(4.0)
    args = (zeros(3, 0, 16), zeros(3, 8), zeros(0, 8), zeros(0), zeros(16), zeros(4, 0), bias)
    assert_bitwise(launch(*on(device, args), 1e-6).cpu(), bias.expand(3, 4))


@each_triton
def test_pieces_and_groups_on_triton(backend, monkeypatch):
    config = (16, 32, 16, 4, 2)  # 5 tiles of patches by 4 of pixels
    pixel_adaln_rules.check_pieces_and_groups(
        DEFINITION, backend, monkeypatch, config=config, whole_piece=8192
    )


@each_triton
def test_strided_on_triton(backend):
    """Every argument of more than one axis, rows and pixels apart and rows at odd addresses."""
    launch, device = launcher(OP, backend)
    args = arguments(torch.bfloat16, (7, 9, 8, 13, 11))
    q, u, *rest = on(device, args)
    rest = [at_odd_stride(t) if t.dim() == 2 else t for t in rest]
    pixels = at_odd_stride(q.transpose(0, 1)).transpose(0, 1)
    y = launch(pixels, at_odd_stride(u), *rest, 1e-6)
    assert y.is_contiguous()
    assert_within_twice_eager_or_spacing(y.cpu(), eager(*args), oracle(*args))


@each_triton
def test_not_finite_on_triton(backend):
    launch, device = launcher(OP, backend)
    q, u, *rest = arguments(torch.float32, (6, 16, 8, 24, 40))
    q[1, 5, 3], q[2, 15, 7], u[4, 0] = torch.nan, torch.inf, torch.inf
    a = launch(*on(device, (q, u, *rest)), 1e-6).cpu()
    check_not_finite_like(a, reference(q, u, *rest, 1e-6))
    assert a.isfinite().all(1).tolist() == [True, False, False, True, False, True]


@each_triton
@pytest.mark.parametrize("std", [1e15, 1e-15])
def test_magnitudes_on_triton(std, backend):
    pixel_adaln_rules.check_magnitude(DEFINITION, std, backend)


@each_triton
def test_repeats_on_triton(backend):
    launch, device = launcher(OP, backend)
    check_repeatable(launch, *on(device, arguments(torch.bfloat16, (5, 7, 16, 40, 24))), 1e-6)


@each_triton
def test_refusals_of_triton(backend):
    launcher(OP, backend)
    why_not = import_module("pixeldiff.triton_kernels.pixel_adaln_compress").why_not

    def reason(shape, change=lambda args: args):
        return why_not(*change(list(arguments(torch.float32, shape))), 1e-6)

    def half_weight(args):
        return [*args[:5], args[5].half(), args[6]]

    assert reason((3, 4, 12, 16, 20)) == "takes 8, 16 or 32 channels of a pixel, got 12"
    assert reason((3, 4, 8, 16, 20), half_weight) == (
        "needs every tensor in the dtype of q, torch.float32, got torch.float16"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
@pytest.mark.parametrize("patches", [16384, 8192 + 77, 300])
def test_released_shape_on_triton_gpu(patches, dtype):
    pixel_adaln_rules.check_released_shape_on_gpu(DEFINITION, dtype, patches, of_patches=2)


@pytest.mark.gpu
def test_captured_on_triton_gpu():
    launch, device = launcher(OP, "triton-gpu")
    args = on(device, arguments(torch.bfloat16, (300, 64, 16, 64, 48)))
    check_captures(launch, *args, 1e-6)


# --- Triton without a GPU -------------------------------------------------------------------------


def test_triton_in_interpreter():
    run_in_interpreter(__file__)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_triton_compiles_ahead_of_time(target):
    module = pytest.importorskip("pixeldiff.triton_kernels.pixel_adaln_compress")
    for dtype in (torch.bfloat16, torch.float32):
        args = aot.released(OP, dtype)
        for kernel in aot.compile_launch(lambda args=args: module.launch(*args), target):
            aot.assert_lean(kernel, tensor_cores=dtype != torch.float32)
            assert dtype != torch.float32 or not kernel.tensor_cores  # TF32 would be
            assert kernel.ptx.count("cp.async.cg.shared.global") >= 4  # 16 bytes each
            assert "ld.global.v4.b32" in kernel.ptx
            assert "st.global.v4.b32" in kernel.ptx


def test_triton_compiles_once_for_all_sizes():
    pieces = (2, 8, 1, 1)
    aot.check_compiles_once(OP, aot.released_sizes(OP), launches=pieces)
