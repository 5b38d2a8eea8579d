"""swiglu against fp64: y = a sigmoid(a) b."""

import aot
import harness
import numpy as np
import pytest
import torch
from harness import NAMES, launcher, one_rounding
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
    sigmoid,
)

import pixeldiff
from pixeldiff import native
from pixeldiff.ops import swiglu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
each_isa = pytest.mark.parametrize("isa", native.ISA_CODES)
needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")
SHAPES = {"production": (2, 40, 4096), "primes": (3, 7, 11), "one": (1, 1, 1), "empty": (2, 0, 6)}


@every_backend("swiglu")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, backend):
    draw = Draw(dtype)
    a, b = draw(*shape, std=std), draw(*shape, std=std)
    with forced("swiglu", backend):
        y = swiglu(a, b)
    assert_one_rounding(y, f64(a) * sigmoid(f64(a)) * f64(b))


@every_backend("swiglu")
def test_rounds_once(backend):
    """Half a unit in the last place: rounding silu(a) to bf16 first would double it."""
    a, b = Draw(torch.bfloat16)(2, 50, 64)
    oracle = f64(a) * sigmoid(f64(a)) * f64(b)
    with forced("swiglu", backend):
        error = abs(f64(swiglu(a, b)) - oracle)
    assert (error <= 0.501 * torch.finfo(torch.bfloat16).eps * abs(oracle)).all()


@every_backend("swiglu")
def test_saturates_without_nan(backend):
    a = torch.tensor([-200.0, -60.0, 0.0, 60.0, 200.0])
    with forced("swiglu", backend):
        y = swiglu(a, torch.full((5,), 2.0))
    assert_one_rounding(y, f64(a) * sigmoid(f64(a)) * 2)


def test_halves_of_a_fused_projection():
    a, b = Draw(torch.bfloat16)(2, 3, 10).chunk(2, -1)
    y = swiglu(a, b)
    assert y.is_contiguous()
    assert_bitwise(y, swiglu(a.contiguous(), b.contiguous()))


def test_runs_everywhere():
    draw = Draw(torch.bfloat16)
    a, b = draw(2, 3, 8), draw(2, 3, 8)
    check_registered("swiglu", swiglu, a, b)
    check_compiles("swiglu", swiglu, (a, b), (draw(4, 5, 8), draw(4, 5, 8)))
    check_meta(swiglu, a, b)
    check_repeatable(swiglu, a, b)


def test_gradients():
    draw = Draw()
    check_gradients(swiglu, draw(2, 3), draw(2, 3))


def test_errors():
    with pytest.raises(
        ValueError, match=r"^swiglu: b must be shape of a = \(2, 8\), got \(2, 4\)$"
    ):
        swiglu(torch.ones(2, 8), torch.ones(2, 4))
    with pytest.raises(
        TypeError, match=r"^swiglu: b must have the dtype of a, torch.float32, got torch.float16$"
    ):
        swiglu(torch.ones(2, 8), torch.ones(2, 8, dtype=torch.float16))
    with pytest.raises(TypeError, match=r"^swiglu: a must be .* got torch.int32$"):
        swiglu(torch.ones(2, dtype=torch.int32), torch.ones(2))


# --- the CPU kernel, every instruction set --------------------------------------------------------

# Tails of every length class, the widths of the demo and of the released networks.
WIDTHS = [1, 3, 8, 15, 16, 17, 31, 341, 4096]


def oracle(a, b):
    return a.double() / (1 + torch.exp(-a.double())) * b.double()


@needs_extension
@each_isa
@each_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_cpu_one_rounding(dtype, isa, width):
    launch, _ = launcher("swiglu", f"cpu-{isa}")
    for std in (1.0, 1e-3):
        a, b = Draw(dtype)(2, 5, 2 * width, std=std).chunk(2, -1)
        y = launch(a, b)
        assert y.is_contiguous()
        assert one_rounding(y, oracle(a, b)) <= 1


@needs_extension
@each_isa
def test_cpu_exponential_to_three_ulp(isa):
    """Relative, without the slack that the rule gives to small values."""
    launch, _ = launcher("swiglu", f"cpu-{isa}")
    a = torch.linspace(-87, 120, 400_001)
    want = oracle(a, torch.ones(1)).numpy()
    ulp = np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)
    assert (np.abs(f64(launch(a, torch.ones_like(a))) - want) <= 3 * ulp).all()


@needs_extension
@each_isa
@each_dtype
def test_cpu_not_finite(dtype, isa):
    launch, _ = launcher("swiglu", f"cpu-{isa}")
    special = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0, 3e4, -3e4, 1e-7, -1e-7]
    special = torch.tensor(special, dtype=dtype)
    a, b = (t.flatten().contiguous() for t in torch.meshgrid(special, special, indexing="ij"))
    y = launch(a, b)
    with pixeldiff.backend("reference"):
        want = swiglu(a, b)
    torch.testing.assert_close(y, want, rtol=torch.finfo(dtype).eps, atol=0, equal_nan=True)
    assert y.isnan().any()
    assert y.isinf().any()


