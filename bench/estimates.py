"""How far from its floor a Triton kernel must stay, counted in its machine code without a GPU.

What each unit of an H100 has to do for a call, by the instructions that were compiled for it, and
the time that takes at the unit's own rate.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from .aot import Compiled, compile_once
from .sass import KINDS, Counts, count
from .shapes import SYSTEMS, Case
from .work import WORK

PROCESSORS = 132
CLOCK = 1.755e9
MEMORY = 3.0e12  # bytes/s, copied, measured
PRODUCTS = 798e12  # FLOP/s, measured
VENDOR = 700e12  # FLOP/s, of a matrix product of a network's size
# Bytes/s that second-level cache gives: 5.5e12 measured with 114 processors (chipsandcheese.com,
# "Nvidia's H100: Funny L2, and Tons of Bandwidth"), scaled to 132.
CACHE = 6.4e12
FP32_PER_CLOCK, INTEGER_PER_CLOCK = 128, 64
UNITS = ("memory", "L2", "tensor", "shared", "issue", "integer", "special")
BEGIN, END = "<!-- counted: {} -->", "<!-- end -->"

# What is estimated: op -> systems, sizes, levels of the local decoder.
SITES = {
    "pixel_adaln_mlp": ("pid", (2048, 4096), (0,)),
    "pixel_adaln_compress": ("pid", (2048, 4096), (0,)),
    "local_decoder_up": ("l2p", (4096, 8192, 10240), (0, 1)),
    "local_decoder_down": ("l2p", (4096, 8192, 10240), (0, 1)),
}


@dataclass(frozen=True)
class Estimate:
    """A call of an op, in ms; `units` of its Triton kernels together, `vendor` of the products it
    leaves to the vendor's library, which run before or after."""

    case: Case
    kernels: list[tuple[Compiled, int, Counts]]  # with its blocks, and what one warp does
    floor: float
    units: dict[str, float]
    vendor: float

    @property
    def range(self) -> tuple[float, float]:
        """At best: all under the longest unit. At worst: the two longest one after the other."""
        second, longest = sorted(self.units.values())[-2:]
        return longest + self.vendor, longest + second + self.vendor


def cases(ops: Sequence[str] = ()) -> Iterator[Case]:
    for op in ops or SITES:
        name, sizes, levels = SITES[op]
        system = SYSTEMS[name]
        for size in sizes:
            for level in levels:
                geometry = replace(system.at(size), level=level)
                site = f"level {level}" if name == "l2p" else "image"
                yield Case(op, name, site, size, 1, geometry)


def estimate(case: Case) -> Estimate:
    """In bf16, with the tiles of the heuristic, on 9.0.

    Raises:
        ImportError: no Triton.
    """
    from pixeldiff.ops.examples import arguments

    module = importlib.import_module(f"pixeldiff.triton_kernels.{case.op}")
    args = arguments(case.op, "meta", torch.bfloat16, case.geometry)
    with FlopCounterMode(display=False) as products:
        compiled = compile_once(lambda: module.launch(*args), 90)
    kernels = [(k, blocks, count(k.sass, iterations(case, k))) for k, blocks in compiled]
    work = WORK[case.op]
    size, flops = work.bytes(args), work.flops(args)
    units = dict.fromkeys(UNITS, 0.0)
    units["memory"] = size / MEMORY
    units["L2"] = size / CACHE
    for kernel, blocks, each in kernels:
        for unit, seconds in of_units(each, kernel.warps * blocks).items():
            units[unit] += seconds
    return Estimate(
        case,
        kernels,
        1e3 * max(size / MEMORY, flops / PRODUCTS),
        {unit: 1e3 * seconds for unit, seconds in units.items()},
        1e3 * products.get_total_flops() / VENDOR,
    )


def iterations(case: Case, kernel: Compiled) -> int:
    """Of the kernel's loop."""
    if case.op.startswith("pixel_adaln"):
        return case.geometry.width // 64  # BLOCK_K of the heuristic
    return 16  # the positions of u that compose_kernel goes through; the squares have no loop


def of_units(each: Counts, warps: int) -> dict[str, float]:
    """Seconds, of so many warps on all processors."""
    clocks = warps / PROCESSORS / CLOCK
    fp32, integer = each.kinds["fp32"], each.kinds["integer"]
    return {
        "L2": each.copied * warps / CACHE,
        # At the clock that the measured product has: power limits it.
        "tensor": each.tensor * warps * 4096 / PRODUCTS,
        "shared": each.shared * clocks,
        "issue": each.instructions * clocks / 4,
        "integer": max(integer * 32 / INTEGER_PER_CLOCK, fp32 * 32 / FP32_PER_CLOCK) * clocks,
        "special": each.special * clocks,
    }


# --- The page -------------------------------------------------------------------------------------


def tables(estimates: Sequence[Estimate]) -> dict[str, str]:
    """Name -> table."""
    return {"units": _units(estimates), "instructions": _instructions(estimates)}


def _units(estimates: Sequence[Estimate]) -> str:
    head = ["op", "at", "floor ms", *(f"{unit} ms" for unit in UNITS), "vendor ms", "of the floor"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for e in estimates:
        least, most = e.range
        share = f"{100 * e.floor / most:.0f} to {min(100, 100 * e.floor / least):.0f} %"
        row = [f"`{e.case.op}`", _place(e.case), _ms(e.floor), *(_ms(e.units[u]) for u in UNITS)]
        lines.append("| " + " | ".join([*row, _ms(e.vendor), share]) + " |")
    return "\n".join(lines)


def _instructions(estimates: Sequence[Estimate]) -> str:
    head = ["kernel", "at", "blocks", "warps", "instructions", *KINDS, "products"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for e in estimates:
        for kernel, blocks, each in e.kernels:
            shapes = sorted(set(re.findall(r"HGMMA\.(\d+x\d+x\d+)|HMMA\.(\d+)", kernel.sass)))
            row = [f"`{kernel.name}`", _place(e.case), str(blocks), str(kernel.warps)]
            row += [f"{each.instructions:.0f}", *(f"{each.kinds[kind]:.0f}" for kind in KINDS)]
            row.append(", ".join("".join(shape) for shape in shapes))
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _place(case: Case) -> str:
    return f"{case.system} {case.size}" + (f", {case.site}" if case.system == "l2p" else "")


def _ms(ms: float) -> str:
    return f"{ms:.2f}"


def version() -> str:
    return f"Triton {importlib.metadata.version('triton')}"


def rewrite(page: Path, estimates: Sequence[Estimate]) -> str:
    """The page with its tables counted again.

    Raises:
        ValueError: it has no place for one.
    """
    text = page.read_text()
    for name, table in {**tables(estimates), "version": version()}.items():
        begin = BEGIN.format(name)
        if begin not in text:
            raise ValueError(f"{page} has no line {begin!r} to put a table behind")
        before, after = text.split(begin, 1)
        text = f"{before}{begin}\n{table}\n{END}{after.split(END, 1)[1]}"
    return text
