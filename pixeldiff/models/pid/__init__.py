"""PiD: a conditional pixel-space diffusion transformer that decodes latents (arXiv 2605.23902)."""

from ..steps import Interrupted, StepInfo
from .checkpoint import load_net, read_checkpoint
from .config import PiDConfig
from .decoder import DecodeOutput, PiDDecoder
from .latents import from_pid_latent, to_pid_latent
from .network import PiDCondition, PiDNet
from .variants import variant, variants

__all__ = [
    "DecodeOutput",
    "Interrupted",
    "PiDCondition",
    "PiDConfig",
    "PiDDecoder",
    "PiDNet",
    "StepInfo",
    "from_pid_latent",
    "load_net",
    "read_checkpoint",
    "to_pid_latent",
    "variant",
    "variants",
]
