"""Golden files: inputs, weights, reference outputs and tolerances in one safetensors file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

L2P = "l2p"  # the kind of all files of that system


class NotUnderstood(Exception):
    """The file is not a golden file, or of a kind this version cannot run; says which."""


@dataclass(frozen=True)
class Golden:
    """One file. Tensor names start with w. (weights), in., out., mid., info. or grad."""

    path: Path
    name: str
    kind: str
    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """Weights below `w.<prefix>`, without it, widened to fp32 (exact: they are bf16 values)."""
        start = "w." + prefix
        return {k[len(start) :]: v.float() for k, v in self.tensors.items() if k.startswith(start)}

    def load(self, module: nn.Module, prefix: str = "") -> None:
        """Give `module` the weights below `w.<prefix>`, all of them and no others."""
        try:
            module.load_state_dict(self.weights(prefix))
        except RuntimeError as e:
            raise NotUnderstood(f"its weights do not fit: {e}") from e

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def expected(self) -> dict[str, Tensor]:
        """Every out. and mid. tensor."""
        return {k: v for k, v in self.tensors.items() if k.startswith(("out.", "mid."))}

    def tolerance(self, key: str) -> float | dict[str, float]:
        """Of the longest matching prefix; a number is a maximum absolute error."""
        table = self.meta["tolerance"]
        prefixes = [p for p in table if key.startswith(p)]
        if not prefixes:
            raise NotUnderstood(f"no tolerance is stated for {key}")
        return table[max(prefixes, key=len)]


def read_golden(path: str | Path) -> Golden:
    """Read a golden file.

    Raises:
        NotUnderstood: missing, truncated, not safetensors, or without the metadata of a golden.
    """
    path = Path(path)
    if not path.is_file():
        raise NotUnderstood("no such file")
    try:
        with safe_open(path, "pt") as f:
            strings = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as e:
        raise NotUnderstood(f"not a readable safetensors file: {e}") from e
    meta = {k: _value(v) for k, v in strings.items()}
    if "case" in meta and "tolerance" in meta:
        meta = _as_l2p(path, meta)
    missing = [k for k in ("name", "kind", "tolerance") if k not in meta]
    if missing:
        raise NotUnderstood(f"not a golden file: its metadata has no {', '.join(missing)}")
    if not isinstance(meta["tolerance"], dict):
        raise NotUnderstood("not a golden file: its tolerance is not a map of prefixes")
    if not isinstance(meta.get("config", {}), dict):
        raise NotUnderstood("not a golden file: its config is not a map")
    return Golden(path, str(meta["name"]), str(meta["kind"]), meta, tensors)


def _as_l2p(path: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """L2P files have no name of their own, and one tolerance for everything they state."""
    tolerance = meta["tolerance"]
    if isinstance(tolerance, dict) and "max_abs_rel_to_peak" in tolerance:
        tolerance = {"": {"relative_to_max": tolerance["max_abs_rel_to_peak"]}}
    return {**meta, "name": path.stem, "kind": L2P, "tolerance": tolerance}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@dataclass(frozen=True)
class Comparison:
    """Error of one tensor in units of its tolerance's own kind."""

    key: str
    error: float
    tolerance: float
    unit: str  # "abs", "relative" or "relative to max"

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def compare(golden: Golden, key: str, got: Tensor) -> Comparison:
    """Hold one computed tensor against the file's; a shape mismatch is an infinite error."""
    want, tolerance = golden.tensors[key].double(), golden.tolerance(key)
    got = got.detach().double()
    unit, bound = ("abs", tolerance) if not isinstance(tolerance, dict) else _relative(tolerance)
    # Intermediate values may be captured before or after batch and tokens are flattened together.
    same = got.shape == want.shape if key.startswith("out.") else got.numel() == want.numel()
    if not same:
        return Comparison(key, float("inf"), bound, unit)
    difference = (got.reshape(want.shape) - want).abs()
    if unit == "relative":
        difference = difference / want.abs().clamp_min(torch.finfo(torch.float64).tiny)
    error = difference.max().item() if difference.numel() else 0.0
    if unit == "relative to max":
        error /= max(want.abs().max().item(), torch.finfo(torch.float64).tiny)
    return Comparison(key, error, bound, unit)


def _relative(tolerance: dict[str, float]) -> tuple[str, float]:
    for field, unit in (("relative", "relative"), ("relative_to_max", "relative to max")):
        if field in tolerance:
            return unit, tolerance[field]
    raise NotUnderstood(f"unknown tolerance {tolerance!r}")
