"""Reading PiD checkpoints: any file that holds the weights of a PiD network, or a clear refusal.

Released files are flat pickles of bf16 tensors under the prefix `net.`; repackaged ones come as
safetensors, under other prefixes or none, in other precisions, or inside training checkpoints.
Which network a file holds is told by its metadata, its tensor shapes, the path it lies at, and,
where none of these can tell, by the caller.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...errors import (
    BackboneMismatchError,
    CheckpointFormatError,
    UnknownGeometryError,
    UnknownNameError,
)
from ...json_text import loads
from ..meta import owning
from .backbones import BACKBONES
from .backbones import backbone as backbone_named
from .checkpoint_format import read_tensors
from .checkpoint_geometry import check_shapes, network_shapes
from .checkpoint_identity import Identity, identify, released_with
from .checkpoint_keys import AUX_HEAD, select_network
from .checkpoint_location import resolve
from .checkpoint_values import check_dtype, converted
from .config import PiDConfig
from .network import PiDNet
from .variants import Variant
from .variants import variant as variant_named


@dataclass(frozen=True)
class CheckpointInfo:
    """What was found in a file, for logs and image metadata.

    Args:
        path: the file read.
        prefix: what preceded the tensor names, "" for nothing.
        ema: the weights are the file's EMA copy (a release's plain weights are EMA weights too).
        stored_dtypes: number of tensors by dtype in the file.
        parameters: number of values of the network.
        ignored: number of tensors left out, by reason.
        also_fits: released networks that could not be told from `variant`.
        metadata: text metadata of a safetensors file.
    """

    path: Path
    prefix: str
    ema: bool
    stored_dtypes: dict[str, int]
    parameters: int
    ignored: dict[str, int]
    also_fits: tuple[str, ...]
    metadata: dict[str, str]


@dataclass(frozen=True)
class LoadedCheckpoint:
    """The weights of one network and what is known of it.

    Args:
        state_dict: exactly the tensors of `PiDNet(config)`, all finite.
        config: geometry, without the training-only RGB head unless it was asked for.
        variant: the released network, or None for any other.
        backbone: generator whose latents it decodes, or None if unknown or without latent.
        info: details of the file.
    """

    state_dict: dict[str, Tensor]
    config: PiDConfig
    variant: Variant | None
    backbone: str | None
    info: CheckpointInfo


def read_checkpoint(
    path: str | Path,
    *,
    backbone: str | None = None,
    variant: str | None = None,
    config: PiDConfig | None = None,
    ema: bool | None = None,
    aux_head: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> LoadedCheckpoint:
    """Read, recognise and check a checkpoint. All of it is used, or none.

    Reads `.safetensors`, `.safetensors.index.json` with its shards, `.pth` and `.pt` (unpickled
    with `weights_only=True`), flat or nested as training code saves them, with or without the
    prefixes of trainers and hosts. A safetensors file may carry metadata "config" (JSON of
    `PiDConfig.to_dict`) and "backbone", which decide before anything is guessed.

    Args:
        path: what `resolve` takes: a file, a directory with one checkpoint, "demo", or a hub id.
        backbone: generator whose latents the network decodes, needed where the shapes fit several
            (flux, sd3 and qwenimage latents look alike).
        variant: name of the released network; more specific than `backbone`.
        config: geometry of a network that was never released.
        ema: True takes an EMA copy, False plain weights, None plain ones where there are any.
        aux_head: keep the training-only RGB head if the file has it.
        dtype: of the result; None leaves every tensor as stored.
        device: of the result. On the CPU and without a conversion the tensors are views of the
            mapped file, read on first use: do not overwrite it in place while they live.

    Raises:
        CheckpointNotFoundError: nothing at `path`.
        CheckpointFormatError: not a format that is read, damaged, or quantised.
        UnsafeCheckpointError: a pickle with more than tensors.
        ForeignCheckpointError: another kind of model, or tensors the network does not have.
        IncompleteCheckpointError, CheckpointShapeError, NonFiniteCheckpointError: with the first
            tensor concerned.
        AmbiguousCheckpointError: several released networks fit; lists what to pass.
        UnknownGeometryError: never released, and no `config`.
        BackboneMismatchError: `backbone`, `variant` or `config` contradicts the file.
        UnknownNameError: no backbone or variant of this name.
    """
    wanted = variant_named(variant) if variant is not None else None
    name = _normalised_name(backbone)
    check_dtype(dtype)
    # Of a directory or repository with all releases, the wanted one.
    file = resolve(path, prefer=[f"/{wanted.checkpoint}/"] if wanted else ())
    tensors, metadata = read_tensors(file)
    found = select_network(tensors, file, ema)
    del tensors
    state = found.tensors
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    has_aux = any(key.startswith(AUX_HEAD) for key in shapes)
    identity = _identify(shapes, file, metadata, found.prefix, name, wanted, config, has_aux)

    keep_aux = aux_head and has_aux
    net_config = identity.config
    if net_config.lq_latent_channels is not None:
        net_config = dataclasses.replace(net_config, lq_aux_rgb_head=keep_aux)
    ignored = dict(found.ignored)
    if has_aux and not keep_aux:
        head = [key for key in state if key.startswith(AUX_HEAD)]
        ignored["training-only RGB head"] = len(head)
        for key in head:
            del state[key], shapes[key]
    expected = network_shapes(net_config)
    check_shapes(shapes, expected, file)
    stored = Counter(str(t.dtype).removeprefix("torch.") for t in state.values())
    ready = converted(state, list(expected), file, dtype, torch.device(device))
    info = CheckpointInfo(
        path=file,
        prefix=found.prefix,
        ema=found.ema,
        stored_dtypes=dict(stored),
        parameters=sum(t.numel() for t in ready.values()),
        ignored=ignored,
        also_fits=identity.also_fits,
        metadata=metadata,
    )
    return LoadedCheckpoint(ready, net_config, identity.variant, identity.backbone, info)


def load_net(path: str | Path, **options) -> PiDNet:
    """A network with the weights of a checkpoint, ready for inference.

    The weights exist once, in the dtype asked for: the network is made without memory and takes
    the tensors that were read. Its parameters do not require gradients.

    Args:
        path, options: as for `read_checkpoint`, which raises what is wrong with them.
    """
    return net_from(read_checkpoint(path, **options))


def net_from(checkpoint: LoadedCheckpoint) -> PiDNet:
    """`PiDNet` that owns the tensors of a checkpoint, in evaluation mode, without gradients."""
    return owning(PiDNet(checkpoint.config, device="meta"), checkpoint.state_dict)


def _identify(
    shapes: dict[str, tuple[int, ...]],
    file: Path,
    metadata: dict[str, str],
    prefix: str,
    backbone: str | None,
    wanted: Variant | None,
    config: PiDConfig | None,
    has_aux: bool,
) -> Identity:
    config = _known_config(metadata, file, config)
    backbone = _known_backbone(metadata, file, backbone)
    if config is None:
        if backbone is not None and backbone not in BACKBONES:
            raise UnknownGeometryError(
                f"read_checkpoint: {file} is for the latents of {backbone!r}, which no released "
                "network decodes, and does not say its geometry; pass config=PiDConfig(...)"
            )
        name = wanted.name if wanted else None
        return identify(shapes, file, prefix=prefix, backbone=backbone, variant=name)
    if wanted is not None and config not in (wanted.config, wanted.inference_config):
        raise BackboneMismatchError(
            f"read_checkpoint: variant {wanted.name} has another geometry than {file} or config="
        )
    _check_backbone_fits(config, backbone, file)
    found = wanted or released_with(config, file, backbone)
    return Identity(config, found, backbone or (found.family if found else None))


def _known_config(
    metadata: dict[str, str], file: Path, config: PiDConfig | None
) -> PiDConfig | None:
    if "config" not in metadata:
        return config
    try:
        stated = PiDConfig.from_dict(loads(metadata["config"]))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointFormatError(
            f"read_checkpoint: metadata 'config' of {file} is not a PiDConfig: {error}"
        ) from error
    if config is not None:
        ours, theirs = config.to_dict(), stated.to_dict()
        for field in ours:
            if ours[field] != theirs[field] and not field.startswith("lq_aux"):
                raise BackboneMismatchError(
                    f"read_checkpoint: config.{field} is {ours[field]!r}, but {file} states "
                    f"{theirs[field]!r}; leave config= out"
                )
    return stated


def _known_backbone(metadata: dict[str, str], file: Path, backbone: str | None) -> str | None:
    stated = metadata.get("backbone")
    if backbone is not None and backbone != stated:
        backbone_named(backbone)  # raises, listing the names, unless the file made it up
    if not stated:
        return backbone
    ours, theirs = (BACKBONES[n].family if n in BACKBONES else n for n in (backbone, stated))
    if backbone is not None and ours != theirs:
        raise BackboneMismatchError(
            f"read_checkpoint: backbone={backbone!r}, but {file} states that it decodes the "
            f"latents of {stated!r}"
        )
    return backbone or stated


def _normalised_name(backbone: str | None) -> str | None:
    """`backbone` as `BACKBONES` spells it; a name only the file may know is left as it is."""
    try:
        return backbone_named(backbone).name if backbone is not None else None
    except UnknownNameError:
        return backbone


def _check_backbone_fits(config: PiDConfig, backbone: str | None, file: Path) -> None:
    known = BACKBONES.get(backbone or "")
    if known is None:
        return
    ours = (known.channels, known.factor)
    theirs = (config.lq_latent_channels, config.latent_spatial_down_factor)
    if ours != theirs:
        raise BackboneMismatchError(
            f"read_checkpoint: backbone={backbone!r} has (channels, pixels per cell) = {ours}, but "
            f"the config of {file} has {theirs}"
        )