@needs_extension
@each_isa
@pytest.mark.parametrize(("of_a", "of_b"), [(1e-30, 1e-5), (80.0, 1e36), (1e-20, 1e30)])
def test_cpu_magnitudes(of_a, of_b, isa):
    launch, _ = launcher("swiglu", f"cpu-{isa}")
    a, b = Draw()(3, 64).clamp(-1, 1) * of_a, Draw(seed=1)(3, 64) * of_b
    assert one_rounding(launch(a, b), oracle(a, b)) <= 1


@needs_extension
@each_isa
@each_dtype
def test_cpu_threads_do_not_change_the_result(dtype, isa):
    launcher("swiglu", f"cpu-{isa}")
    launch, code = _module().launch, native.ISA_CODES[isa]
    a, b = Draw(dtype)(3, 101, 2 * 700).chunk(2, -1)
    one = launch(a, b, isa=code, threads=1)
    for threads in (2, 7):
        assert_bitwise(launch(a, b, isa=code, threads=threads), one)


@needs_extension
@each_isa
@each_dtype
def test_cpu_writes_nothing_outside_its_rows(dtype, isa):
    launcher("swiglu", f"cpu-{isa}")
    a, b = Draw(dtype)(1, 3, 38).chunk(2, -1)
    buffer = torch.full((3 * 19 + 64,), 7.0, dtype=dtype)
    native.load().swiglu_cpu(
        a.shape,
        native.DTYPE_CODES[dtype],
        native.rows(a),
        native.rows(b),
        buffer[32:].data_ptr(),
        native.ISA_CODES[isa],
        2,
    )
    assert (buffer[:32] == 7).all()
    assert (buffer[32 + 57 :] == 7).all()
    assert one_rounding(buffer[32:89].view(1, 3, 19), oracle(a, b)) <= 1


@needs_extension
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(1, 5), max_size=4),
    st.integers(1, 70),
    st.booleans(),
    st.sampled_from([1.0, 1e-3, 30.0]),
    st.sampled_from(sorted(native.ISA_CODES)),
)
def test_cpu_random_shapes(dtype, leading, width, strided, std, isa):
    """Any number of axes, and rows that start anywhere in memory."""
    if not native.load().isa_usable(native.ISA_CODES[isa]):
        return
    draw = Draw(dtype, seed=width)
    a, b = draw(*leading, width, std=std), draw(*leading, width, std=std)
    if strided:
        a, b = at_odd_stride(a), at_odd_stride(b)
        if len(leading) > 1:
            a = a.transpose(0, 1).contiguous().transpose(0, 1)
    y = _module().launch(a, b, isa=native.ISA_CODES[isa])
    assert y.is_contiguous()
    assert one_rounding(y, oracle(a, b)) <= 1


@needs_extension
def test_free_choice_runs_the_cpu_kernel():
    a, b = Draw(torch.bfloat16)(2, 3, 38).chunk(2, -1)
    with pixeldiff.backend("cpu"):
        forced_result = swiglu(a, b)
    assert_bitwise(swiglu(a, b), forced_result)
    assert_bitwise(forced_result, _module().launch(a, b))


@needs_extension
@pytest.mark.parametrize(
    ("a", "reason"),
    [
        (torch.zeros(2, 8, dtype=torch.float64), "takes float32, bfloat16 and float16, got "),
        (torch.zeros(8, 2).T, r"needs a contiguous last axis, got strides \(1, 2\)"),
        (torch.tensor(1.0), "needs at least one axis"),
    ],
)
def test_forced_cpu_refuses(a, reason):
    with (
        pixeldiff.backend("cpu"),
        pytest.raises(NotImplementedError, match=rf'^swiglu\(backend="cpu"\): {reason}'),
    ):
        swiglu(a, a)
    assert swiglu(a, a).shape == a.shape


# --- the Triton kernel ----------------------------------------------------------------------------

each_triton = pytest.mark.parametrize(
    "backend", ["triton", pytest.param("triton-gpu", marks=pytest.mark.gpu)]
)
TRITON = "pixeldiff.triton_kernels.swiglu"


@each_triton
@each_dtype
@pytest.mark.parametrize("width", [1, 3, 17, 341, 1536, 2500])
def test_triton_one_rounding(dtype, width, backend):
    """Halves of a fused projection, as views."""
    launch, device = launcher("swiglu", backend)
    for std in (1.0, 1e-3, 30.0):
        a, b = Draw(dtype)(2, 5, 2 * width, std=std).to(device).chunk(2, -1)
        y = launch(a, b)
        assert y.is_contiguous()
        assert one_rounding(y, oracle(a, b)) <= 1


