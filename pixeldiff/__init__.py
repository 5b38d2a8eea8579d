"""pixeldiff: kernels for pixel-space diffusion, with the PiD decoder on top."""

from .ops.registry import backend

__version__ = "0.1.0"
__all__ = ["__version__", "backend"]
