"""What an op is raced against that none of its backends is: vendors' kernels, ours of other
devices, and what the networks do without it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from pixeldiff.ops import registry


@dataclass(frozen=True)
class Rival:
    """Takes the op's arguments, on a GPU only. `context` as of a `Candidate`; `needs` is a backend
    of the op that must be able to take the call."""

    call: Callable[..., Any]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    needs: str | None = None


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2).contiguous()


def _mma(*args: Any) -> Any:
    from pixeldiff.ops.cuda import joint_attention

    return joint_attention.launch(*args, kernel="mma")


def _in_parts(
    x, weight, q_weight, k_weight, cos, sin, txt_x, txt_weight, txt_q_weight, txt_k_weight, txt_cos,
    txt_sin, heads, eps,
) -> Tensor:  # fmt: skip
    text = None if txt_x is None else linear(txt_x, txt_weight)
    return torch.ops.pixeldiff.qk_norm_rope.default(
        *(linear(x, weight), q_weight, k_weight, cos, sin),
        *(text, txt_q_weight, txt_k_weight, txt_cos, txt_sin, heads, eps),
    )


def _only(backend: SDPBackend) -> Callable[[], contextlib.AbstractContextManager]:
    return lambda: sdpa_kernel(backend)


# PyTorch's kernels of attention in 16 bits are backends of that op, and race there.
RIVALS: Mapping[str, Mapping[str, Rival]] = {
    "joint_attention": {"cuda-mma": Rival(_mma, needs="cuda")},
    # The call's own dtype: whether e4m3 pays.
    "joint_attention_fp8": {
        "flash": Rival(_attention, _only(SDPBackend.FLASH_ATTENTION)),
        "cudnn": Rival(_attention, _only(SDPBackend.CUDNN_ATTENTION)),
    },
    "qkv_norm_rope": {"in-parts": Rival(_in_parts)},
}


def refusal(op: str, rival: Rival, args: tuple[Any, ...]) -> str | None:
    """Why a rival cannot take the call, or None."""
    if not args[0].is_cuda:
        return f"runs on cuda, the tensors are on {args[0].device}"
    return None if rival.needs is None else dict(registry.explain(op, *args)).get(rival.needs)
