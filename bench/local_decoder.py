"""Resident memory of L2P's local decoder at full size, tile by tile, and its pixels beside the
whole decoder's.

Weights are random, of the released widths. Every case runs in a process of its own, whose resident
set before anything was made is the zero of all figures: weights, image, features and result count.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixeldiff.models.l2p import VARIANTS, bands
from pixeldiff.models.l2p.bands import Load, Tiling
from pixeldiff.models.l2p.config import L2PConfig
from pixeldiff.models.l2p.local_decoder import LocalDecoder
from pixeldiff.ops.registry import explain, on_request
from pixeldiff.out_files import written_whole

from .machine import DTYPES, machine
from .memory import Meter
from .models import fill
from .own_process import measured_alone

VERSION = 1
WINDOW = 1024  # of the full-size result, held to a whole decode of what it depends on
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        form: of `VARIANTS`, with a local decoder.
        side: pixels of a side of the square image.
        dtypes: of the weights; the image and the result are fp32.
        budget: `decoder_memory`, bytes.
        threads: of PyTorch.
        whole_side: of an image small enough for the whole decoder to run beside the tiled one.
    """

    form: str
    side: int
    dtypes: tuple[str, ...]
    budget: int
    threads: int
    whole_side: int = 1024


@dataclass
class Resident:
    """Bytes of one run above what the process held before; `peak` holds all the others."""

    dtype: str
    backends: dict[str, str]
    tiling: list[int]  # levels that are cut, height and width of a tile
    weights: int
    image: int
    features: int
    result: int
    held: int  # resident once weights, image and features were there
    peak: int
    beside: int  # peak without weights, image, features and result: what `decoder_memory` bounds
    estimate: int  # what the plan said of it
    before: int  # resident set of the process, not in the others
    seconds: float
    seam_error: float  # largest over the largest value, around a crossing of tiles' edges
    whole_error: float  # the same of an image of `whole_side` in 16 tiles


@dataclass
class Report:
    machine: Any
    command: str
    plan: dict[str, Any]
    runs: list[Resident]
    schema: int = VERSION


def run(plan: Plan, command: str) -> Iterator[Report]:
    """A report after every dtype, the earlier ones included.

    Raises:
        RuntimeError: a process failed; with what it wrote.
    """
    torch.set_num_threads(plan.threads)  # what the machine's description then says
    report = Report(dataclasses.asdict(machine(CPU)), command, dataclasses.asdict(plan), [])
    for dtype in plan.dtypes:
        single = dataclasses.replace(plan, dtypes=(dtype,))
        found = measured_alone(__name__, single, f"local decoder, {dtype}")
        report.runs.append(Resident(**found))
        yield report


def measure(plan: Plan) -> Resident:
    """The one case of a plan, here; a process measures once, or its peak is not its own."""
    torch.set_num_threads(plan.threads)
    config, dtype = VARIANTS[plan.form].config, DTYPES[plan.dtypes[0]]
    meter = Meter(CPU)
    before = meter.now() or 0
    decoder = LocalDecoder(config.local_decoder, config.dim, dtype=dtype).requires_grad_(False)
    fill(decoder, dtype)
    x, features = _inputs(plan.side, config.patch_size, config.dim, dtype)
    held = (meter.now() or 0) - before
    tiling = _tiling(decoder, plan.side, plan.budget, dtype)
    meter.reset()
    start = time.perf_counter()
    with torch.inference_mode():
        u = bands.decode(decoder, x, features, tiling)
    seconds = time.perf_counter() - start
    peak = (meter.peak() or 0) - before
    weights = sum(_bytes(p) for p in decoder.parameters())
    kept = weights + _bytes(x) + _bytes(features) + _bytes(u)
    load = Load(config.local_decoder, 3, (plan.side,) * 2, 1, 1, dtype.itemsize)
    return Resident(
        dtype=plan.dtypes[0],
        backends=_backends(decoder, dtype),
        tiling=[tiling.levels, tiling.height, tiling.width],
        weights=weights,
        image=_bytes(x),
        features=_bytes(features),
        result=_bytes(u),
        held=held,
        peak=peak,
        beside=peak - kept,
        estimate=load.memory(tiling),
        before=before,
        seconds=seconds,
        seam_error=_seam_error(decoder, x, features, u, tiling),
        whole_error=_whole_error(decoder, plan.whole_side, config, dtype, max(1, tiling.levels)),
    )


