"""q += gate1 * a; q += gate2 * fc2(gelu(fc1(norm_modulate(q)))), chunks 2..5 of u W^T + b, in Triton.

FLOPs: 2*R*P*P*p*(4*D + A + 2*F). Bytes: q read and written once; a = expand(attn) written and read;
u once a pixel tile and the weight once a group of patches, from the cache. PiD at 2048, one of two
blocks of a step: 0.82 + 0.15 + 0.02 TFLOP, a floor of 1.03 + 0.19 + 0.02 ms at 798 TFLOP/s; both
blocks are 2.5 of the step's 77 ms. The four chunks (537 MB a block) are never stored, nor is
anything of the MLP.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, pixel_adaln
from .pixel_adaln import Config

OP = "pixel_adaln_mlp"
MAX_HIDDEN = 256  # F; the MLP is unrolled over it

PIECE = 4096


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=["rows"])
def pixel_adaln_mlp_kernel(
    q_ptr,  # (rows, pixels, P)
    u_ptr,  # (rows, D)
    a_ptr,  # (rows, pixels*P) contiguous, expand(attn)
    ada_weight_ptr,  # (6*P*pixels, D)
    ada_bias_ptr,  # (6*P*pixels,)
    norm_weight_ptr,  # (P,)
    fc1_weight_ptr,  # (F, P)
    fc1_bias_ptr,  # (F,)
    fc2_weight_ptr,  # (P, F)
    fc2_bias_ptr,  # (P,)
    out_ptr,  # (rows, pixels, P) contiguous
    rows,
    pixels,
    D,
    q_stride_row,
    q_stride_pixel,
    u_stride,
    ada_weight_stride,
    fc1_stride,
    fc2_stride,
    eps,
    P: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    PIXELS: tl.constexpr = COLUMNS // P
    dtype = q_ptr.dtype.element_ty
    first_row, first_pixel = pixel_adaln.tile(rows, pixels, ROWS, PIXELS, GROUP)
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    pixel = first_pixel + column // P
    i = column % P
    inside = (row < rows)[:, None] & (pixel < pixels)[None, :]
    # int64 before any multiply: both offsets can pass 2^31.
    q_offset = (row.to(tl.int64) * q_stride_row)[:, None]
    q_offset += (pixel.to(tl.int64) * q_stride_pixel + i)[None, :]
    offset = (row.to(tl.int64) * (pixels * P))[:, None] + (pixel * P + i)[None, :]
    q = tl.load(q_ptr + q_offset, mask=inside, other=0.0)
    a = tl.load(a_ptr + offset, mask=inside, other=0.0)

    m = pixel_adaln.modulation(
        u_ptr, ada_weight_ptr, row, first_pixel, rows, pixels, D, u_stride, ada_weight_stride,
        2, 4, P, ROWS, COLUMNS, BLOCK_K, EVEN_K,
    )  # fmt: skip
    even, odd = m.reshape(ROWS, 2, 2, COLUMNS).permute(0, 3, 1, 2).split()
    gate1, scale = even.split()
    shift, gate2 = odd.split()
    bias = ada_bias_ptr + tl.minimum(pixel, pixels - 1) * (6 * P) + i
    gate1 += pixel_adaln.row_of(bias, 2 * P)
    shift += pixel_adaln.row_of(bias, 3 * P)
    scale += pixel_adaln.row_of(bias, 4 * P)
    gate2 += pixel_adaln.row_of(bias, 5 * P)

    q = pixel_adaln.rounded(q.to(tl.float32) + gate1 * a.to(tl.float32), dtype)
    gain = pixel_adaln.row_of(norm_weight_ptr, i) * (1.0 + scale)
    h = pixel_adaln.norm_modulate(q.to(tl.float32), gain, shift, eps, P, ROWS, COLUMNS)

    # One row of the small products for each pixel of each patch. With pixels outside patches every
    # value already lies where the tensor cores want it, so that none leaves its thread's registers.
    h = pixel_adaln.rounded(h, dtype).reshape(ROWS, PIXELS, P)
    h = h.permute(1, 0, 2).reshape(PIXELS * ROWS, P)
    WIDTH: tl.constexpr = P if P > 16 else 16  # the least that a product sums over
    if P < 16:  # zeros between the channels: fc1 reads channel w // 2 of h, if w is even
        h = tl.join(h, tl.zeros_like(h)).reshape(PIXELS * ROWS, WIDTH)
    w = tl.arange(0, WIDTH)
    STEP: tl.constexpr = WIDTH // P
    real = w % STEP == 0
    out = tl.zeros((PIXELS * ROWS, P), tl.float32)
    channel = tl.arange(0, P)
    for start in tl.static_range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        fc1 = tl.load(
            fc1_weight_ptr + (f * fc1_stride)[None, :] + (w // STEP)[:, None],
            mask=real[:, None],
            other=0.0,
        )
        fc2 = tl.load(fc2_weight_ptr + (channel * fc2_stride)[None, :] + f[:, None])
        x = tl.zeros((PIXELS * ROWS, BLOCK_F), tl.float32)
        x = pixel_adaln.dot(h, fc1, x) + pixel_adaln.row_of(fc1_bias_ptr, f)
        out = pixel_adaln.dot(pixel_adaln.rounded(gelu(x), dtype), fc2, out)
    out = out.reshape(PIXELS, ROWS, P).permute(1, 0, 2).reshape(ROWS, COLUMNS)
    out = q.to(tl.float32) + gate2 * (out + pixel_adaln.row_of(fc2_bias_ptr, i))
    tl.store(out_ptr + offset, pixel_adaln.rounded(out, dtype), mask=inside)


def why_not(
    q: Tensor,
    u: Tensor,
    attn: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    ada_weight: Tensor,
    ada_bias: Tensor,
    norm_weight: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    eps: float,
) -> str | None:
    F = fc1_weight.shape[0]
    if F % 16 or not 16 <= F <= MAX_HIDDEN:
        return f"takes an MLP width that is a multiple of 16, at most {MAX_HIDDEN}, got {F}"
    products = (q, u, attn, expand_weight, expand_bias, ada_weight, ada_bias, norm_weight)
    return pixel_adaln.why_not(*products, fc1_weight, fc1_bias, fc2_weight, fc2_bias)


def heuristic(capability: tuple[int, int], q: Tensor, *rest: object) -> Config:
    if pixel_adaln.is_fp32(q):
        return pixel_adaln.heuristic_fp32()
    return Config(128, 32, 64, 8, 3)


def key(q: Tensor, u: Tensor, *rest: object) -> str:
    return pixel_adaln.key(q, u)


def launch(
    q: Tensor,  # (R, P*P, p)
    u: Tensor,  # (R, D)
    attn: Tensor,  # (R, A)
    expand_weight: Tensor,  # (P*P*p, A)
    expand_bias: Tensor,  # (P*P*p,)
    ada_weight: Tensor,  # (6*p*P*P, D)
    ada_bias: Tensor,  # (6*p*P*P,)
    norm_weight: Tensor,  # (p,)
    fc1_weight: Tensor,  # (F, p)
    fc1_bias: Tensor,  # (F,)
    fc2_weight: Tensor,  # (p, F)
    fc2_bias: Tensor,  # (p,)
    eps: float,
    config: Config | None = None,
) -> Tensor:
    patches, pixels, p = q.shape
    out = q.new_empty(q.shape)
    if q.numel() == 0:
        return out
    D, F = u.shape[1], fc1_weight.shape[0]
    chosen = config or configs.choose(OP, Config, heuristic, key, (q, u))
    expanded = q.new_empty((min(patches, PIECE), pixels * p))
    with torch.cuda.device_of(q):
        for start in range(0, patches, PIECE):
            piece = slice(start, start + PIECE)
            rows = min(PIECE, patches - start)
            a = expanded[:rows]
            torch.addmm(expand_bias, attn[piece], expand_weight.t(), out=a)
            pixel_adaln_mlp_kernel[pixel_adaln.grid(chosen, rows, pixels, p)](
                q[piece],
                u[piece],
                a,
                ada_weight,
                ada_bias,
                norm_weight,
                fc1_weight,
                fc1_bias,
                fc2_weight,
                fc2_bias,
                out[piece],
                rows,
                pixels,
                D,
                q.stride(0),
                q.stride(1),
                u.stride(0),
                ada_weight.stride(0),
                fc1_weight.stride(0),
                fc2_weight.stride(0),
                eps,
                F=F,
                BLOCK_F=32 if F % 32 == 0 else 16,
                **pixel_adaln.constants(chosen, p, D),
                **pixel_adaln.options(chosen),
            )
    return out
