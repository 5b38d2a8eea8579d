"""The page of memory: plans of a released network for several budgets, in tables."""

from __future__ import annotations

from pathlib import Path

from pixeldiff.errors import BudgetError
from pixeldiff.memory import parsed_bytes, plan, return_freed_memory
from pixeldiff.memory.budget import in_words, upward
from pixeldiff.out_files import written_whole

from .machine import ROOT

PAGE = ROOT / "docs" / "memory.md"
BEGIN = "<!-- python -m bench plans: from here on -->"
END = "<!-- python -m bench plans: up to here -->"
MODEL, SIZES = "flux-2k", (2048, 4096)
DEVICES = {
    ("cuda", "bf16"): ("2GB", "4GB", "6GB", "8GB", "12GB", "24GB", "80GB"),
    ("cpu", "fp32"): ("4GB", "6GB", "8GB", "12GB", "16GB", "32GB"),
}


def tables() -> str:
    """Markdown: of each size and device a row for each budget."""
    return_freed_memory()  # as the commands do within a tight budget
    parts = []
    for (device, precision), budgets in DEVICES.items():
        for size in SIZES:
            parts += [
                f'`{MODEL}` at {size} x {size}, {precision}, device "{device}":',
                "",
                "| budget | way | weights | activations | workspace | takes | pixels |",
                "|---|---|---|---|---|---|---|",
                *(_row(size, budget, device, precision) for budget in budgets),
                "",
            ]
    return "\n".join(parts)


def _row(size: int, budget: str, device: str, precision: str) -> str:
    named = in_words(parsed_bytes("budget", budget))
    try:
        found = plan(MODEL, size, budget, device=device, precision=precision)
    except BudgetError as e:
        return f"| {named} | none; the smallest budget is {upward(e.smallest)} | | | | | |"
    e = found.estimate
    counts = (e.weights, e.activations, e.workspace, e.peak)
    cells = " | ".join(in_words(count) for count in counts)
    pixels = "the same" if found.same_pixels else "other"
    return f"| {named} | {found.way.words} | {cells} | {pixels} |"


def rewritten(page: str) -> str:
    """The page with the tables of today.

    Raises:
        ValueError: it has no place for them.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page needs the lines {BEGIN!r} and {END!r} once each")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{rest.split(END)[1]}"


def rewrite(path: Path) -> None:
    text = rewritten(path.read_text())
    with written_whole([path]) as (partial,):
        partial.write_text(text)
