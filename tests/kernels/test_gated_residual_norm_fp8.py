"""gated_residual_norm_fp8: the residual of gated_residual_norm bit for bit, its norm in e4m3."""

from __future__ import annotations

from dataclasses import replace

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
from test_gated_residual_norm import EMPTY, EPS, GRID, Case, norm_reference

from pixeldiff.ops import gated_residual_norm_fp8

OP = "gated_residual_norm_fp8"
CASES = [replace(c, N=64) if c.N == 384 else c for c in GRID if c.dtype != torch.float16]
CASES.append(Case(torch.float16, 2, 5, 72))
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def oracle(x_new, args):
    """The norm of the residual that was stored, in fp64."""
    *_, weight, scale, shift, eps = args
    vectors = (None if t is None else t.double() for t in (weight, scale, shift))
    return norm_reference(x_new.double(), *vectors, eps).cpu()


@each_backend
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_of_the_oracle(case, backend):
    if backend == "triton" and case.N * case.D > 10_000:
        pytest.skip("too large for the interpreter; compiled for real on a GPU")
    launch, device = implementation(OP, backend)
    args = case.arguments(device)
    x_new, q, scale = launch(*args)
    check_rows(q, scale, oracle(x_new, args))
    assert x_new.is_contiguous()
    x, y, gate, *_ = (None if t is None else t.double() for t in args[:-1])
    assert harness.one_rounding(x_new, x + gate[:, None] * y) <= 1


@each_backend
def test_residual_is_that_of_the_op_without_fp8(backend):
    launch, device = implementation(OP, backend)
    plain, _ = implementation("gated_residual_norm", backend)
    args = Case(torch.bfloat16, 2, 5, 72).arguments(device)
    assert torch.equal(launch(*args)[0], plain(*args)[0])


@each_backend
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(shape, backend):
    launch, device = implementation(OP, backend)
    x_new, q, scale = launch(*Case(torch.float32, *shape).arguments(device))
    assert x_new.shape == shape
    check_rows(q, scale, torch.zeros(shape).double())


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_not_finite_takes_its_row(dtype, backend):
    launch, device = implementation(OP, backend)
    args = Case(dtype, 2, 3, 37).arguments(device)
    args[0][0, 1, 5] = torch.nan
    args[1][1, 2, 36] = -torch.inf
    x_new, q, scale = launch(*args)
    assert (x_new.isnan().sum(), x_new.isinf().sum()) == (1, 1)
    rows = (q.float() * scale[..., None]).isnan()
    assert rows[0, 1].all()
    assert rows[1, 2].all()
    assert rows.sum() == 2 * 37


@each_backend
def test_repeats_bitwise_and_leaves_its_inputs(backend):
    launch, device = implementation(OP, backend)
    check_repeatable(launch, *Case(torch.bfloat16, 2, 9, 515).arguments(device))


# --- the registered op and the public function ----------------------------------------------------


@pytest.mark.parametrize("shift", [True, False])
def test_opcheck(shift):
    args = Case(torch.bfloat16, 2, 3, 40, strided=True, shift=shift).arguments()
    torch.library.opcheck(torch.ops.pixeldiff.gated_residual_norm_fp8.default, args)


def test_compile_fullgraph_at_two_sizes():
    calls = (Case(torch.bfloat16, 2, n, 72, strided=True).arguments()[:-1] for n in (5, 11))
    check_compiled_like_eager(gated_residual_norm_fp8, *calls, eps=EPS)


def test_meta():
    args = Case(torch.bfloat16, 2, 3, 40, strided=True).arguments("meta")
    x_new, q, scale = gated_residual_norm_fp8(*args[:-1], eps=EPS)
    assert (x_new.dtype, q.dtype, scale.dtype) == (torch.bfloat16, E4M3, torch.float32)
    assert (tuple(x_new.shape), tuple(scale.shape)) == ((2, 3, 40), (2, 3))
    assert q.is_contiguous()


def test_bad_arguments():
    x, y, gate, weight, scale, shift, _ = Case(torch.float32, 2, 3, 8).arguments()
    with pytest.raises(ValueError, match=r"^gated_residual_norm_fp8: gate must be \(B, D\)"):
        gated_residual_norm_fp8(x, y, gate[:1], weight, scale, shift)
    with pytest.raises(TypeError, match=r"^gated_residual_norm_fp8: y must have the dtype of x"):
        gated_residual_norm_fp8(x, y.half(), gate, weight, scale, shift)
    with pytest.raises(RuntimeError, match=r"^gated_residual_norm_fp8: .* has none; call it under"):
        gated_residual_norm_fp8(x, y, gate.requires_grad_(), weight, scale, shift)


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
