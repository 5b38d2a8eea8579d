"""Loader of `pixeldiff._C`, the compiled kernels, and what it was built with.

The extension is optional: without it every op runs in PyTorch (and Triton on a GPU). Nothing here
raises on import; `why_not()` says why the extension is absent and `load()` raises with that reason.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # before _C: both then share one OpenMP runtime and its threads
from torch import Tensor

# Codes of csrc/dtype.h and csrc/cpu/isa.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ISA_CODES = {"portable": 0, "avx2": 1, "avx512": 2, "avx512_bf16": 3}

# Of csrc/interface.h: what the functions of the extension are called and take.
INTERFACE = 2

_STATUS_FILE = Path(__file__).with_name("_native_status.json")  # written by setup.py


@functools.cache
def _import() -> tuple[ModuleType | None, str | None]:
    """(module, None) or (None, reason)."""
    try:
        module = importlib.import_module("pixeldiff._C")
    except ModuleNotFoundError as e:
        if e.name not in ("pixeldiff._C", None):
            raise
        return None, _why_not_built()
    except ImportError as e:
        return None, f"pixeldiff._C was built but cannot be loaded: {e}"
    reason = _why_not_these_sources(module)
    return (module, None) if reason is None else (None, reason)


def _why_not_these_sources(module: ModuleType) -> str | None:
    found = getattr(module, "INTERFACE", 0)  # 0: from before there was a number
    if found == INTERFACE:
        return None
    return (
        f"pixeldiff._C was built from {'older' if found < INTERFACE else 'newer'} sources than "
        f"this package (interface {found}, not {INTERFACE}); rebuild it with `pip install .`, or "
        "in a checkout with `make ext` or `python setup.py build_ext --inplace`"
    )


def _why_not_built() -> str:
    fix = "install from source with PIXELDIFF_REQUIRE_EXT=1 to see the full error"
    try:
        reason = json.loads(_STATUS_FILE.read_text())["reason"]
    except (OSError, ValueError, KeyError, TypeError):
        reason = "pixeldiff is not installed, or not from a build with the extension"
    return f"pixeldiff._C was not built ({reason}); {fix}"


def why_not() -> str | None:
    """None if the compiled kernels are available, else the reason they are not."""
    return _import()[1]


def load() -> ModuleType:
    """The module `pixeldiff._C`.

    Raises:
        ImportError: it was not built, or cannot be loaded; says why.
    """
    module, reason = _import()
    if module is None:
        raise ImportError(reason)
    return module


@functools.cache
def why_not_cuda() -> str | None:
    """None if the compiled CUDA kernels are available on this machine, else the reason."""
    reason = why_not()
    if reason is not None:
        return reason
    info = load().build_info()
    if info["cuda"] is None:
        return f"pixeldiff._C was built without CUDA ({info['cuda_note'] or 'no reason recorded'})"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return None


def build_info() -> dict[str, Any] | None:
    """What `pixeldiff._C` was built with, or None when it is absent.

    Keys: version, compiler, build_type, threads, sanitizer, cpu_isa (compiled), cpu_isa_usable (of
    those, what this processor runs), cuda (compiler version or None), cuda_archs, cuda_note (why
    there is no CUDA).
    """
    return None if why_not() is not None else load().build_info()


@functools.cache
def best_isa() -> int:
    """Code of the widest instruction set this processor runs (`ISA_CODES`)."""
    return load().best_isa()


def rows(t: Tensor) -> tuple[int, int, int]:
    """(B, N, D) tensor, last axis contiguous, as the extension takes it."""
    return t.data_ptr(), t.stride(0), t.stride(1)


def vector(t: Tensor | None) -> tuple[int, int, int]:
    """(D,) or (B, D) tensor, last axis contiguous, or None, as the extension takes it."""
    if t is None:
        return 0, 0, 0
    return t.data_ptr(), DTYPE_CODES[t.dtype], t.stride(0) if t.dim() == 2 else 0


def why_not_tensors(device: str, *tensors: Tensor | None) -> str | None:
    """Why kernels on `device` ("cpu" or "cuda") cannot read these tensors, or None."""
    for t in tensors:
        if t is None:
            continue
        if t.device.type != device:
            return f"runs on {device}, the tensors are on {t.device}"
        if t.dtype not in DTYPE_CODES:
            return f"takes float32, bfloat16 and float16, got {t.dtype}"
        if t.shape[-1] > 1 and t.stride(-1) != 1:
            return f"needs a contiguous last axis, got strides {tuple(t.stride())}"
    return None
