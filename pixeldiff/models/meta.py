"""Networks made on the meta device, without memory: their shapes, and weights that are read."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

Net = TypeVar("Net", bound=nn.Module)


def tensor_shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every tensor name and shape of the state dict."""
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def owning(net: Net, tensors: dict[str, Tensor]) -> Net:
    """`net` with exactly these tensors, not copies, in evaluation mode, without gradients."""
    net.load_state_dict(tensors, strict=True, assign=True)
    return net.requires_grad_(False).eval()
