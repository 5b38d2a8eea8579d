"""joint_attention by one kernel of PyTorch's, whichever PyTorch itself would pick.

`torch.nn.attention.sdpa_kernel` chooses too, but by switches of the whole process: a call in
another thread would see them, and two that overlap can leave one off for good. The operators below
are what attention ends in and turn no switch: threads and CUDA graphs are safe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)

ALIGNMENT = 8  # of the head dim; PyTorch would pad a copy


@dataclass(frozen=True)
class Kernel:
    """One of them, with what a backend has.

    Args:
        takes: PyTorch's own predicate. It also says no where the user has switched the kernel off.
        run: (q, k, v, scale) -> its results, o first; all (B, G, rows, d).
    """

    name: str
    takes: Callable[[SDPAParams], bool]
    run: Callable[[Tensor, Tensor, Tensor, float], tuple]

    def why_not(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        key_mask: Tensor | None,
        return_lse: bool,
    ) -> str | None:
        if not q.is_cuda:
            return f"runs on cuda, the tensors are on {q.device}"
        if key_mask is not None or return_lse:
            return "takes no mask and returns no log-sum-exp here"
        if q.shape[-1] % ALIGNMENT:
            return f"takes head dims that are multiples of {ALIGNMENT}, got {q.shape[-1]}"
        if q.numel() == 0:
            return "takes no empty tensors"
        if not self.takes(SDPAParams(*_heads_first(q, k, v), None, 0.0, False, False)):
            return (
                f"PyTorch {torch.__version__} says it cannot take the call, or it is switched off"
            )
        return None

    def launch(
        self,
        q: Tensor,  # (B, L, G, d)
        k: Tensor,  # (B, S, G, d), dtype of q
        v: Tensor,  # (B, S, G, d), dtype of q
        scale: float,
        key_mask: None,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor]:
        o, *_ = self.run(*_heads_first(q, k, v), scale)
        return o.transpose(1, 2), q.new_empty(0, dtype=torch.float32)


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in tensors)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, scale=scale)


def _efficient(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple:
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, False, scale=scale)


flash = Kernel("flash", can_use_flash_attention, _flash)
cudnn = Kernel("cudnn", can_use_cudnn_attention, _cudnn)
efficient = Kernel("efficient", can_use_efficient_attention, _efficient)