@each_triton
@pytest.mark.parametrize("leading", [(), (7,), (3, 5), (2, 3, 4), (2, 1, 3, 2)], ids=str)
def test_triton_leading_axes(leading, backend):
    launch, device = launcher("swiglu", backend)
    a, b = Draw(torch.bfloat16)(2, *leading, 24).to(device)
    want = launch(a.reshape(-1, 24), b.reshape(-1, 24)).view(a.shape)
    assert one_rounding(want, oracle(a, b)) <= 1
    assert_bitwise(launch(a, b), want)
    assert_bitwise(launch(at_odd_stride(a), at_odd_stride(b)), want)
    if len(leading) > 1:
        crossed = a.transpose(0, 1).contiguous().transpose(0, 1)
        assert_bitwise(launch(crossed, b), want)


@each_triton
@each_dtype
def test_triton_not_finite(dtype, backend):
    launch, device = launcher("swiglu", backend)
    special = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0, 3e4, -3e4, 1e-7, -1e-7]
    special = torch.tensor(special, dtype=dtype)
    a, b = (t.flatten().contiguous() for t in torch.meshgrid(special, special, indexing="ij"))
    y = launch(a.to(device), b.to(device)).cpu()
    with pixeldiff.backend("reference"):
        want = swiglu(a, b)
    harness.check_not_finite_like(y, want)


@each_triton
@pytest.mark.parametrize(("of_a", "of_b"), [(1e-30, 1e-5), (80.0, 1e36), (1e-20, 1e30)])
def test_triton_magnitudes(of_a, of_b, backend):
    launch, device = launcher("swiglu", backend)
    a, b = Draw()(3, 64).clamp(-1, 1) * of_a, Draw(seed=1)(3, 64) * of_b
    assert one_rounding(launch(a.to(device), b.to(device)).cpu(), oracle(a, b)) <= 1


@each_triton
@pytest.mark.parametrize("tile", [(1, 8, 1), (4, 16, 2), (1, 64, 8)], ids=str)
def test_triton_every_tile_gives_the_same(tile, backend):
    launch, device = launcher("swiglu", backend)
    config = pytest.importorskip(TRITON).Config(*tile)
    a, b = Draw(torch.bfloat16)(2, 2, 7, 45).to(device)
    assert_bitwise(launch(a, b, config=config), launch(a, b))


@each_triton
@pytest.mark.parametrize("shape", [(3, 1, 24), (1, 3, 24)], ids=["images", "rows"])
def test_triton_offsets_past_two_to_the_31(shape, backend):
    """The third image, or row, 2^31 elements away from the first, at a stride of 32 bits."""
    launch, device = launcher("swiglu", backend)
    a, b = Draw(torch.bfloat16)(2, *shape).to(device)
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    far = base.as_strided(shape, (2**30, 2**30, 1))
    far.copy_(a)
    assert_bitwise(launch(far, b), launch(a, b))
    far.copy_(b)
    assert_bitwise(launch(a, far), launch(a, b))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [16384, 65536])
def test_released_shapes(rows):
    launch, device = launcher("swiglu", "triton-gpu")
    a, b = torch.randn(1, rows, 8192, device=device, dtype=torch.bfloat16).chunk(2, -1)
    y = launch(a, b)
    for first in range(0, rows, 8192):
        part = slice(first, first + 8192)
        assert one_rounding(y[:, part], oracle(a[:, part], b[:, part])) <= 1


@pytest.mark.parametrize("target", aot.TARGETS)
def test_triton_compiles_ahead_of_time(target):
    module = pytest.importorskip(TRITON)
    cases = ((torch.bfloat16, "pid"), (torch.float32, "pid"), (torch.bfloat16, "l2p"))
    for dtype, system in cases:
        args = aot.released("swiglu", dtype, system=system)
        (kernel,) = aot.compile_launch(lambda args=args: module.launch(*args), target)
        aot.assert_lean(kernel)
        assert kernel.registers <= 64
        assert kernel.shared == 0
        assert kernel.ptx.count("ld.global.v4.b32") == 4  # two vectors each of a and b
        assert kernel.ptx.count("st.global.v4.b32") == 2
        assert "ld.global.b" not in kernel.ptx


def test_triton_compiles_once_for_all_sizes():
    aot.check_compiles_once("swiglu", aot.released_sizes("swiglu"))


def test_triton_in_interpreter():
    harness.run_in_interpreter(__file__)


def _module():
    return pixeldiff.ops.registry.OPS["swiglu"].backends[-1].load()
