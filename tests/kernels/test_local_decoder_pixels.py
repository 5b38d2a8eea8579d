"""local_decoder_pixels against fp64: a projection to colours, and the mix of guidance."""

from __future__ import annotations

from importlib import import_module

import aot
import harness
import numpy as np
import pytest
import torch
from harness import NAMES, TRITON, check_not_finite_like, guarded_outputs, launcher, on
from rules import (
    Draw,
    assert_bitwise,
    assert_within_twice_eager,
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
from torch.nn.functional import linear

from pixeldiff.ops import local_decoder_pixels
from pixeldiff.ops.examples import Geometry
from pixeldiff.ops.examples import arguments as arguments_of

OP = "local_decoder_pixels"
reference = import_module(f"pixeldiff.ops.{OP}").reference
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (B, H, W, C, K)
SHAPES = {
    "production": (2, 4, 40, 16, 3),
    "1k": (2, 6, 10, 64, 3),
    "primes": (2, 7, 37, 13, 5),
    "one": (2, 1, 1, 1, 1),
    "no-images": (0, 3, 4, 5, 3),
    "no-rows": (2, 0, 4, 5, 3),
}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
each_guidance = pytest.mark.parametrize("g", [None, 0.0, 0.4, 1.0, 7.5])


def arguments(dtype, shape, std=1.0, g: float | None = 3.5, vectors=None):
    draw, (b, h, w, c, k) = Draw(dtype), shape
    few = Draw(vectors or dtype, seed=1)
    guidance = None if g is None else torch.tensor(g)
    return draw(b, h, w, c, std=std), few(k, c, std=c**-0.5), few(k, std=std), guidance


def oracle(x, weight, bias, guidance):
    u = f64(x) @ f64(weight).T + f64(bias)
    if guidance is not None:
        positive, negative = np.split(u, 2)
        u = negative + float(guidance) * (positive - negative)
    return u.transpose(0, 3, 1, 2)


def eager(x, weight, bias, guidance):
    """The plain form: both pictures projected in fp32, then mixed."""
    u = linear(x.float(), weight.float(), bias.float())
    if guidance is not None:
        positive, negative = u.chunk(2)
        u = torch.lerp(negative, positive, guidance.float())
    return u.permute(0, 3, 1, 2)


def check(u, args) -> None:
    assert u.dtype == torch.float32
    assert u.is_contiguous()
    args = on("cpu", args)
    assert_within_twice_eager(u.cpu(), eager(*args), oracle(*args))


@every_backend(OP)
@each_guidance
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, g, backend):
    args = arguments(dtype, shape, std, g)
    with forced(OP, backend):
        check(local_decoder_pixels(*args), args)


def test_equal_pictures_need_no_guidance():
    x, weight, bias, _ = arguments(torch.bfloat16, SHAPES["primes"], g=None)
    twice = torch.cat((x[:1], x[:1]))
    want = local_decoder_pixels(x[:1], weight, bias)
    for g in (0.3, 7.5):
        assert_bitwise(local_decoder_pixels(twice, weight, bias, torch.tensor(g)), want)


def test_runs_everywhere():
    args = arguments(torch.bfloat16, SHAPES["primes"])
    check_registered(OP, local_decoder_pixels, *args)
    check_registered(OP, local_decoder_pixels, *args[:3], None)
    other = arguments(torch.bfloat16, (4, 3, 8, 13, 5))
    check_compiles(OP, local_decoder_pixels, args, other)
    check_meta(local_decoder_pixels, *args)
    check_repeatable(local_decoder_pixels, *args)


def test_gradients():
    x, weight, bias, g = arguments(torch.float32, (2, 2, 3, 4, 3))
    check_gradients(local_decoder_pixels, x, weight, bias)
    check_gradients(local_decoder_pixels, x, weight, bias, g)


def test_fp64_stays_fp64():
    args = arguments(torch.float64, (2, 2, 3, 4, 3))
    u = local_decoder_pixels(*args)
    assert u.dtype == torch.float64
    np.testing.assert_allclose(u.numpy(), oracle(*args), rtol=1e-13, atol=1e-13)


X, W, B = torch.ones(2, 3, 4, 5), torch.ones(3, 5), torch.ones(3)
G = torch.tensor(2.0)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((X[0], W, B), ValueError, r"x must be \(B, H, W, C\), 4 axes, got \(3, 4, 5\)"),
        ((X, W[:, :4], B), ValueError, r"weight must be \(K, C\) = \(3, 5\), got \(3, 4\)"),
        ((X, W, B[:2]), ValueError, r"bias must be \(K,\) = \(3,\), got \(2,\)"),
        ((X, W, B, G[None]), ValueError, r"guidance must be \(\) = \(\), got \(1,\)"),
        ((X[:1], W, B, G), ValueError, "x must have an even number of images .*, got 1"),
        ((X.long(), W, B), TypeError, "x must be float32, .* got torch.int64"),
        ((X.mT, torch.ones(3, 4), B), ValueError, "the last axis of x must be contiguous"),
        ((X, W, B, G.to("meta")), ValueError, "guidance must be on cpu, got meta"),
    ],
)
def test_errors(args, error, text):
    with pytest.raises(error, match=f"^local_decoder_pixels: {text}"):
        local_decoder_pixels(*args)


# --- Triton ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("g", [None, 0.4, 7.5])
@each_dtype
def test_kernel(dtype, g, backend):
    """Every shape, at both magnitudes; vectors of the same type, and of another."""
    launch, device = launcher(OP, backend)
    for shape in SHAPES.values():
        for std, vectors in ((1.0, dtype), (1e-3, torch.float32)):
            args = on(device, arguments(dtype, shape, std, g, vectors))
            with guarded_outputs():
                u = launch(*args)
            check(u, args)


