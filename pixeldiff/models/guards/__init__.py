"""Activations that are NaN or infinite: noticed step by step, and their origin found."""

from .inspection import Inspection
from .watch import Place, Watch

__all__ = ["Inspection", "Place", "Watch"]
