"""Inputs whose values are not all finite: how many, where, and what that looks like."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LATENT = ("sample", "channel", "row", "column")
TOKENS = ("prompt", "token", "channel")


def check_finite(
    what: str,
    values: Tensor,
    *,
    axes: Sequence[str] = LATENT,
    hint: str = "",
    error: type[Exception] = ValueError,
) -> None:
    """Raise `error` if a value is NaN or infinite.

    One pass over the values, and one wait for their device.

    Args:
        what: what they are and whose argument, at the beginning of the message.
        values: any shape and floating-point type.
        axes: names of their last axes.
        hint: what to do.
    """
    if values.numel() == 0:
        return
    if bool(ends(values).isfinite().all()):
        return
    values = values.detach()
    axes = axes[len(axes) - values.dim() :] if values.dim() <= len(axes) else axes
    bad = ~values.isfinite()
    share = int(bad.sum()) / values.numel()
    first = torch.unravel_index(bad.flatten().byte().argmax(), bad.shape)
    place = [int(i) for i in first]
    names = [*(f"axis {i}" for i in range(values.dim() - len(axes))), *axes]
    where = ", ".join(f"{name} {i}" for name, i in zip(names, place, strict=True))
    reasons = [_reason(bad, bool(values.isinf().any()), names), *([hint] if hint else [])]
    raise error(
        f"{what} must be finite, got {tally(values)} ({_percent(share)}), the first, "
        f"{values[tuple(place)].item()}, at {where}; {'; '.join(reasons)}"
    )


def tally(values: Tensor) -> str:
    """Of values that are not all finite: "3 NaN and 1 infinite of 4096 values"."""
    nan, infinite = int(values.isnan().sum()), int(values.isinf().sum())
    parts = [f"{nan} NaN"] * (nan > 0) + [f"{infinite} infinite"] * (infinite > 0)
    return f"{' and '.join(parts)} of {values.numel()} values"


def _reason(bad: Tensor, infinite: bool, names: Sequence[str]) -> str:
    """What such values most likely come from."""
    if bool(bad.all()):
        return "no value is finite: what made it overflowed (float16?) or its weights are damaged"
    for axis in range(bad.dim() - 1):
        whole = bad.movedim(axis, 0).flatten(1).all(1)
        each = bad.numel() // bad.shape[axis]
        if bool(whole.any()) and int(bad.sum()) == int(whole.sum()) * each:
            which = whole.nonzero().flatten().tolist()
            listed = ", ".join(map(str, which[:4])) + (", ..." if len(which) > 4 else "")
            cause = "what made it overflowed (float16?)"
            if names[axis] == "channel":
                cause = "it was divided by a statistic that is 0 or missing"
            return f"it is all of {names[axis]} {listed} and nothing else: {cause}"
    if infinite:
        return "infinity is an overflow: float16 ends at 65504, use bfloat16 or float32 before it"
    return "NaN alone is 0/0, or an overflow further back, as of float16"


def _percent(share: float) -> str:
    return "all" if share == 1 else f"{100 * share:.2g}%"


def ends(values: Tensor) -> Tensor:
    """(2,) the least and the largest value, where they lie: both NaN if any value is."""
    values = values.detach()
    return torch.stack(torch.aminmax(values.float() if values.dtype.itemsize == 1 else values))
