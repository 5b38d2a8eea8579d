"""v[:, Y, X] = weight (rms_norm(q[n, py*P + px]) * norm) + bias, in Triton.

Bytes: B*H*W*(p*sizeof(q) + 4*C). FLOPs: B*H*W*p*(2*C + 4). Bandwidth-bound. fp32 inside and out:
nothing is rounded to the storage type of q.

PiD at 2048 in bf16 (C 3, p 16): 134 MB of tokens in, 50 MB of image out, 0.061 ms at 3.0 TB/s, once
a step: 0.08 % of its 77 ms. The 0.7 GFLOP are 0.02 ms of plain fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, pixel_rows
from .pixel_rows import segment

OP = "pixel_head"


@dataclass(frozen=True)
class Config:
    block: int  # pixels of an image row
    num_warps: int


@triton.jit
def final_norm(
    pixels,  # (BLOCK,) addresses of the pixels' first channels
    inside,  # (BLOCK,)
    eps,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """(BLOCK, BLOCK_P) fp32: the pixels over their root mean square."""
    c = tl.arange(0, BLOCK_P)
    mask = inside[:, None] & (c < P)[None, :]
    q = tl.load(pixels[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    root = tl.sqrt_rn(tl.sum(q * q, axis=1) * (1.0 / P) + eps)
    return q * tl.div_rn(1.0, root)[:, None]


@triton.jit
def colour(
    normed,  # (BLOCK, BLOCK_P)
    norm_ptr,  # (P,)
    weight_ptr,  # (C, P) contiguous
    bias_ptr,  # (C,)
    k,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """(BLOCK,) fp32: colour k of the pixels."""
    c = tl.arange(0, BLOCK_P)
    norm = tl.load(norm_ptr + c, mask=c < P, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + k * P + c, mask=c < P, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + k).to(tl.float32)
    return tl.sum(normed * (norm * weight)[None, :], axis=1) + bias


@triton.jit(do_not_specialize=["h", "w"])
def pixel_head_kernel(
    q_ptr,  # (B*h*w, PATCH*PATCH, P)
    norm_ptr,  # (P,)
    weight_ptr,  # (C, P) contiguous
    bias_ptr,  # (C,)
    v_ptr,  # (B, C, h*PATCH, w*PATCH) contiguous
    h,
    w,
    eps,
    COLOURS: tl.constexpr,  # C
    PATCH: tl.constexpr,
    P: tl.constexpr,  # channels
    Q_STRIDE_N: tl.constexpr,  # of a patch: known, so that wide loads need no runtime check
    Q_STRIDE_M: tl.constexpr,  # of a pixel
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r, py, X, inside = segment(w, PATCH, 1, BLOCK)
    # int64 (r is) before any multiply: offsets into q and v can pass 2^31.
    patch = r * w + X // PATCH
    pixels = q_ptr + patch * Q_STRIDE_N + (py * PATCH + X % PATCH) * Q_STRIDE_M
    normed = final_norm(pixels, inside, eps, P, BLOCK_P)
    height, width = h * PATCH, w * PATCH
    Y = r // h * COLOURS * height + (r % h * PATCH + py)  # row of the planes of all images
    for k in tl.static_range(COLOURS):
        v = colour(normed, norm_ptr, weight_ptr, bias_ptr, k, P, BLOCK_P)
        tl.store(v_ptr + (Y + k * height) * width + X, v, mask=inside)


def why_not(
    q: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    height: int,
    width: int,
    patch: int,
    eps: float,
) -> str | None:
    vectors = (norm_weight[:1], weight[:, :1], bias[:1])  # any strides
    return pixel_rows.why_not(q.shape[2], weight.shape[0], q, *vectors)


def heuristic(capability: tuple[int, int], q: Tensor, *rest: object) -> Config:
    """One warp and 32 values a thread, two pixels of 16 channels: nobody waits at a barrier for
    another warp, while a colour goes through shared memory on its way to its store. At least 32
    pixels, whose row of the image is 128 bytes. A heuristic; not yet measured."""
    p = pixel_rows.channels(q.shape[2])
    block = max(32, min(64, 1024 // p))
    return Config(block, max(1, block * p // 1024))


def key(
    q: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    height: int,
    width: int,
    patch: int,
    eps: float,
) -> str:
    return pixel_rows.key(q.dtype, q.shape[2], patch)


def candidates(q: Tensor, *rest: object) -> list[Config]:
    p = pixel_rows.channels(q.shape[2])
    least = heuristic((8, 0), q).block // 2
    blocks = (least, 2 * least, 4 * least, 8 * least)
    # More than 64 values a thread take more than 128 registers.
    return [Config(b, w) for b in blocks for w in (1, 2, 4) if b * p <= 64 * 32 * w]


def launch(
    q: Tensor,  # (B*N, P*P, p)
    norm_weight: Tensor,  # (p,)
    weight: Tensor,  # (C, p)
    bias: Tensor,  # (C,)
    height: int,
    width: int,
    patch: int,
    eps: float,
    config: Config | None = None,
) -> Tensor:
    colours, p = weight.shape
    h, w = height // patch, width // patch
    images = q.shape[0] // (h * w)
    v = torch.empty((images, colours, height, width), dtype=torch.float32, device=q.device)
    if v.numel() == 0:
        return v
    args = (q, norm_weight, weight, bias, height, width, patch, eps)
    chosen = config or configs.choose(OP, Config, heuristic, key, args)
    with torch.cuda.device_of(q):
        pixel_head_kernel[(pixel_rows.programs(images, h, w, patch, 1, chosen.block),)](
            q,
            *(t.contiguous() for t in (norm_weight, weight, bias)),
            v,
            h,
            w,
            eps,
            COLOURS=colours,
            PATCH=patch,
            P=p,
            Q_STRIDE_N=q.stride(0),
            Q_STRIDE_M=q.stride(1),
            BLOCK_P=pixel_rows.channels(p),
            BLOCK=chosen.block,
            num_warps=chosen.num_warps,
            # As pixel_head_step must: the two then agree bit for bit.
            enable_fp_fusion=False,
        )
    return v
