"""Which released network a set of tensor shapes is, and what to ask where shapes cannot tell."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import (
    AmbiguousCheckpointError,
    BackboneMismatchError,
    CheckpointWarning,
    UnknownGeometryError,
)
from .backbones import BACKBONES
from .backbones import backbone as backbone_named
from .checkpoint_geometry import Shapes, geometry, incomplete, network_shapes
from .checkpoint_keys import AUX_HEAD
from .config import PiDConfig
from .variants import Variant, variant_in_path, variants
from .variants import variant as variant_named


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
    hint = variant_in_path(str(path.absolute()))
    if not fits:
        likely = [v for v in variants() if v in (wanted, hint) or v.family == family is not None]
        raise _no_fit(shapes, path, likely)
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


def _no_fit(shapes: Shapes, path: Path, likely: Sequence[Variant]) -> Exception:
    """Incomplete, if one released network has every tensor of the file; else never released.

    Of networks that are equally near, one of `likely` is named.
    """
    nearest, best, most = None, None, -1
    has_aux = any(k.startswith(AUX_HEAD) for k in shapes)
    for v in (*likely, *variants()):
        expected = network_shapes(v.config if has_aux else v.inference_config)
        same = sum(expected.get(k) == s for k, s in shapes.items())
        missing = tuple(k for k in expected if k not in shapes)
        if same == len(shapes) and missing and (best is None or len(missing) < len(best[0])):
            best = (missing, len(expected), v)
        if same > most:
            nearest, most = v, same
    if best is not None:
        missing, total, v = best
        return incomplete(missing, total, path, f" of {v.name}")
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
