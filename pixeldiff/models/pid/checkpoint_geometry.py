"""Tensor shapes of a network: those a config makes, and the config fields that shapes tell."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path

from ...errors import CheckpointShapeError, ForeignCheckpointError, IncompleteCheckpointError
from ..meta import tensor_shapes
from .config import PiDConfig
from .network import PiDNet

Shapes = Mapping[str, tuple[int, ...]]


@functools.lru_cache(maxsize=32)
def network_shapes(config: PiDConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor name and shape of `PiDNet(config)`. Allocates nothing."""
    return tensor_shapes(PiDNet(config, device="meta"))


def geometry(shapes: Shapes) -> dict[str, object]:
    """The `PiDConfig` fields that tensor shapes tell; those whose tensor is missing are left out.

    Two are not fields: `lq_conv_channels`, channels into the first convolution (the latent's, after
    unfolding), and `num_injections`, ceil(patch_depth / lq_interval). Rotary settings, padding,
    `sr_scale` and the latent's spatial factor leave no trace in any shape.
    """
    facts: dict[str, object] = {}

    def size(key: str, axis: int) -> int | None:
        shape = shapes.get(key, ())
        return shape[axis] if axis < len(shape) else None

    def count(pattern: str) -> int:
        head = pattern.split("*")[0]
        return len({k[len(head) :].split(".")[0] for k in shapes if k.startswith(head)})

    def note(name: str, value: object) -> None:
        if value is not None:
            facts[name] = value

    def ratio(whole: int | None, part: int | None) -> int | None:
        return whole // part if whole and part and whole % part == 0 else None

    width = size("s_embedder.proj.weight", 0)
    note("hidden_size", width)
    note("num_groups", ratio(width, size("patch_blocks.0.attn.q_norm_x.weight", 0)))
    note("patch_depth", count("patch_blocks.*"))
    note("pixel_depth", count("pixel_blocks.*"))
    note("in_channels", size("pixel_embedder.proj.weight", 1))
    patch_area = ratio(size("s_embedder.proj.weight", 1), facts.get("in_channels"))
    note("patch_size", math.isqrt(patch_area) if patch_area else None)
    note("pixel_hidden_size", size("pixel_embedder.proj.weight", 0))
    pixel_width = size("pixel_blocks.0.compress_to_attn.weight", 0)
    note("pixel_attn_hidden_size", pixel_width)
    note("pixel_num_groups", ratio(pixel_width, size("pixel_blocks.0.attn.q_norm.weight", 0)))
    note("txt_embed_dim", size("y_embedder.proj.weight", 1))
    note("txt_max_length", size("y_pos_embedding", 1))
    if any(key.startswith("lq_proj.") for key in shapes):
        note("lq_conv_channels", size("lq_proj.latent_proj.0.weight", 1))
        note("lq_hidden_dim", size("lq_proj.latent_proj.0.weight", 0))
        # Layers 0 and 2 of the stack are convolutions, 1 has no tensors, the rest are ResBlocks.
        note("lq_num_res_blocks", max(count("lq_proj.latent_proj.*") - 2, 0))
        note("num_injections", count("lq_proj.output_heads.*"))
        logits = size("lq_proj.gate_modules.0.content_proj.weight", 0)
        if logits is not None:
            per_dim = "sigma_aware_per_token_per_dim"
            note("lq_gate_type", "sigma_aware_per_token" if logits == 1 else per_dim)
        note("pit_lq_inject", any(key.startswith("pit_lq_gate.") for key in shapes))
    else:
        note("lq_latent_channels", "none (text to image)")
    return facts


def check_shapes(shapes: Shapes, expected: Shapes, path: Path) -> None:
    """Every tensor of the network is there in its shape, and nothing else.

    Raises:
        IncompleteCheckpointError, CheckpointShapeError, ForeignCheckpointError: with the number of
        tensors concerned and the first of them.
    """
    missing = tuple(k for k in expected if k not in shapes)
    if missing:
        raise incomplete(missing, len(expected), path, "")
    wrong = [k for k in expected if shapes[k] != expected[k]]
    if wrong:
        raise CheckpointShapeError(
            f"read_checkpoint: {path}: {wrong[0]} must be {expected[wrong[0]]}, got "
            f"{shapes[wrong[0]]}" + (f"; {len(wrong)} tensors differ" if len(wrong) > 1 else "")
        )
    unexpected = [k for k in shapes if k not in expected]
    if unexpected:
        raise ForeignCheckpointError(
            f"read_checkpoint: {path} holds {len(unexpected)} tensors this network does not have, "
            f"first {', '.join(unexpected[:3])}"
        )


def incomplete(missing: tuple[str, ...], total: int, path: Path, whose: str) -> Exception:
    """The error for missing tensors of the network `whose` describes."""
    shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    return IncompleteCheckpointError(
        f"read_checkpoint: {path} lacks {len(missing)} of {total} tensors{whose}: {shown}", missing
    )
