"""A network of which only the blocks' weights are away from its device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from .lanes import lane_for
from .sources import MappedFiles
from .visits import Offload, Part

MODES = ("blocks",)


def check_offload(offload: Any) -> bool:
    """Whether the argument `offload` of a model asks for it.

    Raises:
        ValueError: neither False nor a mode.
    """
    if offload is None or offload is False:
        return False
    if offload not in MODES:
        raise ValueError(f'offload must be False or "blocks", got {offload!r}')
    return True


class CanOffload(Protocol):
    offload: Offload | None
    device: torch.device

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def offload_(self) -> Any: ...


def apply(net: CanOffload, offload: Any) -> bool:
    """Do what a model's argument `offload` asks for; whether the network is offloaded now.

    Raises:
        ValueError: as `check_offload` and `offloaded`; or a network on the CPU whose weights are in
            memory already, where nothing would be saved.
    """
    if check_offload(offload) and net.offload is None:
        files = MappedFiles()
        if net.device.type == "cpu" and not any(map(files.holds, net.parameters())):
            raise ValueError(
                'offload="blocks" would save nothing: this network is on the CPU and its weights '
                "are in memory, not in a file; read it with from_pretrained, or leave offload out"
            )
        net.offload_()
    return net.offload is not None


def offloaded(
    net: nn.Module,
    parts: Sequence[Part],
    *,
    device: torch.device,
    dtype: torch.dtype,
    ready: Callable[[nn.Module], None] = lambda block: None,
) -> Offload:
    """Take the blocks' weights away from a network, in place, and put all others on the device.

    On CUDA they go to pinned host memory; on the CPU they stay where they are, in a mapped file
    that is read anew whenever a block is run, or in memory.

    Args:
        net: on the device, or on the CPU with weights that are yet to be moved and converted.
        parts: its blocks, in the order in which they are run.
        device, dtype: where and in what the network computes.
        ready: called with each block before its weights are taken.

    Raises:
        ValueError: a network that is trained, or a device of another kind.
    """
    if any(p.requires_grad for p in net.parameters()):
        raise ValueError(
            "offload: the network's parameters must not require gradients, its blocks stand in for "
            "one another; call net.requires_grad_(False)"
        )
    lane = lane_for(device)
    cuda = device.type == "cuda"
    offload = Offload(parts, lane, dtype=dtype, adjacent=cuda, ready=ready)
    files = MappedFiles()
    for module in net.modules():
        for kind in (module._parameters, module._buffers):
            for name, t in kind.items():
                if t is None or t.is_meta:
                    continue
                moved = t.detach().to(device, dtype if t.is_floating_point() else None)
                if files.holds(moved):
                    moved = moved.clone()  # else the whole file would stay mapped for it
                kind[name] = nn.Parameter(moved, False) if isinstance(t, nn.Parameter) else moved
    return offload
