"""sigma_gate_norm_fp8: y of sigma_gate_norm bit for bit, its norm by the rules of e4m3."""

from __future__ import annotations

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
from rules import check_compiled_like_eager, check_repeatable
from test_sigma_gate_norm import EPS, Case, norm_reference

from pixeldiff.ops import sigma_gate_norm_fp8

OP = "sigma_gate_norm_fp8"
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_kind = pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-token"])
GRID = [
    Case(dtype, *shape, per_channel, std, strided)
    for dtype in (torch.float32, torch.bfloat16)
    for shape in [(2, 5, 7), (1, 131, 40), (3, 3, 67), (5, 1, 16), (1, 1, 1)]
    for per_channel in (True, False)
    for std in (1.0, 1e-3)
    for strided in (False, True)
]
GRID += [Case(torch.float16, 2, 5, 72, k, shift=False) for k in (True, False)]
GRID += [Case(torch.bfloat16, 2, 3, 768, k) for k in (True, False)]


@each_backend
@pytest.mark.parametrize("case", GRID, ids=str)
def test_rows_of_the_oracle(case, backend):
    launch, device = implementation(OP, backend)
    plain, _ = implementation("sigma_gate_norm", backend)
    args = case.arguments(device)
    y, q, scale = launch(*args)
    assert torch.equal(y, plain(*args)[0])
    assert y.is_contiguous()
    vectors = (None if t is None else t.double() for t in args[4:7])
    check_rows(q, scale, norm_reference(y.double(), *vectors, EPS).cpu())


@each_backend
@each_kind
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_empty(shape, per_channel, backend):
    launch, device = implementation(OP, backend)
    y, q, scale = launch(*Case(torch.float32, *shape, per_channel).arguments(device))
    assert (y.shape, y.dtype) == (shape, torch.float32)
    check_rows(q, scale, torch.zeros(shape).double())


@each_backend
@each_kind
def test_not_finite_takes_its_row(per_channel, backend):
    launch, device = implementation(OP, backend)
    args = Case(torch.bfloat16, 2, 3, 37, per_channel).arguments(device)
    args[1][0, 1, 5] = torch.nan
    args[1][0, 2, 36] = -torch.inf
    _, q, scale = launch(*args)
    rows = (q.float() * scale[..., None]).isnan()
    assert rows.all(-1).tolist() == [[False, True, True], [False, False, False]]
    assert rows.sum() == 2 * 37


@each_backend
@each_kind
def test_repeats_bitwise_and_leaves_its_inputs(per_channel, backend):
    launch, device = implementation(OP, backend)
    check_repeatable(launch, *Case(torch.bfloat16, 2, 9, 67, per_channel).arguments(device))


# --- the registered op and the public function ----------------------------------------------------


@each_kind
def test_opcheck(per_channel):
    args = Case(torch.bfloat16, 2, 3, 40, per_channel, strided=True).arguments()
    torch.library.opcheck(torch.ops.pixeldiff.sigma_gate_norm_fp8.default, args)


def test_compile_fullgraph_at_two_sizes():
    calls = (Case(torch.bfloat16, 2, n, 72, False).arguments()[:-1] for n in (5, 11))
    check_compiled_like_eager(sigma_gate_norm_fp8, *calls, eps=EPS)


def test_meta():
    args = Case(torch.bfloat16, 2, 3, 40, True).arguments("meta")
    y, q, scale = sigma_gate_norm_fp8(*args[:-1], eps=EPS)
    assert (y.dtype, q.dtype, scale.dtype) == (torch.bfloat16, E4M3, torch.float32)
    assert (tuple(q.shape), tuple(scale.shape)) == ((2, 3, 40), (2, 3))


def test_bad_arguments():
    *args, _ = Case(torch.float32, 2, 3, 8, True).arguments()
    with pytest.raises(ValueError, match=r"^sigma_gate_norm_fp8: scale must be \(B, D\)"):
        sigma_gate_norm_fp8(*args[:5], args[5][:1], args[6])
    with pytest.raises(RuntimeError, match=r"^sigma_gate_norm_fp8: .* has none; call it under"):
        sigma_gate_norm_fp8(args[0].requires_grad_(), *args[1:])


# --- without a GPU --------------------------------------------------------------------------------


def test_triton_in_interpreter():
    harness.run_in_interpreter(__file__)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("gates", [1536, 1])
def test_triton_compiles_ahead_of_time(gates, target):
    check_quantising_kernel(OP, target, [{"gates": gates}], launches=1 + (gates > 1))


def test_triton_refuses_a_device_without_e4m3():
    check_refuses_before_e4m3(OP)
