"""swiglu_fp8: the product's fp64 oracle, quantised by the rules of e4m3."""

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
    implementation,
)
from harness import NAMES
from rules import check_compiled_like_eager, check_repeatable

from pixeldiff.ops import swiglu_fp8

OP = "swiglu_fp8"
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    B: int
    N: int
    F: int
    std: float = 1.0
    fused: bool = False  # halves of one projection

    def __str__(self) -> str:
        name = f"{NAMES[self.dtype]}-B{self.B}-N{self.N}-F{self.F}-std{self.std:g}"
        return name + "-fused" * self.fused

    def halves(self, device: str = "cpu"):
        g = torch.Generator().manual_seed(self.N * 7919 + self.F)
        both = torch.randn(self.B, self.N, 2 * self.F, generator=g) * self.std
        a, b = both.to(device, self.dtype).chunk(2, -1)
        return (a, b) if self.fused else (a.contiguous(), b.contiguous())


def oracle(a, b):
    a, b = a.double().cpu(), b.double().cpu()
    return a / (1 + torch.exp(-a)) * b


SHAPES = [(1, 2, 4096), (3, 7, 257), (1, 1, 1), (5, 1, 16), (1, 13, 341)]
GRID = [
    Case(dtype, *shape, std, fused)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for shape in SHAPES
    for std in (1.0, 1e-3)
    for fused in (False, True)
]


@each_backend
@pytest.mark.parametrize("case", GRID, ids=str)
def test_rows_of_the_oracle(case, backend):
    launch, device = implementation(OP, backend)
    a, b = case.halves(device)
    check_rows(*launch(a, b), oracle(a, b))


@each_backend
@pytest.mark.parametrize("shape", [(6, 37), (2, 3, 1, 37)], ids=str)
def test_any_number_of_axes(shape, backend):
    launch, device = implementation(OP, backend)
    a, b = Case(torch.bfloat16, 2, 3, 37, fused=True).halves(device)
    q, scale = launch(a.view(shape), b.view(shape))
    check_rows(q, scale, oracle(a, b).view(shape))


@each_backend
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_empty(shape, backend):
    launch, device = implementation(OP, backend)
    q, scale = launch(*Case(torch.float32, *shape).halves(device))
    check_rows(q, scale, torch.zeros(shape).double())


@each_backend
def test_saturates_without_nan(backend):
    launch, device = implementation(OP, backend)
    a = torch.tensor([[[-200.0, -60.0, 0.0, 60.0, 200.0]]], device=device)
    b = torch.full_like(a, 2.0)
    check_rows(*launch(a, b), oracle(a, b))


@each_backend
def test_zero_rows_have_scale_one(backend):
    launch, device = implementation(OP, backend)
    a, b = Case(torch.bfloat16, 2, 3, 37).halves(device)
    a[0, 2], b[1, 0] = 0, 0
    q, scale = launch(a, b)
    assert (scale == 1).nonzero().tolist() == [[0, 2], [1, 0]]
    assert (q.float()[scale == 1] == 0).all()


@each_backend
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_finite_takes_its_row(bad, backend):
    launch, device = implementation(OP, backend)
    a, b = Case(torch.bfloat16, 2, 3, 37).halves(device)
    a[0, 1, 5], b[1, 2, 36] = bad, bad
    q, scale = launch(a, b)
    rows = (q.float() * scale[..., None]).isnan()
    assert rows[0, 1].all()
    assert rows[1, 2].all()
    assert rows.sum() == 2 * 37


@each_backend
def test_repeats_bitwise_and_leaves_its_inputs(backend):
    launch, device = implementation(OP, backend)
    check_repeatable(launch, *Case(torch.bfloat16, 2, 9, 515, fused=True).halves(device))


# --- the registered op and the public function ----------------------------------------------------


def test_opcheck():
    args = Case(torch.bfloat16, 2, 3, 40, fused=True).halves()
    torch.library.opcheck(torch.ops.pixeldiff.swiglu_fp8.default, args)


def test_compile_fullgraph_at_two_sizes():
    calls = (Case(torch.bfloat16, 2, n, 72, fused=True).halves() for n in (5, 11))
    check_compiled_like_eager(swiglu_fp8, *calls)


def test_meta():
    a = torch.empty(2, 3, 40, device="meta", dtype=torch.bfloat16)
    q, scale = swiglu_fp8(a, a)
    assert (q.device.type, q.dtype, tuple(q.shape)) == ("meta", E4M3, (2, 3, 40))
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (2, 3))


A = torch.zeros(2, 3, 8)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((A, A[:, :2]), ValueError, "b must be shape of a = (2, 3, 8), got (2, 2, 8)"),
        ((A, A.half()), TypeError, "b must have the dtype of a, torch.float32, got torch.float16"),
        ((A[0, 0], A[0, 0]), ValueError, "a must be (..., D), 2 axes or more, got (8,)"),
        ((A.mT, A.mT), ValueError, "last axis of a must be contiguous"),
        ((A, A.clone().requires_grad_()), RuntimeError, "call it under torch.no_grad()"),
    ],
)
def test_bad_arguments(args, error, text):
    with pytest.raises(error) as raised:
        swiglu_fp8(*args)
    assert str(raised.value).startswith("swiglu_fp8: ")
    assert text in str(raised.value)


# --- without a GPU --------------------------------------------------------------------------------


def test_triton_in_interpreter():
    harness.run_in_interpreter(__file__)


@pytest.mark.parametrize("target", TARGETS)
def test_triton_compiles_ahead_of_time(target):
    check_quantising_kernel(OP, target, [{"dtype": d} for d in (torch.bfloat16, torch.float32)])


def test_triton_refuses_a_device_without_e4m3():
    check_refuses_before_e4m3(OP)


def test_triton_compiles_once_for_all_sizes():
    aot.check_compiles_once(OP, aot.released_sizes(OP))
