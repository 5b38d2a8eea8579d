"""L2P: a latent diffusion transformer converted to pixels (arXiv 2605.12013)."""

from .checkpoint import load_net, read_checkpoint
from .config import SOURCE, VARIANTS, L2PConfig, LocalDecoderConfig, Variant
from .network import L2PCondition, L2PNet
from .pipeline import GenerateOutput, L2PPipeline

__all__ = [
    "SOURCE",
    "VARIANTS",
    "GenerateOutput",
    "L2PCondition",
    "L2PConfig",
    "L2PNet",
    "L2PPipeline",
    "LocalDecoderConfig",
    "Variant",
    "load_net",
    "read_checkpoint",
]
