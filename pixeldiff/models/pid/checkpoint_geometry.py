"""Which network a set of tensor shapes is: its geometry, and the released networks that fit."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import (
    AmbiguousCheckpointError,
    BackboneMismatchError,
    CheckpointShapeError,
    CheckpointWarning,
    ForeignCheckpointError,
    IncompleteCheckpointError,
    UnknownGeometryError,
)
from .backbones import BACKBONES
from .backbones import backbone as backbone_named
from .checkpoint_keys import AUX_HEAD
from .config import PiDConfig
from .network import PiDNet
from .variants import Variant, variant_in_path, variants
from .variants import variant as variant_named

Shapes = Mapping[str, tuple[int, ...]]


@functools.lru_cache(maxsize=32)
def network_shapes(config: PiDConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor name and shape of `PiDNet(config)`. Allocates nothing."""
    state = PiDNet(config, device="meta").state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


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


def check_shapes(shapes: Shapes, config: PiDConfig, path: Path) -> None:
    """Every tensor of the network is there in its shape, and nothing else.

    Raises:
        IncompleteCheckpointError, CheckpointShapeError, ForeignCheckpointError: with the number of
        tensors concerned and the first of them.
    """
    expected = network_shapes(config)
    missing = tuple(k for k in expected if k not in shapes)
    if missing:
        raise _incomplete(missing, len(expected), path, "")
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


@dataclass(frozen=True)
class Identity:
    """What a file was found to be. `also_fits` names released networks no test could exclude."""

    config: PiDConfig
    variant: Variant | None
    backbone: str | None
    also_fits: tuple[str, ...] = ()


def identify(
    shapes: Shapes,
    path: Path,
    *,
    prefix: str,
    backbone: str | None,
    variant: str | None,
) -> Identity:
    """Which released network a file is, from its shapes, then `variant`, `backbone` and its path.

    Raises:
        BackboneMismatchError, IncompleteCheckpointError, UnknownGeometryError,
        AmbiguousCheckpointError: see `read_checkpoint`.
    """
    wanted = variant_named(variant) if variant is not None else None
    family = backbone_named(backbone).family if backbone is not None else None
    has_aux = any(k.startswith(AUX_HEAD) for k in shapes)
    fits = _fitting(shapes)
    if not fits:
        raise _no_fit(shapes, path)
    hint = variant_in_path(str(path.absolute()))
    if wanted is not None:
        left = [v for v in fits if v is wanted]
        if not left or (family is not None and wanted.family != family):
            raise _mismatch(path, shapes, fits, f"variant={variant!r}", wanted, backbone)
    elif family is not None:
        left = [v for v in fits if v.family == family]
        if not left:
            raise _mismatch(path, shapes, fits, f"backbone={backbone!r}", None, backbone)
    else:
        left = fits
    original = prefix.endswith("core.") and all(v.kind == "t2i_backbone" for v in left)
    if original and wanted is None and hint is None:
        raise UnknownGeometryError(
            f"read_checkpoint: {path} is an original PixelDiT checkpoint (prefix core.); its "
            "rotary settings cannot be read from tensors. Pass config=PiDConfig(...), or "
            'variant="pixeldit" if it is the released 2kto4k finetune'
        )
    if hint is not None and hint not in left:
        warnings.warn(
            f"read_checkpoint: the path {path} names {hint.name}, but "
            + ("you asked for another" if hint in fits else "its tensors are those of another")
            + f" network ({' or '.join(v.name for v in left)})",
            CheckpointWarning,
            stacklevel=4,
        )
    elif hint is not None:
        left = [hint]
    if not has_aux and any(v.kind == "distilled" for v in left) and wanted is None:
        # Teachers are trained with the RGB head, students never.
        left = [v for v in left if v.kind == "distilled"]
    first, others = left[0], left[1:]
    if any(
        (v.family, v.kind, v.config) != (first.family, first.kind, first.config) for v in others
    ):
        raise _ambiguous(path, left)
    if others:
        warnings.warn(
            f"read_checkpoint: {path} may be any of {', '.join(v.name for v in left)}, which are "
            "one network trained at different sizes. Assuming "
            f"{first.name}; pass variant= to say otherwise",
            CheckpointWarning,
            stacklevel=4,
        )
    name = backbone_named(backbone).name if backbone is not None else first.family
    return Identity(first.inference_config, first, name, tuple(v.name for v in others))


