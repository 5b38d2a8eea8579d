"""Caption embeddings without a language model: words hashed to fixed random vectors.

The demo network is conditioned on these. There is nothing to download or to learn: the vector of a
word is computed from a hash of its letters, on every machine the same.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = re.compile(r"[^\W_]+")


class TinyTextEmbedder:
    """Captions to (B, length, width) embeddings.

    The first token marks the beginning; one token per word follows, lower-cased, in order; the rest
    is zero. A word's vector is the normalised sum of one vector of signs for the word and one for
    each of its letter trigrams, so that similar spellings are close ("stripe", "stripes").

    Args:
        width: E, channels of an embedding.
        length: T, tokens of a caption; words that do not fit are dropped.

    Raises:
        ValueError: width or length below 1.
    """

    def __init__(self, width: int = 64, length: int = 16) -> None:
        if width < 1 or length < 1:
            raise ValueError(
                f"TinyTextEmbedder: width and length must be positive, got {width} and {length}"
            )
        self.width, self.length = width, length

    def encode(self, captions: str | Sequence[str]) -> Tensor:
        """Embeddings of one caption or several.

        Args:
            captions: a caption, or a sequence of B of them. The empty caption is the null caption.

        Returns:
            (B, length, width) fp32 on the CPU.
        """
        if isinstance(captions, str):
            captions = [captions]
        out = torch.zeros(len(captions), self.length, self.width)
        for row, caption in zip(out, captions, strict=True):
            row[0] = _signs("<begin>", self.width)
            words = _WORD.findall(caption.lower())[: self.length - 1]
            for token, word in enumerate(words, 1):
                row[token] = _word(word, self.width)
        return out

    def null(self) -> Tensor:
        """(1, length, width): the embedding of the empty caption, for unconditional decoding."""
        return self.encode("")


@functools.lru_cache(maxsize=4096)
def _word(word: str, width: int) -> Tensor:
    """(width,); shared between calls, not to be changed."""
    padded = f"^{word}$"
    pieces = [word] + [padded[i : i + 3] for i in range(len(padded) - 2)]
    total = torch.stack([_signs(piece, width) for piece in pieces]).sum(0)
    return total / len(pieces) ** 0.5


def _signs(piece: str, width: int) -> Tensor:
    """(width,) of +1 and -1 from the bits of a hash."""
    need = -(-width // 8)
    digest = hashlib.shake_128(piece.encode()).digest(need)
    bits = torch.tensor([byte >> i & 1 for byte in digest for i in range(8)])
    return (bits[:width] * 2 - 1).float()


class TinyPromptEncoder:
    """Captions of any length as one tensor each, without padding: what `L2PPipeline` takes.

    Args:
        width: E, channels of an embedding; see `TinyTextEmbedder`.
        length: most tokens of a caption; words that do not fit are dropped.
    """

    def __init__(self, width: int = 64, length: int = 64) -> None:
        self._embedder = TinyTextEmbedder(width, length)

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """B embeddings (T_b, width) fp32 on the CPU: a first token, then one per word."""
        rows = self._embedder.encode(captions)
        # Every token has a vector; only padding is zero.
        return [row[: int(row.any(-1).sum())] for row in rows]
