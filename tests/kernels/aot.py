"""`bench.aot` for tests: skips where nothing can be compiled; what every kernel must be."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch

from bench import aot
from bench.aot import TARGETS, Compiled
from bench.shapes import SYSTEMS
from pixeldiff.ops.examples import arguments

# Bytes of shared memory one block may take (CUDA C++ Programming Guide, table of capabilities).
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

# Patches of 2048 and of 4096 pixels square, an odd number of them, and a single one.
GRIDS = ((128, 128), (256, 256), (37, 41), (1, 1))

__all__ = [
    "TARGETS",
    "Compiled",
    "assert_lean",
    "check_candidates",
    "check_compiles_once",
    "check_streams",
    "compile_launch",
    "keys",
    "narrow",
    "refusal",
    "released",
    "released_sizes",
    "widths",
]


def compile_launch(call: Callable[[], Any], target: int) -> list[Compiled]:
    """The kernels that `call` launches on a device of capability `target` (90 is 9.0), compiled."""
    _skip_without_compiler()
    return aot.compile_launch(call, target)


def keys(call: Callable[[], Any], target: int = 90) -> list[str]:
    """One string for each kernel `call` launches; equal strings are one compilation."""
    _skip_without_compiler()
    return aot.keys(call, target)


def _kernel(op: str) -> ModuleType:
    return pytest.importorskip(f"pixeldiff.triton_kernels.{op}")


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


def narrow(kernel: Compiled) -> list[str]:
    """Its loads and stores of device memory of less than 16 bytes a thread.

    That there is a wide one says nothing of the others: a gain is wide where the rows are not.
    """
    accesses = re.findall(r"\b(?:ld|st)\.global[\w.:]*", kernel.ptx)
    return [a for a in accesses if not a.endswith((".v4.b32", ".v8.b32", ".v2.b64", ".v4.b64"))]


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


def released_sizes(op: str, **changes: Any) -> list[tuple[Any, ...]]:
    """As `released`, once for each of GRIDS."""
    return [released(op, grid=grid, **changes) for grid in GRIDS]


def widths(widest: int | None = None) -> list[dict[str, Any]]:
    """Changes to `released` for a kernel of whole rows: the released width, and the widest row,
    unless given that of the norms."""
    if widest is None:
        widest = pytest.importorskip("pixeldiff.triton_kernels.norm_rows").MAX_D
    bf16, fp32 = torch.bfloat16, torch.float32
    return [{"dtype": d, "width": w} for d, w in ((bf16, 1536), (fp32, 1536), (bf16, widest))]


def check_streams(op: str, target: int, sites: Iterable[dict[str, Any]]) -> None:
    """At every site (changes to `released`) one lean kernel, which loads and stores 16 bytes."""
    launch = _kernel(op).launch
    for site in sites:
        args = released(op, **site)
        (kernel,) = compile_launch(lambda args=args: launch(*args), target)
        assert_lean(kernel)
        for access in ("ld.global.v4.b32", "st.global.v4.b32"):
            assert access in kernel.ptx, f"{kernel.name} on sm_{target}, {site}: no {access}"


def check_compiles_once(
    op: str,
    calls: Sequence[tuple[Any, ...]],
    *,
    launches: int | Sequence[int] = 1,
    compilations: int = 1,
) -> None:
    """Every call runs the same compiled kernels: `compilations` of them, all calls together.

    `launches`: how many kernels a call runs, one number for all calls or one for each.
    """
    launch = _kernel(op).launch
    found = [keys(lambda args=args: launch(*args)) for args in calls]
    expected = [launches] * len(calls) if isinstance(launches, int) else list(launches)
    ran = [len(of_call) for of_call in found]
    assert ran == expected, f"{op} ran {ran} kernels in these calls, expected {expected}"
    distinct = {tuple(dict.fromkeys(of_call)) for of_call in found}
    assert len(distinct) == 1, f"{op} compiles again for some of {len(calls)} calls: {distinct}"
    kernels = len(distinct.pop())
    assert kernels == compilations, f"{op} has {kernels} kernels, expected {compilations}"


def check_candidates(op: str, *args: Any, target: int = 90) -> None:
    """Whatever configuration tuning may choose on such a device makes lean kernels."""
    module = _kernel(op)
    for config in _candidates(module, target, *args):
        for kernel in compile_launch(partial(module.launch, *args, config=config), target):
            assert_lean(kernel)


def _candidates(module: ModuleType, target: int, *args: Any) -> list[Any]:
    _skip_without_compiler()
    from pixeldiff.triton_kernels.launching import compiling_for

    with compiling_for(divmod(target, 10)):
        return module.candidates(*args)


def refusal(ask: Callable[[], str | None], target: int) -> str | None:
    """What `ask`, a kernel's `why_not`, says on a device of capability `target`."""
    _skip_without_compiler()
    from pixeldiff.triton_kernels.launching import compiling_for

    with compiling_for(divmod(target, 10)):
        return ask()
