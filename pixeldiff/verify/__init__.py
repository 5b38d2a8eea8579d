"""Run golden files through the installed package and hold every tensor against its tolerance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from . import l2p
from .golden import L2P, Comparison, Golden, NotUnderstood, compare, read_golden
from .pid_components import COMPONENTS
from .pid_networks import NETWORKS

__all__ = ["Comparison", "NotUnderstood", "Report", "verify_file"]


@dataclass(frozen=True)
class Report:
    """Result of one file: a comparison per out. and mid. tensor it holds."""

    path: Path
    name: str
    rows: list[Comparison]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)


def verify_file(path: str | Path) -> Report:
    """Recompute everything a golden file states, in fp32 on the CPU.

    Args:
        path: a golden .safetensors file.

    Raises:
        NotUnderstood: not a golden file, or of a kind this version does not implement.
    """
    golden = read_golden(path)
    golden, run = l2p.restated(golden) if golden.kind == L2P else (golden, _runner(golden))
    try:
        with torch.inference_mode():
            got = run(golden)
    except KeyError as e:
        raise NotUnderstood(f"incomplete golden file: {e.args[0]} is missing") from e
    rows = []
    for key in golden.expected():
        if key not in got:
            raise NotUnderstood(f"it states {key}, which this version does not compute")
        rows.append(compare(golden, key, got[key]))
    if not rows:
        raise NotUnderstood("it states no output")
    return Report(golden.path, golden.name, rows)


def _runner(golden: Golden):
    if golden.kind == "component" and golden.name in COMPONENTS:
        return COMPONENTS[golden.name]
    if golden.kind in NETWORKS:
        return NETWORKS[golden.kind]
    raise NotUnderstood(
        f"kind {golden.kind!r} (name {golden.name!r}) is not implemented; known are component "
        f"({', '.join(sorted(COMPONENTS))}) and {', '.join(sorted(NETWORKS))}"
    )
