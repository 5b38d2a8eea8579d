"""pixeldiff: kernels for pixel-space diffusion, with PiD and L2P on top.

import pixeldiff
decoder = pixeldiff.PiDDecoder.from_pretrained("demo")
image = decoder.decode(latent, caption="a red circle", seed=0).images[0]
"""

from typing import Any

from .ops.registry import backend

__version__ = "0.1.0"
__all__ = ["L2PPipeline", "PiDDecoder", "__version__", "backend"]


def __getattr__(name: str) -> Any:
    # The ops are usable alone: the model and what it imports are loaded when first asked for.
    if name == "PiDDecoder":
        from .models.pid.decoder import PiDDecoder

        return PiDDecoder
    if name == "L2PPipeline":
        from .models.l2p.pipeline import L2PPipeline

        return L2PPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
