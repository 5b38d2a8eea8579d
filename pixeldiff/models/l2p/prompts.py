"""Where a pipeline's prompt embeddings come from: tensors, files, or a text encoder on demand."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...finite import TOKENS, check_finite
from ...text import CaptionFile, Qwen3PromptEncoder
from ...text.tiny import TinyPromptEncoder

DEMO = "demo"  # names the text encoder of the packaged model, which is no model itself
Embeddings = Tensor | Sequence[Tensor] | CaptionFile


class PromptSource:
    """Prompt embeddings (T, E), one tensor a prompt. May be used from several threads.

    Args:
        embed_dim: E the network takes.
        text_encoder: None (embeddings only), "demo" (that of the packaged model), a folder or hub
            id of a Qwen3, or an object with `encode(list of B str) -> B tensors (T_b, E)`.
        device: where a Qwen3 is loaded.

    Raises:
        TypeError: text_encoder is none of these.
    """

    def __init__(
        self, embed_dim: int, *, text_encoder: Any = None, device: torch.device | str = "cpu"
    ) -> None:
        self.embed_dim = embed_dim
        self.device = device
        self._lock = threading.RLock()
        if text_encoder == DEMO:
            text_encoder = TinyPromptEncoder(embed_dim)
        # A str has a method `encode` of its own.
        self._location = text_encoder if isinstance(text_encoder, str | os.PathLike) else None
        self._encoder = text_encoder if self._location is None else None
        if self._encoder is not None and not hasattr(self._encoder, "encode"):
            raise TypeError(
                "text_encoder must be a folder or hub id of a Qwen3, or an object with "
                f"encode(list of str), got {type(text_encoder).__name__}"
            )

    def keeps_encoder(self, *texts: Any) -> bool:
        """Whether a large encoder is loaded, or will be for these (embeddings need none)."""
        wanted = any(isinstance(t, str | list | tuple) for t in texts)
        return self._location is not None and (wanted or self._encoder is not None)

    def encode(self, name: str, text: str | Sequence[str]) -> list[Tensor]:
        """B embeddings (T_b, E) of B texts; loads the encoder on first use."""
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
            raise TypeError(f"{name} must be a text or a list of texts, got {type(text).__name__}")
        if not texts:
            raise ValueError(f'{name} is an empty list; the empty prompt is ""')
        with self._lock:
            if self._encoder is None:
                self._encoder = self._load()
            y = self.checked(f"{name}, encoded,", self._encoder.encode(list(texts)))
        if len(y) != len(texts):
            raise ValueError(f"the text encoder gave {len(y)} embeddings of {len(texts)} prompts")
        return y

    def checked(self, name: str, given: Embeddings) -> list[Tensor]:
        """Embeddings a caller gave, one tensor (T, E) a prompt."""
        encoder = None
        if isinstance(given, CaptionFile):
            given.check_family(name, Qwen3PromptEncoder.family)
            given, encoder = given.embedding, given.encoder_id
        if isinstance(given, Tensor):
            given = [given] if given.dim() == 2 else list(given) if given.dim() == 3 else given
        if not isinstance(given, list | tuple) or not all(isinstance(y, Tensor) for y in given):
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(
                f"{name} must be embeddings (T, {self.embed_dim}), a list of them, one a prompt, "
                f"or (B, T, {self.embed_dim}), got {got}"
            )
        if not given:
            raise ValueError(f"{name} must hold at least one prompt, got none")
        for i, y in enumerate(given):
            if y.dim() != 2 or y.shape[1] != self.embed_dim or y.shape[0] == 0:
                raise ValueError(
                    f"{name} must be embeddings (T, {self.embed_dim}), got {tuple(y.shape)} for "
                    f"prompt {i}{f', made by {encoder}' if encoder else ''}; they come from the "
                    f"text encoder the network was trained with"
                )
            if not y.is_floating_point():
                raise ValueError(f"{name} must be floating-point embeddings, got {y.dtype}")
            check_finite(f"{name} of prompt {i}", y, axes=TOKENS, hint="Qwen3 overflows in float16")
        return [y.detach() for y in given]

    def release(self) -> None:
        """Drop the text encoder and free its memory. Calling twice is fine.

        One loaded here is loaded again when a text is given again; one given as an object is only
        let go, and texts are refused from then on.
        """
        with self._lock:
            encoder, self._encoder = self._encoder, None
            if encoder is not None and self._location is not None:
                encoder.release()
        del encoder
        gc.collect()

    def _load(self) -> Any:
        if self._location is None:
            raise ValueError(
                "a prompt text was given, but this pipeline has no text encoder (or it was "
                "released); pass text_encoder= to it, or the prompt's embeddings"
            )
        return Qwen3PromptEncoder.from_pretrained(
            self._location, device=self.device, embed_dim=self.embed_dim
        )
