"""The CUDA C++ kernels of the norms, counted as estimates.py counts those of Triton.

What they run depends on their arguments, by branches: they are followed as bf16 rows and vectors of
a released shape take them.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .aot import Compiled
from .estimates import (
    CACHE,
    MEMORY,
    UNITS,
    Estimate,
    Passage,
    cases,
    estimate,
    markdown,
    milliseconds,
    of_units,
    pass_through,
    place,
)
from .ptxas import Source, compile_source
from .sass import Counts, count, follow, waits
from .shapes import Case
from .work import WORK, size

# csrc/cuda/norm_rows.cuh: kItems, kMaxThreads, elements of a piece.
ITEMS, MAX_THREADS, WIDTH = 4, 512, 8
# Which arguments, in schema order, are the vectors of a row's first pass, and of its second.
VECTORS = {"rms_norm_modulate": ((), (1, 2, 3)), "gated_residual_norm": ((2,), (3, 4, 5))}


@dataclass(frozen=True)
class CudaEstimate:
    case: Case
    kernel: Compiled  # its code is what runs
    each: Counts
    units: dict[str, float]
    passage: Passage


def threads(width: int) -> int:
    """Of a block, as the launch chooses them."""
    pieces = width // WIDTH
    return max(32, min(MAX_THREADS, ((pieces + 1) // 2 + 31) // 32 * 32))


def decisions(op: str, args: Sequence[object], items: int) -> list[bool]:
    """Whether its branches are taken: one over each item past a row's end; of each vector, one if
    it is absent, and one if it is fp32."""
    found = list[bool]()
    for vectors in VECTORS[op]:
        for item in range(ITEMS):
            found.append(item >= items)
            for at in vectors if item < items else ():
                found += [True] if args[at] is None else [False, False]
    return found


def estimates() -> Iterator[CudaEstimate]:
    """Of both ops at all their places.

    Raises:
        FileNotFoundError: no nvcc. ImportError: no Triton.
    """
    from pixeldiff.ops.examples import arguments

    for op in VECTORS:
        name = f"{op}_vector_kernel<bf16, {WIDTH}>"
        kernels, _ = compile_source(Source(f"{op}.cu"), "90a")
        kernel = next(k for k in kernels if k.name == name)
        for case in cases((op,)):
            args = arguments(op, "meta", torch.bfloat16, case.geometry)
            yield of_call(case, kernel.sass, kernel.registers, args)


def of_call(case: Case, sass: str, registers: int, args: tuple[object, ...]) -> CudaEstimate:
    x = args[0]
    assert isinstance(x, Tensor)
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    warps = threads(width) // 32
    items = -(-width // (WIDTH * 32 * warps))
    ran = follow(sass, decisions(case.op, args, items))
    # A barrier's 32 sums; the compiler's report has no stack or spills (cuda.md).
    kernel = Compiled(case.op, 90, registers, 0, 0, 128, warps, "", ran)
    each = count(ran)
    moved = WORK[case.op].bytes(args)
    units = dict.fromkeys(UNITS, 0.0) | of_units(each, warps * rows)
    units |= {"memory": moved / MEMORY, "L2": moved / CACHE}
    passage = pass_through([(kernel, rows, each)], units, size(*args), 1)
    return CudaEstimate(case, kernel, each, units, passage)


def table(found: Sequence[CudaEstimate], triton: Sequence[Estimate] = ()) -> str:
    """Each beside Triton's kernel at the same place, of `triton` where it has it."""
    beside = {e.case: e for e in triton}
    head = ["op", "at", "by", "warps", "registers", "blocks resident", "instructions", "waits"]
    head += ["issue ms", "integer ms", "floor ms", "estimated ms", "of the floor"]
    rows = []
    for e in found:
        other = beside.get(e.case) or estimate(e.case)
        ((kernel, _, each),) = other.kernels
        both = (
            ("Triton", kernel, each, other.units, other.passage),
            ("CUDA", e.kernel, e.each, {u: 1e3 * s for u, s in e.units.items()}, e.passage),
        )
        for by, compiled, counts, units, passage in both:
            row = [f"`{e.case.op}`", place(e.case), by, str(compiled.warps)]
            row += [str(compiled.registers), str(passage.resident), f"{counts.instructions:.0f}"]
            row += [str(waits(compiled.sass)), milliseconds(units["issue"])]
            row += [milliseconds(units["integer"]), milliseconds(other.floor)]
            row += [milliseconds(passage.ms), f"{100 * other.floor / passage.ms:.0f} %"]
            rows.append(row)
    return markdown(head, rows)


def version() -> str:
    """Raises FileNotFoundError without nvcc."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {re.search(r'release ([0-9.]+)', said)[1]}"
