"""Training pictures of one folder with their captions, checked before any work starts.

`NAME.png` (or .jpg, ...) stands beside `NAME.safetensors`, the embedding of its caption, or
`NAME.txt`, its caption. L2P is trained on pictures that its source model made, of the captions it
made them from.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...images import to_rgb
from ...text import Qwen3PromptEncoder, load_caption, save_captions
from ...text.prefix import text_sha256
from .config import L2PConfig

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
_NAMED = 3  # of the files that an error is about


@dataclass(frozen=True)
class Picture:
    """One training picture and its caption's embedding, (T, E) in a file."""

    path: Path
    embedding: Path


class PictureFolder:
    """The training pictures of a folder, in the order of their names.

    Pictures are resized, bilinear, so that they cover `size`, and cut to it about their middle.

    Args:
        pictures: from `pictures_of`.
        size: (H, W) of every example.
    """

    def __init__(self, pictures: Sequence[Picture], size: tuple[int, int]) -> None:
        self.pictures = list(pictures)
        self.size = size

    def __len__(self) -> int:
        return len(self.pictures)

    def image(self, i: int) -> Tensor:
        """(3, H, W) fp32 in [-1, 1].

        Raises:
            OSError: the picture cannot be decoded; names it.
        """
        path = self.pictures[i].path
        try:
            with Image.open(path) as opened:
                picture = to_rgb(opened)
        except (OSError, ValueError, SyntaxError) as e:
            raise OSError(f"l2p train: {path} cannot be read: {e}") from e
        pixels = np.asarray(_covering(picture, self.size))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() * 2 / 255 - 1

    def caption(self, i: int) -> Tensor:
        """(T, E) as stored."""
        return load_caption(self.pictures[i].embedding).embedding[0]


def _covering(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    factor = max(height / picture.height, width / picture.width)
    cover = (max(width, round(picture.width * factor)), max(height, round(picture.height * factor)))
    if cover != picture.size:
        picture = picture.resize(cover, Image.Resampling.BILINEAR)
    left, top = (cover[0] - width) // 2, (cover[1] - height) // 2
    return picture.crop((left, top, left + width, top + height))


def pictures_of(
    folder: Path, config: L2PConfig, *, encoder=None, encoded: Path | None = None
) -> list[Picture]:
    """Find and check every picture of a folder and its caption.

    Captions that are texts are encoded here, once: their embeddings go to files in `encoded`,
    which a later run with the same texts takes instead.

    Args:
        folder: its own pictures, not those of folders inside it.
        config: of the network, which says how wide and how long a caption may be.
        encoder: gives the text encoder, an object with `encode(list of str) -> list of (T, E)`;
            called if a text needs it. None: every picture has an embedding.
        encoded: folder for embeddings of texts; made if there is none.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no pictures, two of one name, missing captions, pictures that cannot be read,
            embeddings that do not fit; each names the first files concerned.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"l2p train: no such folder of pictures: {folder}")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"l2p train: {folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
    stems = Counter(p.stem for p in paths)
    twins = [p for p in paths if stems[p.stem] > 1]
    _refuse("share one caption", twins, "rename one of each pair")
    bare, texts, found = [], {}, {}
    for path in paths:
        ready, text = path.with_suffix(".safetensors"), path.with_suffix(".txt")
        if ready.is_file():
            found[path] = ready
        elif text.is_file():
            texts[path] = text.read_text(encoding="utf-8").strip()
        else:
            bare.append(path)
    _refuse("have no caption", bare, "each needs NAME.txt or NAME.safetensors beside it")
    if texts and (encoder is None or encoded is None):
        _refuse(
            "have a text and no embedding",
            list(texts),
            "pass --text-encoder, or bake embeddings: NAME.safetensors",
        )
    _refuse("cannot be read", [p for p in paths if not _readable(p)], "remove or replace them")
    found.update(_encoded(texts, encoder, encoded))
    for embedding in found.values():
        _check_embedding(embedding, config)
    return [Picture(path, found[path]) for path in paths]


def _refuse(what: str, paths: list[Path], way_out: str) -> None:
    if paths:
        named = ", ".join(str(p) for p in paths[:_NAMED]) + (", ..." if paths[_NAMED:] else "")
        raise ValueError(f"l2p train: {len(paths)} pictures {what}: {named}; {way_out}")


def _readable(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            picture.verify()
    except (OSError, ValueError, SyntaxError):
        return False
    return True


def _encoded(texts: dict[Path, str], encoder, folder: Path | None) -> Iterator[tuple[Path, Path]]:
    """(picture, file of its embedding), made where there is none of this very text."""
    if not texts:
        return
    folder.mkdir(parents=True, exist_ok=True)
    source = None
    for path, text in texts.items():
        target = folder / f"{path.stem}.safetensors"
        known = None
        with contextlib.suppress(OSError, ValueError):
            known = load_caption(target).caption_sha256
        if known != (text_sha256(text),):
            source = source or encoder()
            name = getattr(source, "encoder_id", None) or type(source).__name__
            family = getattr(source, "family", None)
            y = source.encode([text])[0][None]
            save_captions(target, y, text, encoder_id=name, family=family)
        yield path, target


def _check_embedding(path: Path, config: L2PConfig) -> None:
    held = load_caption(path, expected_embed_dim=config.cap_feat_dim)
    held.check_family(f"l2p train: {path}", Qwen3PromptEncoder.family)
    shape = tuple(held.embedding.shape)
    if shape[0] != 1:
        raise ValueError(
            f"l2p train: {path} must hold the embedding of one caption, (1, T, "
            f"{config.cap_feat_dim}), got {shape}"
        )
    if shape[1] > config.max_caption_tokens:
        raise ValueError(
            f"l2p train: {path} must hold at most {config.max_caption_tokens} tokens, the network "
            f"has no rotary positions for more; got {shape[1]}"
        )
