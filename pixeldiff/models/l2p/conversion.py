"""A latent diffusion transformer becomes a pixel network that is ready to be trained.

Every tensor that has the same name and shape in both networks is copied, bit for bit; the patch
embedding and the local decoder are new, drawn as PyTorch draws new layers; what the pixel network
has no place for is dropped. Values pass as bytes, a few MB at a time: memory does not depend on the
size of the model. Cost: the source is read twice and the result written once and read twice.

Source: L2P (arXiv 2605.12013), whose released initialisation also fixes the seed 42 (its own random
numbers come in another order, so new layers have the same distribution, not the same values).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import __version__
from ...errors import (
    CheckpointError,
    CheckpointFormatError,
    ForeignCheckpointError,
    UnknownGeometryError,
    UnknownNameError,
)
from ...out_files import check_out_path
from ..pid.checkpoint_format import read_json
from ..pid.checkpoint_geometry import check_shapes
from . import resumable_file
from .checkpoint_geometry import identify, network_shapes, shapes_within, stated_config
from .checkpoint_keys import split_names, without_prefix
from .config import SOURCE, VARIANTS, L2PConfig
from .resumable_file import Piece, Progress
from .stored_tensors import StoredFiles, StoredTensor, check_types, read_header, stored_files

SEED = 42
NEW = ("all_x_embedder.", "local_decoder.")  # what a conversion may draw; a trunk is never made up
RESOLUTIONS = {v.native_size: v for v in VARIANTS.values() if v is not SOURCE}
_DRAWN_AT_ONCE = 1 << 20
_TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class ConversionPlan:
    """Where each tensor of the target comes from.

    Args:
        copied: by name, the source's tensor.
        new: names of tensors to be drawn.
        dropped: names of the source's tensors that the target has no place for, in their own shape.
    """

    copied: dict[str, StoredTensor]
    new: tuple[str, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did; `to_dict` is JSON-able.

    Args:
        source, output: paths.
        target: name of the released form, or "own" for another geometry.
        seed: of the new tensors.
        copied, new, dropped: tensor names.
        nbytes: of all tensors of the output.
        resumed_bytes: of them, what an interrupted run had written.
    """

    source: str
    output: str
    target: str
    seed: int
    copied: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]
    nbytes: int
    resumed_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.output}: {self.target} pixel network, {self.nbytes / 1e9:.2f} GB, verified",
            f"copied  {len(self.copied):4d} tensors, bit for bit",
            f"new     {len(self.new):4d} tensors, seed {self.seed}: {_families(self.new)}",
            f"dropped {len(self.dropped):4d} tensors: {_families(self.dropped) or 'none'}",
        ]
        if self.resumed_bytes:
            lines.append(f"{self.resumed_bytes / 1e9:.2f} GB were there from an interrupted run")
        return "\n".join(lines)


