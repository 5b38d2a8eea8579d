"""Where and in what precision a model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_stood_for: ContextVar[str] = ContextVar("stood_for", default="meta")


@contextlib.contextmanager
def standing_for(kind: str) -> Iterator[None]:
    """Inside, tensors on "meta" take the course that those on a device of this type would."""
    token = _stood_for.set(kind)
    try:
        yield
    finally:
        _stood_for.reset(token)


def kind_of(device: torch.device) -> str:
    """The type of the device, or of the one that "meta" stands for."""
    # A compiler that traces this knows the type, and never meets the variable.
    return device.type if device.type != "meta" else _stood_for.get()


def check_device(device: torch.device | str | None = None) -> torch.device:
    """A device that is there; by default "cuda" where there is one, else "cpu".

    Raises:
        ValueError: not a device, or not on this machine.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as e:
        raise ValueError(f'device must be one like "cpu" or "cuda:0", got {device!r}') from e
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device = {str(device)!r}, but PyTorch sees no CUDA device; use 'cpu'")
    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ValueError(f"device = {str(device)!r} cannot be used here: {reason}") from e
    return device


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """The network has its dtype; a caller's autocast would give its layers another."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
