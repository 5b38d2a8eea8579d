"""How far from its floor a Triton kernel must stay, counted in its machine code without a GPU.

What each unit of an H100 has to do for a call, by the instructions that were compiled for it, and
the time that takes at the unit's own rate; for a kernel that only moves memory also the time that
its blocks take to pass through all units, few as a multiprocessor holds of them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from . import shapes
from .aot import Compiled, compile_once, record
from .sass import KINDS, Counts, count, waits, widths
from .shapes import SYSTEMS, Case
from .work import WORK, size

PROCESSORS = 132
CLOCK = 1.755e9
MEMORY = 3.0e12  # bytes/s, copied, measured
PRODUCTS = 798e12  # FLOP/s, measured
E4M3_PRODUCTS = 2 * PRODUCTS
VENDOR = 700e12  # FLOP/s, of a matrix product of a network's size
# Bytes/s that second-level cache gives: 5.5e12 measured with 114 processors (chipsandcheese.com,
# "Nvidia's H100: Funny L2, and Tons of Bandwidth"), scaled to 132.
CACHE = 6.4e12
FP32_PER_CLOCK, INTEGER_PER_CLOCK = 128, 64
UNITS = ("memory", "L2", "tensor", "shared", "issue", "integer", "special")
BEGIN, END = "<!-- counted: {} -->", "<!-- end -->"

# What a block waits for besides the units, in clocks: the first thing it loads comes from memory,
# what it loads after that mostly from second-level cache.
FIRST_WAIT, LATER_WAIT = 1000, 300
# Of a warp that has its scheduler for itself: an instruction, and a shuffle or a barrier.
ALONE, EXCHANGE = 2, 30
LAUNCH = 2e-6  # seconds from a kernel's last block to the next one's first
REGISTERS, SHARED, THREADS, BLOCKS = 65536, 227 * 1024, 2048, 32  # of a multiprocessor

SIZES = {"pid": (2048, 4096), "l2p": (4096, 8192, 10240)}
OPS = (
    *("rms_norm", "rms_norm_modulate", "gated_residual_norm", "gated_norm_residual", "add_silu"),
    *("rms_norm_modulate_fp8", "gated_residual_norm_fp8", "quantize_rows", "swiglu", "swiglu_fp8"),
    *("qk_norm_rope", "pixel_embed", "pixel_head", "pixel_head_step", "local_decoder_pixels"),
    *("sigma_gate", "sigma_gate_norm", "sigma_gate_norm_fp8"),
    *("joint_attention", "joint_attention_fp8", "pixel_adaln_mlp", "pixel_adaln_compress"),
    *("local_decoder_up", "local_decoder_down"),
)
# Calls in one step of PiD v1 (14 blocks and 2; 7 gates; those of one logit a token are v1.5's), one
# forward of L2P (34 blocks); where none is given, one.
CALLS = {
    ("gated_residual_norm", "image"): 21,
    ("gated_residual_norm", "text"): 26,
    ("gated_residual_norm_fp8", "image"): 21,
    ("gated_residual_norm_fp8", "text"): 26,
    ("rms_norm_modulate", "image"): 0,
    ("rms_norm_modulate", "trunk"): 68,
    ("rms_norm_modulate_fp8", "image"): 0,
    ("sigma_gate", "v1"): 0,
    ("sigma_gate_norm", "v1"): 7,
    ("sigma_gate_norm", "v1.5"): 7,
    ("sigma_gate_norm_fp8", "v1"): 7,
    ("sigma_gate_norm_fp8", "v1.5"): 7,
    ("swiglu", "image"): 14,
    ("swiglu", "text"): 13,
    ("swiglu", "trunk"): 34,
    ("swiglu_fp8", "image"): 14,
    ("swiglu_fp8", "text"): 13,
    ("quantize_rows", "mmdit"): 14,
    ("quantize_rows", "pit"): 4,
    ("qk_norm_rope", "mmdit"): 14,
    ("qk_norm_rope", "pit"): 2,
    ("qk_norm_rope", "trunk"): 34,
    ("gated_norm_residual", "trunk"): 68,
    ("joint_attention", "mmdit"): 14,
    ("joint_attention", "pit"): 2,
    ("joint_attention", "trunk"): 34,
    ("joint_attention_fp8", "mmdit"): 14,
    ("joint_attention_fp8", "pit"): 2,
    ("pixel_adaln_mlp", "image"): 2,
    ("pixel_adaln_compress", "image"): 2,
    ("rms_norm", "caption"): 0,
}


@dataclass(frozen=True)
class Passage:
    """How the blocks of a kernel that only moves memory pass through the units.

    Args:
        resident: blocks of a multiprocessor at a time.
        in_flight: bytes that those have asked for at most.
        ms: of the call, with its launches.
    """

    resident: int
    in_flight: float
    ms: float


@dataclass(frozen=True)
class Estimate:
    """A call of an op, in ms; `units` of its Triton kernels together, `vendor` of the products it
    leaves to the vendor's library, which run before or after; `passage` if it is one kernel without
    tensor cores. The others overlap units by pipelines of their own."""

    case: Case
    kernels: list[tuple[Compiled, int, Counts]]  # with its blocks, and what one warp does
    floor: float
    units: dict[str, float]
    vendor: float
    passage: Passage | None

    @property
    def range(self) -> tuple[float, float]:
        """At best: all under the longest unit. At worst: the two longest one after the other."""
        second, longest = sorted(self.units.values())[-2:]
        return longest + self.vendor, longest + second + self.vendor

    @property
    def calls(self) -> int:
        return CALLS.get((self.case.op, self.case.site), 1)


def cases(ops: Sequence[str] = ()) -> Iterator[Case]:
    for op in ops or OPS:
        for name, system in SYSTEMS.items():
            found = shapes.cases(op, tuple(s for s in SIZES[name] if s >= min(system.sizes)))
            yield from (case for case in found if case.system == name)


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
    kernels = [(k, blocks, count(k.sass, iterations(k, args))) for k, blocks in compiled]
    work = WORK[case.op]
    moved, flops = work.bytes(args), work.flops(args)
    units = dict.fromkeys(UNITS, 0.0)
    units["memory"] = moved / MEMORY
    units["L2"] = moved / CACHE
    for kernel, blocks, each in kernels:
        for unit, seconds in of_units(each, kernel.warps * blocks).items():
            units[unit] += seconds
    passage = None
    if len(kernels) == 1 and not kernels[0][0].tensor_cores:
        launches = len(record(lambda: module.launch(*args), 90))
        passage = pass_through(kernels, units, size(*args), launches)
    products_of = E4M3_PRODUCTS if case.op == "joint_attention_fp8" else PRODUCTS
    return Estimate(
        case,
        kernels,
        1e3 * max(moved / MEMORY, flops / products_of),
        {unit: 1e3 * seconds for unit, seconds in units.items()},
        1e3 * products.get_total_flops() / VENDOR,
        passage,
    )


def iterations(kernel: Compiled, args: tuple[Any, ...]) -> int | tuple[int, ...]:
    """Of the kernel's loops."""
    found = LOOPS.get(kernel.name, lambda constants, args: ())
    return found(kernel.constants, args)


