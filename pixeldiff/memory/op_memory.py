"""Live memory of a run on "meta" as it would be on a device, with what ops hold inside themselves.

PyTorch's meta kernels say what an op returns. What runs it decides what it holds meanwhile: the
plain PyTorch definition makes tensors of its own, which are counted one by one; a fused kernel
takes a workspace, which is stated here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..ops.cpu.pixel_adaln import CHUNK_BYTES
from ..ops.registry import OPS, Op
from .heap import Heap
from .live import LiveMemory

# Patches whose products a Triton launch holds at a time; of the two kernels' PIECE.
COMPRESS_PIECE, MLP_PIECE = 8192, 4096
NARROW = 32  # channels up to which Triton's local_decoder_up holds no tensor of full resolution
# What is compiled for each shape on a CPU, in 16 bits.
_PRODUCTS = frozenset(
    getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")
)
# A C++ kernel's own copies: weights in fp32, by output channel. Its threads' buffers are small.
_WIDE = 4


class OpMemory(LiveMemory):
    """`LiveMemory` of what runs on "meta" inside the block.

    Args:
        device: "cpu" or "cuda", what the tensors on "meta" stand for.
        backend: of every op: "reference", "cpu" or "triton"; None is free choice on that device.
        gaps: of the heap, on "cpu"; see heap.py.
    """

    def __init__(self, device: str, backend: str | None = None, gaps: float = 1.0) -> None:
        super().__init__(Heap(gaps) if device == "cpu" else None)
        self.device, self.backend = device, backend
        self.products: set[tuple] = set()  # matrix products of different shapes, in 16 bits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _PRODUCTS and args[-1].dtype.itemsize == 2:
            self.products.add((func, *_signature(args)))
        if func.namespace != "pixeldiff":
            return super().__torch_dispatch__(func, types, args, kwargs)
        op = OPS[func._opname]
        args = _all_arguments(func, args, kwargs or {})
        if op.name == "joint_attention":
            result = super().__torch_dispatch__(func, types, args)
            self.moment(_attention(args, self._chosen(op, args)), op.name)
            return result
        chosen = self._chosen(op, args)
        if chosen == "reference":
            with self:
                result = op.reference(*args)
                many = not isinstance(result, Tensor)
                return tuple(t.contiguous() for t in result) if many else result.contiguous()
        result = super().__torch_dispatch__(func, types, args)
        workspace = _WORKSPACES.get((op.name, chosen))
        self.moment(workspace(*args) if workspace else 0, f"{op.name} ({chosen}) inside itself")
        return result

    def _chosen(self, op: Op, args: tuple[Any, ...]) -> str:
        mine = ("cpu",) if self.device == "cpu" else ("cuda", "triton")
        if self.backend is not None and self.backend not in mine:
            return "reference"
        for b in op.backends:
            if b.name not in mine or self.backend not in (None, b.name):
                continue
            if self.backend is None and not b.offers(*args):
                continue
            if b.name != "cpu" or _runs_on_cpu(op.name, _signature(args)):
                return b.name
        return "reference"


def _all_arguments(func, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    rest = func._schema.arguments[len(args) :]
    return (*args, *(kwargs.get(a.name, a.default_value) for a in rest))


def _signature(args: tuple[Any, ...]) -> tuple:
    return tuple(
        (tuple(a.shape), a.stride(), a.dtype) if isinstance(a, Tensor) else (a,) for a in args
    )


@functools.lru_cache(maxsize=4096)
def _runs_on_cpu(op: str, signature: tuple) -> bool:
    """Whether the C++ kernel takes tensors of these shapes, as it is asked by a real call."""
    backend = next(b for b in OPS[op].backends if b.name == "cpu")
    with FakeTensorMode():
        args = [
            torch.empty_strided(s[0], s[1], dtype=s[2], device="cpu") if len(s) == 3 else s[0]
            for s in signature
        ]
        return backend.load().why_not(*args) is None


# ---- Inside an op ------------------------------------------------------------------------------


def _attention(args: tuple[Any, ...], chosen: str) -> int:
    """PyTorch's flash attention keeps a number a row; the definition copies k and v for a mask."""
    q, k, v, _, mask, _ = args
    if chosen != "reference":
        return 0
    copies = 0 if mask is None else k.nbytes + v.nbytes + mask.numel() * (2 + q.itemsize) + q.nbytes
    return copies + 4 * q.shape[0] * q.shape[1] * q.shape[2]


def _compress_triton(q: Tensor, *_: Any) -> int:
    return min(q.shape[0], COMPRESS_PIECE) * q.shape[1:].numel() * q.itemsize


def _mlp_triton(q: Tensor, *_: Any) -> int:
    return min(q.shape[0], MLP_PIECE) * q.shape[1:].numel() * q.itemsize


def _pixel_cpu(q: Tensor, u: Tensor, *_: Any) -> int:
    return CHUNK_BYTES


def _down_cpu(x: Tensor, weight: Tensor, bias: Tensor) -> int:
    return _WIDE * (weight.numel() + bias.numel())


def _up_cpu(x, skip, up_weight, up_bias, weight, bias) -> int:
    return _WIDE * (up_weight.numel() + weight.numel() + bias.numel())


def _up_triton(x: Tensor, skip: Tensor, up_weight: Tensor, *_: Any) -> int:
    """The raised tensor, where the level is too wide for the form without it."""
    up, before = up_weight.shape[:2]
    if (before <= NARROW and up <= NARROW) and skip.shape[3] <= NARROW:
        return 0
    return skip.shape[:3].numel() * x.shape[0] // skip.shape[0] * up * x.itemsize


_WORKSPACES: dict[tuple[str, str], Callable[..., int]] = {
    ("pixel_adaln_compress", "triton"): _compress_triton,
    ("pixel_adaln_mlp", "triton"): _mlp_triton,
    ("pixel_adaln_compress", "cpu"): _pixel_cpu,
    ("pixel_adaln_mlp", "cpu"): _pixel_cpu,
    ("local_decoder_down", "cpu"): _down_cpu,
    ("local_decoder_up", "cpu"): _up_cpu,
    ("local_decoder_up", "triton"): _up_triton,
}
