"""C++ of csrc/cuda that runs on a CPU, built for ctypes: its arithmetic, and whole kernels on an
emulator of a block of threads (hopper/emulator.h)."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT
from torch import Tensor

from pixeldiff import native

HERE = Path(__file__).parent / "hopper"
# Faults of the emulator, hopper/emulator.h.
FAULTS = (
    "none",
    "skip-wait",
    "drop-arrival",
    "no-proxy-fence",
    "no-product-wait",
    "other-swizzle",
    "short-copy",
    "weak-wait",
    "skip-sync",
    "other-column",
)


@functools.cache
def library(source: str) -> ctypes.CDLL:
    """A file of hopper/, compiled; skips the test where there is no compiler for it."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ or clang++, on Linux")
    folder = tempfile.TemporaryDirectory(prefix="pixeldiff-emulated-")
    out = Path(folder.name) / "library.so"
    # No fused multiplications but those the source asks for: the GPU's bits.
    flags = ["-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-shared", "-fPIC"]
    if os.environ.get("PIXELDIFF_SANITIZE"):  # what `make sanitize` sets
        flags += [f"-fsanitize={os.environ['PIXELDIFF_SANITIZE']}", "-fno-sanitize-recover=all"]
        flags += ["-O1", "-g1"]
    command = [compiler, *flags, "-I", str(ROOT / "csrc"), "-o", str(out), str(HERE / source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    loaded = ctypes.CDLL(str(out))
    loaded.folder = folder  # goes with it
    return loaded


class Call(ctypes.Structure):
    """`Call` of hopper/attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in "BLSGd"),
        *((name, ctypes.c_void_p) for name in "qkv"),
        ("strides", ctypes.c_int64 * 9),
        ("o", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("mask_stride_b", ctypes.c_int64),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("bf16", "blocks", "fault", "low", "high")),
        ("seed", ctypes.c_uint64),
    )


class EmulatorError(Exception):
    """What the emulator noticed."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    return_lse: bool = False,
    *,
    kernel: str = "sm90",
    blocks: int = 2,
    seed: int = 0,
    fault: str = "none",
    barriers: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor]:
    """(o, lse) of an attention kernel; what it does not write stays NaN.

    Args:
        kernel: sm90 | mma, csrc/cuda/attention/<kernel>.h.
        blocks: of the grid, run one after the other; of mma there are as many as it needs.
        seed: of the order of everything in a block.
        fault, barriers: what goes wrong on purpose, at barriers with addresses in that range; of
            the block's barriers and waits for own copies, at those a thread comes to n-th.

    Raises:
        EmulatorError: a race, a deadlock, an access out of bounds.
    """
    B, L, G, d = q.shape
    o = torch.full(q.shape, torch.nan, dtype=q.dtype)
    lse = torch.full((B, L, G) if return_lse else (0,), torch.nan)
    strides = [stride for t in (q, k, v) for stride in t.stride()[:3]]
    call = Call(
        *(B, L, k.shape[1], G, d),
        *(t.data_ptr() for t in (q, k, v)),
        (ctypes.c_int64 * 9)(*strides),
        o.data_ptr(),
        lse.data_ptr() if return_lse else None,
        None if key_mask is None else key_mask.data_ptr(),
        0 if key_mask is None else key_mask.stride(0),
        d**-0.5 if scale is None else scale,
        *(q.dtype == torch.bfloat16, blocks, FAULTS.index(fault), *barriers),
        seed,
    )
    message = ctypes.create_string_buffer(400)
    run = {"sm90": "emulate_attention", "mma": "emulate_attention_mma"}[kernel]
    if getattr(library("attention.cpp"), run)(ctypes.byref(call), message, 400):
        raise EmulatorError(message.value.decode())
    return o, lse


def barriers_of(d: int, source: str = "attention.cpp") -> dict[str, tuple[int, int]]:
    """Addresses of an sm_90a kernel's barriers, by name: from, to (all stages of a ring)."""
    found = (ctypes.c_int * 8)()
    library(source).attention_barriers(d, found)
    *starts, stages = found
    names = ("q_full", "q_empty", "k_full", "k_empty", "v_full", "v_clean", "v_empty")
    return {
        name: (start, start + 8 * (1 if name[0] == "q" else stages))
        for name, start in zip(names, starts, strict=True)
    }


# --- e4m3


class CallFp8(ctypes.Structure):
    """`Call` of hopper/attention_fp8.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in "BLSGd"),
        *((name, ctypes.c_void_p) for name in "qkv"),
        ("strides", ctypes.c_int64 * 9),
        *((name, ctypes.c_void_p) for name in ("o", "workspace")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("dtype", "blocks", "fault", "low", "high", "bits14")),
        ("seed", ctypes.c_uint64),
    )


@dataclass
class Quantised:
    """What attention in e4m3 multiplies, as views of its workspace: bytes and fp32."""

    q: Tensor  # (B, G, L, d to a multiple of 16)
    k: Tensor  # (B, G, S, the same)
    v: Tensor  # (B, G, d, S to a multiple of 32)
    q_scale: Tensor  # (B, G, L)
    k_scale: Tensor  # (B, G, steps of 128 keys)
    v_scale: Tensor  # (B, G, d)
    mean: Tensor  # (B, G, d), of k over its rows


class AttentionFp8:
    """One call of the sm_90a attention in e4m3; strides of the arguments are not negative.

    Args:
        scale: of the logits. blocks, seed, fault, barriers: as `attention`; the fault is the
            attending kernel's.
        bits14: sums of e4m3 products keep 14 bits, as Hopper's do; else they are fp32.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        *,
        blocks: int = 2,
        seed: int = 0,
        fault: str = "none",
        barriers: tuple[int, int] = (0, 0),
        bits14: bool = False,
    ) -> None:
        B, L, G, d = q.shape
        self._arguments = q, k, v
        self.o = torch.full(q.shape, torch.nan, dtype=q.dtype)
        strides = [stride for t in (q, k, v) for stride in t.stride()[:3]]
        self.call = CallFp8(
            *(B, L, k.shape[1], G, d),
            *(t.data_ptr() for t in (q, k, v)),
            (ctypes.c_int64 * 9)(*strides),
            *(self.o.data_ptr(), None),
            d**-0.5 if scale is None else scale,
            native.DTYPE_CODES[q.dtype],
            *(blocks, FAULTS.index(fault), *barriers, bits14),
            seed,
        )
        plan = (ctypes.c_int64 * 10)()
        library("attention_fp8.cpp").plan(ctypes.byref(self.call), plan)
        self.workspace_bytes = plan[0]
        # NaN wherever nothing is written, whether it is read as e4m3 or as fp32.
        whole = torch.full((plan[0] + 256,), 0xFF, dtype=torch.uint8)
        self._workspace = whole[-whole.data_ptr() % 256 :][: plan[0]]
        self.call.workspace = self._workspace.data_ptr()
        width, keys, steps = plan[8], plan[9], -(-k.shape[1] // 128)
        shapes = (
            *((B, G, L, width), (B, G, k.shape[1], width), (B, G, d, keys)),
            *((B, G, L), (B, G, steps), (B, G, d), (B, G, d)),
        )
        views = []
        for at, shape in zip(plan[1:8], shapes, strict=True):
            size = 1 if len(shape) == 4 else 4
            part = self._workspace[at : at + size * math.prod(shape)]
            views.append(part.view(torch.uint8 if size == 1 else torch.float32).view(shape))
        self.quantised = Quantised(*views)

    def quantise(self) -> Quantised:
        self._run("emulate_quantize")
        return self.quantised

    def attend(self) -> Tensor:
        self._run("emulate_attend")
        return self.o

    def _run(self, function: str) -> None:
        message = ctypes.create_string_buffer(400)
        if getattr(library("attention_fp8.cpp"), function)(
            ctypes.byref(self.call), message, len(message)
        ):
            raise EmulatorError(message.value.decode())


def attention_fp8(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, **how: Any
) -> Tensor:
    """o of the sm_90a attention in e4m3. Raises EmulatorError, as `attention` does."""
    if q.numel() == 0:
        return torch.empty_like(q)
    call = AttentionFp8(q, k, v, scale, **how)
    call.quantise()
    return call.attend()
