"""Tensor names: prefixes of wrappers, EMA copies, training-only parts, other kinds of model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...errors import CheckpointError, CheckpointFormatError, ForeignCheckpointError

# Around the network in what trainers, compilers and hosts save.
WRAPPERS = ("module.", "_orig_mod.", "model.diffusion_model.", "diffusion_model.", "model.")
# The network itself: releases, and original PixelDiT checkpoints.
ROOTS = ("net.", "core.")
EMA = "net_ema."
# Other networks of the distillation, and parts no PiD network has at inference.
TRAINING_ONLY = ("fake_score.", "discriminator.", "_repa_projector.")
TRAINING_ONLY_KEYS = ("pos_embed",)
AUX_HEAD = "lq_proj.lq_aux_rgb_head."

_PID_KEY = re.compile(
    r"y_pos_embedding$|(pixel|s|t|y)_embedder\.|(patch|pixel)_blocks\.\d+\.|final_layer\."
    r"|lq_proj\.|pit_lq_gate\."
)
_OTHER_MODELS = (
    (re.compile(r"lora_|\.lora\."), "a LoRA"),
    (re.compile(r"double_blocks\.|single_transformer_blocks\."), "a FLUX-style transformer"),
    (re.compile(r"joint_blocks\.|transformer_blocks\."), "a latent diffusion transformer"),
    (re.compile(r"input_blocks\.|down_blocks\..*attentions"), "a latent diffusion U-Net"),
    (re.compile(r"(encoder|decoder)\.(conv_in|down|up|mid)"), "a VAE"),
    (re.compile(r"text_model\.|model\.layers\.|embed_tokens"), "a text encoder"),
    (re.compile(r"context_refiner|noise_refiner|local_decoder"), "a Z-Image or L2P transformer"),
)


@dataclass(frozen=True)
class NetworkTensors:
    """The tensors of one network, prefix-free.

    Args:
        tensors: by the network's own names.
        prefix: what preceded the names, "" for nothing.
        ema: they are the EMA copy.
        ignored: number of left-out tensors by reason.
    """

    tensors: dict[str, Tensor]
    prefix: str
    ema: bool
    ignored: dict[str, int]


def select_network(tensors: dict[str, Tensor], path: Path, ema: bool | None) -> NetworkTensors:
    """Pick the network out of all tensors of a file.

    Args:
        ema: True takes the EMA copy, False the plain weights, None the plain ones where there are
            any. A release holds EMA weights under the plain prefix.

    Raises:
        CheckpointError: the copy asked for is not there. ForeignCheckpointError: another model.
        CheckpointFormatError: two tensors have one name once prefixes are gone.
    """
    copies: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}
    prefixes: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    ignored: Counter[str] = Counter()
    for key, tensor in tensors.items():
        prefix, is_ema, name = split_key(key)
        if name.startswith(TRAINING_ONLY) or name in TRAINING_ONLY_KEYS:
            ignored["training only"] += 1
            continue
        if name in copies[is_ema]:
            raise CheckpointFormatError(
                f"read_checkpoint: {path} holds two tensors named {name!r} under different "
                "prefixes; save one network per file"
            )
        copies[is_ema][name] = tensor
        prefixes[is_ema][prefix] += 1
    use_ema = not copies[False] if ema is None else ema
    chosen = copies[use_ema]
    if not chosen:
        if ema is None:
            raise ForeignCheckpointError(f"read_checkpoint: {path} holds no network")
        have, want = ("plain", "EMA") if ema else ("EMA", "plain")
        raise CheckpointError(
            f"read_checkpoint: ema={ema}: {path} holds no {want} weights, only {have} ones"
        )
    if copies[not use_ema]:
        ignored["plain weights" if use_ema else "EMA copy"] = len(copies[not use_ema])
    _refuse_other_models(chosen, path)
    prefix = prefixes[use_ema].most_common(1)[0][0]
    return NetworkTensors(chosen, prefix, use_ema, dict(ignored))


def split_key(key: str) -> tuple[str, bool, str]:
    """(prefix, whether it marks an EMA copy, name inside the network)."""
    name, is_ema = key, False
    while True:
        if name.startswith(EMA):
            name, is_ema = name[len(EMA) :], True
            continue
        wrapper = next((w for w in (*WRAPPERS, *ROOTS) if name.startswith(w)), None)
        if wrapper is None:
            return key[: len(key) - len(name)], is_ema, name
        name = name[len(wrapper) :]


def _refuse_other_models(names: Iterable[str], path: Path) -> None:
    names = list(names)
    foreign = [n for n in names if not _PID_KEY.match(n)]
    if 2 * len(foreign) < len(names):
        return
    kind = next((k for p, k in _OTHER_MODELS if any(p.search(n) for n in foreign)), None)
    raise ForeignCheckpointError(
        f"read_checkpoint: {path} is not a PiD checkpoint"
        + (f" but looks like {kind}" if kind else "")
        + f": {len(foreign)} of {len(names)} tensors are unknown, first {', '.join(foreign[:3])}"
    )
