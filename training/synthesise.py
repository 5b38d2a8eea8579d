"""The pictures that the demo's L2P learns from: the source's own, with the captions they come from.

Nothing else is shown to it, as in the paper. A few are made of the empty caption, so that the
branch that guidance compares with stays what it is.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from pixeldiff.images import convert
from pixeldiff.text import save_captions
from pixeldiff.text.tiny import TinyPromptEncoder

from .shapes import caption, random_scene
from .source_model import SourceModel

_TOGETHER = 32
WITHOUT_CAPTION = 10  # one picture in so many


def synthesise(
    source: SourceModel,
    folder: Path,
    count: int,
    side: int,
    *,
    steps: int,
    guidance: float,
    seed: int = 0,
) -> None:
    """Writes NAME.png and NAME.safetensors, the caption's embedding, for `pixeldiff l2p train`.

    Pictures that the folder holds already are not made again.

    Args:
        source: makes the pictures.
        count: of pictures; captions are of combinations that are not held out.
        side: of the pictures, in pixels.
        steps, guidance: of the source's sampling.
        seed: of captions and noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = TinyPromptEncoder(source.net.config.cap_feat_dim)
    for begin in range(0, count, _TOGETHER):
        numbers = range(begin, min(begin + _TOGETHER, count))
        # The embedding is written last, so a picture with one is complete.
        numbers = [n for n in numbers if not (folder / f"{n:06d}.safetensors").exists()]
        for bare in (False, True):
            chosen = [n for n in numbers if (n % WITHOUT_CAPTION == 0) == bare]
            if not chosen:
                continue
            texts = ["" if bare else _caption(seed, n) for n in chosen]
            images = source.pictures(
                texts,
                [(seed << 32) + n for n in chosen],
                side,
                steps=steps,
                guidance=1.0 if bare else guidance,
            )
            for n, text, image in zip(chosen, texts, convert(images, "pil"), strict=True):
                partial = folder / f"{n:06d}.part"
                image.save(partial, format="png", compress_level=1)
                os.replace(partial, folder / f"{n:06d}.png")
                save_captions(
                    folder / f"{n:06d}.safetensors",
                    words.encode([text])[0][None],
                    text,
                    encoder_id="TinyPromptEncoder",
                )
        if begin % (10 * _TOGETHER) == 0:
            print(f"synthesised {begin + len(numbers)}/{count}", flush=True)


def _caption(seed: int, number: int) -> str:
    rng = np.random.default_rng([seed, number])
    return caption(random_scene(rng), rng)
