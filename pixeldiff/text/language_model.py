"""What the text encoders share: a transformers decoder stack, loaded, held and released."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LanguageModel:
    """A decoder stack and its tokenizer, until they are released.

    Args:
        model: a transformers model, with or without its language-model head; put in eval mode. It
            stays on its device and in its dtype.
        tokenizer: the model's tokenizer.
        encoder_id: name recorded in caption files; default: the model's name or path.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        encoder_id: str | None = None,
    ) -> None:
        # `base_model` is the decoder stack itself, or the one inside a language model.
        self._model: PreTrainedModel | None = model.base_model.eval()
        self._tokenizer: PreTrainedTokenizerBase | None = tokenizer
        self.encoder_id = encoder_id or model_name(model.config.name_or_path, type(model).__name__)

    @property
    def device(self) -> torch.device:
        """Device the encoder runs on."""
        embedding = self._loaded().get_input_embeddings()
        if embedding.weight.is_meta and hasattr(embedding, "_hf_hook"):
            # accelerate keeps offloaded weights on the meta device between calls.
            return torch.device(embedding._hf_hook.execution_device)
        return embedding.weight.device

    def release(self) -> None:
        """Drop model and tokenizer and hand cached device memory back; calling twice is fine.

        The weights are freed unless the caller holds the model too. `encode` raises afterwards.
        """
        if self._model is None:
            return
        device = self.device
        self._model = self._tokenizer = None
        gc.collect()  # accelerate's hooks hold a model in a reference cycle
        backend = getattr(torch, device.type, None)
        if device.type != "cpu" and hasattr(backend, "empty_cache"):
            backend.empty_cache()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _loaded(self) -> PreTrainedModel:
        if self._model is None:
            raise RuntimeError(
                f"{type(self).__name__}: this encoder was released; make a new one, or keep the "
                "embeddings (pixeldiff.text.save_captions)"
            )
        return self._model

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts as they are: nothing added, padded or cut."""
        return self._tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]

    def _check_vocabulary(self, largest: int) -> None:
        vocabulary = self._loaded().get_input_embeddings().weight.shape[0]
        if largest >= vocabulary:
            raise ValueError(
                f"{type(self).__name__}: tokenizer gave token id {largest}, but the model has "
                f"{vocabulary} tokens; use the tokenizer that comes with the model"
            )

    def _check_finite(self, embeddings: Tensor, overflows: str) -> None:
        if not torch.isfinite(embeddings).all():
            raise ValueError(
                f"{type(self).__name__}: the embeddings are not finite in {embeddings.dtype}; use "
                f"torch.bfloat16 or torch.float32 ({overflows} overflows in float16), or check the "
                "weights"
            )


def load(
    owner: str,
    source: str,
    architecture: str,
    *,
    family: str,
    since: str,
    way_out: str,
    check: Callable[[Any], None],
    dtype: torch.dtype,
    device: torch.device | str,
    hub: dict[str, Any],
    folders: tuple[str, str] = ("", ""),
    **settings: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer with transformers.

    Args:
        owner: the encoder, for errors.
        source: a local folder (nothing is looked up on a network) or a hub id.
        architecture: name of transformers' class of the decoder stack.
        family: what it is called in errors.
        since: the first version of transformers that has it.
        way_out: what to do where it cannot be loaded.
        check: raises where the configuration read is not that of the model wanted.
        dtype, device: of the weights.
        hub: revision, token and local_files_only.
        folders: of the model and of the tokenizer inside `source`.
        settings: further arguments of the model's `from_pretrained`.

    Raises:
        ImportError, OSError, ValueError: see the encoders.
    """
    try:
        import transformers
        from transformers import AutoConfig, AutoTokenizer
    except ImportError as error:
        raise _no_transformers(owner, since) from error
    stack = getattr(transformers, architecture, None)
    if stack is None:
        raise _no_transformers(owner, since)
    if os.path.isdir(source):
        hub = {**hub, "local_files_only": True}
    # The keyword was renamed in 4.56; either name is silently ignored by the other side.
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    dtype_keyword = "dtype" if version >= (4, 56) else "torch_dtype"
    where, tokens = ({"subfolder": folder} if folder else {} for folder in folders)
    try:
        config = AutoConfig.from_pretrained(source, **where, **hub)
    except (OSError, ValueError) as error:
        raise _cannot_load(owner, source, way_out, error) from error
    check(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **tokens, **hub)
        model, info = stack.from_pretrained(
            source,
            output_loading_info=True,
            **{dtype_keyword: dtype},
            **settings,
            **where,
            **hub,
        )
    except (OSError, ValueError) as error:
        raise _cannot_load(owner, source, way_out, error) from error
    # transformers only warns about these and leaves them randomly initialised.
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{owner}: {source!r} must hold every weight of a {family}, but {len(missing)} are "
            f"missing, first {', '.join(missing[:3])}"
        )
    return model.to(device), tokenizer


def as_captions(owner: str, captions: str | Sequence[str], null: str) -> list[str]:
    """A list of texts. Raises TypeError, and ValueError for none; `null` names the empty text."""
    if isinstance(captions, str):
        return [captions]
    if not isinstance(captions, Sequence) or not all(isinstance(c, str) for c in captions):
        raise TypeError(
            f"{owner}: captions must be a str or a sequence of str, got {_type_names(captions)}"
        )
    if not captions:
        raise ValueError(f'{owner}: captions is empty; the {null} is ""')
    return list(captions)


def check_hidden_size(owner: str, config: Any, embed_dim: int, released: str) -> None:
    """Raises ValueError unless the model gives embeddings of width embed_dim."""
    if (hidden := getattr(config, "hidden_size", None)) != embed_dim:
        raise ValueError(
            f"{owner}: the model's hidden size must be embed_dim = {embed_dim}, got {hidden}; the "
            f"releases use {released}"
        )


def model_name(name_or_path: str, default: str) -> str:
    """A hub id as it is; of a local folder the last part, so that no private path is recorded."""
    if os.path.isdir(name_or_path):
        return os.path.basename(os.path.realpath(name_or_path))
    return name_or_path or default


def _type_names(value: object) -> str:
    name = type(value).__name__
    if isinstance(value, Sequence):
        name += f" of {', '.join(sorted({type(v).__name__ for v in value}))}"
    return name


def _no_transformers(owner: str, version: str) -> ImportError:
    return ImportError(
        f"{owner}: transformers >= {version} is needed to encode text; install the extra "
        "pixeldiff[text], or give embeddings from a caption file"
    )


def _cannot_load(owner: str, source: str, way_out: str, error: Exception) -> OSError:
    return OSError(f"{owner}: cannot load {source!r}; {way_out}. Cause: {error}")
