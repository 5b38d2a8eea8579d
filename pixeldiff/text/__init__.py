"""Captions to embeddings: a Gemma-2 adapter, its instruction prefix, and caption files.

PiD reads a caption as (B, T, E) embeddings (released models: T = 300, E = 2304). Importing this
package loads no text library; `transformers` is imported when a `GemmaCaptionEncoder` is loaded and
`diffusers` is only searched when `instruction_prefix()` is called without a file.
"""

from pixeldiff.text.caption_file import CaptionFile, bake_caption, load_caption, save_captions
from pixeldiff.text.gemma import GemmaCaptionEncoder
from pixeldiff.text.prefix import instruction_prefix, negative_prompt

__all__ = [
    "CaptionFile",
    "GemmaCaptionEncoder",
    "bake_caption",
    "instruction_prefix",
    "load_caption",
    "negative_prompt",
    "save_captions",
]
