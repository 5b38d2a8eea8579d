"""What kernels that exist for Hopper only ask of a build and of a device."""

from __future__ import annotations

import functools

import torch

from ... import native

CAPABILITY = (9, 0)


@functools.cache
def why_not_hopper(function: str, device: torch.device) -> str | None:
    """Why `function` of the extension cannot run on a CUDA device, or None."""
    if not hasattr(native.load(), function):
        archs = native.load().build_info()["cuda_archs"]
        return f"needs a build with sm_90a among PIXELDIFF_CUDA_ARCHS, which was {archs}"
    found = torch.cuda.get_device_capability(device)
    if found != CAPABILITY:
        return f"needs compute capability 9.0, this device is {found[0]}.{found[1]}"
    return None
