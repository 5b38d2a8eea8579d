"""Caption embeddings in a file: encode once, then decode pictures without any text encoder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pixeldiff.finite import TOKENS, check_finite
from pixeldiff.json_text import loads
from pixeldiff.out_files import check_out_path, written_whole
from pixeldiff.pickled import (
    DamagedPickleError,
    UnsafePickleError,
    load_pickled,
    why_not_plain,
)
from pixeldiff.text.prefix import text_sha256

FORMAT = "pixeldiff.caption"
FORMAT_VERSION = 1

_MODELS = {"Gemma-2": "pid", "Qwen3": "l2p"}  # by family of their text encoder
_NEGATIVE = "negative_"  # before the names of tensor and metadata
_PICKLED = (".pt", ".pth", ".bin")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class CaptionEncoder(Protocol):
    """What `bake_caption` needs: B texts to (B, T, E), or to a list of B tensors (T_b, E).

    `encoder_id`, `family` and `prefix_sha256` are recorded where they exist.
    """

    def encode(self, captions: list[str]) -> Tensor | list[Tensor]: ...


@dataclass(frozen=True)
class CaptionFile:
    """Caption embeddings and where they come from; unknown facts are None.

    Attributes:
        embedding: (B, T, E) floating point, finite; what `PiDDecoder.decode(caption=...)` takes.
        captions: B texts, where the file holds them; "" is the null caption.
        caption_sha256: B SHA-256 sums of the UTF-8 texts.
        encoder_id: name or path of the text encoder.
        prefix_sha256: SHA-256 of the instruction prefix that stood before each caption.
        family: kind of text encoder, "Gemma-2" or "Qwen3".
        negative: the negative caption that goes with them, one embedding, its tokens its own.
    """

    embedding: Tensor
    captions: tuple[str, ...] | None = None
    caption_sha256: tuple[str, ...] | None = None
    encoder_id: str | None = None
    prefix_sha256: str | None = None
    family: str | None = None
    negative: CaptionFile | None = None

    @property
    def is_null(self) -> tuple[bool, ...] | None:
        """Per caption, whether it is the null caption (the empty text)."""
        if self.caption_sha256 is None:
            return None
        return tuple(sha256 == text_sha256("") for sha256 in self.caption_sha256)

    def check_family(self, what: str, family: str) -> None:
        """Raises ValueError if these are known to come from another kind of text encoder."""
        if self.family not in (None, family):
            command = f"bake-caption --for {_MODELS[family]}"
            raise ValueError(
                f"{what} must hold embeddings of a {family}, which this model was trained with, "
                f"got those of a {self.family} ({self.encoder_id}); `pixeldiff {command}` writes "
                "the right ones"
            )


def save_captions(
    path: str | os.PathLike[str],
    embedding: Tensor,
    captions: str | Sequence[str],
    *,
    encoder_id: str | None = None,
    prefix_sha256: str | None = None,
    family: str | None = None,
    negative: tuple[Tensor, str] | None = None,
    store_text: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> CaptionFile:
    """Write caption embeddings to a `.safetensors` file, whole or not at all.

    The file holds one tensor, `embedding`, and as metadata the format and its version, the texts
    and their SHA-256 sums, the encoder's name and family and the prefix's SHA-256. A negative
    caption adds `negative_embedding` and its text. An existing file is replaced.

    Args:
        path: file to write, ending in `.safetensors`.
        embedding: (B, T, E) floating point, finite, any device.
        captions: B texts; "" is the null caption.
        encoder_id, prefix_sha256, family: facts to record.
        negative: embedding (1, T', E) and text of the negative caption.
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
    facts = {"encoder_id": encoder_id, "prefix_sha256": prefix_sha256, "family": family}
    texts = _as_texts("save_captions", captions)
    result = _made("save_captions: embedding", embedding, texts, store_text, dtype, facts)
    tensors, metadata = {"embedding": result.embedding}, _texts_metadata(result)
    if negative is not None:
        what = "save_captions: negative"
        other = _made(what, negative[0], [negative[1]], store_text, dtype, facts)
        if other.embedding.shape[2] != embedding.shape[2]:
            raise ValueError(
                f"{what} must have the width of embedding, {embedding.shape[2]}, got "
                f"{tuple(other.embedding.shape)}"
            )
        result = replace(result, negative=other)
        # One tensor may be given as both, and the format takes no two of one memory.
        tensors[_NEGATIVE + "embedding"] = other.embedding.clone()
        metadata.update({_NEGATIVE + k: v for k, v in _texts_metadata(other).items()})
    metadata.update(format=FORMAT, format_version=str(FORMAT_VERSION))
    known = {"encoder": encoder_id, "encoder_family": family, "prefix_sha256": prefix_sha256}
    metadata.update({k: v for k, v in known.items() if v is not None})
    with written_whole([path]) as (partial,):
        partial.write_bytes(save(tensors, metadata))
    return result


def _made(
    what: str,
    embedding: Tensor,
    texts: list[str],
    store_text: bool,
    dtype: torch.dtype,
    facts: dict[str, str | None],
) -> CaptionFile:
    _check_embedding(what, embedding)
    if len(texts) != embedding.shape[0]:
        raise ValueError(
            f"save_captions: captions must hold one text per embedding, B = {embedding.shape[0]}, "
            f"got {len(texts)}"
        )
    stored = embedding.detach().to("cpu", dtype).contiguous()
    # Casting down can overflow (fp16) or flush everything to zero.
    _check_values(f"{what} as {dtype}", stored)
    sums = tuple(text_sha256(text) for text in texts)
    return CaptionFile(stored, tuple(texts) if store_text else None, sums, **facts)


def _texts_metadata(captions: CaptionFile) -> dict[str, str]:
    metadata = {
        "caption_sha256": json.dumps(captions.caption_sha256),
        "null_caption": json.dumps(captions.is_null),
    }
    if captions.captions is not None:
        metadata["captions"] = json.dumps(captions.captions)
    return metadata


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
    _check_held(f"load_caption: {path}", result)
    if result.negative is not None:
        _check_held(f"load_caption: negative of {path}", result.negative)
    if expected_embed_dim is not None and embedding.shape[2] != expected_embed_dim:
        raise ValueError(
            f"load_caption: {path} must hold embeddings of width {expected_embed_dim}, got "
            f"{embedding.shape[2]} (shape {tuple(embedding.shape)}); it was made with another "
            f"text encoder{f' ({result.encoder_id})' if result.encoder_id else ''}"
        )
    return result


def bake_caption(
    path: str | os.PathLike[str],
    captions: str | Sequence[str] | None,
    encoder: CaptionEncoder,
    *,
    negative: str | None = None,
    store_text: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> CaptionFile:
    """Encode captions and write them to a file for `load_caption`.

    Args:
        path: file to write, ending in `.safetensors`; checked before anything is encoded.
        captions: one text or several; None is the null caption, the empty text after the prefix.
        encoder: a `GemmaCaptionEncoder`, a `Qwen3PromptEncoder`, or the like.
        negative: text to encode beside them, for guidance.
        store_text, dtype: see `save_captions`.

    Returns:
        What the file holds, on the CPU.

    Raises:
        As `save_captions` and the encoder. ValueError: texts of different numbers of tokens, where
        the encoder does not pad them to one length.
    """
    check_out_path(path, ".safetensors")
    texts = _as_texts("bake_caption", "" if captions is None else captions)
    rows = list(encoder.encode(texts if negative is None else [*texts, negative]))
    lengths = sorted({len(row) for row in rows[: len(texts)]})
    if len(lengths) > 1:
        raise ValueError(
            f"bake_caption: the captions have {', '.join(map(str, lengths))} tokens, and a file "
            "holds embeddings of one length; bake each to its own file"
        )
    return save_captions(
        path,
        torch.stack(rows[: len(texts)]),
        texts,
        encoder_id=getattr(encoder, "encoder_id", None) or type(encoder).__name__,
        prefix_sha256=getattr(encoder, "prefix_sha256", None),
        family=getattr(encoder, "family", None),
        negative=None if negative is None else (rows[-1][None], negative),
        store_text=store_text,
        dtype=dtype,
    )


def _load_safetensors(path: Path) -> CaptionFile:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            ours = metadata.get("format") == FORMAT
            pair = {"embedding", _NEGATIVE + "embedding"}
            if len(names) == 1 or (ours and names == pair):
                tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"load_caption: {path} is not a safetensors file, or is cut off: {error}"
        ) from error
    version = metadata.get("format_version", "")
    if ours and version != str(FORMAT_VERSION):
        raise ValueError(
            f"load_caption: {path} has caption format version {version!r}, this pixeldiff reads "
            f"{FORMAT_VERSION}; update pixeldiff or bake the caption again"
        )
    if len(names) != 1 and not (ours and names == pair):
        raise ValueError(
            f"load_caption: {path} must hold one tensor, got {len(names)}"
            f"{': ' + ', '.join(sorted(names)[:3]) if names else ''}; this is not a caption file"
        )
    if not ours:
        return CaptionFile(*tensors.values())
    facts = metadata.get("encoder"), metadata.get("prefix_sha256"), metadata.get("encoder_family")
    negative = tensors.pop(_NEGATIVE + "embedding", None)
    other = None
    if negative is not None:
        other = CaptionFile(negative, *_texts_of(path, metadata, _NEGATIVE), *facts)
    (embedding,) = tensors.values()
    return CaptionFile(embedding, *_texts_of(path, metadata, ""), *facts, other)


def _texts_of(
    path: Path, metadata: dict[str, str], start: str
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Texts and their SHA-256 sums, which belong together."""
    captions = _texts_entry(path, metadata, start + "captions")
    sha256 = _texts_entry(path, metadata, start + "caption_sha256")
    if captions is not None and sha256 != tuple(text_sha256(text) for text in captions):
        raise ValueError(
            f"load_caption: {path}: the SHA-256 sums do not belong to the captions; bake it again"
        )
    return captions, sha256


def _texts_entry(path: Path, metadata: dict[str, str], key: str) -> tuple[str, ...] | None:
    if key not in metadata:
        return None
    try:
        value = loads(metadata[key])
    except ValueError:
        value = None
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(
            f"load_caption: {path}: metadata entry {key!r} must be a list of texts in JSON"
        )
    return tuple(value)


def _load_pickled(path: Path) -> Tensor:
    try:
        value = load_pickled(path)
    except (DamagedPickleError, UnsafePickleError) as error:
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
    if (reason := why_not_plain(value)) is not None:
        raise ValueError(f"load_caption: the tensor of {path} {reason}")
    return value.detach()


def _check_embedding(what: str, embedding: Tensor) -> None:
    if not isinstance(embedding, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(embedding).__name__}")
    if embedding.ndim != 3 or 0 in embedding.shape:
        raise ValueError(f"{what} must be (B, T, E), none of them 0, got {tuple(embedding.shape)}")
    if embedding.dtype not in _DTYPES:
        raise TypeError(f"{what} must be one of {_names(_DTYPES)}, got {embedding.dtype}")
    _check_values(what, embedding)


def _check_held(what: str, file: CaptionFile) -> None:
    _check_embedding(what, file.embedding)
    count = None if file.caption_sha256 is None else len(file.caption_sha256)
    if count not in (None, file.embedding.shape[0]):
        raise ValueError(
            f"{what} must hold one caption per embedding, got {count} captions and "
            f"{file.embedding.shape[0]} embeddings"
        )


def _check_values(what: str, embedding: Tensor) -> None:
    check_finite(what, embedding, axes=TOKENS)
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
