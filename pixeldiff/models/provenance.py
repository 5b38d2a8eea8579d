"""What image metadata says of captions and of the backends in use."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor

from ..ops.registry import OPS, forced_backend
from ..text import CaptionFile

Caption = str | Sequence[str] | Tensor | CaptionFile | None


def describe(caption: Caption) -> str | list[str] | None:
    """A caption for the metadata: its text, or a digest of embeddings; None is the null caption."""
    if isinstance(caption, CaptionFile):
        if caption.captions is not None:
            return describe(caption.captions)
        caption = caption.embedding
    if isinstance(caption, Tensor):
        data = caption.detach().float().cpu().contiguous().numpy().tobytes()
        return f"embeddings, sha256 {hashlib.sha256(data).hexdigest()}"
    if caption is None or isinstance(caption, str):
        return caption
    return caption[0] if len(caption) == 1 else list(caption)


def forced_backends() -> str | dict[str, str] | None:
    """What `backend(...)` or PIXELDIFF_BACKEND forces here: one name for all ops, or by op."""
    default = forced_backend("*")
    by_op = {op: name for op in OPS if (name := forced_backend(op)) != default and name}
    if not by_op:
        return default
    return {"*": default, **by_op} if default else by_op
