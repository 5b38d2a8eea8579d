"""How time grows with the size of the image: the exponent of pixels, over a variant's sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .schema import Row


@dataclass(frozen=True)
class Growth:
    """Median ms by side, and the exponent p of ms ~ pixels^p by least squares of the logarithms."""

    name: str
    site: str
    dtype: str
    backend: str
    ms: dict[int, float]
    exponent: float


def growth(rows: Sequence[Row]) -> list[Growth]:
    """Of every variant of a network that was measured at two sizes or more, one image at a time.

    Where a size was measured several times, the last counts. Rows of L2P are told apart by network:
    its forms have a size of their own, so several sizes are one form's away from its own.
    """
    times: dict[tuple[str, str, str, str], dict[int, float]] = {}
    for r in rows:
        if r.kind not in ("decode", "forward") or r.timing is None:
            continue
        whole = r.shape["batch"] == 1 and "tile" not in r.shape
        if whole and r.shape["width"] == r.shape["height"]:
            key = (r.name, r.site, r.dtype, r.backend)
            times.setdefault(key, {})[r.shape["width"]] = r.timing.median_ms
    return [
        Growth(*key, dict(sorted(ms.items())), exponent(ms))
        for key, ms in times.items()
        if len(ms) > 1
    ]


def exponent(ms: dict[int, float]) -> float:
    """The slope of log ms over log pixels.

    Raises:
        ValueError: fewer than two sizes.
    """
    if len(ms) < 2:
        raise ValueError(f"an exponent wants two sizes or more, got {len(ms)}")
    x = [2 * math.log(side) for side in ms]
    y = [math.log(t) for t in ms.values()]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    across = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return across / sum((a - mx) ** 2 for a in x)
