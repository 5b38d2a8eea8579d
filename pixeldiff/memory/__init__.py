"""How much memory a picture takes, and how to make it in less."""

from .budget import parsed_bytes
from .estimate import Estimate, estimate_l2p, estimate_memory, estimate_pid
from .plan import Plan, Way, cheaper, plan

__all__ = [
    "Estimate",
    "Plan",
    "Way",
    "cheaper",
    "estimate_l2p",
    "estimate_memory",
    "estimate_pid",
    "parsed_bytes",
    "plan",
]
