"""Captions to embeddings: a Gemma-2 and a Qwen3 adapter, and caption files.

PiD reads a caption as (B, T, E) embeddings of Gemma-2 (released models: T = 300, E = 2304), L2P as
(T, E) embeddings of Qwen3, T the tokens of the prompt (E = 2560). Importing this package loads
no text library; `transformers` is imported when an encoder is loaded and `diffusers` is only
searched when `instruction_prefix()` is called without a file.
"""

from pixeldiff.text.caption_file import CaptionFile, bake_caption, load_caption, save_captions
from pixeldiff.text.gemma import GemmaCaptionEncoder
from pixeldiff.text.prefix import instruction_prefix, negative_prompt
from pixeldiff.text.qwen3 import Qwen3PromptEncoder

__all__ = [
    "CaptionFile",
    "GemmaCaptionEncoder",
    "Qwen3PromptEncoder",
    "bake_caption",
    "instruction_prefix",
    "load_caption",
    "negative_prompt",
    "save_captions",
]
