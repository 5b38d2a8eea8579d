"""pixel_head and the student sampler's update in one pass, in Triton: x0 = x - t v, then
x_next = (1 - t') x0 + t' noise, or x + (t' - t) v, or x0 at t' = 0.

Bytes: B*H*W*(p*sizeof(q) + 4*C*arrays), arrays = x, x_next, and noise and x0 where there are any.
FLOPs: B*H*W*(p*(2*C + 4) + 6*C). Bandwidth-bound; apart the update takes 7 to 9 passes over the
image, some in fp64.

PiD at 2048 in bf16 (C 3, p 16): 134 MB of tokens and 50 MB each of x, noise and x_next, 285 MB,
0.095 ms at 3.0 TB/s (0.112 with x0), once a step: 0.12 % of its 77 ms.

fp64 state: a multiply, a subtraction and three conversions for each of the 12.6 M values. sm_80,
90 and 100 do half as many fp64 operations as fp32: nothing. sm_120 does 2 a clock and SM, 0.8 T/s
on 170 SMs at 2.4 GHz: 63 M operations are 0.08 ms beside 0.16 ms of memory (285 MB at 1.8 TB/s),
and in an ODE step of a network that predicts x0 its fp64 division, about 15 more, 0.3 ms: there
state_dtype=torch.float32 is the faster choice.

The update rounds where the sampler's own operations do, one by one, so that the result is bitwise
theirs: the kernel is compiled without contraction to multiply-add, and so is pixel_head's, whose
output it must repeat.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, pixel_head, pixel_rows
from .pixel_head import Config, colour, final_norm
from .pixel_rows import colours, segment

OP = "pixel_head_step"
MIN_TIME = 0.05  # of pixeldiff/ops/pixel_head_step.py


@triton.jit
def over(a, b):
    """a / b, rounded to fp32; "/" itself is exact in fp64 only."""
    if a.dtype == tl.float64:
        return (a / b).to(tl.float32)
    else:
        return tl.div_rn(a, b)


@triton.jit(do_not_specialize=["h", "w", "time_bits"])
def pixel_head_step_kernel(
    q_ptr,  # (B*h*w, PATCH*PATCH, P)
    norm_ptr,  # (P,)
    weight_ptr,  # (C, P) contiguous
    bias_ptr,  # (C,)
    x_ptr,  # (B, C, h*PATCH, w*PATCH)
    noise_ptr,  # as x; any valid pointer unless RULE is "sde"
    x_next_ptr,  # (B, C, h*PATCH, w*PATCH) contiguous
    x0_ptr,  # as x_next; any valid pointer when WANT_X0 is False
    h,
    w,
    x_stride_b,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    noise_stride_b,
    noise_stride_c,
    noise_stride_h,
    noise_stride_w,
    eps,
    # An fp64 number, as its bits: Triton passes floats as fp32. t; where the network predicts x0,
    # max(t, MIN_TIME), which is then all that is asked of t.
    time_bits: tl.int64,
    keep,  # 1 - t'
    add,  # t'
    move,  # t' - t
    RULE: tl.constexpr,  # "sde", "ode", or "last" at t' = 0
    PREDICTS_X0: tl.constexpr,
    STATE: tl.constexpr,  # tl.float64 or tl.float32
    WANT_X0: tl.constexpr,
    COLOURS: tl.constexpr,  # C
    PATCH: tl.constexpr,
    P: tl.constexpr,  # channels
    Q_STRIDE_N: tl.constexpr,
    Q_STRIDE_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r, py, X, inside = segment(w, PATCH, 1, BLOCK)
    b, Y = r // h, r % h * PATCH + py
    # int64 (r is) before any multiply: offsets into q and the images can pass 2^31.
    column = X.to(tl.int64)
    if not PREDICTS_X0 or RULE == "ode":
        x_row = x_ptr + (b * x_stride_b + Y * x_stride_h) + column * x_stride_w
        x = colours(x_row, x_stride_c, inside, COLOURS)
    if RULE == "sde":
        noise_row = noise_ptr + (b * noise_stride_b + Y * noise_stride_h) + column * noise_stride_w
        noise = colours(noise_row, noise_stride_c, inside, COLOURS)

    patch = r * w + X // PATCH
    pixels = q_ptr + patch * Q_STRIDE_N + (py * PATCH + X % PATCH) * Q_STRIDE_M
    normed = final_norm(pixels, inside, eps, P, BLOCK_P)
    time = time_bits.to(tl.int64).to(tl.float64, bitcast=True).to(STATE)
    height, width = h * PATCH, w * PATCH
    for k in tl.static_range(COLOURS):
        v = colour(normed, norm_ptr, weight_ptr, bias_ptr, k, P, BLOCK_P)
        out = ((b * COLOURS + k) * height + Y) * width + X
        x0 = v
        if not PREDICTS_X0:
            x0 = (x[k].to(STATE) - time * v.to(STATE)).to(tl.float32)
        if WANT_X0:
            tl.store(x0_ptr + out, x0, mask=inside)
        if RULE == "sde":
            x_next = keep * x0 + add * noise[k]
        elif RULE == "ode":
            if PREDICTS_X0:
                v = over(x[k].to(STATE) - x0.to(STATE), time)
            x_next = x[k] + move * v
        else:
            x_next = x0
        tl.store(x_next_ptr + out, x_next, mask=inside)


def why_not(
    q: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    noise: Tensor | None,
    t: float,
    t_next: float,
    ode: bool,
    predicts_x0: bool,
    fp64_state: bool,
    want_x0: bool,
    patch: int,
    eps: float,
) -> str | None:
    for name, state in (("x", x), ("noise", noise)):
        if state is not None and (state.device, state.dtype) != (q.device, torch.float32):
            return f"takes {name} in float32 on {q.device}, got {state.dtype} on {state.device}"
    return pixel_head.why_not(q, norm_weight, weight, bias, *x.shape[2:], patch, eps)


def heuristic(capability: tuple[int, int], q: Tensor, *rest: object) -> Config:
    """Half of pixel_head's tile: with x and noise in registers too, its own comes to more than 128
    a thread and spills. A heuristic; not yet measured."""
    config = pixel_head.heuristic(capability, q)
    return Config(max(16, config.block // 2), config.num_warps)


def key(
    q: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    noise: Tensor | None,
    t: float,
    t_next: float,
    ode: bool,
    predicts_x0: bool,
    fp64_state: bool,
    want_x0: bool,
    patch: int,
    eps: float,
) -> str:
    state = "fp64" if fp64_state else "fp32"
    return f"{pixel_rows.key(q.dtype, q.shape[2], patch)} {state}"


def candidates(q: Tensor, *rest: object) -> list[Config]:
    p = pixel_rows.channels(q.shape[2])
    return [c for c in pixel_head.candidates(q) if c.block * p <= 32 * 32 * c.num_warps]


def launch(
    q: Tensor,  # (B*N, P*P, p)
    norm_weight: Tensor,  # (p,)
    weight: Tensor,  # (C, p)
    bias: Tensor,  # (C,)
    x: Tensor,  # (B, C, H, W)
    noise: Tensor | None,  # (B, C, H, W)
    t: float,
    t_next: float,
    ode: bool,
    predicts_x0: bool,
    fp64_state: bool,
    want_x0: bool,
    patch: int,
    eps: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    images, colours, height, width = x.shape
    p, h, w = q.shape[2], height // patch, width // patch
    x_next = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x0 = torch.empty(x.shape if want_x0 else 0, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return x_next, x0
    rest = (x, noise, t, t_next, ode, predicts_x0, fp64_state, want_x0, patch, eps)
    args = (q, norm_weight, weight, bias, *rest)
    chosen = config or configs.choose(OP, Config, heuristic, key, args)
    t, t_next = float(t), float(t_next)
    rule = "last" if t_next == 0 else "ode" if ode else "sde"
    read = noise if rule == "sde" else x
    with torch.cuda.device_of(x):
        pixel_head_step_kernel[(pixel_rows.programs(images, h, w, patch, 1, chosen.block),)](
            q,
            *(v.contiguous() for v in (norm_weight, weight, bias)),
            x,
            read,
            x_next,
            x0 if want_x0 else x_next,
            h,
            w,
            *x.stride(),
            *read.stride(),
            eps,
            _bits(max(t, MIN_TIME) if predicts_x0 else t),
            1 - t_next,
            t_next,
            t_next - t,
            RULE=rule,
            PREDICTS_X0=predicts_x0,
            STATE=tl.float64 if fp64_state else tl.float32,
            WANT_X0=want_x0,
            COLOURS=colours,
            PATCH=patch,
            P=p,
            Q_STRIDE_N=q.stride(0),
            Q_STRIDE_M=q.stride(1),
            BLOCK_P=pixel_rows.channels(p),
            BLOCK=chosen.block,
            num_warps=chosen.num_warps,
            enable_fp_fusion=False,
        )
    return x_next, x0


def _bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]
