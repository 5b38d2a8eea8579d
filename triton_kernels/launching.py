"""What every Triton launch asks first: can the kernel run here, and what device is it for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MINIMUM = (8, 0)

_compiling_for: ContextVar[tuple[int, int] | None] = ContextVar("compiling_for", default=None)


@triton.jit
def _probe_kernel(x_ptr):
    tl.store(x_ptr, 0)


# TRITON_INTERPRET=1 when Triton was imported: kernels then run as Python, on CPU tensors.
INTERPRETED = not isinstance(_probe_kernel, triton.runtime.JITFunction)


@contextlib.contextmanager
def compiling_for(capability: tuple[int, int]) -> Iterator[None]:
    """Launches inside choose their configs for a device of this capability, not the tensors' own.

    For compiling without that device: tensors on "meta" then count as its tensors.
    """
    token = _compiling_for.set(capability)
    try:
        yield
    finally:
        _compiling_for.reset(token)


def capability(x: Tensor) -> tuple[int, int]:
    """Compute capability of the device that a launch on `x` runs on, or is compiled for."""
    chosen = _compiling_for.get()
    if chosen is not None:
        return chosen
    if x.device.type != "cuda":
        return MINIMUM  # the interpreter
    return torch.cuda.get_device_capability(x.device)


def why_not(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    """Why no Triton kernel can read these tensors here, or None. None among them is no tensor.

    All must be of one of `dtypes`, with a contiguous last axis, on a CUDA device of capability 8.0
    or more (in Triton's interpreter, on any device).
    """
    given = [t for t in tensors if t is not None]
    for t in given:
        if t.dtype not in dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            return f"takes {names}, got {t.dtype}"
        if t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1:
            return f"needs a contiguous last axis, got strides {tuple(t.stride())}"
    return why_not_device(*given)


def why_not_device(*tensors: Tensor) -> str | None:
    """Why no Triton kernel can run on the device of these tensors, or None."""
    if INTERPRETED or _compiling_for.get() is not None:
        return None
    for t in tensors:
        if t.device.type != "cuda":
            return f"runs on cuda, the tensors are on {t.device}"
    found = torch.cuda.get_device_capability(tensors[0].device)
    if found < MINIMUM:
        return f"needs compute capability 8.0, this device is {found[0]}.{found[1]}"
    return None