def convert(
    source: str | Path,
    output: str | Path,
    target: int | L2PConfig = 1024,
    *,
    seed: int = SEED,
    decoder_width: float = 1.0,
    source_config: L2PConfig | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write the pixel network that a latent transformer (or another pixel network) starts.

    An interrupted conversion (even killed) goes on where it was when the same call is made again,
    and gives the same bytes. The result is compared with the source before it gets its name.

    Args:
        source: Z-Image, or an L2P network of another form: a .safetensors file, an index, a
            directory with shards, or a diffusers pipeline; split or fused names, any prefix.
        output: .safetensors file.
        target: side of the images that the released form was trained at (1024, 4096, 8192, 10240),
            or a geometry whose trunk is the source's.
        seed: of the new tensors; each depends on it and on its own name only.
        decoder_width: channels of the local decoder in those of the released form, for a trunk
            narrower than the released one. Not with a geometry as target, which has its own.
        source_config: geometry of a source that was never released and does not state its own (in
            metadata "config", or as diffusers' config.json).
        overwrite: replace an existing `output`.
        progress: called with ("writing" or "checking", bytes done, bytes in all).

    Raises:
        UnknownNameError: no such resolution. FileExistsError: `output` exists. OSError: it cannot
        be written, or the disk is too small. CheckpointNotFoundError, CheckpointFormatError,
        ForeignCheckpointError, IncompleteCheckpointError, UnknownGeometryError: of the source.
        CheckpointError: the result did not pass its verification, and was deleted.
    """
    if not isinstance(target, L2PConfig) and target not in RESOLUTIONS:
        known = ", ".join(map(str, RESOLUTIONS))
        raise UnknownNameError(f"convert: resolution must be one of {known}, got {target}")
    if isinstance(target, L2PConfig) and decoder_width != 1:
        raise ValueError("convert: decoder_width is for a resolution; the target states its own")
    output = check_new_path(output, overwrite, "convert")
    files = stored_files(source)
    state, dropped = own_tensors(files)
    config = geometry(state, files, source_config)
    target_config = resolved_target(config, target, files, decoder_width)
    expected = network_shapes(target_config)
    plan = planned(state, expected, files.path)
    plan = dataclasses.replace(plan, dropped=(*plan.dropped, *dropped))
    dtype = _embedding_type(state)
    pieces = [
        Piece(n, t.dtype, t.shape, t.chunks) if (t := plan.copied.get(n)) else
        Piece(n, dtype, shape, new_tensor(n, expected, dtype, seed))
        for n, shape in expected.items()
    ]  # fmt: skip
    name = next((v.name for v in VARIANTS.values() if v.config == target_config), "own")
    origin = {"pixeldiff": __version__, "target": name, "seed": seed, "new": list(plan.new)}
    metadata = {
        "format": "pt",
        "config": json.dumps(target_config.to_dict()),
        "conversion": json.dumps(origin),
    }
    resumed = resumable_file.write(
        output,
        pieces,
        metadata,
        identity=files.identity,
        check=lambda part: verified(part, expected, plan.copied),
        progress=progress,
    )
    return ConversionReport(
        source=str(files.path),
        output=str(output),
        target=name,
        seed=seed,
        copied=tuple(plan.copied),
        new=plan.new,
        dropped=plan.dropped,
        nbytes=sum(p.nbytes for p in pieces),
        resumed_bytes=resumed,
    )


def check_new_path(output: str | Path, overwrite: bool, caller: str) -> Path:
    """`output`, if a .safetensors file may be written there; FileExistsError if one is there."""
    output = check_out_path(Path(output).expanduser(), ".safetensors")
    if output.exists() and not overwrite:
        raise FileExistsError(
            f"{caller}: {output} exists; choose another name, or replace it with --force "
            "(overwrite=True)"
        )
    return output


def own_tensors(files: StoredFiles) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """(the network's tensors under split names, names of what lies outside its prefix)."""
    own, prefix, _ = without_prefix(files.tensors, files.path)
    outside = tuple(n for n in files.tensors if not n.startswith(prefix))
    check_types(own, files.path)
    return split_once(own, files.path), outside


def split_once(tensors: Mapping[str, StoredTensor], path: Path) -> dict[str, StoredTensor]:
    """`split_names`, of a file that holds no tensor twice.

    Raises:
        CheckpointFormatError: a tensor under its split and its fused name.
    """
    split = split_names(tensors)
    if len(split) != sum(len(split_names({n: t})) for n, t in tensors.items()):
        raise CheckpointFormatError(f"{path} holds a tensor under its split and its fused name")
    return split


def geometry(
    state: Mapping[str, StoredTensor], files: StoredFiles, stated: L2PConfig | None
) -> L2PConfig:
    """The network's config: as stated by the caller or the file, or as released; it is complete.

    Raises:
        IncompleteCheckpointError, CheckpointShapeError: with the first tensor. UnknownGeometryError
        nothing says what network it is.
    """
    shapes = {name: tensor.shape for name, tensor in state.items()}
    config = stated or stated_config(files.metadata, files.path)
    if config is None:
        try:
            config = identify(shapes, files.path).config
        except UnknownGeometryError:
            config = _config_of_diffusers(files.path)
            if config is None:
                raise
    expected = shapes_within(config, shapes, files.path)
    # More than the network's own is no reason to refuse: it is dropped, and the report says so.
    check_shapes({n: s for n, s in shapes.items() if n in expected}, expected, files.path)
    return config


def resolved_target(
    config: L2PConfig, target: int | L2PConfig, files: StoredFiles, decoder_width: float = 1.0
) -> L2PConfig:
    """The geometry of the result: the source's trunk behind other ends.

    Raises:
        ForeignCheckpointError: the source has those ends already. ValueError: another trunk.
    """
    if isinstance(target, L2PConfig):
        wanted = target
    else:
        form = RESOLUTIONS[target].config
        wanted = dataclasses.replace(
            config,
            patch_size=form.patch_size,
            in_channels=form.in_channels,
            local_decoder=form.local_decoder.scaled(decoder_width),
        )
    if wanted == config:
        raise ForeignCheckpointError(
            f"convert: {files.path} is the pixel network asked for already; a conversion starts "
            "from the latent model, or from a pixel network for another resolution"
        )
    ends = ("patch_size", "in_channels", "local_decoder")
    same_ends = dataclasses.replace(wanted, **{f: getattr(config, f) for f in ends})
    for field in dataclasses.fields(config):
        ours, theirs = getattr(same_ends, field.name), getattr(config, field.name)
        if ours != theirs:
            raise ValueError(
                f"convert: {field.name} of the target must be the source's {theirs}, got {ours}; "
                f"only {', '.join(ends)} may differ"
            )
    if wanted.local_decoder is None:
        raise ValueError("convert: the target has no local decoder, so it is no pixel network")
    return wanted


def planned(
    state: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], path: Path
) -> ConversionPlan:
    """Same name and same shape: copied. Else new, which only the two ends may be."""
    copied = {n: state[n] for n, s in expected.items() if n in state and state[n].shape == s}
    new = tuple(n for n in expected if n not in copied)
    invented = next((n for n in new if not n.startswith(NEW)), None)
    if invented is not None:
        raise CheckpointFormatError(
            f"convert: {path} has no {invented} of shape {expected[invented]}, and the trunk of a "
            "converted network must come from its source"
        )
    return ConversionPlan(copied, new, tuple(n for n in state if n not in copied))


def new_tensor(
    name: str, shapes: Mapping[str, tuple[int, ...]], dtype: str, seed: int
) -> Callable[[], Iterator[bytes]]:
    """The bytes of a new weight or bias: uniform in +-1/sqrt(fan_in), drawn in fp32, rounded once.

    Args:
        shapes: of all tensors of the network; a bias takes its fan-in from the weight beside it.
    """
    fan_in = math.prod(shapes[name.rpartition(".")[0] + ".weight"][1:])
    count, bound = math.prod(shapes[name]), fan_in**-0.5
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()

    def chunks() -> Iterator[bytes]:
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        for start in range(0, count, _DRAWN_AT_ONCE):
            size = min(_DRAWN_AT_ONCE, count - start)
            values = torch.empty(size).uniform_(-bound, bound, generator=generator)
            yield _bytes(values.to(_TORCH[dtype]))

    return chunks


def verified(
    part: Path, expected: Mapping[str, tuple[int, ...]], copied: Mapping[str, StoredTensor]
) -> None:
    """The written file is the network, and what was copied is the source's, byte for byte.

    Raises:
        CheckpointError: it is not; names the first tensor.
    """
    written, _ = read_header(part)
    if {n: t.shape for n, t in written.items()} != dict(expected):
        raise CheckpointError(
            f"{part} does not hold the tensors of its network; it was deleted, run the command "
            "again, and report this if it happens twice"
        )
    for name, origin in copied.items():
        result = written[name]
        same = (result.dtype, result.nbytes) == (origin.dtype, origin.nbytes)
        if not same or any(a != b for a, b in zip(result.chunks(), origin.chunks(), strict=True)):
            raise CheckpointError(
                f"{name} in {part} differs from {origin.file}; the file was deleted. Check the "
                "disk, and that nothing writes to the source, and run the command again"
            )


def _embedding_type(state: Mapping[str, StoredTensor]) -> str:
    """New layers are stored as precisely as the embedding that they replace."""
    return next(t.dtype for n, t in state.items() if n.startswith("all_x_embedder."))


def _bytes(values: Tensor) -> bytes:
    return values.view(torch.uint8).numpy().tobytes()


def _config_of_diffusers(path: Path) -> L2PConfig | None:
    """Geometry of a latent model from the config.json beside it, if it is diffusers' Z-Image."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return None
    try:
        values = read_json(file)
        if values.get("_class_name") != "ZImageTransformer2DModel":
            return None
        names = ("in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "cap_feat_dim")
        names += ("axes_dims", "axes_lens", "rope_theta", "t_scale", "norm_eps")
        kept = {name: values[name] for name in names if name in values}
        (patch,) = values["all_patch_size"]
        return L2PConfig(patch_size=patch, local_decoder=None, **kept)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointFormatError(
            f"{file} is not the configuration of a Z-Image transformer: {error}"
        ) from error


def _families(names: tuple[str, ...]) -> str:
    """The first part of each name, with how many tensors share it."""
    counts: dict[str, int] = {}
    for name in names:
        head = name.split(".")[0]
        counts[head] = counts.get(head, 0) + 1
    return ", ".join(f"{head} ({count})" for head, count in counts.items())
