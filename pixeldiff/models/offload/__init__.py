"""Networks whose blocks' weights lie elsewhere and visit the device, one or two at a time."""

from .networks import MODES, apply, check_offload, offloaded
from .visits import Offload, Part, visiting

__all__ = ["MODES", "Offload", "Part", "apply", "check_offload", "offloaded", "visiting"]
