"""A PiD network of 60 thousand parameters with random weights, and files of it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from pixeldiff.models.pid import PiDConfig, PiDNet

CONFIG = PiDConfig(
    hidden_size=32,
    num_groups=2,
    patch_depth=2,
    pixel_depth=1,
    pixel_hidden_size=8,
    pixel_attn_hidden_size=32,
    pixel_num_groups=2,
    txt_embed_dim=16,
    txt_max_length=6,
    rope_ref_h=256,
    rope_ref_w=256,
    lq_latent_channels=16,
    lq_hidden_dim=16,
    lq_num_res_blocks=1,
    lq_gate_type="sigma_aware_per_token",
    lq_conv_padding_mode="replicate",
    pit_lq_inject=True,
)


def tiny_net(config: PiDConfig = CONFIG, *, dtype: torch.dtype = torch.float32) -> PiDNet:
    """Weights large enough for the caption, the latent and sigma to show in the image."""
    generator = torch.Generator().manual_seed(1)
    net = PiDNet(config)
    with torch.no_grad():
        for parameter in net.parameters():
            scale = 0.3 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
            parameter.normal_(0, scale, generator=generator)
    return net.to(dtype).requires_grad_(False)


def save_net(path: Path, net: PiDNet, *, backbone: str = "demo") -> Path:
    metadata = {"config": json.dumps(net.config.to_dict()), "backbone": backbone}
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path, metadata=metadata)
    return path


def tiny_latent(batch: int = 1, height: int = 2, width: int = 2, *, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, CONFIG.lq_latent_channels, height, width, generator=generator)


def tiny_caption(batch: int = 1, *, seed: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, CONFIG.txt_max_length, CONFIG.txt_embed_dim, generator=generator)
