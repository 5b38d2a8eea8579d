"""The kernel of local_decoder_down on the emulator of a block (hopper/emulator.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from emulated import FAULTS, EmulatorError, library
from emulated_local_decoder_up import Picture, Taps
from torch import Tensor

from pixeldiff import native
from pixeldiff.ops.cuda.local_decoder_up import strides

SOURCE = "local_decoder_down.cpp"


class Args(ctypes.Structure):
    """`LocalDecoderDownArgs` of csrc/cuda/local_decoder_down.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("B", "rows", "columns", "Ci", "Co")),
        *(("x_dtype", ctypes.c_int), ("x", Picture), ("x_plane", ctypes.c_int64)),
        *(("weight", Taps), ("bias", ctypes.c_void_p)),
        *(("skip", ctypes.c_void_p), ("pooled", ctypes.c_void_p)),
    )


class Call(ctypes.Structure):
    """`Call` of hopper/local_decoder_down.cpp."""

    _fields_ = (
        ("args", Args),
        *((name, ctypes.c_int) for name in ("slots", "fault", "low", "high")),
        ("seed", ctypes.c_uint64),
    )


def local_decoder_down(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    changed: Mapping[str, object] | None = None,
    slots: int = 4,
    seed: int = 0,
    fault: str = "none",
    which: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor]:
    """The op by the CUDA kernel; what it does not write stays NaN.

    Args:
        changed: fields of `Args` to give instead, those of x as "x.stride_h".
        slots: blocks that run at once: what images are cut by.
        seed: of the order of everything in a block.
        fault, which: what goes wrong on purpose, at those of its barriers and waits that a thread
            comes to n-th.

    Raises:
        EmulatorError: a race, a deadlock, an access out of bounds, arguments that are refused.
    """
    images, height, width, before = x.shape
    after, bias = weight.shape[0], bias.contiguous()
    skip = torch.full((images, height, width, after), torch.nan, dtype=weight.dtype)
    pooled = torch.full((images, height // 2, width // 2, after), torch.nan, dtype=weight.dtype)
    args = Args(
        *(images, height // 2, width // 2, before, after),
        *(native.DTYPE_CODES[x.dtype], Picture(x.data_ptr(), *strides(x)), x.stride(3)),
        *(Taps(weight.data_ptr(), *weight.stride()), bias.data_ptr()),
        *(skip.data_ptr(), pooled.data_ptr()),
    )
    for name, value in (changed or {}).items():
        owner, _, field = name.rpartition(".")
        setattr(getattr(args, owner) if owner else args, field, value)
    call = Call(args, slots, FAULTS.index(fault), *which, seed)
    message = ctypes.create_string_buffer(400)
    if library(SOURCE).emulate_down(ctypes.byref(call), message, len(message)):
        raise EmulatorError(message.value.decode())
    return skip, pooled