def _inputs(side: int, patch: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, side, side, generator=generator)
    grid = side // patch
    return x, torch.randn(1, grid, grid, dim, generator=generator).to(dtype)


def _tiling(decoder: LocalDecoder, side: int, budget: int, dtype: torch.dtype) -> Tiling:
    return bands.plan_for(decoder, (side, side), 1, 1, dtype.itemsize, budget)


def _seam_error(
    decoder: LocalDecoder, x: Tensor, features: Tensor, u: Tensor, tiling: Tiling
) -> float:
    """Of a window on the last crossing of tiles' edges, held to a whole decode around it."""
    config, side, step = decoder.config, x.shape[-1], x.shape[-1] // features.shape[1]
    unit, cell = math.lcm(step, config.pixels_per_cell), config.pixels_per_cell
    pixels, around = bands.radius(config)
    margin = -(-max(pixels, (around + 1) * cell) // unit) * unit
    axes, inside, grid = [], [], []
    for tile in (tiling.height, tiling.width):
        seam = (side - 1) // tile * tile or side // 2
        own = max(0, seam - WINDOW // 2), min(side, seam + WINDOW // 2)
        first = max(0, own[0] - margin) // unit * unit
        end = min(side, -(-(own[1] + margin) // unit) * unit)
        axes.append(slice(first, end))
        grid.append(slice(first // step, end // step))
        inside.append((slice(*own), slice(own[0] - first, own[1] - first)))
    (rows, seen_rows), (columns, seen_columns) = inside
    with torch.inference_mode():
        want = decoder(x[..., axes[0], axes[1]], features[:, grid[0], grid[1]])
    return _error(u[..., rows, columns], want[..., seen_rows, seen_columns])


def _whole_error(
    decoder: LocalDecoder, side: int, config: L2PConfig, dtype: torch.dtype, levels: int
) -> float:
    side = -(-side // config.size_multiple) * config.size_multiple
    x, features = _inputs(side, config.patch_size, config.dim, dtype)
    tile = -(-side // 4 >> levels) << levels
    with torch.inference_mode():
        tiled = bands.decode(decoder, x, features, Tiling(levels, tile, tile))
        return _error(tiled, decoder(x, features))


def _error(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def _backends(decoder: LocalDecoder, dtype: torch.dtype) -> dict[str, str]:
    """Which one takes the calls of the outermost level."""
    level, below = decoder.config.levels[0], decoder.config.levels[1].out
    x, skip = (torch.zeros(1, 8, 8, channels, dtype=dtype) for channels in (3, level.skip))
    h = torch.zeros(1, 4, 4, below, dtype=dtype)
    enc = getattr(decoder, f"enc{level.name}")[0]
    up, dec = getattr(decoder, f"up{level.name}")[1], getattr(decoder, f"dec{level.name}")[0]
    calls = {
        "local_decoder_down": (x, enc.weight, enc.bias),
        "local_decoder_up": (h, skip, up.weight, up.bias, dec.weight, dec.bias),
    }
    return {op: _chosen(op, args) for op, args in calls.items()}


def _chosen(op: str, args: tuple[Tensor, ...]) -> str:
    asked = on_request(op, *args)
    return next(name for name, why in explain(op, *args) if why is None and name not in asked)


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def save(report: Report, path: Path) -> None:
    with written_whole([path]) as (partial,):
        partial.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    result = measure(Plan(**{**given, "dtypes": tuple(given["dtypes"])}))
    print(json.dumps(dataclasses.asdict(result)))
