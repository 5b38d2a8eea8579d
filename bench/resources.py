"""What the Triton kernels take of a device, compiled for several without having one."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from pixeldiff.ops.registry import OPS

from .aot import TARGETS, Compiled, compile_launch
from .machine import DTYPES
from .shapes import Case, cases

DOC = """# Triton kernels: what they take of a device

Compiled ahead of time with Triton {version} at the real shapes of {size} x {size}, {dtype}, by
`python -m bench resources -o docs/kernels/triton.md`. Each cell: registers per thread, warps, KB of
shared memory, and the tensor-core instructions among the machine code. A stack or spills would
stand there in bold; the tests of the ops allow neither, nor more shared memory than the device has.
A dash: the kernel refuses that device (e4m3 before sm_89).

"""


@dataclass(frozen=True)
class Usage:
    """The kernels one launch of an op runs, per target, in order; none where it is refused."""

    case: Case
    kernels: dict[int, list[Compiled]]


def measure(
    size: int, dtype: str, targets: Sequence[int] = TARGETS, ops: Sequence[str] = ()
) -> Iterator[Usage]:
    """Every op with a Triton kernel at every place of its networks.

    Raises:
        ImportError: no Triton. ValueError: an op without a Triton kernel.
    """
    from pixeldiff.ops.examples import arguments

    having = {o.name: b for o in OPS.values() for b in o.backends if b.name == "triton"}
    for op in ops:
        if op not in having:
            raise ValueError(f"{op!r} has no Triton kernel; ops are {', '.join(sorted(having))}")
    for op in ops or sorted(having):
        module = having[op].load()
        for case in cases(op, (size,)):
            args = arguments(op, "meta", DTYPES[dtype], case.geometry)
            yield Usage(case, {t: _kernels(module, args, t) for t in targets})


def _kernels(module: ModuleType, args: tuple[Any, ...], target: int) -> list[Compiled]:
    from pixeldiff.triton_kernels.launching import compiling_for

    with compiling_for(divmod(target, 10)):
        if module.why_not(*args) is not None:
            return []
    return compile_launch(lambda: module.launch(*args), target)


def document(usages: Sequence[Usage], size: int, dtype: str) -> str:
    """The page docs/kernels/triton.md."""
    targets = list(usages[0].kernels)
    names = [f"sm_{t}" for t in targets]
    lines = ["| op | at | kernel | " + " | ".join(names) + " |", "|" + "---|" * (3 + len(names))]
    places: dict[tuple[str, ...], list[str]] = {}  # (op, kernel, cells) -> where it is so
    for usage in usages:
        for i, first in enumerate(max(usage.kernels.values(), key=len)):
            ran = [usage.kernels[t][i : i + 1] for t in targets]
            cells = [cell(k[0], besides=first.name) if k else "-" for k in ran]
            sites = places.setdefault((usage.case.op, first.name, *cells), [])
            if usage.case.site not in sites:  # a launch may run one kernel several times
                sites.append(usage.case.site)
    for (op, kernel, *cells), sites in places.items():
        start = (f"`{op}`", ", ".join(sites), f"`{kernel}`")
        lines.append("| " + " | ".join((*start, *cells)) + " |")
    version = importlib.metadata.version("triton")
    return DOC.format(version=version, size=size, dtype=dtype) + "\n".join(lines) + "\n"


def cell(kernel: Compiled, besides: str = "") -> str:
    """`besides`: the name of its row, which a device may have another kernel in place of."""
    parts = [f"`{kernel.name}`"] if besides not in ("", kernel.name) else []
    parts += [f"{kernel.registers} regs", f"{kernel.warps} warp{'s' if kernel.warps > 1 else ''}"]
    if kernel.shared >= 1024:
        parts.append(f"{kernel.shared / 1024:.0f} KB")
    parts += sorted(kernel.tensor_cores)
    parts += [f"**{kernel.stack} B stack**"] if kernel.stack else []
    parts += [f"**{kernel.spills} B spills**"] if kernel.spills else []
    return ", ".join(parts)
