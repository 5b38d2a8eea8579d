"""Long jobs that survive: what is finished is kept in a folder, and a later run goes on with it."""

from .stages import Stages
from .store import JobStore, resumable

__all__ = ["JobStore", "Stages", "resumable"]
