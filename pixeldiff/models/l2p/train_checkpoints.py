"""Checkpoints of a training run: folders that are there whole or not at all.

`step-00000100/delta.safetensors` holds the tensors that learn, under their names in the network:
what `pixeldiff l2p merge` lays over the base. `state.safetensors` holds what only going on needs:
the optimiser's moments, the weights in fp32 where the delta has them in less or averaged, and their
running average in fp32 where one is kept.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import CheckpointFormatError

DELTA, STATE = "delta.safetensors", "state.safetensors"
_NAME = re.compile(r"step-(\d{8})")


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    if not out.is_dir():
        return []
    return sorted(p for p in out.iterdir() if p.is_dir() and _NAME.fullmatch(p.name))


def write_checkpoint(
    out: Path,
    step: int,
    delta: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    facts: Mapping[str, object],
    *,
    keep: int,
) -> Path:
    """Write one, then remove all but the `keep` newest. Those before it are whole until it is.

    Args:
        facts: JSON-able; stored with both files, for `read_checkpoint_facts`.
    """
    target, partial = out / f"step-{step:08d}", out / f".step-{step:08d}.part"
    for leftover in out.glob(".step-*.part"):
        shutil.rmtree(leftover)
    partial.mkdir()
    try:
        metadata = {k: json.dumps(v) for k, v in facts.items()}
        for name, tensors in ((DELTA, delta), (STATE, state)):
            save_file({k: t.contiguous() for k, t in tensors.items()}, partial / name, metadata)
            with open(partial / name, "rb") as file:
                os.fsync(file.fileno())  # the name must not outlive the data in a power cut
        if target.exists():  # of the same step, when a run is stopped as soon as it resumed
            shutil.rmtree(target)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(old)
    return target


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Raises CheckpointFormatError: damaged."""
    try:
        with safe_open(file, "pt") as opened:
            return {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise _damaged(file, e) from e


def read_facts(folder: Path) -> dict[str, object]:
    """What `write_checkpoint` was told. Raises CheckpointFormatError: damaged."""
    file = folder / STATE
    try:
        with safe_open(file, "pt") as opened:
            return {k: json.loads(v) for k, v in (opened.metadata() or {}).items()}
    except (SafetensorError, OSError, ValueError) as e:
        raise _damaged(file, e) from e


def _damaged(file: Path, error: Exception) -> CheckpointFormatError:
    return CheckpointFormatError(
        f"l2p train: {file} is damaged ({error}); remove the folder {file.parent} to resume from "
        f"the checkpoint before it"
    )


def check_space(out: Path, needed: int) -> None:
    """Raises OSError unless `needed` bytes are free where `out` is."""
    free = shutil.disk_usage(out).free
    if free < needed:
        raise OSError(
            f"l2p train: the checkpoints need {needed / 1e9:.2f} GB in {out}, {free / 1e9:.2f} GB "
            f"are free; free some, keep fewer (--keep), or write elsewhere"
        )
