"""Reading L2P checkpoints, and those of the latent model they come from.

Released files are safetensors, the 1K one with some blocks in fp32 and the rest in bf16; repackaged
ones come under prefixes, with fused projections, or as pickles. All of a file's network is used, or
none.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..meta import owning
from ..pid.checkpoint_format import read_tensors
from ..pid.checkpoint_geometry import check_shapes
from ..pid.checkpoint_location import resolve
from ..pid.checkpoint_values import check_dtype, converted
from .checkpoint_geometry import (
    identify,
    shapes_within,
    signature,
    stated_config,
    stated_variant,
)
from .checkpoint_keys import FINAL_LAYER, is_fused, split_names, without_prefix
from .config import VARIANTS, L2PConfig, Variant
from .network import L2PNet

PACKAGED = "l2p.safetensors"  # the file that "demo" means


@dataclass(frozen=True)
class CheckpointInfo:
    """What was found in a file, for logs and image metadata.

    Args:
        path: the file read.
        prefix: what preceded the tensor names, "" for nothing.
        fused: q, k and v lay in one tensor.
        stored_dtypes: number of tensors by dtype in the file.
        parameters: number of values of the network.
        ignored: number of tensors left out, by reason.
        rounded: tensors whose values the dtype asked for could not hold exactly.
        signature: MD5 of names and shapes.
        metadata: text metadata of a safetensors file.
    """

    path: Path
    prefix: str
    fused: bool
    stored_dtypes: dict[str, int]
    parameters: int
    ignored: dict[str, int]
    rounded: tuple[str, ...]
    signature: str
    metadata: dict[str, str]

    @property
    def note(self) -> str:
        """A line on what reading changed, "" for nothing."""
        if not self.rounded:
            return ""
        shown = ", ".join(self.rounded[:3]) + (", ..." if len(self.rounded) > 3 else "")
        return (
            f"{len(self.rounded)} tensors were stored more precisely than they are held, and "
            f"rounded: {shown}"
        )


@dataclass(frozen=True)
class LoadedCheckpoint:
    """The weights of one network and what is known of it.

    Args:
        state_dict: exactly the tensors of `L2PNet(config)`, all finite.
        config: geometry.
        variant: the released network, or what another one's file says of itself (metadata
            "variant", JSON with "name" and "native_size"), or None.
        info: details of the file.
    """

    state_dict: dict[str, Tensor]
    config: L2PConfig
    variant: Variant | None
    info: CheckpointInfo


def read_checkpoint(
    path: str | Path,
    *,
    config: L2PConfig | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> LoadedCheckpoint:
    """Read, recognise and check a checkpoint.

    Reads `.safetensors`, `.safetensors.index.json` with its shards, `.pth` and `.pt` (unpickled
    with `weights_only=True`), with or without a prefix, with split or fused projections. Which
    network it is, is told by its tensors' names and shapes.

    Args:
        path: a file, a directory with one checkpoint, "demo" (the packaged one), or a hub id.
        config: geometry of a network that was never released; a safetensors file may carry it
            as metadata "config" (JSON of `L2PConfig.to_dict`).
        dtype: of the result; None leaves every tensor as stored, which a network takes only if all
            are of one type. `info.rounded` names the tensors that lost bits.
        device: of the result. On the CPU and without a conversion the tensors are views of the
            mapped file, read on first use: do not overwrite it in place while they live.

    Raises:
        CheckpointNotFoundError: nothing at `path`.
        CheckpointFormatError: not a format that is read, damaged, quantised, or several networks.
        UnsafeCheckpointError: a pickle with more than tensors.
        ForeignCheckpointError: another kind of model, or tensors the network does not have.
        IncompleteCheckpointError, CheckpointShapeError, NonFiniteCheckpointError: with the first
            tensor concerned.
        UnknownGeometryError: never released, and no `config`.
    """
    check_dtype(dtype)
    file = resolve(path, packaged=PACKAGED)
    tensors, metadata = read_tensors(file)
    own, prefix, others = without_prefix(tensors, file)
    del tensors
    ignored = {"outside the prefix": others} if others else {}
    fused = is_fused(own)
    state = split_names(own)
    del own
    if any(name.startswith("local_decoder.") for name in state):
        final = [name for name in state if name.startswith(FINAL_LAYER)]
        for name in final:
            del state[name]
        if final:
            ignored["final layer of the latent model"] = len(final)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    config = config or stated_config(metadata, file)
    if config is None:
        config = identify(shapes, file).config
    expected = shapes_within(config, shapes, file)
    check_shapes(shapes, expected, file)
    stored = Counter(str(t.dtype).removeprefix("torch.") for t in state.values())
    rounded: list[str] = []
    ready = converted(state, list(expected), file, dtype, torch.device(device), rounded)
    info = CheckpointInfo(
        path=file,
        prefix=prefix,
        fused=fused,
        stored_dtypes=dict(stored),
        parameters=sum(t.numel() for t in ready.values()),
        ignored=ignored,
        rounded=tuple(rounded),
        signature=signature(shapes),
        metadata=metadata,
    )
    variant = next((v for v in VARIANTS.values() if v.config == config), None)
    variant = variant or stated_variant(metadata, config, file)
    return LoadedCheckpoint(ready, config, variant, info)


def load_net(path: str | Path, **options) -> L2PNet:
    """`read_checkpoint(path, **options)` as a network for inference, its weights held once."""
    return net_from(read_checkpoint(path, **options))


def net_from(checkpoint: LoadedCheckpoint) -> L2PNet:
    """The network that owns the tensors of a checkpoint; see `pixeldiff.models.meta.owning`."""
    return owning(L2PNet(checkpoint.config, device="meta"), checkpoint.state_dict)
