"""Argument checks of the public ops: one message form, `op: argument must be ..., got ...`."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import needs_grad

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_float(op: str, **tensors: Tensor | None) -> None:
    """Raise TypeError unless every given tensor is a floating-point one the ops compute in."""
    for name, t in tensors.items():
        if t is not None and t.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} must be float32, float16 or bfloat16, got {t.dtype}")


def check_shape(op: str, name: str, t: Tensor, names: str, want: tuple[int, ...]) -> None:
    """Raise ValueError unless `t.shape == want`. `names` is the symbolic shape, "(B, D)"."""
    if tuple(t.shape) != want:
        raise ValueError(f"{op}: {name} must be {names} = {want}, got {tuple(t.shape)}")


def check_rank(op: str, name: str, t: Tensor, names: str) -> None:
    """Raise ValueError unless `t` has as many axes as `names`, "(B, N, D)"."""
    rank = names.count(",") + 1
    if t.dim() != rank:
        raise ValueError(f"{op}: {name} must be {names}, {rank} axes, got {tuple(t.shape)}")


def check_rows(op: str, name: str, t: Tensor) -> None:
    """Raise ValueError unless `t` holds rows: an axis of them, and the axis within one."""
    if t.dim() < 2:
        raise ValueError(f"{op}: {name} must be (..., D), 2 axes or more, got {tuple(t.shape)}")


def check_last_contiguous(op: str, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.numel() and t.shape[-1] > 1 and t.stride(-1) != 1:
            raise ValueError(
                f"{op}: the last axis of {name} must be contiguous, got strides {t.stride()}; "
                f"call .contiguous()"
            )


def check_device(op: str, first: Tensor, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.device != first.device:
            raise ValueError(f"{op}: {name} must be on {first.device}, got {t.device}")


def check_no_grad(op: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError if autograd would record the call: rounding to e4m3 has no gradient."""
    if needs_grad(*tensors):
        raise RuntimeError(
            f"{op}: an argument requires a gradient, and quantisation has none; call it under "
            f"torch.no_grad(), or train in bf16"
        )
