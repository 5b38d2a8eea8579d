"""The numbers of a checkpoint: finite, and in the dtype and place asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...errors import CheckpointError, CheckpointFormatError, NonFiniteCheckpointError

STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_dtype(dtype: torch.dtype | None) -> None:
    """Only the dtypes a network can be held in."""
    if dtype is not None and dtype not in STORED_DTYPES:
        raise CheckpointError(
            f"read_checkpoint: dtype must be None or one of {', '.join(map(str, STORED_DTYPES))}, "
            f"got {dtype}"
        )


def converted(
    state: dict[str, Tensor],
    order: list[str],
    file: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    rounded: list[str] | None = None,
) -> dict[str, Tensor]:
    """Checked tensors in the network's order. Empties `state`, so that copies never add up.

    `rounded`, if given, receives the names of those that `dtype` could not hold exactly.
    """
    for key, tensor in state.items():
        if tensor.dtype not in STORED_DTYPES or tensor.layout is not torch.strided:
            raise CheckpointFormatError(
                f"read_checkpoint: {key} of {file} is {tensor.dtype}; quantised weights are not "
                f"read, only {', '.join(map(str, STORED_DTYPES))}"
            )
    ready: dict[str, Tensor] = {}
    for key in order:
        source = state.pop(key)
        _check_finite(source, f"read_checkpoint: {key} of {file} holds NaN or infinity")
        tensor = source.to(device=device, dtype=dtype).contiguous()
        if dtype is torch.float16 and source.dtype is not torch.float16:
            _check_finite(tensor, f"read_checkpoint: {key} of {file} does not fit into float16")
        if rounded is not None and tensor.dtype != source.dtype:
            back = tensor.to(source.device, source.dtype)
            if not torch.equal(back, source):
                rounded.append(key)
        ready[key] = tensor
    return ready


def _check_finite(tensor: Tensor, message: str) -> None:
    if tensor.numel() == 0:
        return
    # One pass and no temporary: both ends of the range are NaN if any value is.
    low, high = torch.aminmax(tensor)
    if not (low.isfinite() and high.isfinite()):
        raise NonFiniteCheckpointError(f"{message}; the file is damaged or its training diverged")
