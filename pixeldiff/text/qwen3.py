"""Prompt embeddings from a Qwen3 decoder stack, token for token as Z-Image and L2P take them."""

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

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QWEN3 = "Qwen/Qwen3-4B"
EMBED_DIM = 2560
MAX_LENGTH = 512
# Qwen3's chat template for one user turn, thinking enabled, and the start of the answer. Written
# out, because later Qwen3 models come with templates that add to it.
BEFORE, AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
_NAME = "Qwen3PromptEncoder"


class Qwen3PromptEncoder(LanguageModel):
    """Prompts to embeddings (T, embed_dim), one tensor each, with a Qwen3 model.

    The prompt stands as the one user turn of a chat in which the answer is about to begin. It is
    cut to `max_length` tokens at its end, the start of the answer included. Of the decoder's
    hidden states those that enter the last layer are taken, without the final norm. Prompts run
    one by one and without padding, which changes nothing under causal attention.

    Args:
        model: a transformers Qwen3, with or without its language-model head; put in eval mode. It
            stays on its device and in its dtype.
        tokenizer: the model's tokenizer.
        max_length: tokens of a prompt at most, template included.
        embed_dim: hidden size the model must have.
        encoder_id: name recorded in caption files; default: the model's name or path.

    Raises:
        ValueError: an argument that cannot give the embeddings described; the message names it.

    Source: L2P, arXiv 2605.12013, released text conditioning, which is Z-Image's.
    """

    family = "Qwen3"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = MAX_LENGTH,
        embed_dim: int = EMBED_DIM,
        encoder_id: str | None = None,
    ) -> None:
        _check_max_length(max_length)
        check_hidden_size(_NAME, model.config, embed_dim, QWEN3)
        super().__init__(model, tokenizer, encoder_id=encoder_id)
        self.max_length = max_length
        self.embed_dim = embed_dim
        for mark in ("<|im_start|>", "<|im_end|>"):
            if (count := len(self._ids([mark])[0])) != 1:
                raise ValueError(
                    f"{_NAME}: tokenizer must have {mark} as one token, got {count}; use the "
                    f"tokenizer of {QWEN3}"
                )

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str] = QWEN3,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        max_length: int = MAX_LENGTH,
        embed_dim: int = EMBED_DIM,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> Qwen3PromptEncoder:
        """Load model and tokenizer with transformers.

        Args:
            path_or_id: a local folder (nothing is looked up on a network) or a hub id. A folder
                with `text_encoder` and `tokenizer` in it, as Z-Image is published, will do.
            device, dtype: where and how the weights are held; 8 GB in bf16, which upstream runs.
            max_length, embed_dim: see the class.
            revision, token, local_files_only: handed to transformers for a hub id.

        Raises:
            ImportError: transformers is not installed, or is too old.
            OSError: the folder or the hub id cannot be read; says what to do.
            ValueError: not a Qwen3, a wrong hidden size, or weights missing from the files.
        """
        _check_max_length(max_length)
        source = os.fspath(path_or_id)
        parts = ("text_encoder", "tokenizer")
        published = os.path.isdir(os.path.join(source, parts[0]))
        model, tokenizer = load(
            _NAME,
            source,
            "Qwen3Model",
            family="Qwen3",
            since="4.51",
            way_out="give a local folder with config, tokenizer and weights of Qwen3-4B, or a hub "
            f"id such as {QWEN3}",
            check=lambda config: _check_qwen3(config, embed_dim, source),
            dtype=dtype,
            device=device,
            hub={
                "revision": revision or "main",
                "token": token,
                "local_files_only": local_files_only,
            },
            folders=parts if published else ("", ""),
        )
        return cls(
            model,
            tokenizer,
            max_length=max_length,
            embed_dim=embed_dim,
            encoder_id=model_name(source, QWEN3),
        )

    def encode(self, captions: str | Sequence[str]) -> list[Tensor]:
        """Embed one prompt or several; "" is the empty negative prompt.

        Prompts are taken as they are. One that does not fit is cut at its end with a warning that
        counts the lost tokens.

        Returns:
            B tensors (T_b, embed_dim), dtype and device of the model, no gradient. Inference
            tensors only when called under `torch.inference_mode`.

        Raises:
            TypeError: captions is not a str or a sequence of str.
            ValueError: no prompt; a tokenizer that is not the model's; embeddings not finite.
            RuntimeError: the encoder was released.
        """
        model = self._loaded()
        captions = as_captions(_NAME, captions, "empty negative prompt")
        rows = self._ids([BEFORE + caption + AFTER for caption in captions])
        self._check_vocabulary(max(max(row) for row in rows))
        embeddings = []
        for i, row in enumerate(rows):
            if (lost := len(row) - self.max_length) > 0:
                warnings.warn(
                    f"{_NAME}: caption {i} is {lost} tokens too long for max_length = "
                    f"{self.max_length}; its last {lost} tokens are cut off",
                    stacklevel=2,
                )
            embeddings.append(self._embed(model, row[: self.max_length]))
        return embeddings

    def _embed(self, model: PreTrainedModel, ids: list[int]) -> Tensor:
        device = self.device
        # Older transformers make positions on the default device, which may be another one.
        with torch.no_grad(), device:
            states = model(
                input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True
            ).hidden_states
        embedding = states[-2][0]
        self._check_finite(embedding, "Qwen3")
        return embedding


def _check_max_length(max_length: int) -> None:
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise ValueError(f"{_NAME}: max_length must be an integer >= 1, got {max_length!r}")


def _check_qwen3(config: Any, embed_dim: int, source: str) -> None:
    if config.model_type != "qwen3":
        raise ValueError(
            f"{_NAME}: {source!r} must be a Qwen3 (model_type qwen3), got {config.model_type}; the "
            f"releases use {QWEN3}"
        )
    check_hidden_size(_NAME, config, embed_dim, QWEN3)
