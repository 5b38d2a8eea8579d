"""A trained delta laid over the pixel network that its training started from.

Training saves the tensors it changed and nothing else. The complete network is the base with those
put in place of its own, each in the type it was trained in. Bytes are moved as in a conversion:
streamed, resumable, verified.

Source: L2P (arXiv 2605.12013), whose deltas replace tensors; there is no scale.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import (
    CheckpointShapeError,
    CheckpointWarning,
    ForeignCheckpointError,
)
from . import resumable_file
from .checkpoint_geometry import network_shapes
from .conversion import check_new_path, geometry, own_tensors, split_once, verified
from .resumable_file import Piece, Progress
from .stored_tensors import StoredTensor, check_types, stored_files

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "pipe.dit.", "dit.")


@dataclass(frozen=True)
class MergeReport:
    """What a merge did; `to_dict` is JSON-able.

    Args:
        base, delta, output: paths.
        replaced: names of the tensors that the delta gave.
        kept: number of tensors that the base gave.
        ignored: names of the delta's tensors that were not used.
        nbytes: of all tensors of the output.
        resumed_bytes: of them, what an interrupted run had written.
    """

    base: str
    delta: str
    output: str
    replaced: tuple[str, ...]
    kept: int
    ignored: tuple[str, ...]
    nbytes: int
    resumed_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.output}: {self.nbytes / 1e9:.2f} GB, verified",
            f"{len(self.replaced)} tensors of {self.delta}, {self.kept} of {self.base}",
        ]
        if self.ignored:
            lines.append(f"{len(self.ignored)} tensors of the delta were ignored")
        if self.resumed_bytes:
            lines.append(f"{self.resumed_bytes / 1e9:.2f} GB were there from an interrupted run")
        return "\n".join(lines)


def merge(
    base: str | Path,
    delta: str | Path,
    output: str | Path,
    *,
    ignore_misfits: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write `base` with the tensors of `delta` in place of its own.

    Args:
        base: a complete L2P network in safetensors, as `convert` writes it.
        delta: trained tensors in safetensors, by the network's names, with or without a prefix.
        output: .safetensors file.
        ignore_misfits: leave out, with a warning, tensors of the delta that the base does not have
            or has in another shape, instead of refusing the delta.
        overwrite: replace an existing `output`.
        progress: called with ("writing" or "checking", bytes done, bytes in all).

    Raises:
        ForeignCheckpointError: the base is no pixel network, or lacks a tensor of the delta.
        CheckpointShapeError: has it in another shape. FileExistsError: `output` exists; and what
        `convert` raises of files.
    """
    output = check_new_path(output, overwrite, "merge")
    files, changes = stored_files(base), stored_files(delta)
    for path in (*files.files, *changes.files):
        if output.exists() and output.samefile(path):
            raise ValueError(f"merge: {output} is one of the files to be merged; name another")
    state, _ = own_tensors(files)
    config = geometry(state, files, None)
    if config.local_decoder is None:
        raise ForeignCheckpointError(
            f"merge: {files.path} is a latent model, without a local decoder; convert it first"
        )
    expected = network_shapes(config)
    whole = {name: state[name] for name in expected}
    merged, ignored = overlaid(whole, delta_tensors(changes.tensors, changes.path), changes.path,
                               ignore_misfits=ignore_misfits)  # fmt: skip
    replaced = tuple(n for n in merged if merged[n] is not whole[n])
    if ignored:
        shown = ", ".join(ignored[:3]) + (", ..." if len(ignored) > 3 else "")
        warnings.warn(
            f"{len(ignored)} tensors of {changes.path} do not fit and were ignored: {shown}",
            CheckpointWarning,
            stacklevel=2,
        )
    pieces = [Piece(n, t.dtype, t.shape, t.chunks) for n, t in merged.items()]
    resumed = resumable_file.write(
        output,
        pieces,
        files.metadata,
        identity=files.identity + changes.identity,
        check=lambda part: verified(part, expected, merged),
        progress=progress,
    )
    return MergeReport(
        base=str(files.path),
        delta=str(changes.path),
        output=str(output),
        replaced=replaced,
        kept=len(merged) - len(replaced),
        ignored=ignored,
        nbytes=sum(p.nbytes for p in pieces),
        resumed_bytes=resumed,
    )


def delta_tensors(tensors: Mapping[str, StoredTensor], path: Path) -> dict[str, StoredTensor]:
    """The delta under the network's own names; a prefix goes if all names have it."""
    check_types(tensors, path)
    prefix = next((p for p in _PREFIXES if tensors and all(n.startswith(p) for n in tensors)), "")
    return split_once({name[len(prefix) :]: t for name, t in tensors.items()}, path)


def overlaid(
    base: Mapping[str, StoredTensor],
    delta: Mapping[str, StoredTensor],
    path: Path,
    *,
    ignore_misfits: bool = False,
) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """(the base with the delta's tensors, names of those that do not fit).

    Raises:
        ForeignCheckpointError, CheckpointShapeError: a tensor does not fit, and it is not ignored.
    """
    misfits = tuple(n for n, t in delta.items() if n not in base or base[n].shape != t.shape)
    if misfits and not ignore_misfits:
        first, more = misfits[0], f" (and {len(misfits) - 1} more)" if len(misfits) > 1 else ""
        way_out = "; is it of another resolution? --ignore-misfits leaves such tensors out"
        if first not in base:
            raise ForeignCheckpointError(
                f"merge: {path} has {first}{more}, which the base does not have{way_out}"
            )
        raise CheckpointShapeError(
            f"merge: {first}{more} of {path} is {delta[first].shape}, the base's "
            f"{base[first].shape}{way_out}"
        )
    return {n: t if n in misfits else delta.get(n, t) for n, t in base.items()}, misfits
