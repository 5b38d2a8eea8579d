"""Networks small enough for a test, with every parameter random, and inputs for them."""

from __future__ import annotations

import torch
from torch import Tensor

from pixeldiff.models.pid import PiDConfig, PiDNet

TINY = {
    "hidden_size": 32,
    "num_groups": 2,
    "patch_depth": 3,
    "pixel_depth": 2,
    "patch_size": 8,
    "pixel_hidden_size": 4,
    "pixel_attn_hidden_size": 24,
    "pixel_num_groups": 2,
    "txt_embed_dim": 12,
    "txt_max_length": 6,
    "rope_ref_h": 40,
    "rope_ref_w": 40,
    "lq_latent_channels": 4,
    "latent_spatial_down_factor": 8,
    "sr_scale": 2,
    "lq_hidden_dim": 8,
    "lq_num_res_blocks": 1,
}
V1 = PiDConfig(**TINY)
V15 = PiDConfig(
    **TINY,
    lq_gate_type="sigma_aware_per_token",
    lq_conv_padding_mode="replicate",
    pit_lq_inject=True,
    lq_aux_rgb_head=True,
)
PLAIN = PiDConfig(**{**TINY, "lq_latent_channels": None})
CONFIGS = {"v1": V1, "v1.5": V15}


def network(config: PiDConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PiDNet:
    """No parameter is zero, and activations stay near 1."""
    net = PiDNet(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            fan_in = p[0].numel() if p.dim() > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator) * fan_in**-0.5)
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    return net.to(dtype).eval()


def inputs(batch: int = 2, size: tuple[int, int] = (16, 32), seed: int = 1) -> dict[str, Tensor]:
    """Keyword arguments of `PiDNet.forward` for the networks above."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "x": draw(batch, 3, *size),
        "t": torch.linspace(866.0, 342.0, batch),
        "y": draw(batch, 6, 12),
        "lq_latent": draw(batch, 4, size[0] // 16, size[1] // 16),
        "degrade_sigma": torch.linspace(0.1, 0.6, batch),
    }
