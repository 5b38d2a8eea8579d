"""Result files as Markdown and SVG, and README's figures: nothing but what the files say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pixeldiff.out_files import written_whole

from . import plots, schema, show
from .growth import growth
from .kernels import COMPILED, EAGER
from .schema import Machine, Row
from .show import gigabytes, number, times

PAGE = "README.md"
NOTE = "<!-- Written by `python -m bench report`; do not edit. -->"
# README: everything between the markers is generated from the files the first one names.
BEGIN, END = "<!-- measured:", "<!-- /measured -->"
NOTHING = (
    "No measurement is part of this repository yet: `make bench` measures this machine,"
    " `bench/run_gpu.sh` a GPU."
)


def write(files: Sequence[Path], folder: Path) -> list[Path]:
    """Write the report of result files into a folder: PAGE and its plots, all or nothing.

    Returns:
        The files written.

    Raises:
        SchemaError: a file is not a result. ValueError: no row was measured.
    """
    rows = [row for path in files for row in schema.load(path)]
    if not any(r.status == "measured" for r in rows):
        raise ValueError("none of the result files holds a measured row; there is nothing to plot")
    folder.mkdir(parents=True, exist_ok=True)
    figures = plots.figures(rows)
    names = [PAGE, *figures]
    with written_whole([folder / n for n in names]) as partial:
        partial[0].write_text(page(rows, files, list(figures)))
        for path, figure in zip(partial[1:], figures.values(), strict=True):
            plots.save(figure, path)
    return [folder / n for n in names]


def page(rows: Sequence[Row], files: Iterable[Path], figures: Sequence[str]) -> str:
    """The Markdown page."""
    lines = [NOTE, "", "# Performance", ""]
    lines += [
        "What each number means, and how to measure again: see `bench/README.md`.",
        "Times are medians; milliseconds; lower is better. A factor above 1 is faster than the",
        "baseline it is named after, measured in turn with it in the same run.",
        "",
        f"From {', '.join(f'`{p.name}`' for p in files)}.",
        "",
    ]
    for machine, own in _by_machine(rows):
        lines += [f"## {machine.device_name}", "", _versions(own), ""]
        lines += _ceilings(own)
        lines += _kernel_tables([r for r in own if r.kind == "kernel"])
        lines += _decode_tables([r for r in own if r.kind == "decode"])
        lines += _forward_tables([r for r in own if r.kind == "forward"])
        lines += _growth_table(own)
        lines += _profile_tables([r for r in own if r.kind == "profile"])
    lines += [line for name in figures for line in (f"![{Path(name).stem}]({name})", "")]
    return "\n".join(lines).rstrip() + "\n"


def update_readme(path: Path, *, check: bool = False) -> bool:
    """Generate README's figures again from the files its marker names.

    Args:
        check: change nothing.

    Returns:
        Whether the file was already as it is generated.

    Raises:
        ValueError: no markers, or more than one pair. SchemaError: a file is not a result.
    """
    text = path.read_text()
    fresh = regenerated(text, path.parent)
    if not check and fresh != text:
        with written_whole([path]) as (partial,):
            partial.write_text(fresh)
    return fresh == text


def regenerated(text: str, root: Path) -> str:
    """`text` with the part between the markers generated from the files the first one names."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README needs one line '{BEGIN} files -->' and, after it, one '{END}'")
    head, rest = text.split(BEGIN)
    names, rest = rest.split("-->", 1)
    _, tail = rest.split(END)
    rows = [row for name in names.split() for row in schema.load(root / name)]
    return f"{head}{BEGIN}{names}-->\n{readme_block(rows)}{END}{tail}"


def readme_block(rows: Sequence[Row]) -> str:
    """Whole decodes, and the fused ops against plain PyTorch, of every machine."""
    measured = [r for r in rows if r.status == "measured"]
    if not measured:
        return NOTHING + "\n"
    lines: list[str] = []
    for machine, own in _by_machine(measured):
        lines += [f"**{machine.device_name}** ({_versions(own)})", ""]
        lines += _decode_tables([r for r in own if r.kind == "decode"], heading=False)
        lines += _forward_tables([r for r in own if r.kind == "forward"], heading=False)
        fused = [r for r in own if r.kind == "kernel" and r.backend not in (EAGER, COMPILED)]
        if fused:
            lines += _table(
                ("op", "at", "", "backend", "ms", "% of ceiling", "x eager", "x compiled"),
                [
                    (
                        f"`{r.name}`",
                        _place(r),
                        r.dtype,
                        r.backend,
                        number(r.timing.median_ms),
                        f"{r.rates.percent:.0f}",
                        times(r.speedup_eager),
                        times(r.speedup_compiled),
                    )
                    for r in fused
                ],
            )
    return "\n".join(lines).rstrip() + "\n"


