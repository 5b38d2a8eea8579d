"""`pixeldiff plan`: how much memory a picture takes, and how to make it in less."""

from __future__ import annotations

import json
from typing import Any

import click

from .cli_errors import clean_errors
from .cli_options import out

NO_BOUND = "1000TB"


@click.command()
@click.option("--model", default="flux-2k", show_default=True, help="variant, l2p-VARIANT, or demo")
@click.option("--size", required=True, help="pixels of a side, or HEIGHTxWIDTH")
@click.option("--memory", help="what it may take on the device, like 8GB; default: no bound")
@click.option(
    "--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True,
    help="need not be here",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16", "fp8"]), help="default: bf16 on cuda"
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="at once")
@click.option("--steps", type=click.IntRange(1), help="network calls; default: the model's")
@click.option("--text-encoder", is_flag=True, help="texts are given: their encoder stays loaded")
@click.option("--tiles/--no-tiles", default=True, help="tiles, which change pixels, may be chosen")
@click.option("--live", is_flag=True, help="also what is alive at the worst moment")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
@clean_errors
def plan(
    model: str,
    size: str,
    memory: str | None,
    device: str,
    precision: str | None,
    batch: int,
    steps: int | None,
    text_encoder: bool,
    tiles: bool,
    live: bool,
    as_json: bool,
) -> None:
    """The fastest way to make a picture that fits in MEMORY, and what it takes.

    Nothing is loaded: released models are known by their shapes. On a GPU the memory is the
    allocator's, beside which the CUDA context takes about half a gigabyte; on a CPU it is that of a
    process that gives freed memory back at once, as `decode` and `generate` do in a tight --memory.
    """
    from .memory import plan as planned
    from .memory import return_freed_memory

    return_freed_memory()  # as the command that is planned for does within a tight budget
    asked: dict[str, Any] = {"device": device, "batch": batch}
    asked |= {"precision": precision} if precision else {}
    asked |= {"steps": steps} if steps else {}
    asked |= {"text_encoder": True} if text_encoder else {}
    found = planned(model, _pixels(size), memory or NO_BOUND, tiles=tiles, **asked)
    if as_json:
        told = found.to_dict()
        if live:
            told["live"] = list(found.estimate.table)
        click.echo(json.dumps(told, indent=1))
        return
    out.print(str(found), markup=False)
    if live:
        out.print("  alive at the worst moment:", *found.estimate.table, sep="\n  ", markup=False)


def _pixels(size: str) -> tuple[int, int]:
    try:
        sides = [int(side) for side in size.lower().split("x")]
        height, width = sides * 2 if len(sides) == 1 else sides
    except ValueError:
        raise click.BadParameter(
            f"--size must be 2048 or HEIGHTxWIDTH, like 1024x768, got {size!r}"
        ) from None
    return height, width
