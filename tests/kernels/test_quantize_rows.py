"""quantize_rows: bit for bit an emulation that knows no conversion, and the rules of e4m3."""

from __future__ import annotations

from dataclasses import dataclass

import aot
import harness
import pytest
import torch
from e4m3_rules import (
    BACKENDS,
    E4M3,
    TARGETS,
    check_quantising_kernel,
    check_refuses_before_e4m3,
    check_rows,
    codes,
    implementation,
    nearest,
)
from harness import NAMES
from rules import check_compiled_like_eager, check_repeatable

import pixeldiff
from pixeldiff.ops import quantize_rows

OP = "quantize_rows"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    B: int
    N: int
    D: int
    std: float = 1.0
    strided: bool = False

    def __str__(self) -> str:
        name = f"{NAMES[self.dtype]}-B{self.B}-N{self.N}-D{self.D}-std{self.std:g}"
        return name + "-strided" * self.strided

    def rows(self, device: str = "cpu") -> torch.Tensor:
        g = torch.Generator().manual_seed(self.N * 7919 + self.D)
        if self.strided:  # the image rows of a joint buffer, batch and token axes swapped
            x = torch.randn(self.N + 3, self.B, 2 * self.D, generator=g) * self.std
            return x.to(device, self.dtype).transpose(0, 1)[:, 3:, self.D :]
        x = torch.randn(self.B, self.N, self.D, generator=g) * self.std
        return x.to(device, self.dtype)


# A few of the released network's 16384 rows of 1536; primes, size 1, short tails, odd widths.
SHAPES = [(1, 3, 1536), (3, 7, 257), (1, 1, 1), (5, 1, 16), (1, 13, 31), (2, 3, 1000)]
GRID = [
    Case(dtype, *shape, std, strided)
    for dtype in DTYPES
    for shape in SHAPES
    for std in (1.0, 1e-3)
    for strided in (False, True)
]
EMPTY = [(0, 3, 8), (2, 0, 8), (2, 3, 0)]


@each_backend
@pytest.mark.parametrize("case", GRID, ids=str)
def test_nearest_e4m3_bit_for_bit(case, backend):
    launch, device = implementation(OP, backend)
    x = case.rows(device)
    q, scale = launch(x)
    check_rows(q, scale, x.cpu().double())
    # The same operations in the same order, each rounded once to fp32.
    want = x.cpu().float().abs().amax(-1) / 448
    assert torch.equal(scale.cpu(), want)
    assert torch.equal(codes(q), nearest((x.cpu().float() * (1 / want)[..., None]).double()))


@each_backend
def test_every_e4m3_value_and_every_tie(backend):
    """All 254 finite values survive, and the middle between two neighbours goes to the even one."""
    launch, device = implementation(OP, backend)
    values = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    middles = (values[1:] + values[:-1]) / 2
    signed = torch.cat([values, -values, middles, -middles])  # largest 448: the scale is 1
    q, scale = launch(signed.view(1, 1, -1).to(device))
    assert scale.item() == 1
    assert torch.equal(codes(q)[0, 0], nearest(signed.double()))
    even = torch.arange(126) + torch.arange(126) % 2
    assert torch.equal(codes(q)[0, 0, 254 : 254 + 126], even.to(torch.uint8))


@each_backend
def test_random_bits(backend):
    """Any fp32 magnitudes within a row, 60 binades apart."""
    launch, device = implementation(OP, backend)
    g = torch.Generator().manual_seed(3)
    exponent = torch.randint(-40, 20, (1, 40, 301), generator=g)
    x = torch.ldexp(torch.randn(1, 40, 301, generator=g), exponent)
    q, scale = launch(x.to(device))
    want = x.abs().amax(-1) / 448
    assert torch.equal(scale.cpu(), want)
    assert torch.equal(codes(q), nearest((x * (1 / want)[..., None]).double()))


@each_backend
@pytest.mark.parametrize("shape", [(6, 37), (2, 3, 1, 37)], ids=str)
def test_any_number_of_axes(shape, backend):
    launch, device = implementation(OP, backend)
    x = Case(torch.bfloat16, 2, 3, 37).rows(device)
    q, scale = launch(x.view(shape))
    check_rows(q, scale, x.cpu().double().view(shape))


@each_backend
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(shape, backend):
    launch, device = implementation(OP, backend)
    q, scale = launch(torch.zeros(shape, device=device))
    check_rows(q, scale, torch.zeros(shape).double())


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_zero_rows_have_scale_one(dtype, backend):
    launch, device = implementation(OP, backend)
    x = Case(dtype, 2, 3, 37).rows(device)
    x[1, 1] = 0
    q, scale = launch(x)
    assert (scale == 1).nonzero().tolist() == [[1, 1]]
    assert (codes(q)[1, 1] == 0).all()


