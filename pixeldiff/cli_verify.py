"""`pixeldiff verify`: golden files through the installed package."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .cli_errors import clean_errors
from .cli_options import err, out


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--all", "show_all", is_flag=True, help="print every tensor, not only the outputs")
@clean_errors
def verify(files: tuple[Path, ...], show_all: bool) -> None:
    """Run golden FILES through the installed package and print each tensor's error.

    Exits 0 if every tensor is within its tolerance; 2 if a file is not understood, whatever the
    others gave; else 1 if an error exceeds its tolerance or a file cannot be run to its end.
    """
    from .verify import NotUnderstood, verify_file

    missed, failed, unknown = 0, 0, 0
    for path in files:
        try:
            report = verify_file(path)
        except NotUnderstood as e:
            err.print(f"{path}: {e}", style="yellow", markup=False)
            unknown += 1
        except Exception as e:  # the other files still count
            reason = f"{type(e).__name__}: {e}"
            err.print(f"{path}: cannot be run: {reason}", style="red", markup=False)
            failed += 1
        else:
            missed += _print_report(report, show_all)
    parts = [
        f"{len(files) - unknown - failed} files run",
        f"{missed} tensors missed",
        f"{unknown} files not understood",
    ]
    if failed:
        parts.append(f"{failed} files failed")
    out.print(", ".join(parts))
    sys.exit(2 if unknown else 1 if missed or failed else 0)


def _print_report(report, show_all: bool) -> int:
    """Prints the table of one file and returns how many of its tensors missed."""
    from rich.table import Table
    from rich.text import Text

    rows = [r for r in report.rows if show_all or not r.ok or r.key.startswith("out.")]
    table = Table("tensor", "error", "tolerance", "", title=Text(report.name), title_justify="left")
    for r in rows:
        style = None if r.ok else "red"
        bound = f"{r.tolerance:.1e}" + ("" if r.unit == "abs" else f" {r.unit}")
        table.add_row(Text(r.key), f"{r.error:.1e}", bound, "ok" if r.ok else "MISS", style=style)
    out.print(table, markup=False)
    missed = sum(not r.ok for r in report.rows)
    out.print(
        f"{report.name}: {len(report.rows) - missed} of {len(report.rows)} tensors ok\n",
        markup=False,
    )
    return missed
