"""`python -m bench choose`: races become the choice of backends."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from pixeldiff.cli_errors import clean_errors

from . import show
from .choose import TABLES, Decision, decide, read, write


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="only say whether the tables are what the files give")
@click.option("--replace", is_flag=True, help="forget another device of the same capability")
@click.option(
    "--tables",
    type=click.Path(path_type=Path, file_okay=False),
    default=TABLES,
    help="folder to write to; a table it lacks begins as the package's own",
)
@clean_errors
def choose(files: tuple[Path, ...], check: bool, replace: bool, tables: Path) -> None:
    """Let the races in FILES, of `bench kernels` on one kind of GPU, choose the backends.

    The order of every op and class of problem goes by what was fastest and right, where the present
    one is not within 2 % of it.
    """
    machine, races = read(files)
    decisions = decide(machine, races, tables, replace=replace)
    show.console.print(f"{machine.device_name}, capability {machine.capability}", markup=False)
    _show(decisions)
    changes = sum(bool(d.after) and not d.stands for d in decisions)
    if check:
        if changes:
            raise ValueError(
                f"{changes} classes of problems are not in {tables} as these races say"
            )
        show.console.print(f"{tables}: up to date")
        return
    for path in write(machine, decisions, tables, replace=replace):
        show.console.print(str(path), markup=False)


def _show(decisions: list[Decision]) -> None:
    table = Table(title="tried in this order", title_justify="left")
    for name in ("op", "kind", "size", "until now", "from now on", "x", "races"):
        table.add_column(name, overflow="fold", justify="right" if name == "x" else "left")
    for d in decisions:
        after = "as before" if d.after == d.before else " ".join(d.after) or "undecided"
        x = f"{d.gain:.2f}" if d.after else ""
        races = str(len(d.entry["races"]))
        table.add_row(d.op, d.kind, f"2^{d.size}", " ".join(d.before), after, x, races)
    show.console.print(table, markup=False)
    for d in decisions:
        for note in d.notes:
            show.console.print(f"  {d.op} {d.kind} 2^{d.size}: {note}", markup=False)
