"""Moving latent cells between channels, space and tokens. Bitwise, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_2x2(latent: Tensor) -> Tensor:
    """(B, C, zh, zw) -> tokens (B, zh/2 * zw/2, 4C); channel = c*4 + (row%2)*2 + (col%2)."""
    return map_to_tokens(patchify_2x2(latent))


def unpack_2x2(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, zh/2 * zw/2, 4C) -> (B, C, zh, zw), grid = (zh, zw). Undoes `pack_2x2`."""
    return unpatchify_2x2(tokens_to_map(tokens, (grid[0] // 2, grid[1] // 2)))


def patchify_2x2(latent: Tensor) -> Tensor:
    """(B, C, 2h, 2w) -> (B, 4C, h, w); channel = c*4 + (row%2)*2 + (col%2)."""
    return torch.nn.functional.pixel_unshuffle(latent, 2)


def unpatchify_2x2(latent: Tensor) -> Tensor:
    """(B, 4C, h, w) -> (B, C, 2h, 2w). Undoes `patchify_2x2`."""
    return torch.nn.functional.pixel_shuffle(latent, 2)


def map_to_tokens(latent: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h*w, C), raster order."""
    return latent.flatten(2).transpose(1, 2).contiguous()


def tokens_to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h*w, C) in raster order -> (B, C, h, w), grid = (h, w)."""
    return tokens.transpose(1, 2).unflatten(2, grid).contiguous()
