"""Which machine, versions and commit a measurement belongs to."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import pixeldiff

from .schema import Machine

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def machine(device: torch.device) -> Machine:
    """The description that goes into a row measured now."""
    return Machine(
        device=device.type,
        device_name=device_name(device),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        cuda=torch.version.cuda,
        driver=_driver() if device.type == "cuda" else None,
        pixeldiff=pixeldiff.__version__,
        commit=commit(),
        utc=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        capability=capability(device),
    )


def capability(device: torch.device) -> str | None:
    """Compute capability of a GPU, "9.0"."""
    if device.type != "cuda":
        return None
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache a call's data can stay in; 64 MiB where nothing says."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for path in _CACHES.glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM]?)", path.read_text().strip())
        if found:
            sizes.append(int(found[1]) * {"": 1, "K": 2**10, "M": 2**20}[found[2]])
    return max(sizes, default=64 * 2**20)


@functools.cache
def commit() -> str:
    """The commit of the sources, with "+changes" where files differ from it, or "unknown".

    PIXELDIFF_COMMIT says it where the sources are a copy without their history.
    """
    given = os.environ.get("PIXELDIFF_COMMIT")
    if given:
        return given
    head = _run("git", "rev-parse", "HEAD")
    if head is None:
        return "unknown"
    # Results of earlier stages of the same run are no change of what is measured.
    changed = _run("git", "status", "--porcelain", "-uno", "--", ".", ":!bench/results", ":!docs")
    return f"{head}+changes" if changed else head


@functools.cache
def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    name = found[1].strip() if found else platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


@functools.cache
def _driver() -> str | None:
    out = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return out.splitlines()[0].strip() if out else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
