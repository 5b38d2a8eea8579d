"""z = norm_modulate(q; chunks 0, 1 of u W^T + b), then z times the compress weight, in Triton.

FLOPs: 2*R*P*P*p*(2*D + A). Bytes: q read; z written and read; u once a pixel tile and the weight
once a group of patches, from the cache. PiD at 2048, one of two blocks of a step: 0.41 + 0.15
TFLOP, a floor of 0.52 + 0.19 ms at 798 TFLOP/s; both blocks are 1.4 of the step's 77 ms. Neither
shift nor scale is ever stored (268 MB a block).

z is rounded to the dtype of q, as the product that reads it needs; shift and scale stay fp32. That
product is the vendor's, over PIECE patches of z at a time. Fusing it too would save z's way to
memory and back, at most 0.09 of 0.71 ms a block, but every tile of patches would then hold the sums
of all A channels, 128 x 1152 x 4 = 590 KB, more than twice a processor's registers; with 32 patches
a tile they fit, and each of its weights is fetched for 32 patches instead of 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arithmetic, configs, pixel_adaln
from .pixel_adaln import Config

OP = "pixel_adaln_compress"

# 67 MB of z in bf16, half of it at 2048 x 2048. At 128 x 256 a tile, 8192 x 1152 results are 320
# tiles: 81 % of what 3 rounds of 132 processors can do, where 4096 patches (whose z would stay in
# the cache) would be 160 tiles in 2 rounds, 61 %.
PIECE = 8192


@triton.jit(do_not_specialize=["rows"])
def pixel_adaln_compress_kernel(
    q_ptr,  # (rows, pixels, P)
    u_ptr,  # (rows, D)
    ada_weight_ptr,  # (6*P*pixels, D)
    ada_bias_ptr,  # (6*P*pixels,)
    norm_weight_ptr,  # (P,)
    z_ptr,  # (rows, pixels*P) contiguous
    rows,
    pixels,
    D,
    q_stride_row,
    q_stride_pixel,
    u_stride,
    ada_weight_stride,
    eps,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    first_row, first_pixel = pixel_adaln.tile(rows, pixels, ROWS, COLUMNS // P, GROUP)
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    pixel = first_pixel + column // P
    i = column % P
    inside = (row < rows)[:, None] & (pixel < pixels)[None, :]
    # int64 before any multiply: both offsets can pass 2^31.
    q_offset = (row.to(tl.int64) * q_stride_row)[:, None]
    q_offset += (pixel.to(tl.int64) * q_stride_pixel + i)[None, :]
    q = tl.load(q_ptr + q_offset, mask=inside, other=0.0)

    m = pixel_adaln.modulation(
        u_ptr, ada_weight_ptr, row, first_pixel, rows, pixels, D, u_stride, ada_weight_stride,
        0, 2, P, ROWS, COLUMNS, BLOCK_K, EVEN_K,
    )  # fmt: skip
    shift, scale = m.reshape(ROWS, 2, COLUMNS).permute(0, 2, 1).split()
    bias = ada_bias_ptr + tl.minimum(pixel, pixels - 1) * (6 * P) + i
    shift += pixel_adaln.row_of(bias, 0)
    scale += pixel_adaln.row_of(bias, P)
    gain = pixel_adaln.row_of(norm_weight_ptr, i) * (1.0 + scale)
    z = pixel_adaln.norm_modulate(q.to(tl.float32), gain, shift, eps, P, ROWS, COLUMNS)
    z_offset = (row.to(tl.int64) * (pixels * P))[:, None] + (pixel * P + i)[None, :]
    tl.store(z_ptr + z_offset, arithmetic.rounded(z, z_ptr.dtype.element_ty), mask=inside)


def why_not(
    q: Tensor,
    u: Tensor,
    ada_weight: Tensor,
    ada_bias: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> str | None:
    return pixel_adaln.why_not(q, u, ada_weight, ada_bias, norm_weight, weight, bias)


def heuristic(capability: tuple[int, int], q: Tensor, *rest: object) -> Config:
    if pixel_adaln.is_fp32(q):  # on the FMA units: a tile whose operands fit the registers
        return Config(64, 32, 32, 8, 2)
    if capability[0] == 9:  # two blocks a processor: 96 KB, half the registers each
        return Config(128, 64, 64, 8, 3, 128)
    if capability[0] in (10, 11):
        return Config(128, 64, 64, 8, 3)
    return Config(128, 64, 32, 8, 4)  # 49 KB: 8.6, 8.9 and 12.0 have 99


def key(q: Tensor, u: Tensor, *rest: object) -> str:
    return pixel_adaln.key(q, u)


def candidates(q: Tensor, *rest: object) -> list[Config]:
    return pixel_adaln.candidates(q, 64)


def launch(
    q: Tensor,  # (R, P*P, p)
    u: Tensor,  # (R, D)
    ada_weight: Tensor,  # (6*p*P*P, D)
    ada_bias: Tensor,  # (6*p*P*P,)
    norm_weight: Tensor,  # (p,)
    weight: Tensor,  # (A, P*P*p)
    bias: Tensor,  # (A,)
    eps: float,
    config: Config | None = None,
) -> Tensor:
    patches, pixels, p = q.shape
    out = q.new_empty((patches, weight.shape[0]))
    if q.numel() == 0:
        return out.copy_(bias)
    D = u.shape[1]
    chosen = config or configs.choose(OP, Config, heuristic, key, (q, u))
    z = q.new_empty((min(patches, PIECE), pixels * p))
    with torch.cuda.device_of(q):
        for start in range(0, patches, PIECE):
            piece = slice(start, start + PIECE)
            rows = min(PIECE, patches - start)
            pixel_adaln_compress_kernel[pixel_adaln.grid(chosen, rows, pixels, p)](
                q[piece],
                u[piece],
                ada_weight,
                ada_bias,
                norm_weight,
                z,
                rows,
                pixels,
                D,
                q.stride(0),
                q.stride(1),
                u.stride(0),
                ada_weight.stride(0),
                eps,
                **pixel_adaln.constants(chosen, p, D),
                **pixel_adaln.options(chosen),
            )
            torch.addmm(bias, z[:rows], weight.t(), out=out[piece])
    return out
