"""qkv_norm_rope on Hopper; kernel in csrc/cuda/qkv_norm_rope_sm90.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from .hopper import why_not_hopper

HEAD_DIMS = (64, 72, 128)
ALIGNMENT = 16  # bytes: of addresses and strides, for the copy engine and for loads
MAX_TILES = 1 << 31
TILE_ROWS = 128
NAMES = ("x", "weight", "q_weight", "k_weight", "cos", "sin")


def why_not(
    x: Tensor,
    weight: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    txt_x: Tensor | None,
    txt_weight: Tensor | None,
    txt_q_weight: Tensor | None,
    txt_k_weight: Tensor | None,
    txt_cos: Tensor | None,
    txt_sin: Tensor | None,
    heads: int,
    eps: float,
) -> str | None:
    image = (x, weight, q_weight, k_weight, cos, sin)
    text = (txt_x, txt_weight, txt_q_weight, txt_k_weight, txt_cos, txt_sin)
    reason = native.why_not_cuda() or native.why_not_tensors("cuda", *image, *text)
    return (
        reason or why_not_hopper("qkv_norm_rope_cuda", x.device) or why_not_call(image, text, heads)
    )


def why_not_call(image: tuple, text: tuple, heads: int) -> str | None:
    """Why the kernel cannot take these shapes and strides, on whatever device they are, or None."""
    x, weight = image[:2]
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, got {x.dtype}"
    d = weight.shape[0] // (3 * heads)
    if d not in HEAD_DIMS:
        return f"takes head dims {', '.join(map(str, HEAD_DIMS))}, got {d}"
    if x.shape[2] == 0:
        return "needs at least one channel of x, got 0"
    columns = -(-3 * heads // (256 // d))
    rows = (s[0].shape[1] for s in (image, text) if s[0] is not None)
    if x.shape[0] * sum(-(-n // TILE_ROWS) for n in rows) * columns >= MAX_TILES:
        return f"takes fewer than 2^31 tiles of {TILE_ROWS} rows, got {tuple(x.shape)}"
    for who, stream in (("", image), ("text ", text)):
        if stream[0] is not None:
            reason = _why_not_stream(who, stream, x.dtype)
            if reason is not None:
                return reason
    return None


def _why_not_stream(who: str, stream: tuple[Tensor, ...], dtype: torch.dtype) -> str | None:
    for name, t in zip(NAMES, stream, strict=True):
        wanted = torch.float32 if name in ("cos", "sin") else dtype
        if t.dtype != wanted:
            return f"takes {who}{name} in {wanted}, got {t.dtype}"
        if t.numel() and t.data_ptr() % ALIGNMENT:
            return f"needs {who}{name} to start at a multiple of {ALIGNMENT} bytes"
        for rows, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True):
            if rows > 1 and (stride <= 0 or stride * t.element_size() % ALIGNMENT):
                return (
                    f"needs strides of {who}{name} that are positive multiples of {ALIGNMENT} "
                    f"bytes, got {tuple(t.stride())} elements; call .contiguous()"
                )
    return None


def launch(
    x: Tensor,  # (B, N, K)
    weight: Tensor,  # (3*G*d, K), dtype of x
    q_weight: Tensor,  # (d,), dtype of x
    k_weight: Tensor,  # (d,), dtype of x
    cos: Tensor,  # (N, d/2) fp32
    sin: Tensor,  # (N, d/2) fp32
    txt_x: Tensor | None,  # (B, T, K), dtype of x; the other text arguments go with it
    txt_weight: Tensor | None,  # (3*G*d, K)
    txt_q_weight: Tensor | None,  # (d,)
    txt_k_weight: Tensor | None,  # (d,)
    txt_cos: Tensor | None,  # (T, d/2)
    txt_sin: Tensor | None,  # (T, d/2)
    heads: int,
    eps: float,
) -> Tensor:
    B, N, K = x.shape
    T = 0 if txt_x is None else txt_x.shape[1]
    d = weight.shape[0] // (3 * heads)
    out = torch.empty((3, B, T + N, heads, d), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    native.load().qkv_norm_rope_cuda(
        (B, K, heads, d),
        native.DTYPE_CODES[x.dtype],
        _stream(txt_x, txt_weight, txt_q_weight, txt_k_weight, txt_cos, txt_sin),
        _stream(x, weight, q_weight, k_weight, cos, sin),
        out.data_ptr(),
        eps,
        x.device.index,
        torch.cuda.current_stream(x.device).cuda_stream,
    )
    return out


def _stream(x, weight, q_weight, k_weight, cos, sin) -> tuple:
    if x is None:
        return 0, (0, 0, 0), (0, 0), 0, 0, (0, 0), (0, 0)
    return (
        x.shape[1],
        native.rows(x),
        (weight.data_ptr(), weight.stride(0)),
        q_weight.data_ptr(),
        k_weight.data_ptr(),
        (cos.data_ptr(), cos.stride(0)),
        (sin.data_ptr(), sin.stride(0)),
    )
