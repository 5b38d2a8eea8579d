"""A measurement in a process of its own: peaks of resident memory are a process's, not a call's."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

from .machine import ROOT


def measured_alone(module: str, plan: Any, what: str) -> dict[str, Any]:
    """What `python -m MODULE PLAN` prints last, JSON.

    Args:
        module: its `__main__` takes the plan's fields as JSON.
        plan: a dataclass.
        what: the case, for errors.

    Raises:
        RuntimeError: the process failed; with what it wrote.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(dataclasses.asdict(plan))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{what}: its process ended with {done.returncode}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
