"""rms_norm_modulate: every backend against the definition in fp64, rule "one rounding"."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module

import aot
import harness
import pytest
import torch
from harness import BACKENDS, NAMES, launcher, one_rounding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rules import check_compiled_like_eager

import pixeldiff
from pixeldiff import native
from pixeldiff.ops import rms_norm_modulate

OP = "rms_norm_modulate"
reference = import_module("pixeldiff.ops.rms_norm_modulate").reference
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
    vectors: torch.dtype = torch.float32  # of weight, scale and shift
    shift: bool = True

    def __str__(self) -> str:
        name = f"{NAMES[self.dtype]}-B{self.B}-N{self.N}-D{self.D}-std{self.std:g}"
        name += f"-{NAMES[self.vectors]}vectors"
        return name + "-strided" * self.strided + "-noshift" * (not self.shift)

    def arguments(self, device: str = "cpu"):
        g = torch.Generator().manual_seed(self.N * 7919 + self.D)
        B, N, D = self.B, self.N, self.D
        if self.strided:  # middle chunk of a fused projection, batch and token axes swapped
            x = torch.randn(N, B, 3 * D, generator=g).mul(self.std).to(device, self.dtype)
            x = x.transpose(0, 1)[..., D : 2 * D]
            vectors = torch.randn(B, 6 * D, generator=g).to(device, self.vectors)
            scale, shift = vectors[:, D : 2 * D], vectors[:, 3 * D : 4 * D]
        else:
            x = torch.randn(B, N, D, generator=g).mul(self.std).to(device, self.dtype)
            scale, shift = torch.randn(2, B, D, generator=g).to(device, self.vectors)
        weight = (1 + 0.1 * torch.randn(D, generator=g)).to(device, self.vectors)
        return x, weight, scale, shift if self.shift else None, EPS


def oracle(x, weight, scale, shift, eps):
    return reference(*(None if t is None else t.double() for t in (x, weight, scale, shift)), eps)


# The released width is 1536; rows are independent, so 512 of the 16384 tokens of a 2048 x 2048
# picture suffice. Primes, size 1, the shortest tails, and an odd width that defeats vector loads.
# 768 is the narrowest that Triton takes in three pieces.
SHAPES = [
    *((2, 512, 1536), (2, 3, 768), (3, 7, 257), (1, 1, 1)),
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
    y = launch(*args)
    assert y.dtype == case.dtype
    assert y.is_contiguous()
    assert one_rounding(y, oracle(*args)) <= 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(shape, backend):
    launch, device = launcher(OP, backend)
    y = launch(*Case(torch.float32, *shape).arguments(device))
    assert y.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_not_finite(dtype, backend):
    """A NaN takes its row; an infinity makes itself NaN and the rest of its row the shift."""
    launch, device = launcher(OP, backend)
    x, *rest = Case(dtype, 2, 3, 37).arguments(device)
    x[0, 1, 5] = torch.nan
    x[1, 2, 36] = -torch.inf
    y = launch(x, *rest)
    want = reference(x, *rest)
    assert torch.equal(y.isnan(), want.isnan())
    assert y.isnan().sum() == 38
    assert torch.allclose(y.float(), want.float(), rtol=2e-2, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bitwise(backend):
    launch, device = launcher(OP, backend)
    args = Case(torch.bfloat16, 2, 9, 515).arguments(device)
    assert torch.equal(launch(*args), launch(*args))


@needs_extension
@pytest.mark.parametrize("isa", native.ISA_CODES)
def test_threads_do_not_change_the_result(isa):
    launcher(OP, f"cpu-{isa}")
    launch = import_module("pixeldiff.ops.cpu.rms_norm_modulate").launch
    args = Case(torch.bfloat16, 3, 101, 1536).arguments()
    one = launch(*args, isa=native.ISA_CODES[isa], threads=1)
    for threads in (2, 7, 1000):
        assert torch.equal(one, launch(*args, isa=native.ISA_CODES[isa], threads=threads))


@needs_extension
def test_concurrent_callers():
    cases = [Case(torch.float32, 2, 40 + i, 1536) for i in range(4)]
    launch = import_module("pixeldiff.ops.cpu.rms_norm_modulate").launch
    inputs = [case.arguments() for case in cases]
    want = [launch(*args, threads=1) for args in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got in [list(pool.map(lambda a: launch(*a), inputs)) for _ in range(5)]:
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@needs_extension
@pytest.mark.parametrize("isa", native.ISA_CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_writes_nothing_outside_its_rows(dtype, isa):
    launcher(OP, f"cpu-{isa}")
    x, weight, scale, shift, eps = Case(dtype, 1, 3, 19).arguments()
    buffer = torch.full((3 * 19 + 64,), 7.0, dtype=dtype)
    native.load().rms_norm_modulate_cpu(
        x.shape,
        native.DTYPE_CODES[dtype],
        native.rows(x),
        native.vector(weight),
        native.vector(scale),
        native.vector(shift),
        buffer[32:].data_ptr(),
        eps,
        native.ISA_CODES[isa],
        2,
    )
    assert (buffer[:32] == 7).all()
    assert (buffer[32 + 57 :] == 7).all()
    assert one_rounding(buffer[32:89].view(1, 3, 19), oracle(x, weight, scale, shift, eps)) <= 1


@needs_extension
def test_offsets_past_two_to_the_31():
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16)  # pages that are not touched cost nothing
    x = base.as_strided((2, 1, 64), (2**31, 64, 1))
    x.copy_(torch.randn(2, 1, 64))
    args = (x, *Case(torch.bfloat16, 2, 1, 64).arguments()[1:])
    launch = import_module("pixeldiff.ops.cpu.rms_norm_modulate").launch
    assert one_rounding(launch(*args), oracle(*args)) <= 1


@needs_extension
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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
    _, weight, scale, shift, eps = Case(dtype, *shape, vectors=vectors).arguments()
    x = (std * torch.randn(B, N, D + 5)).to(dtype)[..., offset : offset + D]
    launch = import_module("pixeldiff.ops.cpu.rms_norm_modulate").launch
    y = launch(x, weight, scale, shift, eps, isa=code)
    assert one_rounding(y, oracle(x, weight, scale, shift, eps)) <= 1


# --- the registered op and the public function ----------------------------------------------------


@needs_extension
@pytest.mark.parametrize("case", [GRID[0], Case(torch.bfloat16, 2, 5, 72, shift=False)], ids=str)
def test_public_function_runs_the_cpu_kernel(case):
    x, weight, scale, shift, eps = case.arguments()
    launch = import_module("pixeldiff.ops.cpu.rms_norm_modulate").launch
    free = rms_norm_modulate(x, weight, scale, shift, eps=eps)
    with pixeldiff.backend("cpu"):
        forced = rms_norm_modulate(x, weight, scale, shift, eps=eps)
    assert torch.equal(free, forced)
    assert torch.equal(forced, launch(x, weight, scale, shift, eps))


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_opcheck(dtype, shift):
    args = Case(dtype, 2, 3, 40, strided=True, shift=shift).arguments()
    torch.library.opcheck(torch.ops.pixeldiff.rms_norm_modulate.default, args)


def test_compile_fullgraph_at_two_sizes():
    calls = (Case(torch.bfloat16, 2, n, 72, strided=True).arguments()[:-1] for n in (5, 11))
    check_compiled_like_eager(rms_norm_modulate, *calls, eps=EPS)


def test_meta():
    args = Case(torch.bfloat16, 2, 3, 40, strided=True).arguments("meta")
    y = rms_norm_modulate(*args[:4], eps=EPS)
    assert (y.device.type, y.dtype, tuple(y.shape)) == ("meta", torch.bfloat16, (2, 3, 40))
    assert y.is_contiguous()


def test_gradient_goes_through_the_reference():
    x, weight, scale, shift, eps = Case(torch.float32, 2, 3, 8).arguments()
    inputs = [t.clone().requires_grad_() for t in (x, weight, scale, shift)]
    rms_norm_modulate(*inputs, eps=eps).square().sum().backward()
    want = [t.clone().requires_grad_() for t in (x, weight, scale, shift)]
    reference(*want, eps).square().sum().backward()
    for a, b in zip(inputs, want, strict=True):
        assert torch.equal(a.grad, b.grad)


X = torch.zeros(2, 3, 8)
W, V = torch.zeros(8), torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((X, W, torch.zeros(2, 9), V), ValueError, "scale must be (B, D) = (2, 8), got (2, 9)"),
        ((X, torch.zeros(9), V, V), ValueError, "weight must be (D,) = (8,), got (9,)"),
        ((X, W, V, torch.zeros(1, 8)), ValueError, "shift must be (B, D) = (2, 8), got (1, 8)"),
        ((X[0], W, V, V), ValueError, "x must be (B, N, D), 3 axes, got (3, 8)"),
        ((X.int(), W, V, V), TypeError, "x must be float32, float16 or bfloat16, got torch.int32"),
        ((X.mT, torch.zeros(3), V[:, :3], None), ValueError, "last axis of x must be contiguous"),
        ((X, W.to("meta"), V, V), ValueError, "weight must be on cpu, got meta"),
    ],
)
def test_bad_arguments(args, error, text):
    with pytest.raises(error) as raised:
        rms_norm_modulate(*args)
    assert str(raised.value).startswith("rms_norm_modulate: ")
    assert text in str(raised.value)


@needs_extension
def test_forced_cpu_refuses_fp64():
    text = r'rms_norm_modulate\(backend="cpu"\): takes float32, bfloat16 and float16, got .*float64'
    with pixeldiff.backend("cpu"), pytest.raises(NotImplementedError, match=text):
        rms_norm_modulate(X.double(), W, V, V)


@needs_extension
def test_unknown_instruction_set_is_refused():
    launch = import_module("pixeldiff.ops.cpu.rms_norm_modulate").launch
    with pytest.raises(ValueError, match="instruction set 9 was not compiled in"):
        launch(X, W, V, V, EPS, isa=9)


# --- without a GPU --------------------------------------------------------------------------------


def test_triton_in_interpreter():
    harness.run_in_interpreter(__file__)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_triton_compiles_ahead_of_time(target):
    aot.check_streams(OP, target, aot.widths())


@pytest.mark.parametrize("target", aot.TARGETS)
def test_triton_compiles_ahead_of_time_as_l2p_calls_it(target):
    """No shift, a scale in fp32."""
    module = pytest.importorskip("pixeldiff.triton_kernels.rms_norm_modulate")
    x, weight, scale, _, eps = aot.released(OP, system="l2p")
    args = (x, weight, scale.float(), None, eps)
    (kernel,) = aot.compile_launch(lambda: module.launch(*args), target)
    aot.assert_lean(kernel)
    assert aot.narrow(kernel) == []


def test_triton_compiles_once_for_all_sizes():
    aot.check_compiles_once(OP, aot.released_sizes(OP))


def test_cuda_compiles_without_spills(tmp_path):
    report = harness.ptxas_report("rms_norm_modulate.cu", tmp_path)
    assert report
    for stack, spills, registers in report:
        assert (stack, spills) == (0, 0)
        assert registers <= 128


def test_import_without_triton_or_extension():
    """A process in which neither exists still imports, and computes by the definition."""
    code = """
import sys
sys.modules["triton"] = None
sys.modules["pixeldiff._C"] = None
import torch, pixeldiff
from pixeldiff import native
from pixeldiff.ops import explain, rms_norm_modulate
x, w, v = torch.randn(2, 3, 8), torch.ones(8), torch.zeros(2, 8)
y = rms_norm_modulate(x, w, v, v)
assert torch.allclose(y, torch.nn.functional.rms_norm(x, (8,), eps=1e-6), atol=1e-5)
assert "pixeldiff._C was not built" in native.why_not(), native.why_not()
reasons = dict(explain("rms_norm_modulate", x, w, v, v, 1e-6))
assert reasons["reference"] is None and all(reasons[b] for b in ("cuda", "triton", "cpu")), reasons
try:
    native.load()
except ImportError as e:
    assert "PIXELDIFF_REQUIRE_EXT" in str(e)
else:
    raise AssertionError("load() did not raise")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
