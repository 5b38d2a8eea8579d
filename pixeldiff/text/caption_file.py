"""Caption embeddings in a file: encode once, then decode pictures without any text encoder."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pixeldiff.out_files import check_out_path, written_whole
from pixeldiff.text.prefix import text_sha256

FORMAT = "pixeldiff.caption"
FORMAT_VERSION = 1

_PICKLED = (".pt", ".pth", ".bin")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class CaptionEncoder(Protocol):
    """What `bake_caption` needs. `encoder_id` and `prefix_sha256` are recorded where they exist."""

    def encode(self, captions: list[str]) -> Tensor: ...


@dataclass(frozen=True)
class CaptionFile:
    """Caption embeddings and where they come from; unknown facts are None.

    Attributes:
        embedding: (B, T, E) floating point, finite; what `PiDDecoder.decode(caption=...)` takes.
        captions: B texts, where the file holds them; "" is the null caption.
        caption_sha256: B SHA-256 sums of the UTF-8 texts.
        encoder_id: name or path of the text encoder.
        prefix_sha256: SHA-256 of the instruction prefix that stood before each caption.
    """

    embedding: Tensor
    captions: tuple[str, ...] | None = None
    caption_sha256: tuple[str, ...] | None = None
    encoder_id: str | None = None
    prefix_sha256: str | None = None

    @property
    def is_null(self) -> tuple[bool, ...] | None:
        """Per caption, whether it is the null caption (the empty text)."""
        if self.caption_sha256 is None:
            return None
        return tuple(sha256 == text_sha256("") for sha256 in self.caption_sha256)


def save_captions(
    path: str | os.PathLike[str],
    embedding: Tensor,
    captions: str | Sequence[str],
    *,
    encoder_id: str | None = None,
    prefix_sha256: str | None = None,
    store_text: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> CaptionFile:
    """Write caption embeddings to a `.safetensors` file, whole or not at all.

    The file holds one tensor, `embedding`, and as metadata the format and its version, the texts
    and their SHA-256 sums, the encoder's name and the prefix's SHA-256. An existing file is
    replaced.

    Args:
        path: file to write, ending in `.safetensors`.
        embedding: (B, T, E) floating point, finite, any device.
        captions: B texts; "" is the null caption.
        encoder_id, prefix_sha256: facts to record.
        store_text: False records the SHA-256 sums alone.
        dtype: dtype in the file. bf16 loses nothing of a bf16 encoder's output.

    Returns:
        What the file holds, on the CPU.

    Raises:
        ValueError: suffix, shape, number of captions, or values. TypeError: dtype, captions.
        OSError: the file cannot be written.
    """
    path = check_out_path(path, ".safetensors")
    if dtype not in _DTYPES:
        raise TypeError(f"save_captions: dtype must be one of {_names(_DTYPES)}, got {dtype}")
    _check_embedding("save_captions: embedding", embedding)
    texts = _as_texts("save_captions", captions)
    if len(texts) != embedding.shape[0]:
        raise ValueError(
            f"save_captions: captions must hold one text per embedding, B = {embedding.shape[0]}, "
            f"got {len(texts)}"
        )
    stored = embedding.detach().to("cpu", dtype).contiguous()
    # Casting down can overflow (fp16) or flush everything to zero.
    _check_values(f"save_captions: embedding as {dtype}", stored)
    result = CaptionFile(
        embedding=stored,
        captions=tuple(texts) if store_text else None,
        caption_sha256=tuple(text_sha256(text) for text in texts),
        encoder_id=encoder_id,
        prefix_sha256=prefix_sha256,
    )
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "caption_sha256": json.dumps(result.caption_sha256),
        "null_caption": json.dumps(result.is_null),
    }
    if store_text:
        metadata["captions"] = json.dumps(texts)
    if encoder_id is not None:
        metadata["encoder"] = encoder_id
    if prefix_sha256 is not None:
        metadata["prefix_sha256"] = prefix_sha256
    with written_whole([path]) as (partial,):
        partial.write_bytes(save({"embedding": stored}, metadata))
    return result


def load_caption(
    path: str | os.PathLike[str], *, expected_embed_dim: int | None = None
) -> CaptionFile:
    """Read caption embeddings: a file of `save_captions`, or one tensor under any name.

    Args:
        path: `.safetensors`, or `.pt` / `.pth` / `.bin` (unpickled with `weights_only`) holding a
            tensor or a dict with one tensor.
        expected_embed_dim: E that the embeddings must have, 2304 for the released models.

    Returns:
        Embeddings in the file's dtype on the CPU, and what the file says about them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a caption file, damaged, not (B, T, E), a wrong width, or bad values.
        TypeError: not a floating-point tensor.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_caption: no such file: {path}")
    if path.suffix == ".safetensors":
        result = _load_safetensors(path)
    elif path.suffix in _PICKLED:
        result = CaptionFile(_load_pickled(path))
    else:
        raise ValueError(f"load_caption: {path} must end in .safetensors, {', '.join(_PICKLED)}")
    embedding = result.embedding
    _check_embedding(f"load_caption: {path}", embedding)
    if expected_embed_dim is not None and embedding.shape[2] != expected_embed_dim:
        raise ValueError(
            f"load_caption: {path} must hold embeddings of width {expected_embed_dim}, got "
            f"{embedding.shape[2]} (shape {tuple(embedding.shape)}); it was made with another "
            f"text encoder{f' ({result.encoder_id})' if result.encoder_id else ''}"
        )
    count = len(result.caption_sha256) if result.caption_sha256 is not None else None
    if count is not None and count != embedding.shape[0]:
        raise ValueError(
            f"load_caption: {path} must hold one caption per embedding, got {count} captions and "
            f"{embedding.shape[0]} embeddings"
        )
    return result


