"""add_silu against fp64: y = h sigmoid(h), h = x + shift of the image."""

import aot
import harness
import pytest
import torch
from harness import NAMES, launcher
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
    sigmoid,
)

import pixeldiff
from pixeldiff.ops import add_silu

OP = "add_silu"
TRITON = "pixeldiff.triton_kernels.add_silu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "production": (2, 40, 1536),
    "primes": (3, 7, 11),
    "one": (1, 1, 1),
    "no-tokens": (2, 0, 6),
    "no-images": (0, 3, 6),
}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
each_triton = pytest.mark.parametrize(
    "backend", ["triton", pytest.param("triton-gpu", marks=pytest.mark.gpu)]
)


def oracle(x, shift):
    h = f64(x) + f64(shift)[:, None]
    return h * sigmoid(h)


@every_backend(OP)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, backend):
    draw, (b, n, d) = Draw(dtype), shape
    x, shift = draw(b, n, d, std=std), draw(b, d, std=std)
    with forced(OP, backend):
        y = add_silu(x, shift)
    assert y.dtype == dtype
    assert_one_rounding(y, oracle(x, shift))


@every_backend(OP)
def test_rounds_once(backend):
    """Half a unit in the last place: rounding the sum to bf16 first would double it."""
    draw = Draw(torch.bfloat16)
    x, shift = draw(2, 50, 64), draw(2, 64)
    with forced(OP, backend):
        y = add_silu(x, shift)
    want = oracle(x, shift)
    error = abs(f64(y) - want)
    assert (error <= 0.501 * torch.finfo(torch.bfloat16).eps * abs(want) + 1e-7).all()


@every_backend(OP)
@each_dtype
def test_each_image_has_its_own_shift(dtype, backend):
    """Also one in another type, and one vector expanded to all images."""
    x, shift = Draw(dtype)(3, 5, 24), Draw(torch.float32, seed=1)(3, 24)
    with forced(OP, backend):
        y = add_silu(x, shift)
        assert_one_rounding(y, oracle(x, shift))
        one = add_silu(x, shift[:1].expand(3, -1))
        assert_bitwise(one, add_silu(x, shift[:1].repeat(3, 1)))
    assert_bitwise(one[0], y[0])


@every_backend(OP)
def test_strided(backend):
    draw = Draw(torch.bfloat16)
    x, shift = draw(3, 5, 24), draw(3, 24)
    with forced(OP, backend):
        want = add_silu(x, shift)
        for view in (at_odd_stride(x), x.transpose(0, 1).contiguous().transpose(0, 1)):
            y = add_silu(view, at_odd_stride(shift))
            assert y.is_contiguous()
            assert_bitwise(y, want)


@every_backend(OP)
@each_dtype
def test_not_finite(dtype, backend):
    special = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0, 3e4, -3e4, 1e-7, -1e-7]
    special = torch.tensor(special, dtype=dtype)
    x, shift = special.repeat(11, 1).view(11, 1, 11), special[:, None].repeat(1, 11)
    with forced(OP, backend):
        y = add_silu(x, shift)
    want = torch.nn.functional.silu(x.float() + shift.float()[:, None]).to(dtype)
    harness.check_not_finite_like(y, want)


def test_runs_everywhere():
    draw = Draw(torch.bfloat16)
    x, shift = draw(2, 3, 8), draw(2, 8)
    check_registered(OP, add_silu, x, shift)
    check_compiles(OP, add_silu, (x, shift), (draw(4, 5, 8), draw(4, 8)))
    check_meta(add_silu, x, shift)
    check_repeatable(add_silu, x, shift)


def test_gradients():
    draw = Draw()
    check_gradients(add_silu, draw(2, 3, 4), draw(2, 4))


