"""rms_norm_modulate_fp8: the norm's fp64 oracle, quantised by the rules of e4m3."""

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
    codes,
    implementation,
)
from harness import NAMES
from rules import check_compiled_like_eager, check_repeatable
from test_rms_norm_modulate import EMPTY, EPS, GRID, Case, oracle

from pixeldiff.ops import quantize_rows, rms_norm_modulate, rms_norm_modulate_fp8

OP = "rms_norm_modulate_fp8"
CASES = [replace(c, N=96) if c.N == 512 else c for c in GRID if c.dtype != torch.float16]
CASES.append(Case(torch.float16, 2, 5, 72))
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@each_backend
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_of_the_oracle(case, backend):
    if backend == "triton" and case.N * case.D > 10_000:
        pytest.skip("too large for the interpreter; compiled for real on a GPU")
    launch, device = implementation(OP, backend)
    args = case.arguments(device)
    check_rows(*launch(*args), oracle(*args).cpu())


def test_quantises_what_the_norm_has_not_rounded():
    """Quantising the bf16 result would round twice: some bits differ, and the error grows."""
    args = Case(torch.bfloat16, 2, 96, 1536).arguments()
    q, scale = implementation(OP, "reference")[0](*args)
    twice, _ = quantize_rows(rms_norm_modulate(*args[:-1], eps=EPS))
    assert (codes(q) != codes(twice)).float().mean() > 0.01
    check_rows(q, scale, oracle(*args))


@each_backend
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(shape, backend):
    launch, device = implementation(OP, backend)
    q, scale = launch(*Case(torch.float32, *shape).arguments(device))
    check_rows(q, scale, torch.zeros(shape).double())


@each_backend
@pytest.mark.parametrize("shift", [True, False])
def test_zero_rows(shift, backend):
    """A row of zeros is its shift; without one it stays zero, with scale 1."""
    launch, device = implementation(OP, backend)
    args = Case(torch.bfloat16, 2, 3, 37, shift=shift).arguments(device)
    args[0][1, 1] = 0
    q, scale = launch(*args)
    if shift:
        check_rows(q, scale, oracle(*args).cpu())
    else:
        assert scale[1, 1] == 1
        assert (q[1, 1].float() == 0).all()


@each_backend
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_not_finite_takes_its_row(dtype, bad, backend):
    launch, device = implementation(OP, backend)
    args = Case(dtype, 2, 3, 37).arguments(device)
    args[0][0, 1, 5] = bad
    q, scale = launch(*args)
    rows = (q.float() * scale[..., None]).isnan()
    assert rows[0, 1].all()
    assert rows.sum() == 37


@each_backend
def test_repeats_bitwise_and_leaves_its_inputs(backend):
    launch, device = implementation(OP, backend)
    check_repeatable(launch, *Case(torch.bfloat16, 2, 9, 515).arguments(device))


# --- the registered op and the public function ----------------------------------------------------


@pytest.mark.parametrize("shift", [True, False])
def test_opcheck(shift):
    args = Case(torch.bfloat16, 2, 3, 40, strided=True, shift=shift).arguments()
    torch.library.opcheck(torch.ops.pixeldiff.rms_norm_modulate_fp8.default, args)


def test_compile_fullgraph_at_two_sizes():
    calls = (Case(torch.bfloat16, 2, n, 72, strided=True).arguments()[:-1] for n in (5, 11))
    check_compiled_like_eager(rms_norm_modulate_fp8, *calls, eps=EPS)


def test_meta():
    args = Case(torch.bfloat16, 2, 3, 40, strided=True).arguments("meta")
    q, scale = rms_norm_modulate_fp8(*args[:-1], eps=EPS)
    assert (q.device.type, q.dtype, tuple(q.shape)) == ("meta", E4M3, (2, 3, 40))
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (2, 3))
    assert q.is_contiguous()


def test_bad_arguments():
    x, weight, scale, shift, _ = Case(torch.float32, 2, 3, 8).arguments()
    with pytest.raises(ValueError, match=r"^rms_norm_modulate_fp8: scale must be \(B, D\)"):
        rms_norm_modulate_fp8(x, weight, scale[:1], shift)
    with pytest.raises(RuntimeError, match=r"^rms_norm_modulate_fp8: .* has none; call it under"):
        rms_norm_modulate_fp8(x.requires_grad_(), weight, scale, shift)


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
