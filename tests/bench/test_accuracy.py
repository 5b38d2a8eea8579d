"""The errors in result rows are those of tests/kernels/rules.py, on the right side of one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from bench.accuracy import EPS32, Error, Judge, of_budget
from bench.kernels import WORK
from bench.work import ONE_ROUNDING, TWICE_EAGER
from pixeldiff.ops.examples import Geometry, arguments
from pixeldiff.ops.registry import OPS

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import rules

ORACLE = torch.linspace(-3, 5, 97, dtype=torch.float64)
MANY = Geometry(grid=(12, 20), text=7, width=96, heads=3, head_dim=32, patch=4, pixel=8, attn=48)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def passes(check, *args) -> bool:
    try:
        check(*args)
    except AssertionError:
        return False
    return True


@DTYPES
@pytest.mark.parametrize("factor", [0.3, 0.97, 1.03, 2.0])
def test_one_rounding_is_judged_as_the_tests_judge_it(dtype, factor):
    """An error of `factor` budgets at one element, as far as the dtype can express it."""
    y = ORACLE.clone()
    y[40] += factor * (torch.finfo(dtype).eps * abs(y[40]) + 4 * EPS32 * 5)
    # The dtype of the rule is that of the result: keep the exact values in a wider tensor.
    error = Error(y, ORACLE)
    error.roundings = ((y - ORACLE).abs() / _budget(dtype)).max().item()
    ratio = of_budget(ONE_ROUNDING, error, error)
    assert ratio == pytest.approx(factor, rel=1e-3)
    assert passes(rules.assert_one_rounding, y, ORACLE.numpy(), dtype) == (ratio <= 1)


def _budget(dtype):
    return torch.finfo(dtype).eps * ORACLE.abs() + 4 * EPS32 * ORACLE.abs().max()


@DTYPES
def test_the_budget_is_that_of_the_dtype_of_the_result(dtype):
    y = ORACLE.to(dtype)
    assert Error(y, ORACLE).roundings == pytest.approx(
        ((y.double() - ORACLE).abs() / _budget(dtype)).max().item()
    )
    assert 0 < Error(y, ORACLE).roundings <= 1


@pytest.mark.parametrize("factor", [0.5, 1.9, 2.1])
def test_twice_eager_is_judged_as_the_tests_judge_it(factor):
    eager, y = ORACLE.clone(), ORACLE.clone()
    eager[3] += 0.01
    y[60] -= 0.01 * factor
    ratio = of_budget(TWICE_EAGER, Error(y, ORACLE), Error(eager, ORACLE))
    assert passes(rules.assert_within_twice_eager, y, eager, ORACLE.numpy()) == (ratio <= 1)
    assert (ratio <= 1) == (factor <= 2)


@pytest.mark.parametrize("op", sorted(OPS))
def test_the_reference_passes_and_a_wrong_result_does_not(op):
    args = arguments(op, "cpu", torch.bfloat16, MANY)
    judge = Judge(op, WORK[op], args, OPS[op].reference)
    result = OPS[op].reference(*args)
    right = judge(result)
    assert 0 < right.of_budget <= 1
    assert right.error == pytest.approx(right.eager_error)
    one = isinstance(result, torch.Tensor)
    wrong = result.clone() if one else tuple(r.clone() for r in result)
    last = wrong if one else [r for r in wrong if r.numel()][-1]  # the others were not wanted
    last.view(-1)[-1] += last.abs().max()
    judged = judge(wrong)
    assert judged.of_budget > 1
    assert judged.error > 0.5


def test_rows_of_a_selective_oracle_reach_from_first_to_last():
    args = arguments("joint_attention", "cpu", torch.float32, MANY)
    rows = Judge("joint_attention", WORK["joint_attention"], args, OPS["joint_attention"].reference)
    assert rows.rows[0] == 0
    assert rows.rows[-1] == args[0].shape[1] - 1
    assert len(rows.rows) == 128


def test_a_result_that_is_not_finite_is_an_error():
    y = ORACLE.clone()
    y[5] = float("nan")
    with pytest.raises(ArithmeticError, match="holds NaN or infinity"):
        Error(y, ORACLE)


def test_another_shape_is_an_error_not_a_broadcast():
    with pytest.raises(ValueError, match=r"the result is \(1,\), expected \(97,\)"):
        Error(torch.ones(1), ORACLE)
