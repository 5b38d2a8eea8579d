"""Image sizes an L2P network can produce."""

from __future__ import annotations

from ...errors import SizeError
from ..lengths import neighbours
from .config import L2PConfig


def check_size(config: L2PConfig, size: tuple[int, int]) -> tuple[int, int]:
    """The grid (h, w) of patches of an image of `size` (H, W).

    Raises:
        SizeError: not two multiples of `config.size_multiple`, or more patches along one side than
            the rotary tables have; names the nearest legal sizes.
    """
    pair = tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in pair):
        raise SizeError(f"L2PNet: size must be two positive integers (H, W), got {size!r}")
    step = config.size_multiple
    if pair[0] % step or pair[1] % step:
        raise SizeError(
            f"L2PNet: size (H, W) must be multiples of {step}, got {pair}; nearest: "
            f"H {neighbours(pair[0], step)}, W {neighbours(pair[1], step)}"
        )
    grid = pair[0] // config.patch_size, pair[1] // config.patch_size
    for side, cells, most in zip("HW", grid, config.axes_lens[1:], strict=True):
        if cells > most:
            largest = most * config.patch_size // step * step
            raise SizeError(
                f"L2PNet: {side} must be at most {largest} (the network has {most} rotary "
                f"positions along it), got {pair['HW'.index(side)]}"
            )
    return grid
