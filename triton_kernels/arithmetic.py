"""Products and roundings that come out the same compiled and in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

from . import launching

INTERPRETED = tl.constexpr(launching.INTERPRETED)


@triton.jit
def dot(a, b, sums):
    """sums + a b in fp32, exact products."""
    if INTERPRETED:  # which multiplies the bits of bf16; widened, the products are the same
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 to the nearest of `dtype`, ties to even. To e4m3: of at most 448."""
    if INTERPRETED and dtype == tl.bfloat16:  # which cuts off the bits that bf16 has not
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        x = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif INTERPRETED and dtype == tl.float8e4nv:  # which drops the carry
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        # 2^23 steps of e4m3 at x, and half as many again for negative x: fp32 has no bits below.
        shift = tl.maximum(power, 0.015625) * 1572864.0
        x = (x + shift) - shift
    return x.to(dtype)
