"""Whole decodes: every variant in a process of its own, taking turns image by image."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pixeldiff.models.pid.config import PiDConfig
from pixeldiff.models.pid.decoder import PRECISIONS

from . import models, upstream
from .machine import machine
from .schema import Decode, Memory, Row
from .timing import summarise
from .variants import VARIANTS, Spec, precision
from .workers import Worker, WorkerFailed

FIRST = "pixeldiff"
TENTH_SECONDS = 60.0  # nine more images in a new size are worth this much


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        side: pixels of a side of the square output.
        variants: of `VARIANTS`; "pixeldiff" comes first whether named or not.
        images: timed images of each variant, after the first.
        tile: pixels of a side of the tiles it is decoded in; 0 is in one piece.
        new_side: the size of "first call in a new size"; 0 leaves it out.
        seconds: after which no further image starts, once each variant has one.
        timeout: seconds for any single answer of a worker.
    """

    config: str
    side: int
    device: torch.device
    precision: str
    variants: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    steps: int | None = None
    batch: int = 1
    threads: int | None = None
    tile: int = 0
    images: int = 5
    new_side: int = 0
    seconds: float = 300.0
    timeout: float = 900.0


@dataclass
class _Run:
    """What came of one variant so far."""

    variant: str
    row: Row
    worker: Worker | None = None
    loaded: dict[str, Any] = field(default_factory=dict)
    images: list[dict[str, Any]] = field(default_factory=list)
    new_size: list[float] = field(default_factory=list)
    energy: dict[str, Any] = field(default_factory=dict)
    psnr: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        return self.worker is not None and self.row.status == "measured"

    def ask(self, do: str, **request: Any) -> dict[str, Any] | None:
        """The answer; None if the variant is lost, which its row then says."""
        if not self.alive:
            return None
        try:
            return self.worker.ask(do, **request)
        except WorkerFailed as e:
            self.row.status, self.row.reason = "failed", f"{do}: {e}"
            self.worker.end()
            return None


def run(plan: Plan) -> Iterator[list[Row]]:
    """One list with a row for each variant, when all is measured or the caller was interrupted.

    Raises:
        ValueError: an unknown config or a size it cannot decode.
    """
    config = _config(plan.config)
    for side in (plan.side, plan.new_side, plan.tile):
        if side:
            models.inputs(config, side, 1, torch.device("cpu"))
    if plan.tile >= plan.side:
        raise ValueError(f"tile must be smaller than the image's side {plan.side}, got {plan.tile}")
    _check_host_memory(plan, config)
    runs = [_Run(v, _row(plan, v)) for v in dict.fromkeys((FIRST, *plan.variants)) if v in VARIANTS]
    try:
        _measure(plan, runs)
    except KeyboardInterrupt:
        yield _finished(runs)
        raise
    finally:
        for r in runs:
            if r.worker is not None:
                r.worker.end()
    yield _finished(runs)


def _finished(runs: list[_Run]) -> list[Row]:
    rows = [_finish(r) for r in runs]
    compare(rows)
    return rows


def _measure(plan: Plan, runs: list[_Run]) -> None:
    for r in runs:
        reason = upstream.why_not() if VARIANTS[r.variant][0] == "upstream" else None
        if reason is not None:
            r.row.status, r.row.reason = "skipped", reason
            continue
        r.worker = Worker(plan.timeout)
        spec = Spec(
            variant=r.variant,
            config=plan.config,
            device=str(plan.device),
            precision=plan.precision,
            steps=plan.steps,
            batch=plan.batch,
            backends=plan.backends,
            threads=plan.threads,
            tile=plan.tile // _config(plan.config).pixels_per_latent_cell,
        )
        r.loaded = r.ask("load", **dataclasses.asdict(spec)) or {}
    with tempfile.TemporaryDirectory() as folder:
        # The first image of each, alone: compilation and every other lazy start are in it.
        for r in runs:
            _image(r, plan.side, Path(folder) / f"{r.variant}.npy")
        _psnr(runs, Path(folder))
    # Then in turn, A B C A B C: whatever drifts hits all alike.
    spent = 0.0
    for _ in range(plan.images):
        if spent > 1e3 * plan.seconds:
            break
        spent += sum(_image(r, plan.side) for r in runs)
    for r in runs:
        if plan.device.type == "cuda":
            r.energy = r.ask("energy", side=plan.side) or {}
            if r.energy.get("note"):
                r.notes.append(r.energy["note"])
    if plan.new_side:
        _new_size(plan, runs)


def _image(r: _Run, side: int, save: Path | None = None) -> float:
    answer = r.ask("image", side=side, save=None if save is None else str(save))
    if answer is None:
        return 0.0
    r.images.append(answer)
    return answer["ms"]


def _new_size(plan: Plan, runs: list[_Run]) -> None:
    for k in range(10):
        left = (10 - k) * sum(r.new_size[-1] for r in runs if r.new_size and r.alive)
        # The first in a new size may compile; the second tells what the others will take.
        if k == 2 and left > 1e3 * TENTH_SECONDS:
            for r in runs:
                r.notes.append(f"no tenth image at {plan.new_side}: it would take too long")
            return
        for r in runs:
            answer = r.ask("image", side=plan.new_side)
            if answer is not None:
                r.new_size.append(answer["ms"])


