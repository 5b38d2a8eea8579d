"""Where a decoder's caption embeddings come from: tensors, files, or a text encoder on demand."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...text import CaptionFile, load_caption
from ...text.tiny import TinyTextEmbedder

GEMMA = "google/gemma-2-2b-it"


class CaptionSource:
    """Caption embeddings of width `embed_dim`.

    Args:
        embed_dim: E the network takes.
        null_caption: (1, T, E) embedding of the empty caption, or a caption file.
        text_encoder: None (embeddings only), a folder or hub id of a Gemma-2, or an object with
            `encode(list of str) -> (B, T, E)` and optionally `release()`.
        device: where a Gemma-2 is loaded.

    Raises:
        ValueError: the null caption has another width, or holds more than one caption.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        null_caption: str | os.PathLike[str] | Tensor | None = None,
        text_encoder: Any = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.embed_dim = embed_dim
        self.device = device
        self._source = text_encoder
        self._encoder = text_encoder if hasattr(text_encoder, "encode") else None
        self._null = None
        if null_caption is not None:
            if not isinstance(null_caption, Tensor):
                file = load_caption(null_caption, expected_embed_dim=embed_dim)
                null_caption = file.embedding
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
            return self._checked(name, caption.embedding)
        return self.encode(caption)

    def encode(self, text: str | Sequence[str]) -> Tensor:
        """(B, T, E) of B texts; loads the encoder on first use."""
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(t, str) for t in texts):
            raise TypeError(f"caption must be text, embeddings or None, got {text!r}")
        if self._encoder is None:
            self._encoder = self._load()
        return self._checked("caption", self._encoder.encode(texts))

    def null(self, *, load: bool) -> Tensor:
        """(1, T, E) of the empty caption; `load` allows to load a text encoder for it."""
        if self._null is None:
            if self._encoder is None and not load:
                raise ValueError(
                    "caption=None needs the embedding of the empty caption, which takes the text "
                    "encoder once: run `pixeldiff bake-caption -o null.safetensors` and pass "
                    "null_caption='null.safetensors', call decoder.null_caption() first, or pass "
                    "caption="
                )
            self._null = self.encode("")
        return self._null

    def release(self) -> None:
        """Drop the text encoder and free its memory. One given as an object is only let go."""
        encoder, self._encoder = self._encoder, None
        if isinstance(self._source, str | os.PathLike) and hasattr(encoder, "release"):
            encoder.release()
        elif encoder is not None:
            self._encoder = encoder if isinstance(encoder, TinyTextEmbedder) else None
        del encoder
        gc.collect()

    def _load(self) -> Any:
        if self._source is None:
            raise ValueError(
                "a caption text was given, but this decoder has no text encoder; pass "
                "text_encoder=, or the caption's embeddings"
            )
        if not isinstance(self._source, str | os.PathLike):
            raise ValueError("the text encoder was released; pass embeddings, or a new decoder")
        from ...text import GemmaCaptionEncoder

        return GemmaCaptionEncoder.from_pretrained(
            self._source, device=self.device, embed_dim=self.embed_dim
        )

    def _checked(self, name: str, y: Tensor) -> Tensor:
        if y.dim() != 3 or y.shape[-1] != self.embed_dim or 0 in y.shape:
            raise ValueError(
                f"{name} must be embeddings (B, T, {self.embed_dim}), got {tuple(y.shape)}; they "
                f"come from the text encoder the network was trained with"
            )
        if not y.is_floating_point() or not torch.isfinite(y).all():
            raise ValueError(f"{name} must hold finite floating-point embeddings, got {y.dtype}")
        return y.detach()