@each_backend
def test_tiny_rows_keep_an_ordinary_scale(backend):
    """Below 448 times the smallest normal fp32 the scale stops shrinking; 1 / scale is finite."""
    launch, device = implementation(OP, backend)
    smallest = torch.finfo(torch.float32).smallest_normal
    x = torch.tensor([[[1e-37, -3e-37, 0.0], [smallest, 1e-45, 0.0], [1e-36, 5e-36, 6e-36]]])
    q, scale = launch(x.to(device))
    want = (x.abs().amax(-1) / 448).clamp(min=smallest)
    assert torch.equal(scale.cpu(), want)
    assert torch.equal(codes(q), nearest((x * (1 / want)[..., None]).double()))
    assert codes(q)[0, 1].tolist() == [0x38, 0, 0]  # 1.0, and what is below half a spacing


@each_backend
def test_large_rows(backend):
    launch, device = implementation(OP, backend)
    x = torch.tensor([[[3.4e38, -3.4e38, 1e38, 1.0]]])
    q, scale = launch(x.to(device))
    check_rows(q, scale, x.double())


@each_backend
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_not_finite_takes_its_row(dtype, bad, backend):
    """Multiplied out, the row is NaN and the others are as without it."""
    launch, device = implementation(OP, backend)
    x = Case(dtype, 2, 3, 37).rows(device)
    clean_q, clean_scale = launch(x)
    x[0, 1, 36] = bad
    q, scale = launch(x)
    assert not scale[0, 1].isfinite()
    assert (q[0, 1].float() * scale[0, 1]).isnan().all()
    others = torch.ones(2, 3, dtype=torch.bool)
    others[0, 1] = False
    assert torch.equal(codes(q)[others], codes(clean_q)[others])
    assert torch.equal(scale.cpu()[others], clean_scale.cpu()[others])


@each_backend
def test_repeats_bitwise_and_leaves_its_input(backend):
    launch, device = implementation(OP, backend)
    check_repeatable(launch, Case(torch.bfloat16, 2, 9, 515).rows(device))


# --- the registered op and the public function ----------------------------------------------------


def test_opcheck():
    x = Case(torch.bfloat16, 2, 3, 40, strided=True).rows()
    torch.library.opcheck(torch.ops.pixeldiff.quantize_rows.default, (x,))


def test_compile_fullgraph_at_two_sizes():
    calls = ((Case(torch.bfloat16, 2, n, 72, strided=True).rows(),) for n in (5, 11))
    check_compiled_like_eager(quantize_rows, *calls)


def test_meta():
    q, scale = quantize_rows(torch.empty(2, 3, 40, device="meta", dtype=torch.bfloat16))
    assert (q.device.type, q.dtype, tuple(q.shape)) == ("meta", E4M3, (2, 3, 40))
    assert (scale.device.type, scale.dtype, tuple(scale.shape)) == ("meta", torch.float32, (2, 3))


X = torch.zeros(2, 3, 8)


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (X[0, 0], ValueError, "x must be (..., D), 2 axes or more, got (8,)"),
        (X.int(), TypeError, "x must be float32, float16 or bfloat16, got torch.int32"),
        (X.to(E4M3), TypeError, "x must be float32, float16 or bfloat16, got torch.float8_e4m3fn"),
        (X.mT, ValueError, "last axis of x must be contiguous"),
        (X.clone().requires_grad_(), RuntimeError, "call it under torch.no_grad()"),
    ],
)
def test_bad_arguments(x, error, text):
    with pytest.raises(error) as raised:
        quantize_rows(x)
    assert str(raised.value).startswith("quantize_rows: ")
    assert text in str(raised.value)


def test_forced_triton_says_why_it_cannot_run_on_a_cpu():
    pytest.importorskip("triton")
    if harness.INTERPRETER:
        pytest.skip("the interpreter runs on a CPU")
    with (
        pixeldiff.backend("triton"),
        pytest.raises(NotImplementedError, match="runs on cuda, the tensors are on cpu"),
    ):
        quantize_rows(X)


# --- without a GPU --------------------------------------------------------------------------------


def test_triton_in_interpreter():
    harness.run_in_interpreter(__file__)


@pytest.mark.parametrize("target", TARGETS)
def test_triton_compiles_ahead_of_time(target):
    check_quantising_kernel(OP, target, aot.widths())


def test_triton_refuses_a_device_without_e4m3():
    check_refuses_before_e4m3(OP)


def test_triton_compiles_once_for_all_sizes():
    aot.check_compiles_once(OP, aot.released_sizes(OP))
