"""Recompute the L2P golden of the text encoder, with transformers' own Qwen3."""

from __future__ import annotations

from ..text.qwen3 import AFTER, BEFORE, Qwen3PromptEncoder
from .golden import Golden
from .l2p_inputs import Results, load_weights


class _TokensOf:
    """Stands for a tokenizer: prompt "0" has the first row of ids. Its marks are one token each."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = {f"{BEFORE}{i}{AFTER}": row for i, row in enumerate(rows)}

    def __call__(self, texts: list[str], **settings: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.rows.get(text, [0]) for text in texts]}


def text_encoder(g: Golden) -> Results:
    """Each prompt's embedding, from the ids that its mask keeps.

    Raises:
        ImportError: transformers is not installed, or is too old.
    """
    try:
        from transformers import Qwen3Config, Qwen3Model
    except ImportError as e:
        raise ImportError(
            "transformers >= 4.51 is needed; install the extra pixeldiff[text]"
        ) from e
    model = Qwen3Model(Qwen3Config(**g.meta["config"]))
    load_weights(model, g.weights())
    ids, mask = g.tensors["input_ids"], g.tensors["mask"]
    rows = [row[own].tolist() for row, own in zip(ids, mask, strict=True)]
    width = model.config.hidden_size
    encoder = Qwen3PromptEncoder(model, _TokensOf(rows), embed_dim=width)
    prompts = [str(i) for i in range(len(rows))]
    return {f"embedding.{i}": y for i, y in enumerate(encoder.encode(prompts))}
