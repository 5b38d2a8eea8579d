"""SVG plots of result rows: roofline, decode times, memory against size. Same rows, same bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "pixeldiff"
matplotlib.rcParams["svg.fonttype"] = "none"
matplotlib.rcParams["font.size"] = 9

from matplotlib.figure import Figure  # noqa: E402 (after the backend is chosen)

from .schema import Row  # noqa: E402

# One colour an implementation, from the Okabe-Ito set and Tol's, and a marker for print.
STYLES = {
    "eager": ("#999999", "o"),
    "reference": ("#999999", "o"),
    "reference-fp32": ("#555555", "o"),
    "compiled": ("#0072B2", "s"),
    "compile": ("#0072B2", "s"),
    "compile-max-autotune": ("#332288", "s"),
    "cpu": ("#D55E00", "^"),
    "cuda": ("#D55E00", "^"),
    "triton": ("#009E73", "v"),
    "pixeldiff": ("#D55E00", "^"),
    "pixeldiff+compile": ("#E69F00", "D"),
    "pixeldiff-no-graphs": ("#F0E442", "^"),
    "pixeldiff+returned": ("#117733", "<"),
    "upstream": ("#CC79A7", "P"),
    "upstream+compile": ("#56B4E9", "X"),
    "upstream+accelerate": ("#882255", "*"),
}
OTHER = ("#000000", "x")


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """File name -> figure, for everything there are rows for."""
    measured = [r for r in rows if r.status == "measured"]
    found: dict[str, Figure] = {}
    kernels = [r for r in measured if r.kind == "kernel"]
    for device, dtype in dict.fromkeys((r.machine.device_name, r.dtype) for r in kernels):
        own = [r for r in kernels if (r.machine.device_name, r.dtype) == (device, dtype)]
        found[_file("roofline", device, dtype)] = roofline(own)
    decodes = [r for r in measured if r.kind == "decode"]
    for device in dict.fromkeys(r.machine.device_name for r in decodes):
        own = [r for r in decodes if r.machine.device_name == device]
        found[_file("decode", device)] = bars(own)
        if len({r.shape["width"] for r in own if r.memory}) > 1:
            found[_file("memory", device)] = memory(own)
    return found


def roofline(rows: Sequence[Row]) -> Figure:
    """FLOPs per byte against achieved TFLOP/s, under the roofs measured in the same run."""
    figure, axes = _figure(8, 5)
    for backend in dict.fromkeys(r.backend for r in rows):
        own = [r for r in rows if r.backend == backend]
        colour, marker = STYLES.get(backend, OTHER)
        axes.scatter(
            [r.rates.flops / r.rates.bytes for r in own],
            [r.rates.tflop_s for r in own],
            s=22,
            c=colour,
            marker=marker,
            label=backend,
            zorder=3,
        )
    gb_s = max(r.rates.ceiling_gb_s for r in rows)
    tflop_s = max(r.rates.ceiling_tflop_s for r in rows)
    intensities = [r.rates.flops / r.rates.bytes for r in rows]
    left, right = min(intensities) / 2, max(*intensities, 4e3 * tflop_s / gb_s) * 2
    ridge = 1e3 * tflop_s / gb_s
    axes.plot(
        [left, ridge, right],
        [left * gb_s / 1e3, tflop_s, tflop_s],
        c="black",
        lw=1,
        label=f"copy {gb_s:.0f} GB/s, product {tflop_s:.3g} TFLOP/s",
    )
    # Each op once, above the fastest of its points.
    best: dict[tuple[str, str], Row] = {}
    for r in rows:
        key = (r.name, r.site)
        if key not in best or r.rates.tflop_s > best[key].rates.tflop_s:
            best[key] = r
    # Numbers in the plot and names beside it: many ops lie at nearly the same place.
    names = []
    for i, ((name, site), r) in enumerate(sorted(best.items()), 1):
        names.append(f"{i:2d} {name} {site.split('/')[-1]}")
        axes.annotate(
            str(i),
            (r.rates.flops / r.rates.bytes, r.rates.tflop_s),
            xytext=(3 if i % 2 else -8, 3),
            textcoords="offset points",
            fontsize=6,
        )
    axes.text(
        *(1.02, 1.0, "\n".join(names)),
        transform=axes.transAxes,
        va="top",
        fontsize=6.5,
        family="monospace",
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs per byte that must move")
    axes.set_ylabel("TFLOP/s achieved")
    return _finish(figure, axes, rows)


def bars(rows: Sequence[Row]) -> Figure:
    """Milliseconds of an image, a panel from zero for each network, size and dtype."""
    groups = list(dict.fromkeys(_model(r) for r in rows))
    figure = Figure(figsize=(1 + 2.4 * len(groups), 4), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, group in zip(panels, groups, strict=True):
        own = [r for r in rows if _model(r) == group]
        medians = [r.timing.median_ms for r in own]
        spread = [
            [r.timing.median_ms - r.timing.min_ms for r in own],
            [r.timing.max_ms - r.timing.median_ms for r in own],
        ]
        colours = [STYLES.get(r.backend, OTHER)[0] for r in own]
        axes.bar(range(len(own)), medians, yerr=spread, color=colours, ecolor="#444", width=0.8)
        names = [r.backend.replace("+", "\n+") for r in own]
        axes.set_xticks(range(len(own)), names, rotation=30, fontsize=7)
        axes.set_xlabel(group)
        axes.set_ylim(bottom=0)
        axes.grid(True, axis="y", lw=0.3, alpha=0.5)
    panels[0].set_ylabel("ms per image, median and range")
    figure.suptitle(_title(rows), fontsize=7)
    return figure


def memory(rows: Sequence[Row]) -> Figure:
    """Peak bytes against the side of the image, and the weights."""
    figure, axes = _figure(6, 4)
    with_memory = [r for r in rows if r.memory is not None and "tile" not in r.shape]
    for name, dtype, variant in dict.fromkeys((r.name, r.dtype, r.backend) for r in with_memory):
        own = sorted(
            (r for r in with_memory if (r.name, r.dtype, r.backend) == (name, dtype, variant)),
            key=lambda r: r.shape["width"],
        )
        colour, marker = STYLES.get(variant, OTHER)
        sides = [r.shape["width"] for r in own]
        label = f"{name} {dtype} {variant}"
        peaks = [r.memory.peak_bytes / 1e9 for r in own]
        axes.plot(sides, peaks, c=colour, marker=marker, ms=4, label=label)
        if own[0].memory.weight_bytes is not None:
            axes.axhline(own[0].memory.weight_bytes / 1e9, c=colour, lw=0.7, ls=":")
    axes.set_xlabel("side of the image, pixels")
    axes.set_ylabel("GB at the peak (dotted: weights alone)")
    axes.set_ylim(bottom=0)
    return _finish(figure, axes, rows)


def save(figure: Figure, path: Path) -> None:
    """Write an SVG without the time of writing."""
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _figure(width: float, height: float):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _finish(figure: Figure, axes, rows: Sequence[Row]) -> Figure:
    axes.set_title(_title(rows), fontsize=7)
    axes.legend(fontsize=7)
    axes.grid(True, which="major", lw=0.3, alpha=0.5)
    return figure


def _title(rows: Sequence[Row]) -> str:
    m = rows[0].machine
    dtypes = ", ".join(dict.fromkeys(r.dtype for r in rows))
    commit = m.commit.partition("+")[0][:10]
    return f"{m.device_name}, {dtypes}\ntorch {m.torch}, {commit}, {m.utc[:10]}"


def _model(r: Row) -> str:
    tiles = f"\nin tiles of {r.shape['tile']}" if "tile" in r.shape else ""
    return f"{r.name}\n{r.shape['width']}x{r.shape['height']} {r.dtype}{tiles}"


def _file(*words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-") + ".svg"
