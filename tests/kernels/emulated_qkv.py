"""The sm_90a projection kernel (csrc/cuda/qkv) on the emulator of emulated.py."""

from __future__ import annotations

import ctypes

import torch
from emulated import FAULTS, EmulatorError, library
from torch import Tensor

SOURCE = "qkv.cpp"


class Stream(ctypes.Structure):
    """`Stream` of hopper/qkv.cpp."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("x_stride_b", ctypes.c_int64),
        ("x_stride_n", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("weight_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("q_weight", "k_weight", "cos", "sin")),
        ("cos_stride", ctypes.c_int64),
        ("sin_stride", ctypes.c_int64),
    )

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor):
        return cls(
            *(x.shape[1], x.data_ptr(), x.stride(0), x.stride(1)),
            *(weight.data_ptr(), weight.stride(0)),
            *(t.data_ptr() for t in (q, k, cos, sin)),
            *(cos.stride(0), sin.stride(0)),
        )


class Call(ctypes.Structure):
    """`Call` of hopper/qkv.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in "BKGd"),
        ("image", Stream),
        ("text", Stream),
        ("out", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("bf16", "blocks", "fault", "low", "high")),
        ("seed", ctypes.c_uint64),
    )


def call_of(image, text, out, heads, eps=1e-6, blocks=2, fault="none", barriers=(0, 0), seed=0):
    """`Call` of the op's arguments; image and text as the six tensors of `Stream.of`."""
    x, q_weight = image[0], image[2]
    return Call(
        *(x.shape[0], x.shape[2], heads, q_weight.numel()),
        Stream.of(*image),
        Stream() if text is None else Stream.of(*text),
        out.data_ptr(),
        eps,
        *(x.dtype == torch.bfloat16, blocks, FAULTS.index(fault), *barriers),
        seed,
    )


def qkv_norm_rope(image, text, heads: int, eps: float = 1e-6, **how) -> Tensor:
    """The op's result by the sm_90a kernel; what it does not write stays NaN.

    Args:
        image, text: x, weight, q_weight, k_weight, cos, sin of a stream; text may be None.
        how: `blocks` of the grid, run one after the other; `seed` of the order of everything in a
            block; `fault` and `barriers`, what goes wrong on purpose, at which addresses.

    Raises:
        EmulatorError: a race, a deadlock, an access out of bounds.
    """
    rows = image[0].shape[1] + (0 if text is None else text[0].shape[1])
    shape = (3, image[0].shape[0], rows, heads, image[2].numel())
    out = torch.full(shape, torch.nan, dtype=image[0].dtype)
    call = call_of(image, text, out, heads, eps, **how)
    message = ctypes.create_string_buffer(400)
    if library(SOURCE).emulate_qkv(ctypes.byref(call), message, 400):
        raise EmulatorError(message.value.decode())
    return out


def shared_memory(d: int) -> list[int]:
    """Bytes in all, stages, bytes of a stage, of x in it, addresses of the first full and empty."""
    found = (ctypes.c_int * 6)()
    library(SOURCE).qkv_shared_memory(d, found)
    return list(found)


def barriers_of(d: int) -> dict[str, tuple[int, int]]:
    """Addresses of the barriers of all stages: from, to."""
    _, stages, _, _, full, empty = shared_memory(d)
    return {"full": (full, full + 8 * stages), "empty": (empty, empty + 8 * stages)}
