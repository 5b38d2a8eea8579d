"""`bench.aot` for tests: skips where nothing can be compiled; what every kernel must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import aot
from bench.aot import TARGETS, Compiled
from bench.shapes import SYSTEMS
from pixeldiff.ops.examples import arguments

# Bytes of shared memory one block may take (CUDA C++ Programming Guide, table of capabilities).
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

__all__ = ["TARGETS", "Compiled", "assert_lean", "compile_launch", "keys", "released"]


def compile_launch(call: Callable[[], Any], target: int) -> list[Compiled]:
    """The kernels that `call` launches on a device of capability `target` (90 is 9.0), compiled."""
    _skip_without_compiler()
    return aot.compile_launch(call, target)


def keys(call: Callable[[], Any], target: int = 90) -> list[str]:
    """One string for each kernel `call` launches; equal strings are one compilation."""
    _skip_without_compiler()
    return aot.keys(call, target)


def _skip_without_compiler() -> None:
    pytest.importorskip("triton")
    from pixeldiff.triton_kernels.launching import INTERPRETED

    if INTERPRETED:
        pytest.skip("Triton is interpreting in this process; it cannot compile")


def assert_lean(kernel: Compiled, *, tensor_cores: bool = False) -> None:
    """No stack, no spills, shared memory within the device; tensor cores where they must be."""
    where = f"{kernel.name} on sm_{kernel.target}"
    assert kernel.stack == 0, f"{where} keeps {kernel.stack} bytes of stack"
    assert kernel.spills == 0, f"{where} spills {kernel.spills} bytes"
    limit = SHARED[kernel.target]
    assert kernel.shared <= limit, f"{where} takes {kernel.shared} bytes of {limit} shared"
    if tensor_cores:
        assert kernel.tensor_cores, f"{where} has no tensor-core instruction"


def released(
    op: str, dtype: torch.dtype = torch.bfloat16, *, system: str = "pid", **changes: Any
) -> tuple[Any, ...]:
    """Arguments of `op` on the meta device at a released network's shapes.

    "pid" at 2048 x 2048, or the trunk of "l2p", which has the same tokens at every size.
    `changes` to the geometry: grid=(256, 256) is PiD at 4096 x 4096.
    """
    grid = {"pid": (128, 128), "l2p": (64, 64)}[system]
    geometry = replace(SYSTEMS[system].geometry, **{"grid": grid, **changes})
    return arguments(op, "meta", dtype, geometry)