def _psnr(runs: list[_Run], folder: Path) -> None:
    """Peak signal-to-noise ratio of each variant's first image against the reference's."""
    base = folder / "reference.npy"
    if not base.exists():
        return
    want = np.load(base).astype(np.float64)
    for r in runs:
        path = folder / f"{r.variant}.npy"
        if r.variant == "reference" or not path.exists():
            continue
        r.psnr = psnr(np.load(path), want)
        if r.psnr is None:
            r.notes.append("the image equals the reference's bit for bit")


def psnr(image: np.ndarray, want: np.ndarray) -> float | None:
    """dB of images in [-1, 1]; None where they are equal."""
    error = np.mean((image.astype(np.float64) - want) ** 2)
    return None if error == 0 else float(10 * math.log10(4 / error))


def _finish(r: _Run) -> Row:
    """The row of what was measured, also where the rest is missing."""
    row = r.row
    if row.status == "measured" and len(r.images) < 2:
        row.status, row.reason = "skipped", "interrupted before its second image"
    if row.status != "measured":
        return row
    first, timed = r.images[0], r.images[1:]
    row.timing = summarise([i["ms"] for i in timed], first_ms=first["ms"])
    peak = max((i["peak_bytes"] or 0 for i in timed), default=0)
    if peak:
        row.memory = Memory(
            peak_bytes=peak,
            activation_bytes=max(0, peak - r.loaded["loaded_bytes"]),
            weight_bytes=r.loaded["weight_bytes"],
            first_peak_bytes=first["peak_bytes"],
            base_bytes=r.loaded["base_bytes"],
            source=r.loaded["memory_source"],
        )
    row.decode = Decode(
        steps=r.loaded["steps"],
        step_ms=statistics.median(ms for i in timed for ms in i["step_ms"]),
        prepare_ms=statistics.median(i["prepare_ms"] for i in timed),
        load_ms=r.loaded["load_ms"],
        parameters=r.loaded["parameters"],
        new_size_first_ms=r.new_size[0] if r.new_size else None,
        new_size_tenth_ms=r.new_size[9] if len(r.new_size) > 9 else None,
        joules_per_image=r.energy.get("joules"),
        watts=r.energy.get("watts"),
        psnr_reference_db=r.psnr,
        notes=r.notes,
    )
    return row


def compare(rows: list[Row]) -> None:
    """Speedups over the rows of the plain network, eager and compiled, and over those of the
    original, where they are there."""
    base = {r.backend: r.timing.median_ms for r in rows if r.timing is not None}
    for row in rows:
        if row.timing is not None:
            if "reference" in base:
                row.speedup_eager = base["reference"] / row.timing.median_ms
            if "compile" in base:
                row.speedup_compiled = base["compile"] / row.timing.median_ms
            if "upstream" in base:
                row.speedup_upstream = base["upstream"] / row.timing.median_ms
            if "upstream+compile" in base:
                row.speedup_upstream_compiled = base["upstream+compile"] / row.timing.median_ms


def _row(plan: Plan, variant: str) -> Row:
    if plan.threads:
        torch.set_num_threads(plan.threads)  # what the machine's description then says
    shape = {"height": plan.side, "width": plan.side, "batch": plan.batch}
    if plan.new_side:
        shape["new_size"] = plan.new_side
    if plan.tile:
        shape["tile"] = plan.tile
    site = ",".join(plan.backends) if VARIANTS[variant][0] == "pixeldiff" else ""
    return Row(
        kind="decode",
        name=plan.config,
        site=site,
        shape=shape,
        dtype=precision(variant, plan.precision),
        backend=variant,
        status="measured",
        machine=machine(plan.device),
    )


def _config(name: str) -> PiDConfig:
    found = models.resolve(name)
    if found is not None:
        return found.inference_config
    from pixeldiff.models.pid.checkpoint import read_checkpoint

    return read_checkpoint("demo").config


def _check_host_memory(plan: Plan, config: PiDConfig) -> None:
    """Every worker holds its own weights: refuse what the machine cannot hold.

    Raises:
        ValueError: says how much it would be and what to leave out.
    """
    if plan.device.type != "cpu" or plan.config == models.DEMO:
        return
    try:
        have = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return
    from pixeldiff.models.pid import PiDNet

    count = sum(p.numel() for p in PiDNet(config, device="meta").parameters())
    need = sum(
        count
        * (4 if VARIANTS[v][0] == "upstream" else PRECISIONS[precision(v, plan.precision)].itemsize)
        for v in {FIRST, *plan.variants}
        if VARIANTS[v][0] != "upstream" or upstream.why_not() is None
    )
    if need > 0.8 * have:
        raise ValueError(
            f"the weights of {len({FIRST, *plan.variants})} variants need {need / 1e9:.1f} GB, "
            f"{have / 1e9:.1f} GB are free; compare fewer at a time, or take --precision bf16"
        )
