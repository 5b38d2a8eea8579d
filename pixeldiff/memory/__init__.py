"""How much memory a picture takes, and how to make it in less."""

from .estimate import Estimate, estimate_l2p, estimate_memory, estimate_pid

__all__ = ["Estimate", "estimate_l2p", "estimate_memory", "estimate_pid"]
