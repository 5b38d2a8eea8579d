"""Tensor names of L2P and Z-Image files: prefixes, and the fused naming of single-file releases."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ...errors import CheckpointFormatError, ForeignCheckpointError

# A tensor every trunk has, under both namings.
LANDMARK = "layers.0.attention_norm1.weight"
FINAL_LAYER = "all_final_layer."

_FUSED = {
    ".attention.out.weight": ".attention.to_out.0.weight",
    ".attention.q_norm.weight": ".attention.norm_q.weight",
    ".attention.k_norm.weight": ".attention.norm_k.weight",
}
_QKV = ".attention.qkv.weight"
_PATCH_PARTS = re.compile(r"(x_embedder|final_layer)\.(.+)")


def without_prefix(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], str, int]:
    """(the network's tensors by their own names, what preceded those, number of others).

    Raises:
        ForeignCheckpointError: no such network. CheckpointFormatError: several.
    """
    prefixes = [k[: -len(LANDMARK)] for k in tensors if k.endswith(LANDMARK)]
    prefixes = [p for p in prefixes if not p or p.endswith(".")]
    if not prefixes:
        raise ForeignCheckpointError(
            f"read_checkpoint: {path} is not a Z-Image or L2P checkpoint: none of its "
            f"{len(tensors)} tensors is named {LANDMARK}"
            + (f", first {', '.join(sorted(tensors)[:3])}" if tensors else "")
        )
    if "" in prefixes:
        return dict(tensors), "", 0
    if len(prefixes) > 1:
        raise CheckpointFormatError(
            f"read_checkpoint: {path} holds {len(prefixes)} networks, under the prefixes "
            f"{', '.join(sorted(prefixes))}; save one network per file"
        )
    (prefix,) = prefixes
    own = {k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)}
    return own, prefix, len(tensors) - len(own)


def is_fused(names: Mapping[str, Tensor]) -> bool:
    return any(name.endswith(_QKV) for name in names)


def split_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the network's own names; fused projections become views.

    Split names pass unchanged. Pad tokens may be (D,) or (1, D).
    """
    patch = _patch(tensors)
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        part = _PATCH_PARTS.fullmatch(name)
        if name.endswith(_QKV) and tensor.dim() == 2 and tensor.shape[0] % 3 == 0:
            block = name[: -len(_QKV)]
            for which, rows in zip("qkv", tensor.chunk(3), strict=True):
                split[f"{block}.attention.to_{which}.weight"] = rows
        elif part and patch is not None:
            split[f"all_{part[1]}.{patch}-1.{part[2]}"] = tensor
        elif name in ("x_pad_token", "cap_pad_token") and tensor.dim() == 1:
            split[name] = tensor[None]
        else:
            end = next((e for e in _FUSED if name.endswith(e)), None)
            split[name[: -len(end)] + _FUSED[end] if end else name] = tensor
    return split


def _patch(tensors: Mapping[str, Tensor]) -> int | None:
    """p of a patch embedding whose name does not tell: its columns are channels * p^2."""
    weight = tensors.get("x_embedder.weight")
    if weight is None or weight.dim() != 2:
        return None
    pixels = any(name.startswith("local_decoder.") for name in tensors)
    return math.isqrt(weight.shape[1] // (3 if pixels else 16))
