"""Rows of fp32 values to e4m3 with one scale a row: the epilogue of the quantising kernels.

    scale = max|h| / 448        1 for a row of zeros, at least the smallest normal fp32
    q     = h * (1 / scale)     to the nearest e4m3, ties to even

The arithmetic is that of `pixeldiff.ops.quantize_rows`, so equal rows give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching

MINIMUM = (8, 9)  # the first with a conversion to e4m3; before it Triton has no such type
LARGEST = tl.constexpr(448.0)
SMALLEST_NORMAL = tl.constexpr(torch.finfo(torch.float32).smallest_normal)
INTERPRETED = tl.constexpr(launching.INTERPRETED)


def why_not(*tensors: Tensor | None) -> str | None:
    """Why no quantising kernel can read these tensors here, or None."""
    reason = launching.why_not(*tensors)
    if reason is not None or launching.INTERPRETED:
        return reason
    found = launching.capability(next(t for t in tensors if t is not None))
    if found < MINIMUM:
        return f"e4m3 needs compute capability 8.9, this device is {found[0]}.{found[1]}"
    return None


@triton.jit
def largest_magnitude(
    h,  # (ROWS, BLOCK_D) fp32
):
    """(ROWS,) max|h| of each row; NaN if the row holds one."""
    # As integers, magnitudes are in order, and NaN is above infinity: a floating-point maximum
    # would lose it. An order of reduction cannot show in the result either.
    bits = h.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def largest_in_pieces(
    h,  # a tuple of (ROWS, BLOCK_D) fp32
    PIECES: tl.constexpr,
):
    """(ROWS,) as `largest_magnitude`, of rows that lie in several tiles."""
    bits = h[0].to(tl.int32, bitcast=True) & 0x7FFFFFFF
    for i in tl.static_range(1, PIECES):
        bits = tl.maximum(bits, h[i].to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return tl.max(bits, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def row_scale(
    largest,  # (ROWS,) fp32, of largest_magnitude
):
    """(ROWS,) the scale of each row. That of a row with a NaN or an infinity is not finite."""
    scale = tl.div_rn(largest, LARGEST)
    # Comparisons, as a maximum would turn NaN into the smallest scale.
    scale = tl.where(scale < SMALLEST_NORMAL, SMALLEST_NORMAL, scale)
    return tl.where(largest == 0.0, 1.0, scale)


@triton.jit
def quantized(
    h,  # (ROWS, BLOCK_D) fp32
    scale,  # (ROWS,) of row_scale
):
    """(ROWS, BLOCK_D) e4m3. The largest of a row may come to 448 (1 + 2^-22), which rounds to 448:
    nothing overflows."""
    h = h * tl.div_rn(1.0, scale)[:, None]
    if INTERPRETED:
        return _nearest_e4m3(h)
    return h.to(tl.float8e4nv)


@triton.jit
def _nearest_e4m3(h):
    """The GPU's conversion in integers: the interpreter's drops carries, subnormals and NaN."""
    bits = h.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Keep 3 of the mantissa's 23 bits, to nearest, ties to even, and move the exponent's bias.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 the spacing is 2^-9, that of fp32 at 24576: adding it rounds.
    shifted = magnitude.to(tl.float32, bitcast=True) + 24576.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46C00000  # the bits of 24576.0
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)  # the bits of 2^-6
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    code |= (bits >> 24) & 0x80
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
