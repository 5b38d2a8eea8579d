"""Weights, inputs and geometry as L2P goldens state them: in the file, beside it, or by a seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.l2p.config import DECODERS, L2PConfig, LocalDecoderConfig
from ..models.l2p.network import L2PNet
from .golden import Golden, NotUnderstood, read_golden
from .portable_generator import generated

Results = dict[str, Tensor]
SEQ_MULTIPLE = 32


def weights(g: Golden) -> dict[str, Tensor]:
    """State dict of the file's network or part, fp32."""
    case = g.meta["case"]
    if "weights_seed" in case:
        seed = case["weights_seed"]
        return {k: generated(seed, k, *rule) for k, rule in case["weights_rules"].items()}
    if "weights" in case:
        shared = beside(g, case["weights"])
        return {k: t.float() for k, t in shared.tensors.items()}
    return g.weights()


def beside(g: Golden, name: str) -> Golden:
    """Another file of the same set.

    Raises:
        NotUnderstood: it is not there, or no golden file.
    """
    path = g.path.with_name(f"{name}.safetensors")
    try:
        return read_golden(path)
    except NotUnderstood as e:
        raise NotUnderstood(f"it needs {path.name} beside it: {e}") from e


def load_weights(module: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give `module` these weights, all of them and no others."""
    try:
        module.load_state_dict(state)
    except RuntimeError as e:
        raise NotUnderstood(f"its weights do not fit: {e}") from e


def given(g: Golden, name: str) -> Tensor:
    """An input, fp32."""
    rule = g.meta["case"].get("inputs_generated", {}).get(name)
    return g.tensors[name].float() if rule is None else generated(*rule)


def under(start: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with `start`, without it."""
    return {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}


def padded(rows: int) -> int:
    return -(-rows // SEQ_MULTIPLE) * SEQ_MULTIPLE


def decoder_config(form: str, widths: Mapping[str, int] | None) -> LocalDecoderConfig:
    return DECODERS[form].with_widths({int(k): v for k, v in (widths or {}).items()})


def network_config(values: Mapping[str, Any]) -> L2PConfig:
    """The geometry in a file's `config`.

    Raises:
        NotUnderstood: no such network can be built.
    """
    same = (
        *("patch_size", "in_channels", "dim", "n_heads", "n_layers", "n_refiner_layers"),
        *("cap_feat_dim", "ffn_hidden", "axes_dims", "axes_lens", "rope_theta", "norm_eps"),
    )
    kept = {name: values[name] for name in (*same, "t_scale")}
    decoder = decoder_config(values["decoder_variant"], values["decoder_widths"])
    try:
        return L2PConfig(**kept, local_decoder=decoder)
    except (ValueError, TypeError) as e:
        raise NotUnderstood(f"its network cannot be built: {e}") from e


def stated_network(g: Golden) -> L2PNet:
    """The file's network with its weights, in evaluation mode."""
    net = L2PNet(network_config(g.meta["config"]))
    load_weights(net, weights(g))
    return net.eval()
