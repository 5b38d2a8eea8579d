"""What the kernels between an image and the pixels of its patches share: which pixels a program
takes, and what none of them can take.

A program takes BLOCK pixels of an image row, of as many patches as that is: the image is then read
and written along x, and the pixel stream in runs of P*p values, P pixels of one patch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launching

MAX_CHANNELS = 256  # p, held in registers; so are 4 pixels a thread
MAX_COLOURS = 16  # C, an unrolled loop


@triton.jit
def segment(w, PATCH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(r, py, X, inside) of this program: row r of patches among all images' (int64), the first of
    its ROWS pixel rows there, and its BLOCK pixels along x."""
    # Pixel rows of the same patches go to neighbouring programs: together they read or write
    # whole patches, which lie in one piece.
    groups: tl.constexpr = (PATCH + ROWS - 1) // ROWS
    segments = tl.cdiv(w * PATCH, BLOCK)
    py = tl.program_id(0) % groups * ROWS
    program = tl.program_id(0) // groups
    X = program % segments * BLOCK + tl.arange(0, BLOCK)
    # By patch and not by pixel: the compiler then knows that PATCH pixels share an answer, whatever
    # w is, and may still read several at once.
    column = X // PATCH
    return (program // segments).to(tl.int64), py, X, column < w


@triton.jit
def colours(pointers, stride_c, inside, COLOURS: tl.constexpr):
    """A tuple of the pixels' colours. All are asked for before any is used: the compiler moves no
    load over the barriers between two uses."""
    loaded = (tl.load(pointers, mask=inside, other=0.0),)
    for _ in tl.static_range(1, COLOURS):
        pointers += stride_c
        loaded += (tl.load(pointers, mask=inside, other=0.0),)
    return loaded


def programs(images: int, h: int, w: int, patch: int, rows: int, block: int) -> int:
    return images * h * triton.cdiv(w * patch, block) * triton.cdiv(patch, rows)


def channels(p: int) -> int:
    """Channels of a tile: the power of two that covers `p`."""
    return triton.next_power_of_2(p)


def key(dtype: object, p: int, patch: int) -> str:
    return f"{str(dtype).removeprefix('torch.')} p{p} P{patch}"


def why_not(p: int, colours: int, *tensors: Tensor | None) -> str | None:
    if p > MAX_CHANNELS:
        return f"takes at most {MAX_CHANNELS} channels a pixel, got {p}"
    if colours > MAX_COLOURS:
        return f"takes at most {MAX_COLOURS} colours a pixel, got {colours}"
    return launching.why_not(*tensors)
