"""gated_residual_norm: every backend against the definition in fp64, rule "one rounding" twice.

The oracle of the norm starts from the residual the kernel stored, since that is what it must read.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import aot
import harness
import pytest
import torch
from harness import BACKENDS, NAMES, launcher, one_rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import check_compiled_like_eager

import pixeldiff
from pixeldiff import native
from pixeldiff.ops import gated_residual_norm

OP = "gated_residual_norm"
reference = import_module("pixeldiff.ops.gated_residual_norm").reference
norm_reference = import_module("pixeldiff.ops.rms_norm_modulate").reference
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6

needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    B: int
    N: int
    D: int
    std: float = 1.0
    strided: bool = False
    vectors: torch.dtype = torch.float32  # of gate, weight, scale and shift
    shift: bool = True

    def __str__(self) -> str:
        name = f"{NAMES[self.dtype]}-B{self.B}-N{self.N}-D{self.D}-std{self.std:g}"
        name += f"-{NAMES[self.vectors]}vectors"
        return name + "-strided" * self.strided + "-noshift" * (not self.shift)

    def arguments(self, device: str = "cpu"):
        g = torch.Generator().manual_seed(self.N * 7919 + self.D)
        B, N, D = self.B, self.N, self.D
        if self.strided:  # chunks of a fused projection, batch and token axes swapped in one
            both = torch.randn(N, B, 3 * D, generator=g).mul(self.std).to(device, self.dtype)
            x = both.transpose(0, 1)[..., D : 2 * D]
            y = torch.randn(B, N, 2 * D, generator=g).mul(self.std).to(device, self.dtype)[..., D:]
            vectors = torch.randn(B, 6 * D, generator=g).to(device, self.vectors)
            gate, scale, shift = (vectors[:, k * D : (k + 1) * D] for k in (1, 3, 5))
        else:
            x, y = torch.randn(2, B, N, D, generator=g).mul(self.std).to(device, self.dtype)
            gate, scale, shift = torch.randn(3, B, D, generator=g).to(device, self.vectors)
        weight = (1 + 0.1 * torch.randn(D, generator=g)).to(device, self.vectors)
        return x, y, gate, weight, scale, shift if self.shift else None, EPS


def errors(args, x_new, h) -> tuple[float, float]:
    """Error over bound of the residual, and of the norm of the residual as stored."""
    x, y, gate, weight, scale, shift, eps = args
    residual = x.double() + gate.double()[:, None] * y.double()
    vectors = (None if t is None else t.double() for t in (weight, scale, shift))
    norm = norm_reference(x_new.double(), *vectors, eps)
    return one_rounding(x_new, residual), one_rounding(h, norm)


# The released width, 384 of its 16384 tokens (rows are independent); primes, size 1, short tails.
# 768 is the narrowest that Triton takes in three pieces.
SHAPES = [
    *((2, 384, 1536), (2, 3, 768), (3, 7, 257), (1, 1, 1)),
    *((5, 1, 16), (1, 13, 31), (2, 3, 1000)),
]
GRID = [
    Case(dtype, *shape, std, strided)
    for dtype in DTYPES
    for shape in SHAPES
    for std in (1.0, 1e-3)
    for strided in (False, True)
]
GRID += [Case(d, 2, 5, 72, vectors=v) for d in DTYPES for v in DTYPES if v != torch.float32]
GRID += [Case(d, 2, 5, 72, shift=False) for d in DTYPES]
EMPTY = [(0, 3, 8), (2, 0, 8), (2, 3, 0)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", GRID, ids=str)
def test_one_rounding(case, backend):
    if backend == "triton" and case.N * case.D > 10_000:
        pytest.skip("too large for the interpreter; compiled for real on a GPU")
    launch, device = launcher(OP, backend)
    args = case.arguments(device)
    x_new, h = launch(*args)
    for out in (x_new, h):
        assert out.dtype == case.dtype
        assert out.is_contiguous()
    residual, norm = errors(args, x_new, h)
    assert residual <= 1
    assert norm <= 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(shape, backend):
    launch, device = launcher(OP, backend)
    x_new, h = launch(*Case(torch.float32, *shape).arguments(device))
    assert x_new.shape == h.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_not_finite(dtype, backend):
    """A NaN stays one element of the residual and takes its row of the norm."""
    launch, device = launcher(OP, backend)
    x, y, *rest = Case(dtype, 2, 3, 37).arguments(device)
    x[0, 1, 5] = torch.nan
    y[1, 2, 36] = -torch.inf
    got = launch(x, y, *rest)
    want = reference(x, y, *rest)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    assert got[0].isnan().sum() == 1
    assert got[0].isinf().sum() == 1
    assert got[1].isnan().sum() == 38


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bitwise(backend):
    launch, device = launcher(OP, backend)
    args = Case(torch.bfloat16, 2, 9, 515).arguments(device)
    for a, b in zip(launch(*args), launch(*args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend):
    launch, device = launcher(OP, backend)
    args = Case(torch.bfloat16, 2, 3, 40).arguments(device)
    before = [t.clone() for t in args[:-1]]
    launch(*args)
    assert all(torch.equal(a, b) for a, b in zip(args[:-1], before, strict=True))


@needs_extension
@pytest.mark.parametrize("isa", native.ISA_CODES)
def test_threads_do_not_change_the_result(isa):
    launcher(OP, f"cpu-{isa}")
    launch = import_module("pixeldiff.ops.cpu.gated_residual_norm").launch
    args = Case(torch.bfloat16, 3, 101, 1536).arguments()
    one = launch(*args, isa=native.ISA_CODES[isa], threads=1)
    for threads in (2, 7, 1000):
        many = launch(*args, isa=native.ISA_CODES[isa], threads=threads)
        assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@needs_extension
@pytest.mark.parametrize("isa", native.ISA_CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_writes_nothing_outside_its_rows(dtype, isa):
    launcher(OP, f"cpu-{isa}")
    x, y, gate, weight, scale, shift, eps = args = Case(dtype, 1, 3, 19).arguments()
    outputs = [torch.full((57 + 64,), 7.0, dtype=dtype) for _ in range(2)]
    native.load().gated_residual_norm_cpu(
        x.shape,
        native.DTYPE_CODES[dtype],
        native.rows(x),
        native.rows(y),
        native.vector(gate),
        native.vector(weight),
        native.vector(scale),
        native.vector(shift),
        *(out[32:].data_ptr() for out in outputs),
        eps,
        native.ISA_CODES[isa],
        2,
    )
    for out in outputs:
        assert (out[:32] == 7).all()
        assert (out[32 + 57 :] == 7).all()
    assert max(errors(args, *(out[32:89].view(1, 3, 19) for out in outputs))) <= 1


@needs_extension
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 200)),
    st.integers(0, 3),
    st.sampled_from([1.0, 1e-3, 100.0]),
    st.sampled_from(sorted(native.ISA_CODES)),
)
def test_random_shapes(dtype, vectors, shape, offset, std, isa):
    """Any shape, and rows that start anywhere in memory."""
    code = native.ISA_CODES[isa]
    if not native.load().isa_usable(code):
        return
    B, N, D = shape
    _, _, *rest = Case(dtype, *shape, vectors=vectors).arguments()
    x, y = (std * torch.randn(2, B, N, D + 5)).to(dtype)[..., offset : offset + D]
    launch = import_module("pixeldiff.ops.cpu.gated_residual_norm").launch
    assert max(errors((x, y, *rest), *launch(x, y, *rest, isa=code))) <= 1


# --- the registered op and the public function ----------------------------------------------------


@needs_extension
def test_public_function_runs_the_cpu_kernel():
    *args, eps = Case(torch.bfloat16, 2, 5, 72).arguments()
    launch = import_module("pixeldiff.ops.cpu.gated_residual_norm").launch
    free = gated_residual_norm(*args, eps=eps)
    with pixeldiff.backend("cpu"):
        forced = gated_residual_norm(*args, eps=eps)
    for a, b, c in zip(free, forced, launch(*args, eps), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b, c)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_opcheck(dtype, shift):
    args = Case(dtype, 2, 3, 40, strided=True, shift=shift).arguments()
    torch.library.opcheck(torch.ops.pixeldiff.gated_residual_norm.default, args)


def test_compile_fullgraph_at_two_sizes():
    calls = (Case(torch.bfloat16, 2, n, 72, strided=True).arguments()[:-1] for n in (5, 11))
    check_compiled_like_eager(gated_residual_norm, *calls, eps=EPS)


def test_meta():
    args = Case(torch.bfloat16, 2, 3, 40, strided=True).arguments("meta")
    for out in gated_residual_norm(*args[:-1], eps=EPS):
        assert (out.device.type, out.dtype) == ("meta", torch.bfloat16)
        assert tuple(out.shape) == (2, 3, 40)
        assert out.is_contiguous()


X = torch.zeros(2, 3, 8)
W, V = torch.zeros(8), torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((X, X[:, :2], V, W, V, V), ValueError, "y must be (B, N, D) = (2, 3, 8), got (2, 2, 8)"),
        ((X, X.half(), V, W, V, V), TypeError, "y must have the dtype of x, torch.float32, got"),
        ((X, X, V[:1], W, V, V), ValueError, "gate must be (B, D) = (2, 8), got (1, 8)"),
        ((X, X, V, W, V[:, :7], V), ValueError, "scale must be (B, D) = (2, 8), got (2, 7)"),
        ((X, X, V.long(), W, V, V), TypeError, "gate must be float32, float16 or bfloat16, got"),
    ],
)
def test_bad_arguments(args, error, text):
    with pytest.raises(error) as raised:
        gated_residual_norm(*args)
    assert str(raised.value).startswith("gated_residual_norm: ")
    assert text in str(raised.value)


# --- without a GPU --------------------------------------------------------------------------------


def test_triton_in_interpreter():
    harness.run_in_interpreter(__file__)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_triton_compiles_ahead_of_time(target):
    aot.check_streams(OP, target, aot.widths())


def test_triton_compiles_once_for_all_sizes():
    aot.check_compiles_once(OP, aot.released_sizes(OP))


def test_cuda_compiles_without_spills(tmp_path):
    report = harness.ptxas_report("gated_residual_norm.cu", tmp_path)
    assert report
    for stack, spills, registers in report:
        assert (stack, spills) == (0, 0)
        assert registers <= 128
