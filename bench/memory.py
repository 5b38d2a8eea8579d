"""Peak memory: the allocator's and CUDA graphs' own on a GPU, the resident set on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """The peak since the last `reset`, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def source(self) -> str:
        if self.device.type == "cuda":
            return "CUDA allocator"
        return "resident set" if STATUS.exists() else ""

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        elif CLEAR.exists():
            CLEAR.write_text("5")  # resets VmHWM

    def now(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _status("VmRSS")

    def peak(self) -> int | None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) + _graphs_own(self.device)
        return _status("VmHWM")


def _graphs_own(device: torch.device) -> int:
    """Memory that a replay writes to and no tensor holds, which the allocator does not count."""
    device = torch.device("cuda", device.index or torch.cuda.current_device())
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == device.index and tuple(segment["segment_pool_id"]) != (0, 0)
    )


def resident_peak(pid: int) -> int | None:
    """The most bytes that were resident in another process; None where that cannot be known."""
    try:
        return _status("VmHWM", STATUS.parents[1] / str(pid) / "status")
    except OSError:  # it has ended
        return None


def _status(key: str, path: Path = STATUS) -> int | None:
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None
