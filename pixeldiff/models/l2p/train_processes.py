"""The processes that train one network together: one alone, or those a launcher started.

Several are for several GPUs: each takes its share of every step's examples and holds the whole
network; gradients are averaged. `accelerate launch` starts them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from ..devices import check_device


class Processes:
    """This process among those that train together.

    Args:
        device: of a process alone; several take the device accelerate gives each.

    Raises:
        ImportError: several processes were launched, and accelerate is not installed.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.index, self.count = 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            self.device = check_device(device)
            return
        try:
            from accelerate import PartialState
        except ImportError as e:
            raise ImportError(
                "l2p train: several processes were launched, which takes accelerate; "
                "pip install pixeldiff[train], or start one process"
            ) from e
        state = PartialState(cpu=device is not None and torch.device(device).type == "cpu")
        self.index, self.count, self.device = state.process_index, state.num_processes, state.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.index == 0

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """A tensor without a gradient in every process keeps none."""
        if self.count == 1:
            return
        parameters = list(parameters)
        held = torch.tensor([p.grad is not None for p in parameters], device=self.device).int()
        dist.all_reduce(held)
        for p, holders in zip(parameters, held.tolist(), strict=True):
            if holders:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
                p.grad.div_(self.count)

    def mean(self, value: float) -> float:
        return self._sum(value) / self.count

    def any(self, flag: bool) -> bool:
        return self._sum(flag) > 0

    def wait(self) -> None:
        """Until every process has come here."""
        self._sum(0)

    def _sum(self, value: float) -> float:
        if self.count == 1:
            return float(value)
        total = torch.tensor(float(value), device=self.device)
        dist.all_reduce(total)
        return total.item()