def released_with(config: PiDConfig, path: Path, backbone: str | None) -> Variant | None:
    """The one released network with this geometry, or None where several or none have it."""
    family = BACKBONES[backbone].family if backbone in BACKBONES else backbone
    same = [
        v for v in variants() if v.config == config or v.inference_config == config
        if family is None or v.family == family
    ]  # fmt: skip
    hint = variant_in_path(str(path.absolute()))
    if hint in same:
        return hint
    return same[0] if len(same) == 1 else None


def _fitting(shapes: Shapes) -> list[Variant]:
    facts = geometry(shapes)
    return [v for v in variants() if geometry(network_shapes(v.config)) == facts]


def _no_fit(shapes: Shapes, path: Path) -> Exception:
    """Incomplete, if one released network has every tensor of the file; else never released."""
    nearest, best, most = None, None, -1
    for v in variants():
        expected = network_shapes(v.config)
        same = sum(expected.get(k) == s for k, s in shapes.items())
        missing = tuple(k for k in expected if k not in shapes and not k.startswith(AUX_HEAD))
        if same == len(shapes) and missing and (best is None or len(missing) < len(best[0])):
            best = (missing, len(expected), v)
        if same > most:
            nearest, most = v, same
    if best is not None:
        missing, total, v = best
        return _incomplete(missing, total, path, f" of {v.name}")
    expected = network_shapes(nearest.config)
    facts, theirs = geometry(shapes), geometry(expected)
    differing = ", ".join(
        f"{k} {facts.get(k, 'absent')} ({theirs.get(k, 'absent')})"
        for k in {**theirs, **facts}
        if facts.get(k) != theirs.get(k)
    )
    other = next((k for k, s in expected.items() if shapes.get(k, s) != s), None)
    example = f"; {other} is {shapes[other]}, not {expected[other]}" if other else ""
    return UnknownGeometryError(
        f"read_checkpoint: {path} is a PiD network of a geometry that was never released. Nearest "
        f"is {nearest.name}; what differs (released value): {differing}{example}. Pass "
        "config=PiDConfig(...)"
    )


def _incomplete(missing: tuple[str, ...], total: int, path: Path, whose: str) -> Exception:
    shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    return IncompleteCheckpointError(
        f"read_checkpoint: {path} lacks {len(missing)} of {total} tensors{whose}: {shown}", missing
    )


def _mismatch(
    path: Path,
    shapes: Shapes,
    fits: Sequence[Variant],
    asked: str,
    wanted: Variant | None,
    backbone: str | None,
) -> Exception:
    if wanted is not None and wanted in fits:
        return BackboneMismatchError(
            f"read_checkpoint: variant {wanted.name} does not decode backbone={backbone!r}, but "
            f"{', '.join(wanted.backbones) or 'no latent at all'}"
        )
    families = dict.fromkeys(v.family or "none (text to image)" for v in fits)
    key = "lq_proj.latent_proj.0.weight"
    shape = f"{key} is {shapes[key]}" if key in shapes else f"it has no {key}"
    return BackboneMismatchError(
        f"read_checkpoint: {asked} does not fit {path}: {shape}, which is backbone "
        f"{' or '.join(families)} ({', '.join(v.name for v in fits)})"
    )


def _ambiguous(path: Path, left: Sequence[Variant]) -> Exception:
    lines = []
    for family in dict.fromkeys(v.family for v in left):
        group = [v for v in left if v.family == family]
        others = group[0].backbones[1:]
        also = f" (also {', '.join(others)})" if others else ""
        names = " or ".join(f'variant="{v.name}"' for v in group)
        lines.append(f'\n  backbone="{family}"{also}: {names}')
    if len(lines) > 1:
        what, how = "the latents of several generators have these shapes", "backbone=... or "
    else:
        what, how = "distilled and undistilled networks have these shapes", ""
    return AmbiguousCheckpointError(
        f"read_checkpoint: cannot tell which released network {path} is: {what}. Pass {how}"
        "variant=..., one of:" + "".join(lines),
        tuple(v.name for v in left),
    )