X = torch.ones(2, 3, 8)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((X, X[:, 0, :4]), ValueError, r"shift must be \(B, D\) = \(2, 8\), got \(2, 4\)"),
        ((X, X), ValueError, r"shift must be \(B, D\) = \(2, 8\), got \(2, 3, 8\)"),
        ((X[0], X[0]), ValueError, r"x must be \(B, N, D\), 3 axes, got \(3, 8\)"),
        ((X, X[:, 0].long()), TypeError, r"shift must be float32, .* got torch.int64"),
        ((X, X[:, 0].to("meta")), ValueError, r"shift must be on cpu, got meta"),
    ],
)
def test_errors(args, error, text):
    with pytest.raises(error, match=f"^add_silu: {text}$"):
        add_silu(*args)


# --- the Triton kernel ----------------------------------------------------------------------------


@each_triton
@each_dtype
@pytest.mark.parametrize("width", [1, 17, 341, 1536, 2500])
def test_triton_one_rounding(dtype, width, backend):
    launch, device = launcher(OP, backend)
    for std in (1.0, 1e-3, 30.0):
        x, shift = Draw(dtype)(2, 5, width, std=std), Draw(dtype, seed=1)(2, width, std=std)
        y = launch(x.to(device), shift.to(device)).cpu()
        error = harness.one_rounding(y, torch.from_numpy(oracle(x, shift)))
        assert error <= 1


@each_triton
@pytest.mark.parametrize("tile", [(1, 8, 1), (4, 16, 2), (1, 64, 8)], ids=str)
def test_triton_every_tile_gives_the_same(tile, backend):
    launch, device = launcher(OP, backend)
    config = pytest.importorskip(TRITON).Config(*tile)
    x, shift = Draw(torch.bfloat16)(2, 7, 45).to(device), Draw()(2, 45).to(device)
    assert_bitwise(launch(x, shift, config=config), launch(x, shift))


@each_triton
@pytest.mark.parametrize("shape", [(3, 1, 24), (1, 3, 24)], ids=["images", "rows"])
def test_triton_offsets_past_two_to_the_31(shape, backend):
    """The third image, or row, 2^31 elements away from the first, at a stride of 32 bits."""
    launch, device = launcher(OP, backend)
    x, shift = Draw(torch.bfloat16)(*shape).to(device), Draw()(3, 24)[: shape[0]].to(device)
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    far = base.as_strided(shape, (2**30, 2**30, 1))
    far.copy_(x)
    assert_bitwise(launch(far, shift), launch(x, shift))
    if len(shift) > 1:
        far = base.as_strided((3, 24), (2**30, 1))
        far.copy_(shift)
        assert_bitwise(launch(x, far), launch(x, shift.bfloat16()))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [16384, 65536])
def test_released_shapes(rows):
    launch, device = launcher(OP, "triton-gpu")
    x, shift = Draw(torch.bfloat16)(1, rows, 1536), Draw(torch.bfloat16, seed=1)(1, 1536)
    y = launch(x.to(device), shift.to(device)).cpu()
    assert_one_rounding(y[:, -4096:], oracle(x[:, -4096:], shift))
    assert_one_rounding(y[:, :4096], oracle(x[:, :4096], shift))


@pytest.mark.parametrize("target", aot.TARGETS)
def test_triton_compiles_ahead_of_time(target):
    module = pytest.importorskip(TRITON)
    for dtype in (torch.bfloat16, torch.float32):
        args = aot.released(OP, dtype)
        (kernel,) = aot.compile_launch(lambda args=args: module.launch(*args), target)
        aot.assert_lean(kernel)
        assert kernel.registers <= 64
        assert kernel.shared == 0
        assert kernel.ptx.count("ld.global.v4.b32") == 4  # two vectors each of x and shift
        assert kernel.ptx.count("st.global.v4.b32") == 2
        assert "ld.global.b" not in kernel.ptx


def test_triton_compiles_once_for_all_sizes():
    aot.check_compiles_once(OP, aot.released_sizes(OP))


def test_triton_in_interpreter():
    harness.run_in_interpreter(__file__)


def test_free_choice_without_a_gpu_is_the_reference():
    draw = Draw(torch.bfloat16)
    x, shift = draw(2, 3, 8), draw(2, 8)
    with pixeldiff.backend("reference"):
        want = add_silu(x, shift)
    assert_bitwise(add_silu(x, shift), want)
