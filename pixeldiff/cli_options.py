"""What several commands share: sizes, captions as text or file, and the progress bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

if TYPE_CHECKING:
    from .text import CaptionFile

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def parsed_size(_ctx, _param, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    try:
        height, width = (int(v) for v in value.lower().split("x"))
    except ValueError:
        raise click.BadParameter(f"must be HEIGHTxWIDTH, like 1024x768, got {value!r}") from None
    return height, width


def parsed_tile(_ctx, _param, value: str | None) -> tuple[int, int] | str | None:
    return value if value in (None, "auto") else parsed_size(_ctx, _param, value)


def keep_within(value: str | None) -> None:
    """Raises ValueError, before anything is loaded, unless it is an amount of memory or None. With
    one that is tight, this process will give memory that it frees back to the system."""
    from .memory.budget import parsed_bytes
    from .memory.heap import allow_returning

    if value is not None:
        parsed_bytes("--memory", value)
        allow_returning()


def caption_option(
    name: str, text: str | None, file_name: str, file: Path | None, family: str
) -> str | CaptionFile | None:
    """The text, or the file's embeddings, which must not be those of another kind of encoder."""
    from .text import load_caption

    if text is not None and file is not None:
        raise click.UsageError(f"{name} and {file_name} exclude each other")
    if file is None:
        return text
    held = load_caption(file)
    held.check_family(str(file), family)
    return held


@contextlib.contextmanager
def progress_bar(quiet: bool, what: str = "decoding") -> Iterator[Callable]:
    """A callback that shows a progress bar on stderr while the block runs."""
    from rich.progress import Progress, TimeElapsedColumn

    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(
        *columns, console=err, disable=quiet or not err.is_terminal, transient=True
    ) as bar:
        task = bar.add_task(what, total=None)

        def callback(info) -> None:
            # Of a tile: step s of n, tile k of m.
            tiles, tile = getattr(info, "tiles", 1), getattr(info, "tile", 1)
            bar.update(task, completed=(info.step - 1) * tiles + tile, total=info.steps * tiles)

        yield callback
