"""q[n, py*P + px] = weight x[:, Y, X] + bias + [pos_x[X] | pos_y[Y]], in Triton.

Bytes: B*H*W*(C*sizeof(x) + p*sizeof(q)). FLOPs: B*H*W*p*(2*C + 1). Bandwidth-bound. fp32 inside,
one rounding at the end.

PiD at 2048 in bf16 (C 3, p 16): 50 MB of image in, 134 MB of tokens out, 0.061 ms at 3.0 TB/s, once
a step: 0.08 % of its 77 ms. The 0.4 GFLOP are 0.01 ms of plain fp32.

The table is read from the L2 cache: pos_x holds 8 fp32 a pixel and would be as many bytes as the
tokens if every image row read it again, so a program keeps it for several rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, pixel_rows
from .pixel_rows import colours, segment

OP = "pixel_embed"


@dataclass(frozen=True)
class Config:
    rows: int  # image rows
    block: int  # pixels of each
    num_warps: int


@triton.jit(do_not_specialize=["h", "w"])
def pixel_embed_kernel(
    x_ptr,  # (B, C, h*PATCH, w*PATCH)
    weight_ptr,  # (P, C) contiguous
    bias_ptr,  # (P,)
    pos_x_ptr,  # (w*PATCH, P/2) contiguous
    pos_y_ptr,  # (h*PATCH, P/2) contiguous
    q_ptr,  # (B*h*w, PATCH*PATCH, P) contiguous
    h,
    w,
    x_stride_b,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    COLOURS: tl.constexpr,  # C
    PATCH: tl.constexpr,
    P: tl.constexpr,  # channels
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r, first, X, inside = segment(w, PATCH, ROWS, BLOCK)
    py = first + tl.arange(0, ROWS)
    Y = r % h * PATCH + py  # int64, as r: offsets into x and q can pass 2^31
    c = tl.arange(0, BLOCK_P)
    half: tl.constexpr = P // 2
    here = (py < PATCH)[:, None] & inside[None, :]  # (ROWS, BLOCK)

    column = (X.to(tl.int64) * x_stride_w)[None, :]
    x = colours(
        x_ptr + r // h * x_stride_b + Y[:, None] * x_stride_h + column, x_stride_c, here, COLOURS
    )
    pos_x = tl.load(
        pos_x_ptr + (X * half)[:, None] + c[None, :],
        mask=inside[:, None] & (c < half)[None, :],
        other=0.0,
    )
    pos_y = tl.load(
        pos_y_ptr + (Y * half)[:, None] + (c - half)[None, :],
        mask=(py < PATCH)[:, None] & ((c >= half) & (c < P))[None, :],
        other=0.0,
    )
    bias = tl.load(bias_ptr + c, mask=c < P, other=0.0).to(tl.float32)
    across = pos_x.to(tl.float32) + bias[None, :]
    q = across[None, :, :] + pos_y.to(tl.float32)[:, None, :]  # (ROWS, BLOCK, BLOCK_P)
    for k in tl.static_range(COLOURS):
        weight = tl.load(weight_ptr + c * COLOURS + k, mask=c < P, other=0.0).to(tl.float32)
        q += x[k].to(tl.float32)[:, :, None] * weight[None, None, :]
    patch = r * w + X // PATCH
    pixel = patch[None, :] * (PATCH * PATCH) + (py * PATCH)[:, None] + (X % PATCH)[None, :]
    tl.store(
        q_ptr + (pixel * P)[:, :, None] + c[None, None, :],
        q.to(q_ptr.dtype.element_ty),
        mask=here[:, :, None] & (c < P)[None, None, :],
    )


def why_not(
    x: Tensor, weight: Tensor, bias: Tensor, pos_x: Tensor, pos_y: Tensor, patch: int
) -> str | None:
    tensors = (x[..., :1], weight[:, :1], bias[:1], pos_x[:, :1], pos_y[:, :1])  # any strides
    return pixel_rows.why_not(*weight.shape, *tensors)


def heuristic(
    capability: tuple[int, int], x: Tensor, weight: Tensor, bias: Tensor, *rest: object
) -> Config:
    """One warp, which waits for no other, and 32 values a thread: four image rows of 16 pixels
    where there are 16 channels, so that the table is read a quarter as often. With 64 values the
    count is the same, but the registers come to 130. A heuristic; not yet measured."""
    p = pixel_rows.channels(weight.shape[0])
    block = max(16, 256 // p)
    return Config(4, block, max(1, 4 * block * p // 1024))


def key(x: Tensor, weight: Tensor, bias: Tensor, pos_x: Tensor, pos_y: Tensor, patch: int) -> str:
    return pixel_rows.key(weight.dtype, weight.shape[0], patch)


def candidates(x: Tensor, weight: Tensor, *rest: object) -> list[Config]:
    p = pixel_rows.channels(weight.shape[0])
    wide = max(16, 512 // p)
    tiles = ((4, wide // 2), (4, wide), (8, wide // 2), (4, 2 * wide), (8, wide))
    # More than 64 values a thread take more than 128 registers; less than 16 are no wide stores.
    return [
        Config(rows, block, warps)
        for rows, block in tiles
        for warps in (1, 2, 4)
        if 512 * warps <= rows * block * p <= 2048 * warps
    ]


def launch(
    x: Tensor,  # (B, C, H, W)
    weight: Tensor,  # (p, C)
    bias: Tensor,  # (p,)
    pos_x: Tensor,  # (W, p/2)
    pos_y: Tensor,  # (H, p/2)
    patch: int,
    config: Config | None = None,
) -> Tensor:
    images, colours, height, width = x.shape
    p, h, w = weight.shape[0], height // patch, width // patch
    q = torch.empty((images * h * w, patch * patch, p), dtype=weight.dtype, device=weight.device)
    if q.numel() == 0:
        return q
    args = (x, weight, bias, pos_x, pos_y, patch)
    chosen = config or configs.choose(OP, Config, heuristic, key, args)
    with torch.cuda.device_of(x):
        pixel_embed_kernel[(pixel_rows.programs(images, h, w, patch, chosen.rows, chosen.block),)](
            x,
            *(t.contiguous() for t in (weight, bias, pos_x, pos_y)),
            q,
            h,
            w,
            *x.stride(),
            COLOURS=colours,
            PATCH=patch,
            P=p,
            BLOCK_P=pixel_rows.channels(p),
            ROWS=chosen.rows,
            BLOCK=chosen.block,
            num_warps=chosen.num_warps,
        )
    return q
