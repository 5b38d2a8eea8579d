"""pixel_embed against fp64: one linear a pixel, plus the separable position, in patch order."""

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
    assert_bitwise,
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
)

import pixeldiff
from pixeldiff import native
from pixeldiff.ops import pixel_embed
from pixeldiff.ops.examples import Geometry
from pixeldiff.ops.examples import arguments as arguments_of

reference = import_module("pixeldiff.ops.pixel_embed").reference

# (B, C, H, W, p, P)
SHAPES = {
    "production": (1, 3, 64, 96, 16, 16),
    "primes": (2, 5, 21, 35, 4, 7),
    "one": (1, 1, 1, 1, 2, 1),
    "released-patch8": (1, 3, 16, 48, 8, 8),
    "p12-patch2": (3, 1, 4, 10, 12, 2),
    "p20-patch19": (1, 4, 19, 38, 20, 19),
    "one-p4": (1, 1, 1, 1, 4, 1),
    "empty": (0, 3, 8, 12, 4, 4),
}


def arguments(dtype, shape, std=1.0):
    """The image is fp32 whatever the weights' dtype, as in the network."""
    draw, (b, c, height, width, p, patch) = Draw(dtype), shape
    wide = Draw(seed=1)
    x, weight, bias = wide(b, c, height, width, std=std), draw(p, c), draw(p)
    return x, weight, bias, wide(width, p // 2), wide(height, p // 2), patch


def call(x, weight, bias, pos_x, pos_y, patch):
    return pixel_embed(x, weight, bias, pos_x, pos_y, patch=patch)


def oracle(x, weight, bias, pos_x, pos_y, patch):
    x, weight, bias, pos_x, pos_y = f64(x, weight, bias, pos_x, pos_y)
    b, _, height, width = x.shape
    h, w, p = height // patch, width // patch, weight.shape[0]
    out = np.empty((b * h * w, patch * patch, p))
    for row in range(height):
        for col in range(width):
            token = (row // patch) * w + col // patch
            pixel = (row % patch) * patch + col % patch
            position = np.concatenate((pos_x[col], pos_y[row]))
            out[token :: h * w, pixel] = x[:, :, row, col] @ weight.T + bias + position
    return out


@every_backend("pixel_embed")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, backend):
    args = arguments(dtype, shape, std)
    with forced("pixel_embed", backend):
        q = call(*args)
    assert q.dtype == dtype
    assert_one_rounding(q, oracle(*args))


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_instruction_set(dtype, shape, isa):
    launch, _ = launcher("pixel_embed", f"cpu-{isa}")
    if shape[4] % 4:
        pytest.skip("the kernels take multiples of 4 channels")
    args = arguments(dtype, shape)
    assert_one_rounding(launch(*args), oracle(*args))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_shapes(data):
    draw = data.draw
    p, patch = 4 * draw(st.integers(1, 6)), draw(st.integers(1, 17))
    # At least 8 x 8: the rule measures a sum that cancels by the largest of its neighbours.
    h, w = (patch * (8 // patch + draw(st.integers(1, 4))) for _ in range(2))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 4)), h, w, p, patch)
    x, *rest = arguments(draw(st.sampled_from([torch.float32, torch.bfloat16])), shape)
    x = at_odd_stride(x).to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    launch, _ = launcher("pixel_embed", f"cpu-{draw(st.sampled_from(usable_isas()))}")
    assert_one_rounding(launch(x, *rest), oracle(x, *rest))


@each_isa
def test_threads_do_not_change_the_result(isa):
    check_threads("pixel_embed", isa, *arguments(torch.bfloat16, (2, 3, 96, 96, 8, 16)))


@each_isa
@pytest.mark.parametrize("std", [1e30, 1e-30])
def test_magnitudes(isa, std):
    launch, _ = launcher("pixel_embed", f"cpu-{isa}")
    args = arguments(torch.float32, (1, 3, 16, 32, 8, 16), std)
    assert_one_rounding(launch(*args), oracle(*args))


@pytest.mark.parametrize("backend", [*(f"cpu-{isa}" for isa in native.ISA_CODES), *TRITON])
def test_not_finite(backend):
    """Of one pixel only."""
    launch, device = launcher("pixel_embed", backend)
    x, *rest = on(device, arguments(torch.float32, (1, 3, 16, 32, 8, 16)))
    x[0, 1, 3, 4], x[0, 2, 15, 31] = torch.nan, torch.inf
    q = launch(x, *rest)
    check_not_finite_like(q, reference(x, *rest))
    assert q.isfinite().all(-1).sum() == 16 * 32 - 2


def test_strided_image():
    x, *rest = arguments(torch.bfloat16, (2, 3, 8, 12, 4, 4))
    assert_bitwise(call(x.transpose(2, 3).contiguous().transpose(2, 3), *rest), call(x, *rest))


def test_runs_everywhere():
    args = arguments(torch.bfloat16, (2, 3, 8, 12, 4, 4))
    check_registered("pixel_embed", call, *args)
    check_compiles("pixel_embed", call, args, arguments(torch.bfloat16, (1, 3, 16, 4, 4, 4)))
    check_meta(call, *args)
    check_repeatable(call, *args)


def test_gradients():
    *tensors, patch = arguments(torch.float32, (1, 2, 4, 2, 4, 2))
    check_gradients(lambda *t: call(*t, patch), *tensors)


def test_errors():
    x, weight, bias, pos_x, pos_y, patch = arguments(torch.float32, (2, 3, 8, 12, 4, 4))

    def raises(error, message, *args):
        with pytest.raises(error, match=f"^pixel_embed: {message}$"):
            call(*args)

    raises(
        ValueError,
        r"H and W must be multiples of patch = 5, got 8x12",
        *(x, weight, bias, pos_x, pos_y, 5),
    )
    raises(
        ValueError,
        r"H and W must be multiples of patch = 0, got 8x12",
        *(x, weight, bias, pos_x, pos_y, 0),
    )
    raises(
        ValueError,
        r"x must be \(B, C, H, W\), 4 axes, got \(3, 8, 12\)",
        *(x[0], weight, bias, pos_x, pos_y, patch),
    )
    raises(
        ValueError,
        r"weight must be \(p, C\) = \(4, 3\), got \(4, 2\)",
        *(x, weight[:, :2], bias, pos_x, pos_y, patch),
    )
    raises(
        ValueError,
        r"p must be even, got 3",
        *(x, weight[:3], bias[:3], pos_x[:, :1], pos_y[:, :1], patch),
    )
    raises(
        ValueError,
        r"bias must be \(p,\) = \(4,\), got \(3,\)",
        *(x, weight, bias[:3], pos_x, pos_y, patch),
    )
    raises(
        ValueError,
        r"pos_x must be \(W, p/2\) = \(12, 2\), got \(8, 2\)",
        *(x, weight, bias, pos_y, pos_x, patch),
    )
    raises(
        ValueError,
        r"pos_y must be \(H, p/2\) = \(8, 2\), got \(7, 2\)",
        *(x, weight, bias, pos_x, pos_y[:7], patch),
    )
    raises(TypeError, r"x must be .* got torch.uint8", *(x.byte(), weight, bias, pos_x, pos_y, 4))


# --- Triton ---------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# p 6 and P 5 are no powers of two; 35 pixels are no whole tile, 20 rows of a patch no whole group.
ODD = (2, 3, 10, 35, 6, 5)
LAYOUTS = {
    "contiguous": lambda x: x,
    "rows-apart": at_odd_stride,
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "one-image-for-all": lambda x: x[:1].expand(2, -1, -1, -1),
}


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle_on_the_gpu(dtype, std, shape):
    launch, device = launcher("pixel_embed", "triton-gpu")
    args = arguments(dtype, shape, std)
    assert_one_rounding(launch(*on(device, args)).cpu(), oracle(*args))


IMAGES = [(dtype, image, "contiguous") for dtype in DTYPES for image in DTYPES]
IMAGES += [(d, d, layout) for d in DTYPES[:2] for layout in LAYOUTS if layout != "contiguous"]


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize(
    ("dtype", "image", "layout"), IMAGES, ids=[f"{NAMES[d]}-{NAMES[i]}-{v}" for d, i, v in IMAGES]
)
def test_any_image(dtype, image, layout, backend):
    """Every pair of dtypes, and images read where they lie."""
    launch, device = launcher("pixel_embed", backend)
    x, *rest = on(device, arguments(dtype, ODD))
    x = LAYOUTS[layout](x.to(image))
    with guarded_outputs():
        q = launch(x, *rest)
    assert q.dtype == dtype
    assert_one_rounding(q.cpu(), oracle(*on("cpu", (x, *rest))))


@pytest.mark.parametrize("backend", TRITON)
def test_every_tile_gives_the_same_bits(backend):
    launch, device = launcher("pixel_embed", backend)
    module = import_module("pixeldiff.triton_kernels.pixel_embed")
    args = on(device, arguments(torch.bfloat16, (1, 3, 32, 16, 16, 16)))
    want = launch(*args)
    for config in {*module.candidates(*args), module.Config(1, 16, 1), module.Config(32, 16, 4)}:
        assert_bitwise(launch(*args, config=config), want)


@pytest.mark.parametrize("backend", TRITON)
def test_the_demo_network_on_both_backends(backend):
    """Its own weights, in fp32, at the size of its pixels: CPU kernel and Triton differ by the
    order of four additions."""
    usable_isas()
    launch, device = launcher("pixel_embed", backend)
    weight, bias = demo_weights("weight", "bias", of="pixel_embedder.proj")
    x, _, _, *rest = arguments(torch.float32, (1, 3, 32, 48, weight.shape[0], 16))
    args = (x, weight, bias, *rest)
    with pixeldiff.backend("cpu"):
        want = call(*args)
    assert_one_rounding(launch(*on(device, args)).cpu(), f64(want))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_released_size_on_the_gpu(dtype):
    launch, device = launcher("pixel_embed", "triton-gpu")
    x, *rest = arguments_of("pixel_embed", device, dtype, Geometry(grid=(128, 128)))
    want = reference(x.double(), *(t.double() for t in rest[:-1]), rest[-1])
    assert harness.one_rounding(launch(x, *rest), want) <= 1


@pytest.mark.gpu
def test_captures_in_a_graph():
    launch, device = launcher("pixel_embed", "triton-gpu")
    check_captures(launch, *on(device, arguments(torch.bfloat16, SHAPES["production"])))


def test_triton_in_interpreter():
    harness.run_in_interpreter(__file__)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_triton_compiles_ahead_of_time(target):
    module = pytest.importorskip("pixeldiff.triton_kernels.pixel_embed")
    for dtype, pixel in ((torch.bfloat16, 16), (torch.float32, 16), (torch.bfloat16, 8)):
        args = aot.released("pixel_embed", dtype, pixel=pixel)
        (kernel,) = aot.compile_launch(lambda args=args: module.launch(*args), target)
        aot.assert_lean(kernel)
        assert kernel.registers <= 128
        assert kernel.warps == 1  # which waits for no other
        assert "st.global.v4.b32" in kernel.ptx  # the tokens
        assert "ld.global.v2.b32" in kernel.ptx  # the image, two pixels a thread
        assert "ld.global.v4.b32" in kernel.ptx  # the table


def test_every_tile_compiles_ahead_of_time():
    aot.check_candidates("pixel_embed", *aot.released("pixel_embed"))


def test_triton_compiles_once_for_all_sizes():
    aot.check_compiles_once("pixel_embed", aot.released_sizes("pixel_embed"))


each_refused_pixel = pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "takes float32, bfloat16, float16, got torch.float64"),
        ({"p": 130}, "takes 1 to 128 channels a pixel, got 130"),
        ({"c": 17}, "takes 1 to 16 colours a pixel, got 17"),
        ({"c": 0}, "takes 1 to 16 colours a pixel, got 0"),
    ],
)


@each_refused_pixel
def test_triton_refuses(change, reason):
    module = pytest.importorskip("pixeldiff.triton_kernels.pixel_embed")
    dtype, p, c = ({"dtype": torch.float32, "p": 4, "c": 3} | change).values()
    assert module.why_not(*arguments(dtype, (1, c, 4, 4, p, 4))) == reason