def bake_caption(
    path: str | os.PathLike[str],
    captions: str | Sequence[str] | None,
    encoder: CaptionEncoder,
    *,
    store_text: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> CaptionFile:
    """Encode captions and write them to a file for `load_caption`.

    Args:
        path: file to write, ending in `.safetensors`; checked before anything is encoded.
        captions: one text or several; None is the null caption, the empty text after the prefix.
        encoder: for example a `GemmaCaptionEncoder`.
        store_text, dtype: see `save_captions`.

    Returns:
        What the file holds, on the CPU.

    Raises:
        As `save_captions` and the encoder.
    """
    check_out_path(path, ".safetensors")
    texts = _as_texts("bake_caption", "" if captions is None else captions)
    return save_captions(
        path,
        encoder.encode(texts),
        texts,
        encoder_id=getattr(encoder, "encoder_id", None) or type(encoder).__name__,
        prefix_sha256=getattr(encoder, "prefix_sha256", None),
        store_text=store_text,
        dtype=dtype,
    )


def _load_safetensors(path: Path) -> CaptionFile:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            if len(names) == 1:
                embedding = file.get_tensor(names[0])
    except SafetensorError as error:
        raise ValueError(
            f"load_caption: {path} is not a safetensors file, or is cut off: {error}"
        ) from error
    if len(names) != 1:
        raise ValueError(
            f"load_caption: {path} must hold one tensor, got {len(names)}"
            f"{': ' + ', '.join(sorted(names)[:3]) if names else ''}; this is not a caption file"
        )
    if metadata.get("format") != FORMAT:
        return CaptionFile(embedding)
    version = metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise ValueError(
            f"load_caption: {path} has caption format version {version!r}, this pixeldiff reads "
            f"{FORMAT_VERSION}; update pixeldiff or bake the caption again"
        )
    captions = _texts_entry(path, metadata, "captions")
    sha256 = _texts_entry(path, metadata, "caption_sha256")
    if captions is not None and sha256 != tuple(text_sha256(text) for text in captions):
        raise ValueError(
            f"load_caption: {path}: the SHA-256 sums do not belong to the captions; bake it again"
        )
    return CaptionFile(
        embedding, captions, sha256, metadata.get("encoder"), metadata.get("prefix_sha256")
    )


def _texts_entry(path: Path, metadata: dict[str, str], key: str) -> tuple[str, ...] | None:
    if key not in metadata:
        return None
    try:
        value = json.loads(metadata[key])
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(
            f"load_caption: {path}: metadata entry {key!r} must be a list of texts in JSON"
        )
    return tuple(value)


def _load_pickled(path: Path) -> Tensor:
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"load_caption: {path} is not a PyTorch file of plain tensors, or is cut off: {error}"
        ) from error
    if isinstance(value, dict):
        tensors = [v for v in value.values() if isinstance(v, Tensor)]
        if len(tensors) != 1:
            raise ValueError(
                f"load_caption: {path} must hold one tensor, got a dict with {len(tensors)}; this "
                "is not a caption file"
            )
        value = tensors[0]
    if not isinstance(value, Tensor):
        raise ValueError(
            f"load_caption: {path} must hold a tensor or a dict with one tensor, got "
            f"{type(value).__name__}"
        )
    return value.detach()


def _check_embedding(what: str, embedding: Tensor) -> None:
    if not isinstance(embedding, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(embedding).__name__}")
    if embedding.ndim != 3 or 0 in embedding.shape:
        raise ValueError(f"{what} must be (B, T, E), none of them 0, got {tuple(embedding.shape)}")
    if embedding.dtype not in _DTYPES:
        raise TypeError(f"{what} must be one of {_names(_DTYPES)}, got {embedding.dtype}")
    _check_values(what, embedding)


def _check_values(what: str, embedding: Tensor) -> None:
    finite = torch.isfinite(embedding).flatten(1).all(1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(f"{what} must be finite, got NaN or infinity in embedding {row}")
    zero = (embedding == 0).flatten(1).all(1)
    if zero.any():
        # The null caption is the encoding of an empty text; zeros cost most of the quality.
        raise ValueError(
            f"{what} is zero throughout embedding {int(zero.nonzero()[0])}: no encoder gives that; "
            'the null caption is the encoding of ""'
        )


def _as_texts(name: str, captions: str | Sequence[str]) -> list[str]:
    texts = [captions] if isinstance(captions, str) else captions
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name}: captions must be a str or a sequence of str")
    if not texts:
        raise ValueError(f'{name}: captions is empty; the null caption is ""')
    return list(texts)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