def _by_machine(rows: Sequence[Row]) -> list[tuple[Machine, list[Row]]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        m = row.machine
        key = (m.device, m.device_name, m.threads if m.device == "cpu" else 0)
        groups.setdefault(key, []).append(row)
    return [(own[0].machine, own) for own in groups.values()]


def _versions(rows: Sequence[Row]) -> str:
    """Every value that occurs: rows of several runs are told apart in their files."""

    def all_of(name: str) -> str:
        values = {str(v) for r in rows if (v := getattr(r.machine, name)) is not None}
        return ", ".join(sorted(values))

    commits = sorted({_short(r.machine.commit) for r in rows})
    dates = sorted({r.machine.utc[:10] for r in rows})
    parts = [f"torch {all_of('torch')}"]
    parts += [f"{n} {all_of(n)}" for n in ("triton", "cuda", "driver") if all_of(n)]
    if rows[0].machine.device == "cpu":
        parts.append(f"{all_of('threads')} threads")
    parts += [f"commit {', '.join(commits)}", dates[0]]
    if dates[-1] != dates[0]:
        parts[-1] += f" to {dates[-1]}"
    return ", ".join(parts)


def _short(commit: str) -> str:
    head, plus, rest = commit.partition("+")
    return head[:10] + plus + rest


def _ceilings(rows: Sequence[Row]) -> list[str]:
    found = [r for r in rows if r.kind == "ceiling" and r.status == "measured"]
    if not found:
        return []
    text = ", ".join(f"{r.dtype} {r.name} {show.best_rate(r)}" for r in found)
    return [f"Ceilings measured in the same runs: {text}.", ""]


def _kernel_tables(rows: Sequence[Row]) -> list[str]:
    lines: list[str] = []
    columns = (
        *("op", "at", "backend", "ms", "range", "rate", "% of ceiling"),
        *("x eager", "x compiled", "error", "eager's", "of budget", "peak"),
    )
    for dtype in dict.fromkeys(r.dtype for r in rows):
        own = [r for r in rows if r.dtype == dtype]
        lines += [f"### Ops, {dtype}", ""]
        measured = [r for r in own if r.status == "measured"]
        lines += _table(columns, [_kernel_cells(r) for r in measured])
        lines += _others(own)
    return lines


def _kernel_cells(r: Row) -> tuple[str, ...]:
    peak = "" if r.memory is None else gigabytes(r.memory.activation_bytes)
    return (f"`{r.name}`", _place(r), *show.kernel_cells(r), peak)


def _place(r: Row) -> str:
    scale = r.shape.get("scale", 1)
    site = r.site.split("/")[-1]
    return f"{site} {r.shape['size']}" + (f" / {scale}" if scale > 1 else "")


def _decode_tables(rows: Sequence[Row], *, heading: bool = True) -> list[str]:
    if not rows:
        return []
    columns = (
        *("network", "size", "", "variant", "image ms", "step ms", "first ms"),
        *("new size, first / tenth ms", "peak", "weights", "activations", "J", "x eager"),
        *("x compiled", "x original", "x original compiled", "PSNR to reference"),
    )
    lines = ["### Whole decodes", ""] if heading else []
    lines += _table(columns, [_decode_cells(r) for r in rows if r.status == "measured"])
    return lines + (_others(rows) if heading else [])


def _decode_cells(r: Row) -> tuple[str, ...]:
    t, m, d = r.timing, r.memory, r.decode
    new = [d.new_size_first_ms, d.new_size_tenth_ms]
    psnr = "" if d.psnr_reference_db is None else f"{d.psnr_reference_db:.1f} dB"
    return (
        r.name,
        f"{r.shape['width']}x{r.shape['height']}"
        + (f" in tiles of {r.shape['tile']}" if "tile" in r.shape else ""),
        r.dtype,
        r.backend + (f" ({r.site})" if r.site else ""),
        number(t.median_ms),
        number(d.step_ms),
        "" if t.first_ms is None else number(t.first_ms),
        " / ".join("-" if v is None else number(v) for v in new) if any(new) else "",
        *(("", "", "") if m is None else _memory_cells(r)),
        "" if d.joules_per_image is None else number(d.joules_per_image),
        times(r.speedup_eager),
        times(r.speedup_compiled),
        times(r.speedup_upstream),
        times(r.speedup_upstream_compiled),
        psnr,
    )


def _forward_tables(rows: Sequence[Row], *, heading: bool = True) -> list[str]:
    if not rows:
        return []
    columns = (
        *("network", "size", "", "variant", "call ms", "host ms", "TFLOP/s", "peak", "weights"),
        *("activations", "x eager", "x compiled"),
    )
    lines = ["### One network call of L2P", ""] if heading else []
    lines += _table(columns, [_forward_cells(r) for r in rows if r.status == "measured"])
    return lines + (_others(rows) if heading else [])


def _forward_cells(r: Row) -> tuple[str, ...]:
    t, m = r.timing, r.memory
    return (
        r.name + (f", {r.site}" if r.site else ""),
        f"{r.shape['width']}x{r.shape['height']}",
        r.dtype,
        r.backend,
        number(t.median_ms),
        "" if t.host_ms is None else number(t.host_ms),
        number(r.rates.tflop_s),
        *(("", "", "") if m is None else _memory_cells(r)),
        times(r.speedup_eager),
        times(r.speedup_compiled),
    )


def _growth_table(rows: Sequence[Row]) -> list[str]:
    found = growth(rows)
    if not found:
        return []
    sides = sorted({side for g in found for side in g.ms})
    columns = ("network", "", "variant", *(f"{side} ms" for side in sides), "pixels^")
    lines = ["### Time against size", ""]
    lines += ["The exponent fits the logarithms of a variant's times over those of its pixels.", ""]
    return lines + _table(
        columns,
        [
            (
                g.name,
                g.dtype,
                g.backend + (f" ({g.site})" if g.site else ""),
                *(number(g.ms[side]) if side in g.ms else "" for side in sides),
                f"{g.exponent:.2f}",
            )
            for g in found
        ],
    )


def _profile_tables(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    lines = ["### A step, part by part", ""]
    columns = ("part", "shapes", "calls", "ms", "share", "floor ms", "gap ms", "kernels")
    steps: dict[tuple, list[Row]] = {}
    for r in rows:
        key = (show.network(r), r.shape["height"], r.dtype, r.backend, r.machine.commit)
        steps.setdefault(key, []).append(r)
    for own in (rows for rows in steps.values() if rows[0].status == "measured"):
        step, *parts = own
        lines += [
            f"**{show.network(step)} {step.shape['height']}x{step.shape['width']}, {step.dtype}, "
            f"{step.backend}**: {show.accounted(step)}; the floors add up to "
            f"{number(step.profile.floor_ms)} ms.",
            "",
        ]
        large = [r for r in parts if r.profile.share >= show.LEAST_SHARE]
        lines += _table(columns, [_profile_cells(r) for r in large])
        left = [r for r in parts if r.profile.share < show.LEAST_SHARE]
        if left:
            share = sum(r.profile.share for r in left)
            lines += [f"And {len(left)} parts of less, {share:.1f} % in all.", ""]
    return lines + _others(rows)


def _profile_cells(r: Row) -> tuple[str, ...]:
    p = r.profile
    _, _, shapes = r.site.partition("/")
    kernels = ", ".join(f"`{show.short(k.name, 48)}` {number(k.ms)}" for k in p.kernels[:2])
    return (
        f"`{show.short(r.name, 48)}`",
        shapes,
        f"{p.calls:.4g}",
        number(p.ms),
        f"{p.share:.1f} %",
        number(p.floor_ms),
        number(p.gap_ms),
        kernels + (", ..." if len(p.kernels) > 2 else ""),
    )


def _memory_cells(r: Row) -> tuple[str, ...]:
    m = r.memory
    weights = "" if m.weight_bytes is None else gigabytes(m.weight_bytes)
    return gigabytes(m.peak_bytes), weights, gigabytes(m.activation_bytes)


def _others(rows: Sequence[Row]) -> list[str]:
    """Why some rows have no time, each reason once."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for r in rows:
        if r.status != "measured":
            place = f"{r.name} {_place(r)}" if r.kind == "kernel" else r.name
            reasons.setdefault((r.backend, r.status, r.reason), []).append(place)
    if not reasons:
        return []
    lines = ["Not measured:", ""]
    for (backend, status, reason), places in reasons.items():
        names = sorted({p.split(" ")[0] for p in places})
        lines.append(f"- {backend} ({', '.join(names)}): {status}, {reason}")
    return [*lines, ""]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    used = [i for i, _ in enumerate(columns) if any(r[i] for r in rows)]
    lines = ["| " + " | ".join(columns[i] for i in used) + " |", "|" + "---|" * len(used)]
    lines += ["| " + " | ".join(r[i].replace("|", "\\|") for i in used) + " |" for r in rows]
    return [*lines, ""]
