"""What runs on this machine: versions, devices, the native build, backends of every op."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform

import torch
from rich.console import Console
from rich.table import Table

from . import __version__, ops
from .ops import choice
from .ops.examples import arguments
from .ops.registry import OPS, forced_backend, on_request

_OPTIONAL = ("triton", "transformers", "diffusers", "huggingface_hub")


def backend_rows(
    device: torch.device | str, dtype: torch.dtype
) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(op, backend chosen, [(backend passed over, reason)]) for every op on a device.

    A forced backend that cannot run is chosen by nobody: the op would raise, shown as "none". What
    measurement lists behind the chosen one is passed over as slower.
    """
    rows = []
    for name in sorted(OPS):
        refused, chosen = [], None
        args = arguments(name, device, dtype)
        asked = on_request(name, *args)
        forced = forced_backend(name)
        listed = choice.order(name, args)
        for backend, reason in ops.explain(name, *args):
            if reason is not None:
                refused.append((backend, reason))
            elif forced is not None:
                if backend == forced:
                    chosen = backend
                else:
                    refused.append((backend, f"{forced} is forced"))
            elif backend in asked:
                refused.append((backend, f"{asked[backend]}: pixeldiff.backend(...)"))
            elif chosen is None:
                chosen = backend
            elif backend in listed:
                refused.append((backend, "was measured to be slower"))
        rows.append((name, chosen or "none", refused))
    return rows


def render(console: Console) -> None:
    """Print everything."""
    versions = [f"{n} {_version(n)}" for n in _OPTIONAL]
    console.print(
        f"pixeldiff {__version__} · Python {platform.python_version()} · torch {torch.__version__}"
        f" · {' · '.join(versions)}",
        markup=False,
    )
    console.print(f"devices: {', '.join(_devices())}", markup=False)
    console.print(f"native extension: {_native()}", markup=False)
    forced = forced_backend("*")
    if forced is not None:
        console.print(f"forced backend: {forced} (PIXELDIFF_BACKEND or a backend block)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        console.print(f"chosen by measurement: {_measured(torch.cuda.current_device())}")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = str(dtype).removeprefix("torch.")
    table = Table(title=f"backends on {device}, {name}")
    for title in ("op", "runs on", "passed over"):
        table.add_column(title, overflow="fold")
    for op, chosen, refused in backend_rows(device, dtype):
        table.add_row(op, chosen, "\n".join(f"{b}: {reason}" for b, reason in refused))
    console.print(table, markup=False)


def _measured(index: int) -> str:
    """The ops with a table for this GPU; others take their own order."""
    capable = choice.capability(index)
    found = [op for op in sorted(OPS) if choice.table(op).get(capable)]
    return f"{', '.join(found) or 'no op'} (for capability {capable})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _devices() -> list[str]:
    threads = torch.get_num_threads()
    found = [f"cpu ({torch.backends.cpu.get_cpu_capability()}, {threads} threads)"]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i} {p.name} ({p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB)")
    return found


def _native() -> str:
    try:
        module = importlib.import_module("pixeldiff._C")
    except ImportError as e:
        return f"not built ({e}); ops run on PyTorch and Triton"
    return ", ".join(f"{k} {v}" for k, v in module.build_info().items())
