"""Resident memory and time of the demo's decode in tiles, beyond the size of its training.

Every case runs in a process of its own; what is resident once the network, the latent and nothing
else is there counts as none.
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

import torch
from torch.nn.functional import interpolate

from pixeldiff.images import from_pil
from pixeldiff.models.pid.decoder import PiDDecoder
from pixeldiff.out_files import written_whole
from pixeldiff.sources import demo_asset, demo_autoencoder, read_picture

from .machine import machine
from .memory import Meter
from .own_process import measured_alone

VERSION = 1
CPU = torch.device("cpu")
WHOLE, FILE = "whole", "file"


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        side: pixels of a side of the square result.
        modes: of tiles, "sync" or "independent"; "file", independent ones written to a TIFF as
            they are decoded; or "whole", one piece.
        tile: "auto", or rows and columns of latent cells.
        threads: of PyTorch.
    """

    side: int
    modes: tuple[str, ...]
    threads: int
    tile: str | tuple[int, int] = "auto"


@dataclass
class Resident:
    """Bytes and seconds of one decode to a Pillow image, or to a file."""

    mode: str
    tile: list[int] | None  # latent cells
    overlap: list[int] | None
    weights: int
    before: int  # resident set of the process with weights and latent
    above: int  # the most that was resident during the decode, less `before`
    seconds: float


@dataclass
class Report:
    machine: Any
    command: str
    plan: dict[str, Any]
    runs: list[Resident]
    schema: int = VERSION


def run(plan: Plan, command: str) -> Iterator[Report]:
    """A report after every mode, the earlier ones included.

    Raises:
        RuntimeError: a process failed; with what it wrote.
    """
    torch.set_num_threads(plan.threads)  # what the machine's description then says
    report = Report(dataclasses.asdict(machine(CPU)), command, dataclasses.asdict(plan), [])
    for mode in plan.modes:
        single = dataclasses.replace(plan, modes=(mode,))
        report.runs.append(Resident(**measured_alone(__name__, single, f"tiles, {mode}")))
        yield report


def measure(plan: Plan) -> Resident:
    """The one case of a plan, here; a process measures once, or its peak is not its own."""
    torch.set_num_threads(plan.threads)
    (mode,) = plan.modes
    small = from_pil(read_picture(demo_asset("picture.png")))
    size = (plan.side // 4,) * 2  # the network enlarges by 4
    small = interpolate(small, size, mode="bicubic", antialias=True).clamp(-1, 1)
    with torch.no_grad():
        latent = demo_autoencoder().encode(small)
    del small
    decoder = PiDDecoder.from_pretrained("demo", device="cpu")
    tiles = {"tile": plan.tile, "tile_mode": "independent" if mode == FILE else mode}
    options = {} if mode == WHOLE else tiles
    meter = Meter(CPU)
    before = meter.now() or 0
    meter.reset()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if mode == FILE:
            options["output"] = Path(folder) / "picture.tif"
        metadata = decoder.decode(latent, seed=0, **options).metadata
        seconds = time.perf_counter() - start
    return Resident(
        mode=mode,
        tile=metadata.get("tile"),
        overlap=metadata.get("overlap"),
        weights=sum(p.numel() * p.element_size() for p in decoder.net.parameters()),
        before=before,
        above=(meter.peak() or 0) - before,
        seconds=seconds,
    )


def save(report: Report, path: Path) -> None:
    with written_whole([path]) as (partial,):
        partial.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(
        json.dumps(dataclasses.asdict(measure(Plan(**{**given, "modes": tuple(given["modes"])}))))
    )
