"""A decode whose picture is larger than memory need be: killed on the way, continued, read back.

The picture is the demo's scene drawn at a quarter of the size and encoded by the demo's
autoencoder. A process of its own writes it as it is decoded, with `resume`, is killed by SIGKILL
and started again. What is resident is counted above what was when the network and the latent
were there and no tile had been made.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from pixeldiff.models.pid.decoder import PiDDecoder
from pixeldiff.models.pid.tile_layout import tile_layout
from pixeldiff.out_files import written_whole
from pixeldiff.sources import demo_autoencoder

from .machine import ROOT, machine
from .memory import Meter, resident_peak

VERSION = 1
CPU = torch.device("cpu")
SCALE = 4  # of the demo's network
SQUARE = 128  # pixels of the drawn scene: what is compared at a time


@dataclass(frozen=True)
class Plan:
    """What to decode.

    Args:
        side: pixels of a side of the square result, a multiple of 32.
        tile: rows and columns of a tile in latent cells.
        kills: shares of the tiles after which the process is killed.
        threads: of PyTorch.
    """

    side: int
    tile: tuple[int, int]
    kills: tuple[float, ...]
    threads: int


@dataclass
class Process:
    """From the start of its tiles to its end."""

    found: int  # parts that earlier ones had kept
    kept: int  # parts at its end; the end of the last removes them
    killed: bool
    before: int  # bytes resident with network and latent
    above: int  # the most that was resident after, less `before`
    seconds: float


@dataclass
class Likeness:
    """PSNR in dB of squares of the result, reduced to the drawn scene's size, beside that."""

    squares: int
    least: float
    median: float


@dataclass
class Report:
    machine: Any
    command: str
    plan: dict[str, Any]
    image_bytes: int  # of the result in fp32, which nobody held
    processes: list[Process] = field(default_factory=list)
    file_bytes: int = 0
    likeness: Likeness | None = None
    schema: int = VERSION


def run(plan: Plan, out: Path, command: str) -> Iterator[Report]:
    """A report after every process, and one after the file was read back.

    Args:
        out: the picture, a .tif. It stays, and so does what was done if this is interrupted: the
            same call goes on.

    Raises:
        RuntimeError: a process failed that was not killed; with what it wrote.
    """
    torch.set_num_threads(plan.threads)
    scene = _scene(plan.side // SCALE)
    source = out.with_suffix(".latent.safetensors")
    save_file({"latent": _encoded(scene)}, source)
    report = Report(
        dataclasses.asdict(machine(CPU)), command, dataclasses.asdict(plan), plan.side**2 * 12
    )
    for share in (*plan.kills, None):
        report.processes.append(_process(plan, source, out, share))
        yield report
    source.unlink()
    report.file_bytes = out.stat().st_size
    report.likeness = likeness(out, scene)
    yield report


def save(report: Report, path: Path) -> None:
    with written_whole([path]) as (partial,):
        partial.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")


def likeness(path: Path, scene: np.ndarray) -> Likeness:
    """Reads a strip at a time.

    Args:
        scene: (h, w, 3) uint8; the picture is `SCALE` times as large.
    """
    from .tiff_rows import rows

    small = np.empty(scene.shape, np.float32)
    first, held = 0, np.empty((0, scene.shape[1] * SCALE, 3), np.uint8)
    for strip in rows(path):
        held = np.concatenate((held, strip))
        whole = len(held) // SCALE
        parts = held[: whole * SCALE].reshape(whole, SCALE, scene.shape[1], SCALE, 3)
        small[first : first + whole] = parts.mean((1, 3), dtype=np.float32)
        first, held = first + whole, held[whole * SCALE :]
    errors = []
    for y in range(0, scene.shape[0], SQUARE):
        for x in range(0, scene.shape[1], SQUARE):
            part = (slice(y, y + SQUARE), slice(x, x + SQUARE))
            errors.append(float(np.square(small[part] - scene[part]).mean()))
    levels = 10 * np.log10(255**2 / np.array(errors))
    return Likeness(len(errors), float(levels.min()), float(np.median(levels)))


def _scene(side: int) -> np.ndarray:
    from training.scene import draw_scene

    return draw_scene(side)


@torch.no_grad()
def _encoded(scene: np.ndarray) -> torch.Tensor:
    image = torch.from_numpy(scene).permute(2, 0, 1)[None].float() / 127.5 - 1
    return demo_autoencoder().encode(image).contiguous()


def decode(latent: Path, out: Path, tile: tuple[int, int], threads: int) -> None:
    """In a process of its own: prints the number of tiles and what is resident, then the peak."""
    torch.set_num_threads(threads)
    decoder = PiDDecoder.from_pretrained("demo", device="cpu")
    source = load_file(latent)["latent"]
    meter = Meter(CPU)
    layout = tile_layout(decoder.net.config, None, source.shape[-2:], tile, None)
    print(len(layout.tiles), meter.now(), flush=True)
    meter.reset()
    tiles = {"tile": tile, "tile_mode": "independent"}
    decoder.decode(source, seed=0, output=out, resume=_job(out), **tiles)
    print(meter.peak())


def _process(plan: Plan, latent: Path, out: Path, share: float | None) -> Process:
    """Until its end, or until that share of the tiles is kept."""
    found = kept = _kept(out)
    words = [json.dumps([str(latent), str(out), plan.tile, plan.threads])]
    with subprocess.Popen(
        [sys.executable, "-m", __name__, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        tiles, before = map(int, (child.stdout.readline() or "0 0").split())
        enough = None if share is None else math.ceil(share * tiles)
        start, peak = time.perf_counter(), before
        while child.poll() is None and (enough is None or kept < enough):
            time.sleep(0.02)
            peak = max(peak, resident_peak(child.pid) or 0)
            kept = max(kept, _kept(out))
        seconds = time.perf_counter() - start
        killed = child.poll() is None
        if killed:
            child.send_signal(signal.SIGKILL)
        said, errors = child.communicate()
    if not killed:
        if child.returncode != 0:
            raise RuntimeError(f"the decode ended with {child.returncode}: {errors}")
        peak = int(said)
    return Process(found, kept, killed, before, peak - before, seconds)


def _job(out: Path) -> Path:
    return Path(f"{out}.job")


def _kept(out: Path) -> int:
    folder = _job(out)
    return sum(name.endswith(".piece") for name in os.listdir(folder)) if folder.exists() else 0


if __name__ == "__main__":
    latent_path, picture, tile_cells, count = json.loads(sys.argv[1])
    decode(Path(latent_path), Path(picture), tuple(tile_cells), count)
