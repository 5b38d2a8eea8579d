"""Recompute the L2P goldens of files of weights: read, under other names, converted, merged."""

from __future__ import annotations

import torch

from ..models.l2p.checkpoint import load_net
from ..models.l2p.checkpoint_keys import split_names
from ..models.l2p.conversion import planned
from ..models.l2p.merging import overlaid
from .golden import Golden
from .l2p_inputs import Results, beside, network_config, under


def checkpoint(g: Golden) -> Results:
    """Weights that other files share, read as a checkpoint: complete, and unchanged."""
    config = network_config(g.meta["config"])
    return dict(load_net(g.path, config=config, dtype=torch.float32).state_dict())


def naming(g: Golden) -> Results:
    return {f"split.{k}": t for k, t in split_names(under("fused.", g.tensors)).items()}


def conversion(g: Golden) -> Results:
    """The tensors that `convert` takes from either side; the file of the inputs lies beside it."""
    inputs = beside(g, g.path.stem.removesuffix("_result")).tensors
    fresh = under("target_init.", inputs)
    shapes = {name: tuple(tensor.shape) for name, tensor in fresh.items()}
    copied = planned(under("source.", inputs), shapes, g.path).copied
    return {f"result.{name}": copied.get(name, fresh[name]) for name in fresh}


def merging(g: Golden) -> Results:
    base, delta = under("base.", g.tensors), under("delta.", g.tensors)
    merged, _ = overlaid(base, delta, g.path, ignore_misfits=True)
    return {f"merged.{name}": tensor for name, tensor in merged.items()}
