"""pixel_head_step on the CPU; kernel in csrc/cpu/pixel_head_step.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from . import pixel_head
from .pixel_adaln import fp32


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
        if state is not None and (state.device.type, state.dtype) != ("cpu", torch.float32):
            return f"takes {name} in float32 on the CPU, got {state.dtype} on {state.device}"
    return pixel_head.why_not(q, norm_weight, weight, bias, *x.shape[2:], patch, eps)


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
    *,
    isa: int | None = None,  # a code of native.ISA_CODES; None takes the best
    threads: int | None = None,  # None takes PyTorch's number
) -> tuple[Tensor, Tensor]:
    x_next = x.new_empty(x.shape)
    x0 = x.new_empty(x.shape if want_x0 else 0)
    if x.numel() == 0:
        return x_next, x0
    _, channels, height, width = x.shape
    q, norm, weight, bias = q.contiguous(), fp32(norm_weight), fp32(weight), fp32(bias)
    x = x.contiguous()
    noise = None if noise is None else noise.contiguous()
    native.load().pixel_head_step_cpu(
        (q.shape[0], height, width, channels),
        patch,
        q.shape[2],
        native.DTYPE_CODES[q.dtype],
        q.data_ptr(),
        norm.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        eps,
        x.data_ptr(),
        0 if noise is None else noise.data_ptr(),
        x_next.data_ptr(),
        x0.data_ptr() if want_x0 else 0,
        t,
        t_next,
        ode,
        predicts_x0,
        fp64_state,
        native.best_isa() if isa is None else isa,
        torch.get_num_threads() if threads is None else threads,
    )
    return x_next, x0
