"""Rows as tables on the terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from .schema import Row

LEAST_SHARE = 0.2  # percent of a step, of the parts of it that are shown
console = Console(highlight=False)
if not console.is_terminal:  # a log: as wide as its tables
    console = Console(highlight=False, width=120)


def kernels(rows: list[Row]) -> None:
    """One table for the rows of one case."""
    for row in (r for r in rows if r.kind == "ceiling"):
        console.print(f"ceiling, {row.dtype}: {row.name} {best_rate(row)}", markup=False)
    rows = [r for r in rows if r.kind == "kernel"]
    if not rows:
        return
    names = ("ms", "range", "rate", "% ceiling", "x eager", "x compiled")
    names += ("error", "eager's", "of budget")
    _table(title(rows[0]), ("backend", *names), rows, kernel_cells)


def _table(title: str, columns: tuple[str, ...], rows: list[Row], cells: Callable) -> None:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    measured = [r for r in rows if r.timing is not None]
    for row in measured:
        table.add_row(*cells(row))
    if measured:
        console.print(table, markup=False)
    else:
        console.print(title, markup=False)
    for row in rows:
        if row.timing is None:
            console.print(f"  {row.backend}: {row.status}, {row.reason}", markup=False)


def kernel_cells(row: Row) -> tuple[str, ...]:
    t, r, a = row.timing, row.rates, row.accuracy
    errors = ("", "", "")
    if a is not None:
        errors = (f"{a.error:.1e}", f"{a.eager_error:.1e}", f"{a.of_budget:.2f}")
    return (
        row.backend,
        number(t.median_ms),
        f"{number(t.min_ms)} to {number(t.max_ms)}",
        rate(row),
        f"{r.percent:.0f}",
        times(row.speedup_eager),
        times(row.speedup_compiled),
        *errors,
    )


def title(row: Row) -> str:
    scale = row.shape.get("scale", 1)
    scaled = f", side / {scale}: {row.shape['tokens']} tokens" if scale > 1 else ""
    return f"{row.name} {row.site} at {row.shape['size']}{scaled}, {row.dtype}"


def tiles(rows: list[Row]) -> None:
    """The tiles of one kernel at one place, the fastest first."""
    if rows:
        rows = sorted(rows, key=lambda r: r.timing.median_ms if r.timing else math.inf)
        _table(title(rows[0]), ("tile", "ms", "range", "GB/s", "TFLOP/s", "of budget"), rows, _tile)


def _tile(row: Row) -> tuple[str, ...]:
    t, r = row.timing, row.rates
    spread = f"{number(t.min_ms)} to {number(t.max_ms)}"
    rates = (number(r.gb_s), number(r.tflop_s))
    return (row.backend, number(t.median_ms), spread, *rates, f"{row.accuracy.of_budget:.2f}")


def decodes(rows: list[Row]) -> None:
    if not rows:
        return
    shape = rows[0].shape
    title = f"{rows[0].name} {shape.get('height')}x{shape.get('width')}, {rows[0].dtype}"
    names = ("image ms", "range", "step ms", "first ms", "peak", "weights", "J/image")
    _table(title, ("variant", *names), rows, decode_cells)


def forwards(rows: list[Row]) -> None:
    if rows:
        side = rows[0].shape["height"]
        title = f"{rows[0].name} {rows[0].site} {side}x{side}, one network call, {rows[0].dtype}"
        names = ("call ms", "range", "host ms", "TFLOP/s", "peak", "first ms", "x eager", "x comp")
        _table(title, ("variant", *names), rows, forward_cells)


def forward_cells(row: Row) -> tuple[str, ...]:
    t, m = row.timing, row.memory
    return (
        row.backend,
        number(t.median_ms),
        f"{number(t.min_ms)} to {number(t.max_ms)}",
        "" if t.host_ms is None else number(t.host_ms),
        number(row.rates.tflop_s),
        "" if m is None else gigabytes(m.peak_bytes),
        "" if t.first_ms is None else number(t.first_ms),
        times(row.speedup_eager),
        times(row.speedup_compiled),
    )


def profiles(rows: list[Row]) -> None:
    """Parts of a step, the largest gap first."""
    for row in (r for r in rows if r.kind == "ceiling"):
        console.print(f"ceiling, {row.dtype}: {row.name} {best_rate(row)}", markup=False)
    rows = [r for r in rows if r.kind == "profile"]
    if rows:
        side = rows[0].shape["height"]
        title = f"one step of {network(rows[0])}, {side}x{side}, {rows[0].dtype}, {rows[0].backend}"
        if rows[0].profile is not None:
            title += f": {accounted(rows[0])}"
        columns = ("part", "shapes", "calls", "ms", "share %", "floor ms", "gap ms", "% of floor")
        few = [r for r in rows if r.profile is None or r.profile.share >= LEAST_SHARE]
        _table(title, columns, few, profile_cells)
        if len(few) < len(rows):
            left = sum(r.profile.share for r in rows if r not in few)
            left = f"and {len(rows) - len(few)} parts below {LEAST_SHARE} %, {left:.1f} % in all"
            console.print(left, markup=False)


def profile_cells(row: Row) -> tuple[str, ...]:
    p = row.profile
    _, _, shapes = row.site.partition("/")
    return (
        short(row.name, 28),
        short(shapes, 40),
        f"{p.calls:.4g}",
        number(row.timing.median_ms if row.name == "step" else p.ms),
        f"{p.share:.1f}",
        number(p.floor_ms),
        number(p.gap_ms),
        f"{row.rates.percent:.0f}" if p.floor_ms else "",
    )


def network(row: Row) -> str:
    return row.site.split("/")[0]


def accounted(row: Row) -> str:
    """Of the row of a step: how much of it its kernels are."""
    p = row.profile
    return (
        f"{number(row.timing.median_ms)} ms, {number(p.step_ms)} under the profiler, "
        f"{p.share:.1f} % of that in kernels"
    )


def short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def decode_cells(row: Row) -> tuple[str, ...]:
    t, m, d = row.timing, row.memory, row.decode
    return (
        row.backend,
        number(t.median_ms),
        f"{number(t.min_ms)} to {number(t.max_ms)}",
        number(d.step_ms),
        "" if t.first_ms is None else number(t.first_ms),
        "" if m is None else gigabytes(m.peak_bytes),
        "" if m is None or m.weight_bytes is None else gigabytes(m.weight_bytes),
        "" if d.joules_per_image is None else f"{d.joules_per_image:.1f}",
    )


def summary(rows: list[Row]) -> None:
    """Every op's fused backends and every decode in one table, and how many rows have no time."""
    table = Table(title="summary", title_justify="left")
    for i, name in enumerate(("what", "at", "", "backend", "ms", "% ceiling", "x eager", "x comp")):
        table.add_column(name, justify="right" if i > 3 else "left", no_wrap=True)
    for r in rows:
        if r.timing is None or r.kind in ("ceiling", "tile"):
            continue
        if r.kind == "profile" and r.name != "step":
            continue
        if r.kind == "kernel" and r.backend in ("eager", "compiled"):
            continue
        size = r.shape.get("size", r.shape.get("width"))
        scale = r.shape.get("scale", 1)
        tiled = f" in {r.shape['tile']}" if "tile" in r.shape else ""
        percent = "" if r.rates is None or r.rates.percent is None else f"{r.rates.percent:.0f}"
        table.add_row(
            r.name,
            f"{r.site.split('/')[-1]} {size}" + (f"/{scale}" if scale > 1 else "") + tiled,
            r.dtype,
            r.backend,
            number(r.timing.median_ms),
            percent,
            times(r.speedup_eager),
            times(r.speedup_compiled),
        )
    console.print(table, markup=False)
    counts = Counter(r.status for r in rows)
    console.print(", ".join(f"{n} rows {status}" for status, n in counts.items()), markup=False)


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def rate(row: Row) -> str:
    """The achieved rate, in the unit of what bounds the call."""
    r = row.rates
    if r.bound == "compute":
        return f"{number(r.tflop_s)} TFLOP/s"
    return f"{number(r.gb_s)} GB/s"


def best_rate(row: Row) -> str:
    """Of a ceiling: its fastest sample, which is what percentages are of."""
    faster = row.timing.median_ms / row.timing.min_ms
    if row.name == "matmul":
        return f"{number(row.rates.tflop_s * faster)} TFLOP/s"
    return f"{number(row.rates.gb_s * faster)} GB/s"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
