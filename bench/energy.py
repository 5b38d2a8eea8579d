"""Energy of work on a GPU, from the counter of its driver (NVML)."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

LEAST_SECONDS = 2.0  # the counter moves every tenth of a second or so


class NoEnergy(RuntimeError):
    """There is no energy counter; the message says why."""


def joules(
    work: Callable[[], None],
    counter: Callable[[], float],
    *,
    least_seconds: float = LEAST_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """(joules of one `work`, mean watts), repeated back to back for at least `least_seconds`.

    The whole board counts, whoever uses it, and its idle power too.

    Args:
        work: must return only when the device is done with it.
        counter: joules since some fixed moment.
    """
    count, start, before = 0, clock(), counter()
    while count < 2 or clock() - start < least_seconds:
        work()
        count += 1
    used, seconds = counter() - before, clock() - start
    return used / count, used / seconds


def nvml_counter(device: torch.device) -> Callable[[], float]:
    """A counter of joules of the GPU that PyTorch calls `device`.

    Raises:
        NoEnergy: not a CUDA device, no nvidia-ml-py, or a GPU without the counter.
    """
    if device.type != "cuda":
        raise NoEnergy("energy is read from NVML, which knows NVIDIA GPUs only")
    try:
        import pynvml
    except ImportError:
        raise NoEnergy("nvidia-ml-py is not installed") from None
    try:
        pynvml.nvmlInit()
        # By UUID: CUDA_VISIBLE_DEVICES renumbers the devices of PyTorch, not those of NVML.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as e:
        raise NoEnergy(f"NVML: {e}") from e
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3  # it counts mJ
