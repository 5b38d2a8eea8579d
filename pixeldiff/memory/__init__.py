"""How much memory a picture takes, and how to make it in less."""

from .budget import parsed_bytes
from .estimate import Estimate, estimate_l2p, estimate_memory, estimate_pid
from .heap import return_freed_memory
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
    "return_freed_memory",
]
