"""L2P networks small enough for a test, with every parameter random, and inputs for them."""

from __future__ import annotations

import torch
from torch import Tensor

from pixeldiff.models.l2p import L2PConfig, L2PNet
from pixeldiff.models.l2p.config import DECODERS

WIDTHS = {16: 4, 32: 6, 64: 8, 128: 10, 256: 12, 512: 14}
PATCHES = {"1k": 16, "4k": 64, "8k": 128, "10k": 160}


def config(form: str = "1k", **changes) -> L2PConfig:
    values = {
        "patch_size": PATCHES[form],
        "dim": 48,
        "n_heads": 2,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "cap_feat_dim": 20,
        "axes_dims": (8, 8, 8),
        "local_decoder": DECODERS[form].with_widths(WIDTHS),
    }
    return L2PConfig(**{**values, **changes})


LATENT = config(patch_size=2, in_channels=16, local_decoder=None)


def fill(net: torch.nn.Module, seed: int = 0) -> None:
    """No parameter is zero, and activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            fan_in = p[0].numel() if p.dim() > 1 and "pad_token" not in name else 4
            p.copy_(torch.randn(p.shape, generator=generator) * fan_in**-0.5)
            if "norm" in name or name == "cap_embedder.0.weight":
                p.add_(1)


def network(config: L2PConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> L2PNet:
    net = L2PNet(config)
    fill(net, seed)
    return net.to(dtype).eval().requires_grad_(False)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def captions(*lengths: int, width: int = 20) -> list[Tensor]:
    return [draw(length, width, seed=100 + i) for i, length in enumerate(lengths)]


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest magnitude of b."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()
