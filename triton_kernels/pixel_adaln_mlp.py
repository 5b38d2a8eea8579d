"""q += gate1 * a, then q += gate2 * mlp(norm_modulate(q)): chunks 2..5 of u W^T + b, in Triton.

FLOPs: 2*R*P*P*p*(4*D + A + 2*F). Bytes: q read and written once; a = expand(attn) written and read;
u once a pixel tile and the weight once a group of patches, from the cache. PiD at 2048, one of two
blocks of a step: 0.82 + 0.15 + 0.02 TFLOP, a floor of 1.03 + 0.19 + 0.02 ms at 798 TFLOP/s; both
blocks are 2.5 of the step's 77 ms. The four chunks (537 MB a block) are never stored, nor is
anything of the MLP.

The tile is 128 patches by 4 chunks of 2 pixels, one product 128 wide. An m64n128 reads 6 KB of
shared memory, 48 cycles' worth, in 64 cycles of the tensor cores; one product a chunk, m64n32 each,
would read 3 KB in 16 and run at two thirds. 256 wide (4 pixels) fetches a quarter less from the
cache, 85 FLOPs a byte instead of 64, but holds 128 sums a thread: one block a processor, with
nothing to run under its epilogue, where two blocks of 128 wide alternate. The epilogue is 1600
instructions a thread on sm_90, 3200 cycles of issue for a tile's 12300 of products. The cache is
what limits it there, at 54 to 66 % of the floor by the count of docs/kernels/estimates.md; the
kernel in CUDA C++ fetches half.

expand(attn) is the vendor's product, over PIECE patches at a time. As a second loop in here it is
m64n32 for 2 pixels: 0.29 ms a block at two thirds of the floor's rate, and each tile fetches its
295 KB of attn and 74 KB of weights for a fifth of the products that u and its weights serve, 6 GB
a block from the cache, about 0.6 ms at 10 TB/s. The vendor's takes 0.2 ms, and at most 0.09 to
write and read the result, less what the cache keeps of a piece.

q + gate1 * a, the norm's result, gelu's and the sum are rounded to the dtype of q, the first two as
the reference does, the third for the tensor cores; the chunks and fc1 and fc2 stay fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arithmetic, configs, pixel_adaln
from .pixel_adaln import Config

OP = "pixel_adaln_mlp"
MAX_HIDDEN = 256  # F; the MLP is unrolled over it

# 34 MB of expand(attn) in bf16, which the 50 MB second-level cache of an H100 can hold until it is
# read. Its 512 tiles of 128 x 256 are 97 % of what 4 rounds of 132 processors can do.
PIECE = 4096


@triton.jit
def gelu(x, dtype: tl.constexpr):
    """x Phi(x), for a result that is rounded to `dtype`."""
    if dtype == tl.float32:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        # Phi(-t) = 2^(-1 + t L(t)), L the polynomial of degree 4 whose gelu has the least maximum
        # error, its tail weighted a little too: off by at most 2e-6, and in the tail down to
        # x = -5 by at most 0.4 % of the value, where fp16 rounds a 1 by up to 5e-4. With erf the
        # kernel has 3250 instructions on sm_90, with this 1780. t L(t) falls without end, so that
        # gelu(inf) = inf and gelu(-inf) = NaN, as with erf.
        t = tl.abs(x)
        log = -0.000406244236
        log = log * t + 0.00670223044
        log = log * t - 0.0511250273
        log = log * t - 0.460424545
        log = log * t - 1.15078336
        tail = tl.exp2(log * t - 1.0)
        y = x * tl.where(x > 0.0, 1.0 - tail, tail)
    return y


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

    q = arithmetic.rounded(q.to(tl.float32) + gate1 * a.to(tl.float32), dtype)
    gain = pixel_adaln.row_of(norm_weight_ptr, i) * (1.0 + scale)
    h = pixel_adaln.norm_modulate(q.to(tl.float32), gain, shift, eps, P, ROWS, COLUMNS)

    # One row of the small products for each pixel of each patch. With pixels outside patches every
    # value already lies where the tensor cores want it, so that none leaves its thread's registers.
    h = arithmetic.rounded(h, dtype).reshape(ROWS, PIXELS, P)
    h = h.permute(1, 0, 2).reshape(PIXELS * ROWS, P)
    WIDTH: tl.constexpr = P if P > 16 else 16  # the least that a product sums over
    w = tl.arange(0, WIDTH)
    if P < 16:  # again, for weights of 0; not by tl.join, after which Triton takes TF32 for fp32
        h = h.reshape(PIXELS * ROWS, 1, P).broadcast_to(PIXELS * ROWS, WIDTH // P, P)
        h = h.reshape(PIXELS * ROWS, WIDTH)
    out = tl.zeros((PIXELS * ROWS, P), tl.float32)
    channel = tl.arange(0, P)
    for start in tl.static_range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        fc1 = tl.load(
            fc1_weight_ptr + (f * fc1_stride)[None, :] + w[:, None],
            mask=(w < P)[:, None],
            other=0.0,
        )
        fc2 = tl.load(fc2_weight_ptr + (channel * fc2_stride)[None, :] + f[:, None])
        x = tl.zeros((PIXELS * ROWS, BLOCK_F), tl.float32)
        x = arithmetic.dot(h, fc1, x) + pixel_adaln.row_of(fc1_bias_ptr, f)
        out = arithmetic.dot(arithmetic.rounded(gelu(x, dtype), dtype), fc2, out)
    out = out.reshape(PIXELS, ROWS, P).permute(1, 0, 2).reshape(ROWS, COLUMNS)
    out = q.to(tl.float32) + gate2 * (out + pixel_adaln.row_of(fc2_bias_ptr, i))
    tl.store(out_ptr + offset, arithmetic.rounded(out, dtype), mask=inside)


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
    if pixel_adaln.is_fp32(q):  # on the FMA units: a tile whose operands fit the registers
        return Config(32, 32, 16, 8, 2)
    # With 8 channels a tile has twice the rows of 16 in the small products, and needs more
    # registers than half.
    narrow = q.shape[2] < 16
    if capability[0] == 9:  # two blocks a processor: 96 KB, half the registers each
        return Config(128, 32, 64, 8, 3, None if narrow else 128)
    if capability[0] in (10, 11):
        return Config(128, 32, 64, 8, 3)
    # 49 KB: 8.6, 8.9 and 12.0 have 99. Two blocks of 4 warps for the same reason as above.
    return Config(128, 32, 32, 8 if narrow else 4, 4)


def block_f(p: int, F: int) -> int:
    """Columns of fc1 at a time: few enough that the hidden values of a tile, whose rows are its
    patches times its pixels, fit the registers beside what waits for them."""
    return 32 if p >= 16 and F % 32 == 0 else 16


def key(q: Tensor, u: Tensor, *rest: object) -> str:
    return pixel_adaln.key(q, u)


def candidates(q: Tensor, *rest: object) -> list[Config]:
    return pixel_adaln.candidates(q, 32)


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
                BLOCK_F=block_f(p, F),
                **pixel_adaln.constants(chosen, p, D),
                **pixel_adaln.options(chosen),
            )
    return out