def _attention_loops(constants: dict[str, Any], args: tuple[Any, ...]) -> tuple[int, int]:
    # The last block of keys has a loop of its own.
    return (args[1].shape[1] - 1) // constants["BLOCK_N"], 1


def _up(of: int, block: int) -> int:
    return -(-of // block)


LOOPS: dict[str, Callable[[dict[str, Any], tuple[Any, ...]], int | tuple[int, ...]]] = {
    "pixel_adaln_mlp_kernel": lambda c, a: a[1].shape[1] // c["BLOCK_K"],
    "pixel_adaln_compress_kernel": lambda c, a: a[1].shape[1] // c["BLOCK_K"],
    "sigma_gate_channel_kernel": lambda c, a: (_up(a[0].shape[-1], c["BLOCK_K"]),),
    "joint_attention_kernel": _attention_loops,
    "joint_attention_fp8_kernel": _attention_loops,
    "column_statistics_kernel": lambda c, a: (c["CHUNK"] // c["ROWS"],),
    "quantize_keys_kernel": lambda c, a: (_up(a[1].shape[1], 16 * 2048),),
    # The positions of u that it goes through.
    "compose_kernel": lambda c, a: 16,
    "down_pixels_kernel": lambda c, a: (9 * _up(c["CI"], c["BLOCK_K"]),),
    "raise_kernel": lambda c, a: (4 * _up(c["CI"], c["BLOCK_K"]),),
    "join_kernel": lambda c, a: tuple(9 * _up(c[n], c["BLOCK_K"]) for n in ("CU", "CS")),
}


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


# --- Blocks on their way --------------------------------------------------------------------------


def resident(kernel: Compiled) -> int:
    """Blocks that a multiprocessor holds."""
    registers = -(-kernel.registers // 8) * 8 * 32 * kernel.warps
    shared = kernel.shared + 1024  # which the system takes
    return min(REGISTERS // registers, SHARED // shared, THREADS // (32 * kernel.warps), BLOCKS)


def alone(kernel: Compiled, each: Counts) -> float:
    """Clocks that a block waits if it has a multiprocessor for itself."""
    exchanges = len(re.findall(r"\b(SHFL|BAR)\.", kernel.sass))
    loads = FIRST_WAIT + LATER_WAIT * max(0, waits(kernel.sass) - 1)
    return loads + ALONE * each.instructions + EXCHANGE * exchanges


def throughputs(demands: Sequence[float], wait: float, most: int) -> list[float]:
    """Blocks a clock that 1, 2, ..., `most` blocks achieve, each of which needs each unit for
    `demands` clocks and waits `wait` besides: mean value analysis of a closed network of queues."""
    queues = [0.0] * len(demands)
    found = []
    for n in range(1, most + 1):
        times = [d * (1 + q) for d, q in zip(demands, queues, strict=True)]
        found.append(n / (wait + sum(times)))
        queues = [found[-1] * t for t in times]
    return found


def pass_through(
    kernels: Sequence[tuple[Compiled, int, Counts]],
    units: dict[str, float],
    read: int,
    launches: int,
) -> Passage:
    """Seconds of `units`, of all `kernels`, which are one that may be launched several times."""
    ((kernel, blocks, each),) = kernels
    # Instructions that a pipe is slow for hold up the issue of others: one queue for both. So do
    # the caches memory.
    stations = [
        max(units["memory"], units["L2"]),
        max(units["issue"], units["integer"]),
        units["shared"],
        units["special"],
    ]
    # Warps that never wait for each other go their own ways.
    parts = 1 if "BAR.SYNC" in kernel.sass else kernel.warps
    each_has = -(-blocks // PROCESSORS) * parts
    most = min(resident(kernel) * parts, each_has)
    share = blocks * parts / PROCESSORS
    rates = throughputs(
        [seconds * CLOCK / share for seconds in stations], alone(kernel, each), most
    )
    # The first one has the units to itself, the others follow as fast as all together do.
    clocks = 1 / rates[0] + (each_has - 1) / rates[-1]
    held = most // parts
    return Passage(held, held * read / blocks, 1e3 * (clocks / CLOCK + launches * LAUNCH))


# --- The page -------------------------------------------------------------------------------------


def tables(estimates: Sequence[Estimate]) -> dict[str, str]:
    """Name -> table, and what compiled the kernels."""
    return {
        "version": version(),
        "units": _units(estimates),
        "passage": _passage(estimates),
        "instructions": _instructions(estimates),
    }


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _units(estimates: Sequence[Estimate]) -> str:
    head = ["op", "at", "floor ms", *(f"{unit} ms" for unit in UNITS), "vendor ms", "of the floor"]
    rows = []
    for e in estimates:
        least, most = e.range
        share = f"{100 * e.floor / most:.0f} to {min(100, 100 * e.floor / least):.0f} %"
        if e.passage is not None:
            share = f"{100 * e.floor / e.passage.ms:.0f} %"
        row = [
            f"`{e.case.op}`",
            place(e.case),
            milliseconds(e.floor),
            *(milliseconds(e.units[u]) for u in UNITS),
        ]
        rows.append([*row, milliseconds(e.vendor), share])
    return markdown(head, rows)


def _passage(estimates: Sequence[Estimate]) -> str:
    head = ["op", "at", "blocks resident", "KB in flight", "waits", "bytes a load", "a store"]
    head += ["floor ms", "estimated ms", "of the floor", "calls", "missing ms"]
    rows = []
    smallest: dict[tuple[str, str, str], Estimate] = {}
    for e in estimates:
        if e.passage:
            smallest.setdefault((e.case.op, e.case.system, e.case.site), e)
    for e in sorted(smallest.values(), key=_missing, reverse=True):
        kernel, _, _ = e.kernels[0]
        loads, stores = (" ".join(map(str, sorted(w)[::-1])) for w in widths(kernel.sass))
        row = [f"`{e.case.op}`", place(e.case), str(e.passage.resident)]
        row += [f"{e.passage.in_flight / 1024:.0f}", str(waits(kernel.sass)), loads, stores]
        row += [
            milliseconds(e.floor),
            milliseconds(e.passage.ms),
            f"{100 * e.floor / e.passage.ms:.0f} %",
        ]
        rows.append([*row, str(e.calls), milliseconds(_missing(e))])
    return markdown(head, rows)


def _missing(e: Estimate) -> float:
    """ms of a step."""
    return e.calls * (e.passage.ms - e.floor)


def _instructions(estimates: Sequence[Estimate]) -> str:
    head = ["kernel", "at", "blocks", "warps", "instructions", *KINDS, "products"]
    rows: dict[tuple[str, ...], list[str]] = {}
    for e in estimates:
        for kernel, blocks, each in e.kernels:
            found = sorted(set(re.findall(r"GMMA\.(\d+x\d+x\d+)|HMMA\.(\d+)", kernel.sass)))
            row = [f"`{kernel.name}`", place(e.case), str(blocks), str(kernel.warps)]
            row += [f"{each.instructions:.0f}", *(f"{each.kinds[kind]:.0f}" for kind in KINDS)]
            row.append(", ".join("".join(shape) for shape in found))
            # The same code at several sizes: the first.
            rows.setdefault((e.case.op, e.case.site, kernel.name, *row[4:]), row)
    return markdown(head, list(rows.values()))


def place(case: Case) -> str:
    return f"{case.system} {case.size}" + ("" if case.site == "image" else f", {case.site}")


def milliseconds(ms: float) -> str:
    return f"{ms:.2f}" if ms >= 0.1 or ms < 0.0005 else f"{ms:.3f}"


def version() -> str:
    return f"Triton {importlib.metadata.version('triton')}"


def rewrite(page: Path, found: Mapping[str, str]) -> str:
    """The page with tables counted again, of those names.

    Raises:
        ValueError: it has no place for one.
    """
    text = page.read_text()
    for name, table in found.items():
        begin = BEGIN.format(name)
        if begin not in text:
            raise ValueError(f"{page} has no line {begin!r} to put a table behind")
        before, after = text.split(begin, 1)
        text = f"{before}{begin}\n{table}\n{END}{after.split(END, 1)[1]}"
    return text
