"""u = weight (x_neg + g (x_pos - x_neg)) + bias, from pixels of channels to planes, in Triton.

Bytes: B*H*W*C*sizeof(x) + 4*K*H*W a result. FLOPs: H*W*C*(2*K + 3) a result. Bandwidth-bound. The
two pictures of guidance are mixed as they are read, in fp32; nothing in between is stored, where
the plain form writes and reads an fp32 copy of x.

L2P at 4096 in bf16 (C 16, K 3): 0.54 GB in and 0.20 GB out, 0.25 ms on 3.0 TB/s; guided 1.07 and
0.20 GB, 0.43 ms. Once a call: 0.3 % of 74 ms. At 8192 four times that, of 77 ms. The plain form
moves 2.9 GB, guided 6.4 GB.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, pixel_rows

OP = "local_decoder_pixels"


@dataclass(frozen=True)
class Config:
    block: int  # pixels of an image row
    num_warps: int


@triton.jit(do_not_specialize=["B", "H", "W"])
def local_decoder_pixels_kernel(
    x_ptr,  # (B, H, W, C), or (2*B, H, W, C) when GUIDED
    weight_ptr,  # (K, C) contiguous
    bias_ptr,  # (K,)
    guidance_ptr,  # (); any valid pointer unless GUIDED
    u_ptr,  # (B, K, H, W) contiguous
    B,
    H,
    W,
    x_stride_b,
    x_stride_h,
    GUIDED: tl.constexpr,
    COLOURS: tl.constexpr,  # K
    CHANNELS: tl.constexpr,  # C
    X_STRIDE_W: tl.constexpr,  # known, so that wide loads need no runtime check
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    segments = tl.cdiv(W, BLOCK)
    # int64 before any multiply: offsets into x and u can pass 2^31.
    row = (tl.program_id(0) // segments).to(tl.int64)
    b = row // H
    y = row % H
    X = tl.program_id(0) % segments * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, BLOCK_C)
    inside = (X < W)[:, None] & (c < CHANNELS)[None, :]

    start = x_ptr + b * x_stride_b + y * x_stride_h
    offset = X[:, None] * X_STRIDE_W + c[None, :]
    h = tl.load(start + offset, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        start += B.to(tl.int64) * x_stride_b
        negative = tl.load(start + offset, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(guidance_ptr).to(tl.float32)
        # As torch.lerp: from the nearer side, and exact where both are equal.
        apart = h - negative
        h = tl.where(g < 0.5, negative + g * apart, h - apart * (1.0 - g))
    for k in tl.static_range(COLOURS):
        weight = tl.load(weight_ptr + k * CHANNELS + c, mask=c < CHANNELS, other=0.0)
        bias = tl.load(bias_ptr + k).to(tl.float32)
        value = tl.sum(h * weight.to(tl.float32)[None, :], axis=1) + bias
        tl.store(u_ptr + ((b * COLOURS + k) * H + y) * W + X, value, mask=X < W)


def why_not(x: Tensor, weight: Tensor, bias: Tensor, guidance: Tensor | None) -> str | None:
    vectors = (weight[:, :1], bias[:1], guidance)  # any strides
    return pixel_rows.why_not(x.shape[3], weight.shape[0], x, *vectors)


def heuristic(capability: tuple[int, int], x: Tensor, *rest: object) -> Config:
    """32 values of a picture a thread, as in pixel_head, which does the same reading. Not yet
    measured."""
    return Config(min(256, max(32, 4096 // pixel_rows.channels(x.shape[3]))), 4)


def key(x: Tensor, weight: Tensor, bias: Tensor, guidance: Tensor | None) -> str:
    kind = "" if guidance is None else " guided"
    return f"{str(x.dtype).removeprefix('torch.')} c{x.shape[3]}{kind}"


def candidates(x: Tensor, *rest: object) -> list[Config]:
    most, channels = heuristic((8, 0), x).block, pixel_rows.channels(x.shape[3])
    blocks = [block for block in (most // 4, most // 2, most, 2 * most) if block >= 16]
    # Two pictures of more than 32 values a thread take more than 128 registers.
    return [Config(b, w) for b in blocks for w in (2, 4, 8) if b * channels <= 32 * 32 * w]


def launch(
    x: Tensor,  # (B, H, W, C)
    weight: Tensor,  # (K, C)
    bias: Tensor,  # (K,)
    guidance: Tensor | None,  # ()
    config: Config | None = None,
) -> Tensor:
    images, height, width, channels = x.shape
    results = images if guidance is None else images // 2
    u = torch.empty((results, weight.shape[0], height, width), dtype=torch.float32, device=x.device)
    if u.numel() == 0:
        return u
    chosen = config or configs.choose(OP, Config, heuristic, key, (x, weight, bias, guidance))
    weight, bias = weight.contiguous(), bias.contiguous()
    with torch.cuda.device_of(x):
        local_decoder_pixels_kernel[(results * height * triton.cdiv(width, chosen.block),)](
            x,
            weight,
            bias,
            weight if guidance is None else guidance,
            u,
            results,
            height,
            width,
            x.stride(0),
            x.stride(1),
            GUIDED=guidance is not None,
            COLOURS=weight.shape[0],
            CHANNELS=channels,
            X_STRIDE_W=x.stride(2),
            BLOCK_C=pixel_rows.channels(channels),
            BLOCK=chosen.block,
            num_warps=chosen.num_warps,
        )
    return u
