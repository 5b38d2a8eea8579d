"""The kernels of local_decoder_up on the emulator of a block (hopper/emulator.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from emulated import FAULTS, EmulatorError, library
from torch import Tensor

SOURCE = "local_decoder_up.cpp"


class Picture(ctypes.Structure):
    """`Picture` of csrc/cuda/local_decoder_up.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("stride_b", "stride_h", "stride_w")),
    )


class Taps(ctypes.Structure):
    """`Taps` of csrc/cuda/local_decoder_up.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("stride_n", "stride_c", "stride_r", "stride_s")),
    )


class Args(ctypes.Structure):
    """`LocalDecoderUpArgs` of csrc/cuda/local_decoder_up.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("B", "S", "rows", "columns")),
        *((name, ctypes.c_int64) for name in ("Ci", "Cu", "Cs", "Co")),
        *(("x", Picture), ("skip", Picture)),
        *(("up_weight", Taps), ("up_bias", ctypes.c_void_p)),
        *(("weight", Taps), ("bias", ctypes.c_void_p)),
        *(("workspace", ctypes.c_void_p), ("out", ctypes.c_void_p)),
    )


class Call(ctypes.Structure):
    """`Call` of hopper/local_decoder_up.cpp."""

    _fields_ = (
        ("args", Args),
        *((name, ctypes.c_int) for name in ("slots", "fault", "low", "high")),
        ("seed", ctypes.c_uint64),
    )


class Up:
    """One call; what its kernels do not write stays NaN."""

    def __init__(
        self,
        x: Tensor,
        skip: Tensor,
        up_weight: Tensor,
        up_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> None:
        B, rows, columns, Ci = x.shape
        S, *_, Cs = skip.shape
        Co, Cu = weight.shape[0], up_weight.shape[0]
        self.kept = (x, skip, up_weight, up_bias.contiguous(), weight, bias.contiguous())
        count = library(SOURCE).up_workspace(Ci, Cs)
        self.workspace = torch.full((count // 2,), torch.nan, dtype=torch.bfloat16)
        self.out = torch.full((B, 2 * rows, 2 * columns, Co), torch.nan, dtype=x.dtype)
        self.args = Args(
            *(B, S, rows, columns, Ci, Cu, Cs, Co),
            *(Picture(t.data_ptr(), *t.stride()[:3]) for t in (x, skip)),
            *(Taps(up_weight.data_ptr(), *up_weight.stride()), self.kept[3].data_ptr()),
            *(Taps(weight.data_ptr(), *weight.stride()), self.kept[5].data_ptr()),
            *(self.workspace.data_ptr(), self.out.data_ptr()),
        )

    def compose(self, **how: object) -> Tensor:
        """The workspace: weights as `multiply` reads them."""
        self._run("emulate_compose", **how)
        return self.workspace

    def multiply(self, **how: object) -> Tensor:
        self._run("emulate_multiply", **how)
        return self.out

    def _run(
        self,
        function: str,
        slots: int = 4,
        seed: int = 0,
        fault: str = "none",
        which: tuple[int, int] = (0, 0),
    ) -> None:
        call = Call(self.args, slots, FAULTS.index(fault), *which, seed)
        message = ctypes.create_string_buffer(400)
        if getattr(library(SOURCE), function)(ctypes.byref(call), message, len(message)):
            raise EmulatorError(message.value.decode())


def local_decoder_up(
    *args: Tensor, changed: Mapping[str, object] | None = None, **how: object
) -> Tensor:
    """The op by the CUDA kernels.

    Args:
        changed: fields of `Args` to give instead.
        how: slots, blocks that run at once: what images are cut by. seed: of the order of
            everything in a block. fault, which: what goes wrong on purpose in the second kernel, at
            those of its barriers and waits that a thread comes to n-th.

    Raises:
        EmulatorError: a race, a deadlock, an access out of bounds, arguments that are refused.
    """
    call = Up(*args)
    for name, value in (changed or {}).items():
        setattr(call.args, name, value)
    call.compose(seed=how.get("seed", 0))
    return call.multiply(**how)
