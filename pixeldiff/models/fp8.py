"""Linear layers in e4m3, and the rows that go between the ops that quantise and those layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.examples import arguments


@dataclass(frozen=True)
class Rows:
    """A tensor (..., D) as e4m3 values and a scale for each row, for `Fp8Linear` alone.

    Its size, device, dtype, indexing and flattening (of all axes but the last) are those of the
    tensor it stands for.
    """

    values: Tensor  # (..., D) e4m3
    scale: Tensor  # (...) fp32
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        return cls(*ops.quantize_rows(x), x.dtype)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    def __getitem__(self, index: Any) -> Rows:
        return Rows(self.values[index], self.scale[index], self.dtype)

    def flatten(self, first: int, last: int) -> Rows:
        if (first, last) != (0, -2):
            raise ValueError(f"Rows.flatten: rows stay whole: (0, -2), got ({first}, {last})")
        return Rows(self.values.flatten(0, -2), self.scale.flatten(), self.dtype)

    def multiplied(self) -> Tensor:
        """values * scale, in `dtype`."""
        return (self.values.float() * self.scale[..., None]).to(self.dtype)


class Fp8Linear(nn.Module):
    """A linear layer of which weight and input are e4m3 with a scale a row.

    Made of a trained layer by `of` or by `quantize_`; it is not trained itself. `.to(dtype)`
    changes its bias and leaves weight and scales as they are.

    Args:
        weight: (out, in) e4m3.
        weight_scale: (out,) fp32.
        bias: (out,), or None.
    """

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear) -> Fp8Linear:
        """The same layer quantised; `linear` is left alone, its bias is shared."""
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(*ops.quantize_rows(linear.weight), bias)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor | Rows) -> Tensor:
        """(..., in) -> (..., out) in the dtype of x."""
        return product(x, self.weight, self.weight_scale, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        # As integers: a change of dtype leaves those alone, a change of device moves them.
        weight = fn(self.weight.data.view(torch.uint8)).view(self.weight.dtype)
        scale = fn(self.weight_scale.data.view(torch.int32)).view(self.weight_scale.dtype)
        bias = None if self.bias is None else fn(self.bias.data)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return self


def product(x: Tensor | Rows, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x times the transpose of weight * scale, for x that is quantised or still is to be."""
    rows = Rows.of(x) if isinstance(x, Tensor) else x
    return ops.fp8_linear(rows.values, rows.scale, weight, scale, bias, out_dtype=rows.dtype)


@torch.no_grad()
def quantize_(module: nn.Module, *names: str) -> None:
    """Replace linear layers, by name, with `Fp8Linear`, freeing one before the next is made.

    Raises:
        TypeError: one of them is no plain nn.Linear.
    """
    for name in names:
        linear = module.get_submodule(name)
        if type(linear) is Fp8Linear:
            continue
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"quantize_: {name} must be a torch.nn.Linear, got {type(linear).__name__}"
            )
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, Fp8Linear.of(linear))
        del linear


def why_not(device: torch.device) -> str | None:
    """Why e4m3 layers cannot be used on `device`, or None.

    The CPU takes them, slowly: it multiplies in fp32. That is for measuring their error.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"runs on cuda and cpu, not on {device.type}"
    reasons = ops.explain("fp8_linear", *arguments("fp8_linear", device, torch.bfloat16))
    fused = [reason for backend, reason in reasons if backend != "reference"]
    return None if None in fused else "; ".join(fused)


__all__ = ["Fp8Linear", "Rows", "product", "quantize_", "why_not"]
