"""What the encoders that write a picture from top to bottom take: bands of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

CHANNELS = 3


def checked(
    encoder: str, size: tuple[int, int], bands: Iterable[np.ndarray]
) -> Iterator[np.ndarray]:
    """The bands, if they are those of the picture.

    Args:
        encoder: its name, for the error.
        size: (H, W).
        bands: (rows, W, 3) uint8 from top to bottom, H rows in all.

    Raises:
        ValueError: other rows than `size` says. What `bands` raises passes through.
    """
    height, width = size
    left = height
    for band in bands:
        if band.shape[1:] != (width, CHANNELS) or band.dtype != np.uint8 or len(band) > left:
            raise ValueError(
                f"{encoder}: bands must be (rows, {width}, {CHANNELS}) uint8 with {left} more "
                f"rows, got {band.shape} {band.dtype}"
            )
        left -= len(band)
        yield band
    if left:
        raise ValueError(f"{encoder}: the bands must have {height} rows, got {height - left}")


def rebanded(bands: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """The same rows in bands of `rows`; the last may have fewer."""
    held: list[np.ndarray] = []
    count = 0
    for band in bands:
        while count + len(band) >= rows:
            cut = rows - count
            yield np.concatenate([*held, band[:cut]])
            band, held, count = band[cut:], [], 0
        if len(band):
            held.append(band.copy())
            count += len(band)
    if held:
        yield np.concatenate(held)
