"""Errors against an fp64 oracle, by the rules of tests/kernels/rules.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pixeldiff.ops.registry import OPS

from .schema import Accuracy
from .work import HALF_SPACING, TWICE_EAGER, Work

EPS32 = torch.finfo(torch.float32).eps
ROWS = 128  # rows of a selective oracle, spread over all of them, the first and the last included


class Judge:
    """Holds the oracle of one call and eager's own error, and judges other results of it.

    Args:
        op, work: the op and its entry.
        args: of the call.
        eager: the reference, run on `args` in their own dtype.
    """

    def __init__(self, op: str, work: Work, args: tuple[Any, ...], eager: Callable) -> None:
        self.work = work
        self.rows = None
        if work.token_axes:
            index, axis = next(iter(work.token_axes.items()))
            count = args[index].shape[axis]
            picks = torch.linspace(0, count - 1, min(count, ROWS), dtype=torch.float64).round()
            self.rows = picks.long().unique().to(args[index].device)
            args = tuple(
                a.index_select(work.token_axes[i], self.rows) if i in work.token_axes else a
                for i, a in enumerate(args)
            )
        self._args = tuple(_double(a) for a in args)
        self._oracle = None if work.oracle else _tuple(OPS[op].reference(*self._args))
        # Eager is run on the selection alone: its rows do not depend on each other.
        self._eager = self._errors(_tuple(eager(*args)))

    def __call__(self, result: Any) -> Accuracy:
        """Judge the result of the whole call."""
        results = _tuple(result)
        if self.rows is not None:
            results = tuple(r.index_select(self.work.out_axis, self.rows) for r in results)
        errors = self._errors(results)
        return Accuracy(
            rule=self.work.rule,
            error=max(e.relative for e in errors),
            eager_error=max(e.relative for e in self._eager),
            of_budget=max(
                of_budget(rule, e, base)
                for rule, e, base in zip(self._rules(errors), errors, self._eager, strict=True)
            ),
        )

    def _rules(self, errors: list[Error]) -> list[str]:
        if self.work.rule != HALF_SPACING:
            return [self.work.rule] * len(errors)
        return [self.work.rest] * (len(errors) - 1) + [HALF_SPACING]

    def _errors(self, results: tuple[Tensor, ...]) -> list[Error]:
        oracle = self._oracle
        if oracle is None:
            oracle = _tuple(self.work.oracle(self._args, tuple(r.double() for r in results)))
        if self.work.rule != HALF_SPACING:
            return [Error(r, o) for r, o in zip(results, oracle, strict=True)]
        *plain, values, scale = results
        *wanted, rows = oracle
        return [
            *(Error(r, o) for r, o in zip(plain, wanted, strict=True)),
            Error(values.double() * scale[..., None], rows, rounding=half_spacing(rows, scale)),
        ]


def half_spacing(oracle: Tensor, scale: Tensor) -> Tensor:
    """Half the distance of neighbouring e4m3 values at `oracle`, in rows of these scales."""
    scale = scale.double()[..., None]
    exponent = torch.frexp(oracle / scale).exponent - 1
    return torch.ldexp(torch.ones_like(oracle), exponent.clamp(min=-6) - 4) * scale


class Error:
    """Largest errors of one tensor. `rounding` is what one rounding of it may be wrong by; default:
    of its dtype."""

    def __init__(self, y: Tensor, oracle: Tensor, rounding: Tensor | None = None) -> None:
        if y.shape != oracle.shape:
            raise ValueError(f"the result is {tuple(y.shape)}, expected {tuple(oracle.shape)}")
        difference = (y.double() - oracle).abs()
        self.largest = oracle.abs().max().item()
        self.absolute = difference.max().item()
        if not math.isfinite(self.absolute):
            raise ArithmeticError("the result holds NaN or infinity where the oracle does not")
        self.slack = 4 * EPS32 * self.largest
        if rounding is None:
            rounding = torch.finfo(y.dtype).eps * oracle.abs()
        self.roundings = (difference / (rounding + self.slack)).max().item()

    @property
    def relative(self) -> float:
        """Largest error over the largest value."""
        return self.absolute / self.largest if self.largest else self.absolute


def of_budget(rule: str, error: Error, eager: Error) -> float:
    """The error over what the rule allows; at most 1 passes."""
    if rule == TWICE_EAGER:
        return error.absolute / (2 * eager.absolute + error.slack)
    return error.roundings


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _tuple(result: Any) -> tuple[Tensor, ...]:
    """The results there are to judge: one that was not asked for is empty."""
    results = (result,) if isinstance(result, Tensor) else tuple(result)
    return tuple(r for r in results if r.numel())
