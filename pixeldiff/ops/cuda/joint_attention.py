"""joint_attention on Hopper, csrc/cuda/joint_attention_sm90.cu, and on every other device from
capability 8.0 on, csrc/cuda/joint_attention_mma.cu."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ... import native

# Of csrc/cuda/joint_attention.h; `best` is sm90 on 9.0 where it was built, else mma.
KERNELS = {"best": 0, "sm90": 1, "mma": 2}
CAPABILITY = (8, 0)
MAX_D = 128
ALIGNMENT = 16  # bytes: of addresses and strides, for cp.async and the copy engine
MAX_TILES = 1 << 31
TILE_ROWS = 128


def why_not(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None, return_lse: bool
) -> str | None:
    reason = native.why_not_cuda() or native.why_not_tensors("cuda", q, k, v)
    return reason or _why_not_device(q.device) or why_not_call(q, k, v, scale)


@functools.cache
def _why_not_device(device: torch.device) -> str | None:
    archs = native.load().build_info()["cuda_archs"]
    return why_not_capability(torch.cuda.get_device_capability(device), archs)


def why_not_capability(capability: tuple[int, int], archs: str) -> str | None:
    """Why no kernel of a build for `archs`, "80;90a", runs on a device of `capability`, or None."""
    name = "{}.{}".format(*capability)
    if capability < CAPABILITY:
        return f"needs compute capability 8.0 or later, this device is {name}"
    built = [int(arch) for arch in archs.split(";") if arch.isdigit()]
    # Machine code runs on later devices of the same major version, the last one's PTX on all later.
    same = any(divmod(arch, 10) <= capability and arch // 10 == capability[0] for arch in built)
    exact = any(arch.rstrip("af") == "{}{}".format(*capability) for arch in archs.split(";"))
    last = archs.split(";")[-1]
    if same or exact or (last.isdigit() and divmod(int(last), 10) <= capability):
        return None
    return f"was built for {archs} (PIXELDIFF_CUDA_ARCHS), this device is {name}"


def why_not_call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """Why the kernel cannot take these shapes and strides, on whatever device they are, or None."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, got {q.dtype}"
    d = q.shape[-1]
    if d % 8 or d > MAX_D:
        return f"takes head dims that are multiples of 8 up to {MAX_D}, got {d}"
    if not scale > 0:
        return f"takes a positive scale, got {scale}"
    B, L, G, _ = q.shape
    if B * G * (L // TILE_ROWS + 1) >= MAX_TILES:
        return f"takes fewer than 2^31 tiles of {TILE_ROWS} queries, got {tuple(q.shape)}"
    for name, t in (("q", q), ("k", k), ("v", v)):
        size = t.element_size()
        if t.numel() and t.data_ptr() % ALIGNMENT:
            return f"needs {name} to start at a multiple of {ALIGNMENT} bytes"
        for rows, stride in zip(t.shape[:3], t.stride()[:3], strict=True):
            if rows > 1 and (stride <= 0 or stride * size % ALIGNMENT):
                return (
                    f"needs strides of {name} that are positive multiples of {ALIGNMENT} bytes, "
                    f"got {tuple(t.stride())} elements; call .contiguous()"
                )
    return None


def launch(
    q: Tensor,  # (B, L, G, d)
    k: Tensor,  # (B, S, G, d), dtype of q
    v: Tensor,  # (B, S, G, d), dtype of q
    scale: float,
    key_mask: Tensor | None,  # (B, S) bool
    return_lse: bool,
    *,
    kernel: str = "best",
) -> tuple[Tensor, Tensor]:
    B, L, G, d = q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, L, G) if return_lse else 0, dtype=torch.float32, device=q.device)
    if o.numel() == 0:
        return o, lse
    native.load().joint_attention_cuda(
        (B, L, k.shape[1], G, d),
        native.DTYPE_CODES[q.dtype],
        _heads(q),
        _heads(k),
        _heads(v),
        o.data_ptr(),
        scale,
        (0, 0) if key_mask is None else (key_mask.data_ptr(), key_mask.stride(0)),
        lse.data_ptr() if return_lse else 0,
        KERNELS[kernel],
        q.device.index,
        torch.cuda.current_stream(q.device).cuda_stream,
    )
    return o, lse


def _heads(t: Tensor) -> tuple[int, int, int, int]:
    return t.data_ptr(), *t.stride()[:3]
