"""The processes that train one network together: one alone, or those a launcher started.

Several are for several GPUs: each takes its share of every step's examples and holds the whole
network; gradients are averaged. `torchrun` or `accelerate launch` starts them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..devices import check_device

# The others wait while the first one encodes texts or makes pictures; where a process dies, its
# launcher ends the rest.
PATIENCE = timedelta(days=1)


class Processes:
    """This process among those that train together.

    Args:
        device: of a process alone. Of several each takes a CUDA device of its own, or the CPU where
            that is asked for or there is no CUDA.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.index, self.count, self.device = 0, 1, check_device(device)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return
        cuda = self.device.type == "cuda"
        if cuda:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
        self.index, self.count = dist.get_rank(), dist.get_world_size()

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
