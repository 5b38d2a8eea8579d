"""Rows to e4m3 with one scale a row, in Triton.

Bytes: B*N*D*(sizeof(x) + 1) + 4*B*N. FLOPs: 3*B*N*D. Bandwidth-bound: one read and one write.
Attention outputs of PiD at 2048 in bf16, 16384 x 1536: 75 MB, 25 us on 3.0 TB/s; 14 of them and the
four of the PiT's attentions are 0.4 ms of a step of 51 ms in e4m3.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, e4m3, norm_rows
from .elementwise_rows import three_axes
from .norm_rows import Config

OP = "quantize_rows"


@triton.jit(do_not_specialize=["count", "N"])
def quantize_rows_kernel(
    x_ptr,  # (B, N, D)
    q_ptr,  # (B, N, D) e4m3, contiguous
    row_scale_ptr,  # (B, N) fp32, contiguous
    count,  # B * N
    N,
    D,
    x_stride_b,
    x_stride_n,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # int64 before any multiply: a row offset can pass 2^31.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = (row < count)[:, None] & (column < D)[None, :]
    x_offset = ((row // N) * x_stride_b + (row % N) * x_stride_n)[:, None] + column[None, :]
    x = tl.load(x_ptr + x_offset, mask=inside, other=0.0).to(tl.float32)
    row_scale = e4m3.row_scale(e4m3.largest_magnitude(x))
    q = e4m3.quantized(x, row_scale)
    tl.store(q_ptr + (row * D)[:, None] + column[None, :], q, mask=inside)
    tl.store(row_scale_ptr + row, row_scale, mask=row < count)


def why_not(x: Tensor) -> str | None:
    return norm_rows.why_not(x) or e4m3.why_not(x)


def heuristic(capability: tuple[int, int], x: Tensor) -> Config:
    """32 values a thread, twice what the norms have, which keep gains beside them: what every warp
    does for a row, its maximum and scale, is done half as often."""
    found = norm_rows.heuristic(x.shape[-1])
    return replace(found, num_warps=2) if norm_rows.columns(x.shape[-1]) <= 2048 else found


def key(x: Tensor) -> str:
    return norm_rows.key(x)


def candidates(x: Tensor) -> list[Config]:
    return norm_rows.candidates(x.shape[-1])


def launch(
    x: Tensor,  # (..., D)
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    row_scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if q.numel() == 0:
        return q, row_scale.fill_(1)
    x = three_axes(x)
    B, N, D = x.shape
    chosen = config or configs.choose(OP, Config, heuristic, key, (x,))
    with torch.cuda.device_of(x):
        quantize_rows_kernel[(triton.cdiv(B * N, chosen.rows),)](
            x,
            q,
            row_scale,
            B * N,
            N,
            D,
            x.stride(0),
            x.stride(1),
            ROWS=chosen.rows,
            BLOCK_D=norm_rows.columns(D),
            num_warps=chosen.num_warps,
        )
    return q, row_scale
