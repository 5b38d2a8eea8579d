"""Tile shape and refusals that the row-normalising kernels share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

MAX_D = 16384  # a whole row is held in registers: 64 values a thread at 8 warps


@dataclass(frozen=True)
class Config:
    block_d: int  # columns of a tile, the power of two that covers D
    rows: int  # rows of a tile
    num_warps: int


def config(d: int) -> Config:
    """Tile for rows of `d` channels: about 2048 values, so that short rows share a program and
    every thread has several 16-byte loads in flight. A heuristic; not yet measured."""
    block_d = max(16, triton.next_power_of_2(d))
    rows = max(1, 2048 // block_d)
    return Config(block_d, rows, 8 if block_d > 4096 else 4)


def why_not(interpreted: bool, x: Tensor, *others: Tensor | None) -> str | None:
    tensors = [x, *(t for t in others if t is not None)]
    for t in tensors:
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"takes float32, bfloat16 and float16, got {t.dtype}"
        if t.shape[-1] > 1 and t.stride(-1) != 1:
            return f"needs a contiguous last axis, got strides {tuple(t.stride())}"
    if x.shape[-1] > MAX_D:
        return f"takes at most {MAX_D} channels, got {x.shape[-1]}"
    if interpreted:
        return None
    if x.device.type != "cuda":
        return f"runs on cuda, the tensors are on {x.device}"
    capability = torch.cuda.get_device_capability(x.device)
    if capability < (8, 0):
        return f"needs compute capability 8.0, this device is {capability[0]}.{capability[1]}"
    return None
