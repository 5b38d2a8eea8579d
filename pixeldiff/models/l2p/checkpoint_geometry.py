"""Which network a set of tensor shapes is: the released variant, or what its shapes tell."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from ...errors import CheckpointFormatError, UnknownGeometryError
from ...json_text import loads
from ..meta import tensor_shapes
from ..pid.checkpoint_geometry import Shapes, incomplete
from .config import VARIANTS, L2PConfig, Variant
from .network import L2PNet

_FORMS = (("10k", "enc_10k_a"), ("8k", "enc_8k"), ("4k", "enc0b"), ("1k", "enc1"))
_TELLING = {
    "dim": ("layers.0.attention_norm1.weight", 0),
    "ffn_hidden": ("layers.0.feed_forward.w1.weight", 0),
    "cap_feat_dim": ("cap_embedder.1.weight", 1),
    "head_dim": ("layers.0.attention.norm_q.weight", 0),
    "bottleneck": ("local_decoder.bottleneck.0.weight", 0),
}


@functools.lru_cache(maxsize=16)
def network_shapes(config: L2PConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor name and shape of `L2PNet(config)`. Allocates nothing."""
    return tensor_shapes(L2PNet(config, device="meta"))


def stated_config(metadata: Mapping[str, str], path: Path) -> L2PConfig | None:
    """The geometry a file states, or None.

    Raises:
        CheckpointFormatError: its metadata "config" is not one.
    """
    if "config" not in metadata:
        return None
    try:
        return L2PConfig.from_dict(loads(metadata["config"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointFormatError(
            f"read_checkpoint: metadata 'config' of {path} is not an L2PConfig: {str(error)[:300]}"
        ) from error


def stated_variant(metadata: Mapping[str, str], config: L2PConfig, path: Path) -> Variant | None:
    """What a file that is no released network calls itself, or None.

    Raises:
        CheckpointFormatError: its metadata "variant" is not a name and a native size.
    """
    if "variant" not in metadata:
        return None
    try:
        values = loads(metadata["variant"])
        return Variant(str(values["name"]), int(values["native_size"]), config)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointFormatError(
            f"read_checkpoint: metadata 'variant' of {path} must be JSON with name and "
            f"native_size: {str(error)[:300]}"
        ) from error


def shapes_within(config: L2PConfig, held: Shapes, path: Path) -> dict[str, tuple[int, ...]]:
    """`network_shapes` of a geometry that a file states, which is no larger than the file.

    Raises:
        CheckpointFormatError: it is, or no network can be so.
    """
    try:
        decoder = config.local_decoder
        parts = config.n_layers + config.n_refiner_layers + (len(decoder.levels) if decoder else 0)
        if parts > len(held):
            raise ValueError(f"{parts} blocks and levels")
        return network_shapes(config)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointFormatError(
            f"read_checkpoint: {path}, of {len(held)} tensors, cannot be the network that its "
            f"config describes: {reason}"
        ) from error


def signature(shapes: Shapes) -> str:
    """MD5 by which releases of this family are told apart: of all names, with and without shape."""
    parts = list(shapes)
    parts += [f"{name}:{'_'.join(map(str, shape))}" for name, shape in shapes.items()]
    return hashlib.md5(",".join(sorted(parts)).encode(), usedforsecurity=False).hexdigest()


def identify(shapes: Shapes, path: Path) -> Variant:
    """The released network a file is.

    The form of the local decoder names the candidate; then every shape must be its own.

    Raises:
        IncompleteCheckpointError: some of a released network. UnknownGeometryError: another one;
        says what differs.
    """
    form = next((f for f, enc in _FORMS if f"local_decoder.{enc}.0.weight" in shapes), "z-image")
    if form == "z-image" and any(name.startswith("local_decoder.") for name in shapes):
        form = "1k"  # of which the outermost level is missing
    variant = VARIANTS[form]
    expected = network_shapes(variant.config)
    if all(expected.get(name, shape) == shape for name, shape in shapes.items()):
        missing = tuple(name for name in expected if name not in shapes)
        if missing:
            raise incomplete(missing, len(expected), path, f" of the {form} network")
        return variant
    ours, theirs = _facts(shapes), _facts(expected)
    differing = [f"{k} {v} ({theirs[k]})" for k, v in ours.items() if v != theirs.get(k)]
    wrong = next(n for n, s in shapes.items() if expected.get(n, s) != s)
    raise UnknownGeometryError(
        f"read_checkpoint: {path} is a network of a geometry that was never released. Nearest is "
        f"{form}; what differs (released value): {', '.join(differing) or 'no size of the trunk'}; "
        f"{wrong} is {shapes[wrong]}, not {expected[wrong]}. Pass config=L2PConfig(...)"
    )


def _facts(shapes: Shapes) -> dict[str, int]:
    """Sizes that shapes tell; those whose tensor is missing are left out."""
    facts = {
        field: shapes[name][axis]
        for field, (name, axis) in _TELLING.items()
        if len(shapes.get(name, ())) > axis
    }
    for field, pattern in (("n_layers", r"layers\.(\d{1,9})\."), ("patch_size", _EMBEDDER)):
        found = [int(m[1]) for m in map(re.compile(pattern).match, shapes) if m]
        if found:
            facts[field] = max(found) + (field == "n_layers")
    return facts


_EMBEDDER = r"all_x_embedder\.(\d{1,9})-1\.weight"
