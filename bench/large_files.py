"""Picture files larger than memory need be: written as a decode to a file writes them, read back.

The picture is noise, which does not shrink: a TIFF of 38000 x 38000 passes 4 GB. Each is written in
a process of its own, and then read and compared whole, by a reader that is not the writer.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pixeldiff import png_stream, tiff_stream
from pixeldiff.images import uint8_bands
from pixeldiff.out_files import written_whole
from pixeldiff.picture_files import read_picture_metadata, save_rows

from . import tiff_rows
from .machine import machine
from .memory import Meter
from .own_process import measured_alone

VERSION = 1
CPU = torch.device("cpu")
ROWS = 32  # of the noise at a time
METADATA = {"seed": 3}


@dataclass(frozen=True)
class Plan:
    """One file.

    Args:
        suffix: .png or .tif.
        side: pixels of a side of the square.
        path: of the file.
        threads: of PyTorch.
    """

    suffix: str
    side: int
    path: str
    threads: int


@dataclass
class Written:
    """Bytes and seconds of one file."""

    suffix: str
    side: int
    file_bytes: int
    bigtiff: bool
    before: int  # resident set of the process with everything imported
    above: int  # the most that was resident while it was written, less `before`
    seconds: float
    same: bool | None = None  # every pixel, and the metadata, read back


@dataclass
class Report:
    machine: Any
    command: str
    files: list[Written]
    schema: int = VERSION


def run(
    cases: tuple[tuple[str, int], ...], threads: int, folder: Path | None, command: str
) -> Iterator[Report]:
    """A report after every file, the earlier ones included.

    Args:
        cases: suffix and side of each.
        folder: where the files lie for a while; default: that of temporary files.

    Raises:
        RuntimeError: a process failed; with what it wrote.
    """
    torch.set_num_threads(threads)
    report = Report(dataclasses.asdict(machine(CPU)), command, [])
    for suffix, side in cases:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            path = Path(place) / f"picture{suffix}"
            plan = Plan(suffix, side, str(path), threads)
            report.files.append(Written(**measured_alone(__name__, plan, f"{suffix}, {side}")))
            report.files[-1].same = _same(path, side)
        yield report


def measure(plan: Plan) -> Written:
    """The one file of a plan, here; a process measures once, or its peak is not its own."""
    torch.set_num_threads(plan.threads)
    path = Path(plan.path)
    for module in (png_stream, tiff_stream):  # imports, which are not the picture's
        if module.why_not() is not None:
            raise RuntimeError(module.why_not())
    meter = Meter(CPU)
    before = meter.now() or 0
    meter.reset()
    start = time.perf_counter()
    save_rows(path, (plan.side, plan.side), noise(plan.side), METADATA)
    seconds = time.perf_counter() - start
    above = (meter.peak() or 0) - before
    with path.open("rb") as file:
        bigtiff = file.read(4) == b"II+\0"
    return Written(plan.suffix, plan.side, path.stat().st_size, bigtiff, before, above, seconds)


def noise(side: int) -> Iterator[Tensor]:
    """(3, rows, side) in [-1, 1], the same each time."""
    for first in range(0, side, ROWS):
        generator = torch.Generator().manual_seed(first)
        shape = (3, min(ROWS, side - first), side)
        yield torch.rand(shape, generator=generator) * 2 - 1


def _same(path: Path, side: int) -> bool:
    want = (band for part in noise(side) for band in uint8_bands(part))
    got = _read(path)
    same = read_picture_metadata(path) == METADATA
    left = np.empty((0, side, 3), np.uint8)
    for band in want:
        while len(left) < len(band):
            left = np.concatenate((left, next(got)))
        same = same and np.array_equal(left[: len(band)], band)
        left = left[len(band) :]
    return same and not len(left) and next(got, None) is None


def _read(path: Path) -> Iterator[np.ndarray]:
    if path.suffix == ".tif":
        yield from tiff_rows.rows(path)
        return
    most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # it would take it for an attack
    try:
        with Image.open(path) as image:
            for first in range(0, image.height, ROWS):
                last = min(first + ROWS, image.height)
                yield np.asarray(image.crop((0, first, image.width, last)))
    finally:
        Image.MAX_IMAGE_PIXELS = most


def save(report: Report, path: Path) -> None:
    with written_whole([path]) as (partial,):
        partial.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(measure(Plan(**json.loads(sys.argv[1]))))))
