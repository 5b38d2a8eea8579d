"""The published implementation, run from a checkout in .upstream/PiD (nothing of it is kept here).

Only its network is used; the sampling loop around it is `pixeldiff`'s, whose arithmetic and order
of noise are the same. As published, weights are fp32 and bf16 means autocast.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
from typing import Any

import torch
from torch import Tensor, nn

from pixeldiff.models.pid import PiDConfig

from .machine import ROOT

CHECKOUT = ROOT / ".upstream" / "PiD"


def why_not() -> str | None:
    """None if the checkout is there, else what is missing."""
    if (CHECKOUT / "pid" / "_src" / "networks" / "pid_net.py").is_file():
        return None
    return "absent: put a checkout of github.com/nv-tlabs/PiD in .upstream/PiD"


def network(config: PiDConfig, device: torch.device) -> nn.Module:
    """The published network of this geometry, fp32, with weights still to be filled in.

    Raises:
        ImportError: the checkout or something it needs is missing.
    """
    reason = why_not()
    if reason is not None:
        raise ImportError(reason)
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    # Its logger and its process groups want packages that a forward pass does not.
    for name in ("log", "distributed"):
        sys.modules.setdefault(f"pid._ext.imaginaire.utils.{name}", _Silent(name))
    from pid._src.networks.pid_net import PidNet

    taken = inspect.signature(PidNet.__init__).parameters
    values = {k: v for k, v in dataclasses.asdict(config).items() if k in taken}
    with torch.device(device):
        net = PidNet(**values, lq_in_channels=0)
    return net.eval().requires_grad_(False)


class Step:
    """`PiDNet.step` on the published network: everything is recomputed in every step."""

    def __init__(self, net: nn.Module, precision: str, *, compiled: bool) -> None:
        self.net = torch.compile(net, mode="default", dynamic=False) if compiled else net
        self.autocast = precision == "bf16"

    def __call__(self, x: Tensor, tau: float, latent: Tensor, caption: Tensor) -> Tensor:
        batch = x.shape[0]
        t = torch.full((batch,), tau, device=x.device)
        sigma = torch.zeros(batch, device=x.device)
        y = caption.expand(batch, -1, -1)
        if self.autocast:
            latent, y = latent.bfloat16(), y.bfloat16()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            return self.net(x, t, y, lq_latent=latent, degrade_sigma=sigma).float()


class _Silent(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None
