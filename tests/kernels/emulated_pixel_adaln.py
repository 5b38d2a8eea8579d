"""The sm_90a kernel of pixel_adaln_mlp on the emulator of a cluster (hopper/emulator.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from emulated import FAULTS, EmulatorError, library
from torch import Tensor
from torch.nn.functional import linear

from pixeldiff.native import DTYPE_CODES

SOURCE = "pixel_adaln.cpp"


class Args(ctypes.Structure):
    """`PixelAdalnMlpArgs` of csrc/cuda/pixel_adaln_mlp.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "pixels", "D", "hidden")),
        ("dtype", ctypes.c_int),
        ("q", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("q_stride_row", "q_stride_pixel")),
        ("u", ctypes.c_void_p),
        ("u_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("a", "ada_weight")),
        ("ada_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("ada_bias", "norm", "fc1_weight", "fc1_bias")),
        *((name, ctypes.c_void_p) for name in ("fc2_weight", "fc2_bias", "out")),
        ("eps", ctypes.c_float),
    )


class Call(ctypes.Structure):
    """`Call` of hopper/pixel_adaln.cpp."""

    _fields_ = (
        ("args", Args),
        *((name, ctypes.c_int) for name in ("clusters", "fault", "low", "high")),
        ("seed", ctypes.c_uint64),
    )


def pixel_adaln_mlp(
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
    eps: float = 1e-6,
    *,
    clusters: int = 1,
    seed: int = 0,
    fault: str = "none",
    barriers: tuple[int, int] = (0, 0),
    changed: Mapping[str, int] | None = None,
) -> Tensor:
    """The op by the sm_90a kernel; what it does not write stays NaN.

    Args:
        clusters: of the grid, run one after the other. seed: of the order of everything in one.
        fault, barriers: what goes wrong on purpose, at barriers with addresses in that range.
        changed: fields of `Args` to give instead.

    Raises:
        EmulatorError: a race, a deadlock, an access out of bounds, arguments that are refused.
    """
    a = linear(attn, expand_weight, expand_bias)
    out = torch.full(q.shape, torch.nan, dtype=q.dtype)
    rest = (norm_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, out)
    args = Args(
        *(*q.shape[:2], u.shape[1], fc1_weight.shape[0], DTYPE_CODES[q.dtype]),
        *(q.data_ptr(), q.stride(0), q.stride(1), u.data_ptr(), u.stride(0), a.data_ptr()),
        *(ada_weight.data_ptr(), ada_weight.stride(0), ada_bias.data_ptr()),
        *(t.data_ptr() for t in rest),
        eps,
    )
    for name, value in (changed or {}).items():
        setattr(args, name, value)
    call = Call(args, clusters, FAULTS.index(fault), *barriers, seed)
    message = ctypes.create_string_buffer(400)
    if library(SOURCE).emulate_pixel_adaln_mlp(ctypes.byref(call), message, 400):
        raise EmulatorError(message.value.decode())
    return out


def barriers() -> dict[str, tuple[int, int]]:
    """Addresses of the barriers of all stages: from, to."""
    found = (ctypes.c_int * 3)()
    library(SOURCE).pixel_adaln_barriers(found)
    full, empty, stages = found
    return {"full": (full, full + 8 * stages), "empty": (empty, empty + 8 * stages)}
