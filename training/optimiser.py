"""Muon for the convolutions, AdamW for the rest, behind one learning rate."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

_SMALLEST = 16  # channels below which a convolution is left to AdamW


class MuonAdamW:
    """Orthogonalised momentum (Muon) for wide 3x3 convolutions, AdamW for every other parameter.

    PyTorch's Muon takes matrices. A channels-last kernel (out, in, 3, 3) is one in memory, so the
    optimiser works on such views of the parameters and their storage is updated in place.

    Args:
        groups: (parameters, share of the learning rate). Kernels must be channels-last.
        learning_rate: of AdamW; Muon's updates are scaled to the same size.

    Raises:
        ValueError: a wide kernel that is not channels-last.
    """

    def __init__(
        self, groups: Iterable[tuple[Iterable[nn.Parameter], float]], learning_rate: float
    ) -> None:
        self._matrices: list[tuple[nn.Parameter, nn.Parameter]] = []
        muon, adam = [], []
        for parameters, share in groups:
            matrices, others = [], []
            for parameter in parameters:
                if (
                    parameter.dim() == 4
                    and min(parameter.shape[:2]) >= _SMALLEST
                    and (parameter.shape[2] > 1)
                ):
                    view = nn.Parameter(_as_matrix(parameter.detach()))
                    if view.data_ptr() != parameter.data_ptr():
                        raise ValueError(
                            "MuonAdamW: convolutions must be channels-last, got strides "
                            f"{parameter.stride()}; call .to(memory_format=torch.channels_last)"
                        )
                    self._matrices.append((view, parameter))
                    matrices.append(view)
                else:
                    others.append(parameter)
            muon.append({"params": matrices, "share": share})
            adam.append({"params": others, "share": share})
        self.learning_rate = learning_rate
        self._optimisers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [group for group in adam if group["params"]],
                lr=learning_rate,
                betas=(0.9, 0.98),
                weight_decay=0.0,
            )
        ]
        if self._matrices:
            self._optimisers.append(
                torch.optim.Muon(
                    [group for group in muon if group["params"]],
                    lr=learning_rate,
                    weight_decay=0.0,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    def step(self, rate: float) -> None:
        """One update from the parameters' gradients, at `rate` of the peak learning rate."""
        for view, parameter in self._matrices:
            if parameter.grad is not None:
                view.grad = _as_matrix(parameter.grad)
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.learning_rate * rate * group["share"]
            optimiser.step()


def _as_matrix(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.permute(0, 2, 3, 1).flatten(1)
