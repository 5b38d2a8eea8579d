"""The sm_90a pixel_adaln kernels on the emulator of a cluster (hopper/emulator.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from emulated import FAULTS, EmulatorError, library
from torch import Tensor
from torch.nn.functional import linear

from pixeldiff.native import DTYPE_CODES

SOURCE = "pixel_adaln.cpp"


class Args(ctypes.Structure):
    """`PixelAdalnArgs` of csrc/cuda/pixel_adaln/args.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "pixels", "D")),
        ("dtype", ctypes.c_int),
        ("q", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("q_stride_row", "q_stride_pixel")),
        ("u", ctypes.c_void_p),
        ("u_stride", ctypes.c_int64),
        ("ada_weight", ctypes.c_void_p),
        ("ada_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("ada_bias", "norm", "out")),
        ("eps", ctypes.c_float),
    )


class MlpArgs(ctypes.Structure):
    """`PixelAdalnMlpArgs` of csrc/cuda/pixel_adaln_mlp.h."""

    _fields_ = (
        ("common", Args),
        ("hidden", ctypes.c_int64),
        *((n, ctypes.c_void_p) for n in ("a", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")),
    )


class How(ctypes.Structure):
    """`How` of hopper/pixel_adaln.cpp."""

    _fields_ = (
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
    changed: Mapping[str, int] | None = None,
    **how: Any,
) -> Tensor:
    """The op by the sm_90a kernel; what it does not write stays NaN.

    Args:
        changed: fields of `MlpArgs` or of `Args` to give instead. how: as `emulate`.

    Raises:
        EmulatorError: a race, a deadlock, an access out of bounds, arguments that are refused.
    """
    a = linear(attn, expand_weight, expand_bias)
    out = torch.full(q.shape, torch.nan, dtype=q.dtype)
    mlp = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    args = MlpArgs(
        common(q, u, ada_weight, ada_bias, norm_weight, out, eps),
        fc1_weight.shape[0],
        *(t.data_ptr() for t in (a, *mlp)),
    )
    for name, value in (changed or {}).items():
        setattr(args if name in dict(MlpArgs._fields_) else args.common, name, value)
    emulate("emulate_pixel_adaln_mlp", args, **how)
    return out


def pixel_adaln_compress(
    q: Tensor,
    u: Tensor,
    ada_weight: Tensor,
    ada_bias: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    **how: Any,
) -> Tensor:
    """The op by the sm_90a kernel and a product of PyTorch's, as `modulated`."""
    z = modulated(q, u, ada_weight, ada_bias, norm_weight, eps, **how)
    return linear(z, weight, bias)


def modulated(
    q: Tensor,
    u: Tensor,
    ada_weight: Tensor,
    ada_bias: Tensor,
    norm_weight: Tensor,
    eps: float = 1e-6,
    *,
    changed: Mapping[str, int] | None = None,
    **how: Any,
) -> Tensor:
    """The z that the sm_90a kernel makes, (patches, pixels * 16); what it does not write stays NaN.

    Args:
        changed: fields of `Args` to give instead. how: as `emulate`.

    Raises:
        EmulatorError: as `pixel_adaln_mlp`.
    """
    z = torch.full((q.shape[0], q.shape[1] * 16), torch.nan, dtype=q.dtype)
    args = common(q, u, ada_weight, ada_bias, norm_weight, z, eps)
    for name, value in (changed or {}).items():
        setattr(args, name, value)
    emulate("emulate_pixel_adaln_compress", args, **how)
    return z


def common(
    q: Tensor,
    u: Tensor,
    ada_weight: Tensor,
    ada_bias: Tensor,
    norm: Tensor,
    out: Tensor,
    eps: float = 1e-6,
) -> Args:
    return Args(
        *(*q.shape[:2], u.shape[1], DTYPE_CODES[q.dtype]),
        *(q.data_ptr(), q.stride(0), q.stride(1), u.data_ptr(), u.stride(0)),
        *(ada_weight.data_ptr(), ada_weight.stride(0)),
        *(t.data_ptr() for t in (ada_bias, norm, out)),
        eps,
    )


def emulate(
    function: str,
    args: ctypes.Structure,
    *,
    clusters: int = 1,
    seed: int = 0,
    fault: str = "none",
    barriers: tuple[int, int] = (0, 0),
) -> None:
    """
    Args:
        clusters: of the grid, run one after the other. seed: of the order of everything in one.
        fault, barriers: what goes wrong on purpose, at barriers with addresses in that range.
    """
    how = How(clusters, FAULTS.index(fault), *barriers, seed)
    message = ctypes.create_string_buffer(400)
    run = getattr(library(SOURCE), function)
    if run(ctypes.byref(args), ctypes.byref(how), message, len(message)):
        raise EmulatorError(message.value.decode())


def barriers(op: str) -> dict[str, tuple[int, int]]:
    """Addresses of the barriers of all stages of a kernel: from, to."""
    found = (ctypes.c_int * 4)()
    library(SOURCE).pixel_adaln_memory(is_compress(op), found)
    full, empty, stages, _ = found
    return {"full": (full, full + 8 * stages), "empty": (empty, empty + 8 * stages)}


def is_compress(op: str) -> bool:
    return op == "pixel_adaln_compress"
