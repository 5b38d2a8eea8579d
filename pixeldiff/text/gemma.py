"""Caption embeddings from a Gemma-2 decoder stack, token for token as PiD was trained on them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pixeldiff.text.language_model import (
    LanguageModel,
    as_captions,
    check_hidden_size,
    load,
    model_name,
)
from pixeldiff.text.prefix import instruction_prefix, text_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GEMMA = "google/gemma-2-2b-it"
EMBED_DIM = 2304
_NAME = "GemmaCaptionEncoder"


class GemmaCaptionEncoder(LanguageModel):
    """Captions to (B, max_length, embed_dim) embeddings with a Gemma-2 model.

    The text is `prefix + caption`, joined directly, behind one BOS token. With c the token count of
    the prefix alone (BOS included), the sequence is padded on the right, or cut, to
    c + max_length - 2 tokens; the decoder runs with the padding masked; of its last hidden state
    (after the final norm) position 0 and the last `max_length - 1` positions are kept. The padding
    mask is not returned: PiD attends to all `max_length` positions, padding included.

    BOS and padding are placed here, so the tokenizer's own padding side, BOS and truncation
    settings do not matter and are left as they are.

    Args:
        model: a transformers Gemma-2, with or without its language-model head; put in eval mode.
            It stays on its device and in its dtype. Use bf16 or fp32: Gemma-2 overflows in fp16.
        tokenizer: the model's tokenizer, with a BOS and a padding token.
        prefix: text before every caption, see `pixeldiff.text.instruction_prefix`.
        max_length: embeddings per caption, at least 2.
        embed_dim: hidden size the model must have.
        encoder_id: name recorded in caption files; default: the model's name or path.

    Raises:
        ValueError: an argument that cannot give the embeddings described; the message names it.

    Source: PiD, arXiv 2605.23902, released text conditioning.
    """

    family = "Gemma-2"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prefix: str,
        max_length: int = 300,
        embed_dim: int = EMBED_DIM,
        encoder_id: str | None = None,
    ) -> None:
        _check_max_length(max_length)
        if not isinstance(prefix, str):
            raise TypeError(
                f"GemmaCaptionEncoder: prefix must be a str, got {type(prefix).__name__}; "
                "pixeldiff.text.instruction_prefix() returns the released one"
            )
        if not prefix:
            raise ValueError(
                "GemmaCaptionEncoder: prefix must not be empty; "
                "pixeldiff.text.instruction_prefix() returns the released one"
            )
        check_hidden_size(_NAME, model.config, embed_dim, GEMMA)
        for token in ("bos_token_id", "pad_token_id"):
            if getattr(tokenizer, token, None) is None:
                raise ValueError(
                    f"GemmaCaptionEncoder: tokenizer must have a {token}, got None; use the "
                    "tokenizer that comes with the model"
                )
        super().__init__(model, tokenizer, encoder_id=encoder_id)
        self.prefix = prefix
        self.max_length = max_length
        self.embed_dim = embed_dim
        self._prefix_tokens = len(self._tokenize([prefix])[0])

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str] = GEMMA,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        prefix: str | None = None,
        max_length: int = 300,
        embed_dim: int = EMBED_DIM,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> GemmaCaptionEncoder:
        """Load model and tokenizer with transformers.

        Args:
            path_or_id: a local folder (nothing is looked up on a network) or a hub id.
            device, dtype: where and how the weights are held; 5.2 GB in bf16. Upstream runs bf16.
            prefix: text before every caption; None reads `instruction_prefix()`.
            max_length, embed_dim: see the class.
            revision, token, local_files_only: handed to transformers for a hub id.

        Raises:
            ImportError: transformers is not installed.
            OSError: the folder or the hub id cannot be read; says what to do.
            ValueError: not a Gemma-2, a wrong hidden size, or weights missing from the files.
        """
        _check_max_length(max_length)
        if prefix is None:
            prefix = instruction_prefix()
        source = os.fspath(path_or_id)
        model, tokenizer = load(
            _NAME,
            source,
            "Gemma2Model",
            family="Gemma-2",
            since="4.45",
            way_out="give a local folder with config, tokenizer and weights of gemma-2-2b-it, or a "
            "hub id. The hub's Gemma is gated: accept its terms on the model page and log in "
            "(`hf auth login` or token=...)",
            check=lambda config: _check_gemma2(config, embed_dim, source),
            dtype=dtype,
            device=device,
            hub={
                "revision": revision or "main",
                "token": token,
                "local_files_only": local_files_only,
            },
            # sdpa has no logit soft-capping, which Gemma-2 was trained with.
            attn_implementation="eager",
        )
        return cls(
            model,
            tokenizer,
            prefix=prefix,
            max_length=max_length,
            embed_dim=embed_dim,
            encoder_id=model_name(source, GEMMA),
        )

    @property
    def prefix_sha256(self) -> str:
        """SHA-256 of the prefix, recorded in caption files."""
        return text_sha256(self.prefix)

    def encode(self, captions: str | Sequence[str]) -> Tensor:
        """Embed one caption or a batch; "" is the null caption of caption dropout.

        Captions are taken as they are: no cleaning, no lower-casing. One that does not fit is cut
        at its end with a warning that counts the lost tokens.

        Returns:
            (B, max_length, embed_dim), dtype and device of the model, no gradient. An inference
            tensor only when called under `torch.inference_mode`.

        Raises:
            TypeError: captions is not a str or a sequence of str.
            ValueError: no caption; a tokenizer that is not the model's; embeddings not finite.
            RuntimeError: the encoder was released.
        """
        model = self._loaded()
        captions = as_captions(_NAME, captions, "null caption")
        length = self._prefix_tokens + self.max_length - 2
        ids, mask = self._batch(captions, length)
        self._check_vocabulary(int(ids.max()))
        device = self.device
        # Older transformers make positions on the default device, which may be another one.
        with torch.no_grad(), device:
            hidden = model(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
            ).last_hidden_state
        embeddings = torch.cat([hidden[:, :1], hidden[:, length - self.max_length + 1 :]], dim=1)
        self._check_finite(embeddings, "Gemma-2")
        return embeddings

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return [[self._tokenizer.bos_token_id, *row] for row in self._ids(texts)]

    def _batch(self, captions: list[str], length: int) -> tuple[Tensor, Tensor]:
        rows = self._tokenize([self.prefix + caption for caption in captions])
        ids = torch.full((len(rows), length), self._tokenizer.pad_token_id, device="cpu")
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            if (lost := len(row) - length) > 0:
                warnings.warn(
                    f"GemmaCaptionEncoder: caption {i} is {lost} tokens too long for max_length = "
                    f"{self.max_length}; its last {lost} tokens are cut off",
                    stacklevel=3,
                )
                row = row[:length]
            ids[i, : len(row)] = torch.tensor(row, device="cpu")
            mask[i, : len(row)] = 1
        return ids, mask


def _check_max_length(max_length: int) -> None:
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise ValueError(
            f"GemmaCaptionEncoder: max_length must be an integer >= 2, got {max_length!r}"
        )


def _check_gemma2(config: Any, embed_dim: int, source: str) -> None:
    if config.model_type != "gemma2":
        raise ValueError(
            f"GemmaCaptionEncoder: {source!r} must be a Gemma-2 (model_type gemma2), got "
            f"{config.model_type}; the releases use {GEMMA}"
        )
    check_hidden_size(_NAME, config, embed_dim, GEMMA)
