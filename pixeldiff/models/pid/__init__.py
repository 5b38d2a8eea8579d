"""PiD: a conditional pixel-space diffusion transformer that decodes latents (arXiv 2605.23902)."""

from .config import PiDConfig
from .network import PiDCondition, PiDNet

__all__ = ["PiDCondition", "PiDConfig", "PiDNet"]