@pytest.mark.parametrize("backend", TRITON)
def test_kernel_of_a_window(backend):
    """A tile without its margin, of a tensor that is larger on all sides."""
    launch, device = launcher(OP, backend)
    x, *rest = on(device, arguments(torch.bfloat16, (4, 12, 50, 16, 3)))
    window = x[:, 3:9, 5:42]
    assert_bitwise(launch(window, *rest), launch(window.contiguous(), *rest))
    wide = torch.cat((x, x + 1), -1)[..., :16]
    assert_bitwise(launch(wide, *rest), launch(x, *rest))


@pytest.mark.parametrize("backend", TRITON)
@each_dtype
def test_kernel_not_finite(dtype, backend):
    """Of one pixel only, from either picture."""
    launch, device = launcher(OP, backend)
    for g in (None, 0.4, 0.7, 3.5):
        args = on(device, arguments(dtype, (2, 4, 6, 8, 3), g=g))
        args[0][0, 1, 2, 3], args[0][1, 2, 3, 4] = torch.nan, torch.inf
        u = launch(*args)
        check_not_finite_like(u, reference(*args))
        assert (~u.isfinite()).sum() == 6


@pytest.mark.parametrize("backend", TRITON)
def test_equal_pictures_need_no_guidance_in_the_kernel(backend):
    launch, device = launcher(OP, backend)
    x, weight, bias, _ = on(device, arguments(torch.bfloat16, SHAPES["primes"], g=None))
    twice = torch.cat((x[:1], x[:1]))
    for g in (0.3, 7.5):
        mixed = launch(twice, weight, bias, torch.tensor(g, device=device))
        assert_bitwise(mixed, launch(x[:1], weight, bias, None))


@pytest.mark.parametrize("backend", TRITON)
def test_every_tile(backend):
    launch, device = launcher(OP, backend)
    args = on(device, arguments(torch.bfloat16, (2, 3, 77, 16, 3)))
    for config in import_module(f"pixeldiff.triton_kernels.{OP}").candidates(*args):
        check(launch(*args, config=config), args)


@pytest.mark.parametrize("backend", TRITON)
def test_offsets_past_two_to_the_31(backend):
    """The third picture, or row, 2^31 elements after the first, at a stride of 32 bits; and the
    second of two that are mixed, at one of 64."""
    launch, device = launcher(OP, backend)
    base = torch.empty(2**31 + 2**20, dtype=torch.bfloat16, device=device)
    for images, g, strides in (
        (3, None, (2**30, 2**10, 4, 1)),
        (3, None, (2**10, 2**30, 4, 1)),
        (2, 3.5, (2**31, 2**10, 4, 1)),
    ):
        x, *rest = on(device, arguments(torch.bfloat16, (images, 3, 3, 4, 3), g=g))
        far = base.as_strided(x.shape, strides)
        far.copy_(x)
        assert_bitwise(launch(far, *rest), launch(x, *rest))


@pytest.mark.gpu
@pytest.mark.parametrize("guided", [False, True])
@each_dtype
def test_released_size_on_the_gpu(dtype, guided):
    launch, device = launcher(OP, "triton-gpu")
    geometry = Geometry(grid=(64, 64), patch=64, guided=guided)
    args = arguments_of(OP, device, dtype, geometry)
    u = launch(*args)
    x, weight, bias, g = args
    rows = slice(1000, 1100)  # all of them in fp64 would not fit
    check(u[:, :, rows].contiguous(), (x[:, rows], weight, bias, g))


@pytest.mark.gpu
def test_captures_in_a_graph():
    launch, device = launcher(OP, "triton-gpu")
    check_captures(launch, *on(device, arguments(torch.bfloat16, SHAPES["production"])))


def test_triton_in_interpreter():
    harness.run_in_interpreter(__file__)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_triton_compiles_ahead_of_time(target):
    module = pytest.importorskip(f"pixeldiff.triton_kernels.{OP}")
    for dtype, pixel, guided in (
        (torch.bfloat16, 16, True),
        (torch.bfloat16, 16, False),
        (torch.float32, 16, True),
        (torch.bfloat16, 64, True),
    ):
        decoder = ((pixel, pixel, pixel),)
        args = aot.released(OP, dtype, system="l2p", patch=64, decoder=decoder, guided=guided)
        (kernel,) = aot.compile_launch(lambda args=args: module.launch(*args), target)
        aot.assert_lean(kernel)
        assert kernel.registers <= 128
        # A thread's 32 values of each picture, 16 bytes at a time.
        loads = (1 + guided) * 32 * dtype.itemsize // 16
        assert kernel.ptx.count("ld.global.v4.b32") >= loads


def test_every_tile_compiles_ahead_of_time():
    aot.check_candidates(OP, *aot.released(OP, system="l2p", patch=64, guided=True))


def test_triton_compiles_once_for_all_sizes():
    grids = ((64, 64), (128, 128), (37, 41), (1, 1))
    aot.check_compiles_once(
        OP, [aot.released(OP, system="l2p", grid=grid, patch=64, guided=True) for grid in grids]
    )


def test_triton_refuses():
    module = pytest.importorskip(f"pixeldiff.triton_kernels.{OP}")
    for (c, k, dtype), reason in {
        (130, 3, torch.float32): "takes 1 to 128 channels a pixel, got 130",
        (4, 17, torch.float32): "takes 1 to 16 colours a pixel, got 17",
        (4, 3, torch.float64): "takes float32, bfloat16, float16, got torch.float64",
    }.items():
        assert module.why_not(*arguments(dtype, (2, 2, 2, c, k))) == reason
