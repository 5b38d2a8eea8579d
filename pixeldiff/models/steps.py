"""What every sampling loop has in common: telling a callback, being stopped by it, scalars."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepInfo:
    """What a callback is told after each network call.

    `t` is the noise level the network was called at, 1 pure noise; `x0` is the estimate of the
    image that it gave, (B, 3, H, W), unclamped, for previews.
    """

    step: int  # 1-based
    steps: int
    t: float
    x0: Tensor


@dataclass(frozen=True)
class TileInfo:
    """What a tile callback is told: after each tile of each network call; of independent tiles
    after each finished one, as if all network calls were one step."""

    step: int  # 1-based
    steps: int
    tile: int  # 1-based, row by row
    tiles: int


class Interrupted(RuntimeError):
    """A callback returned False. Nothing was written."""


Callback = Callable[[StepInfo], bool | None]
TileCallback = Callable[[TileInfo], bool | None]


def fp32(value: float) -> float:
    """The value as fp32 holds it: schedules are fp32 tensors upstream."""
    return torch.tensor(value, dtype=torch.float32, device="cpu").item()


def report(callback: Callback | None, step: int, steps: int, t: float, x0: Tensor) -> None:
    """Tell the callback, if there is one. Raises Interrupted where it returns False."""
    if callback is not None and callback(StepInfo(step, steps, t, x0)) is False:
        raise Interrupted(f"stopped by the callback after step {step} of {steps}")


def report_tile(callback: TileCallback | None, info: TileInfo) -> None:
    """Tell the callback, if there is one. Raises Interrupted where it returns False."""
    if callback is not None and callback(info) is False:
        raise Interrupted(
            f"stopped by the callback after tile {info.tile} of {info.tiles} in step {info.step} "
            f"of {info.steps}"
        )


def with_tile_callback(
    callback: Callback | None, tile_callback: TileCallback | None
) -> Callback | None:
    """For an image in one piece, which is one tile: told of it too, before the caller's callback
    is told."""
    if tile_callback is None:
        return callback

    def both(info: StepInfo) -> bool | None:
        if tile_callback(TileInfo(info.step, info.steps, 1, 1)) is False:
            return False
        return None if callback is None else callback(info)

    return both


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError, which names the choices, unless value is one of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
