"""Where a decoder's caption embeddings come from: tensors, files, or a text encoder on demand."""

from __future__ import annotations

import gc
import os
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...finite import TOKENS, check_finite
from ...text import CaptionFile, load_caption
from ...text.tiny import TinyTextEmbedder

GEMMA = "google/gemma-2-2b-it"
FAMILY = "Gemma-2"


class CaptionSource:
    """Caption embeddings of width `embed_dim`. May be used from several threads.

    Args:
        embed_dim: E the network takes.
        max_length: T of a text encoder loaded here; the network's `txt_max_length`.
        null_caption: (1, T, E) embedding of the empty caption, or a caption file.
        text_encoder: None (embeddings only), a folder or hub id of a Gemma-2, or an object with
            `encode(list of B str) -> (B, T, E)`.
        device: where a Gemma-2 is loaded.

    Raises:
        ValueError: the null caption has another width, or holds more than one caption.
        TypeError: text_encoder is none of these.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        max_length: int = 300,
        null_caption: str | os.PathLike[str] | Tensor | CaptionFile | None = None,
        text_encoder: Any = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.embed_dim = embed_dim
        self.max_length = max_length
        self.device = device
        self._lock = threading.RLock()
        # A str has a method `encode` of its own.
        self._location = text_encoder if isinstance(text_encoder, str | os.PathLike) else None
        self._encoder = text_encoder if self._location is None else None
        self._released = False
        if self._encoder is not None and not hasattr(self._encoder, "encode"):
            raise TypeError(
                "text_encoder must be a folder or hub id of a Gemma-2, or an object with "
                f"encode(list of str), got {type(text_encoder).__name__}"
            )
        self._null = None
        if null_caption is not None:
            if isinstance(null_caption, str | os.PathLike):
                null_caption = load_caption(null_caption, expected_embed_dim=embed_dim)
            if isinstance(null_caption, CaptionFile):
                null_caption.check_family("null_caption", FAMILY)
                null_caption = null_caption.embedding
            self._null = self._checked("null_caption", null_caption)
            if self._null.shape[0] != 1:
                raise ValueError(f"null_caption must hold one caption, got {self._null.shape[0]}")

    @classmethod
    def for_checkpoint(cls, loaded, *, null_caption, text_encoder, device) -> CaptionSource:
        """The source a checkpoint calls for: its own tiny embedder for "demo", else a Gemma-2."""
        config = loaded.config
        if text_encoder is None:
            if loaded.backbone == "demo":
                text_encoder = TinyTextEmbedder(config.txt_embed_dim, config.txt_max_length)
            elif config.txt_embed_dim == 2304:
                text_encoder = GEMMA
        return cls(
            config.txt_embed_dim,
            max_length=config.txt_max_length,
            null_caption=null_caption,
            text_encoder=text_encoder,
            device=device,
        )

    def embeddings(self, name: str, caption: Any) -> Tensor:
        """(B, T, E) of whatever a caller gave as caption; None is the null caption."""
        if caption is None:
            return self.null(load=False)
        if isinstance(caption, Tensor):
            return self._checked(name, caption)
        if isinstance(caption, CaptionFile):
            caption.check_family(name, FAMILY)
            return self._checked(name, caption.embedding)
        return self.encode(caption, name=name)

    def keeps_encoder(self, *texts: Any) -> bool:
        """Whether a large encoder is loaded, or will be for these (embeddings need none)."""
        wanted = any(isinstance(t, str | list | tuple) for t in texts)
        return self._location is not None and (wanted or self._encoder is not None)

    def encode(self, text: str | Sequence[str], *, name: str = "caption") -> Tensor:
        """(B, T, E) of B texts; loads the encoder on first use."""
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
            raise TypeError(
                f"{name} must be a text, a list of texts, embeddings or None, got "
                f"{type(text).__name__}"
            )
        if not texts:
            raise ValueError(f'{name} is an empty list; the null caption is None or ""')
        with self._lock:
            if self._encoder is None:
                self._encoder = self._load()
            y = self._checked(f"{name}, encoded,", self._encoder.encode(list(texts)))
        if y.shape[0] != len(texts):
            raise ValueError(
                f"the text encoder gave {y.shape[0]} embeddings of {len(texts)} captions"
            )
        return y

    def null(self, *, load: bool) -> Tensor:
        """(1, T, E) of the empty caption; `load` allows to load a text encoder for it."""
        with self._lock:
            if self._null is None:
                if self._encoder is None and not load:
                    raise ValueError(
                        "caption=None needs the embedding of the empty caption, which takes the "
                        "text encoder once: run `pixeldiff bake-caption -o null.safetensors` and "
                        "pass null_caption='null.safetensors' (decode --caption-file), call "
                        "decoder.null_caption() first, or pass caption="
                    )
                self._null = self.encode("")
            return self._null

    def release(self) -> None:
        """Drop the text encoder and free its memory. Calling twice is fine.

        One loaded here is loaded again when a text is given again; one given as an object is only
        let go, and texts are refused from then on. The demo's embedder needs no memory and stays.
        """
        with self._lock:
            encoder = self._encoder
            if encoder is None or isinstance(encoder, TinyTextEmbedder):
                return
            self._encoder = None
            self._released = True
            if self._location is not None:
                encoder.release()
        del encoder
        gc.collect()

    def _load(self) -> Any:
        if self._location is None:
            if self._released:
                raise ValueError("the text encoder was released; pass embeddings, or a new decoder")
            raise ValueError(
                "a caption text was given, but this decoder has no text encoder; pass "
                "text_encoder=, or the caption's embeddings"
            )
        from ...text import GemmaCaptionEncoder

        return GemmaCaptionEncoder.from_pretrained(
            self._location,
            device=self.device,
            max_length=self.max_length,
            embed_dim=self.embed_dim,
        )

    def _checked(self, name: str, y: Any) -> Tensor:
        if not isinstance(y, Tensor):
            raise TypeError(f"{name} must be a tensor of embeddings, got {type(y).__name__}")
        if y.dim() != 3 or y.shape[-1] != self.embed_dim or 0 in y.shape:
            raise ValueError(
                f"{name} must be embeddings (B, T, {self.embed_dim}), got {tuple(y.shape)}; they "
                f"come from the text encoder the network was trained with"
            )
        if not y.is_floating_point():
            raise ValueError(f"{name} must be floating-point embeddings, got {y.dtype}")
        check_finite(name, y, axes=TOKENS, hint="Gemma-2 overflows in float16")
        if not y.any():
            # Easily taken for the null caption, and tens of dB away from it.
            warnings.warn(
                f"{name} is all zeros, which no text encoder gives; the null caption is the "
                f'embedding of "" (caption=None)',
                stacklevel=3,
            )
        return y.detach()
