"""`pixeldiff l2p convert` at the size of Z-Image, from a source that takes no room on the disk.

The source has the released names, shapes and shards; its files are sparse, with a few random values
at both ends of every tensor. The command runs in a process of its own, which says at its end what
it read, wrote and kept resident.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pixeldiff.models.l2p.checkpoint_geometry import network_shapes, signature
from pixeldiff.models.l2p.config import SOURCE
from pixeldiff.models.l2p.stored_tensors import StoredTensor, read_header

from .machine import ROOT, machine
from .memory import Meter

VERSION = 1
ENDS = 2048  # random values at either end of a tensor
Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Conversion:
    """One conversion; bytes. `peak` and `before` are resident sets of its process, the second once
    everything was imported."""

    resolution: int
    source: int  # apparent size of its files
    source_on_disk: int
    result: int
    copied: int  # tensors
    new: int
    dropped: int
    before: int
    peak: int
    read: int
    written: int
    seconds: float


@dataclass
class Report:
    machine: Any
    command: str
    signature: str  # of the source's names and shapes
    runs: list[Conversion]
    schema: int = VERSION


def run(resolutions: tuple[int, ...], folder: Path, shards: int, command: str) -> Iterator[Report]:
    """A report after every resolution, the earlier ones included. Leaves nothing in `folder`.

    Raises:
        RuntimeError: the command failed, or a tensor is not what the source has; OSError: no room.
    """
    shapes = network_shapes(SOURCE.config)
    report = Report(
        dataclasses.asdict(machine(torch.device("cpu"))), command, signature(shapes), []
    )
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source = Path(work) / "source"
        sparse_source(source, shapes, shards)
        for resolution in resolutions:
            report.runs.append(conversion(source, Path(work) / "result.safetensors", resolution))
            yield report


def sparse_source(
    folder: Path, shapes: Shapes, shards: int, metadata: Mapping[str, str] | None = None
) -> None:
    """Sharded bf16 files and their index, as diffusers writes them, holes but for tensors' ends."""
    folder.mkdir()
    names = list(shapes)
    share = -(-len(names) // shards)
    table = {}
    for i in range(shards):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: shapes[n] for n in names[i * share : (i + 1) * share]}
        table.update(dict.fromkeys(part, file))
        _sparse_file(folder / file, part, metadata or {})
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}))


def _sparse_file(path: Path, shapes: Shapes, metadata: Mapping[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name in shapes:
            start, end = header[name]["data_offsets"]
            values = torch.randn(ENDS, generator=generator).bfloat16()
            data = values.view(torch.uint8).numpy().tobytes()[: end - start]
            for offset in (start, end - len(data)):
                file.seek(8 + len(text) + offset)
                file.write(data)


def conversion(source: Path, result: Path, resolution: int) -> Conversion:
    """Convert, hold the ends of the tensors to the source's, and delete the result."""
    said = result.with_suffix(".json")
    args = ["l2p", "convert", "--source", source, "--resolution", resolution, "-o", result]
    args += ["--report", said, "--quiet"]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", __name__, *map(str, args)], cwd=ROOT, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise RuntimeError(f"convert to {resolution} ended with {done.returncode}: {done.stderr}")
    told, report = json.loads(done.stdout.splitlines()[-1]), json.loads(said.read_text())
    files = list(source.glob("*.safetensors"))
    _check_ends(files, result, report["copied"])
    found = Conversion(
        resolution=resolution,
        source=sum(f.stat().st_size for f in files),
        source_on_disk=sum(512 * f.stat().st_blocks for f in files),
        result=result.stat().st_size,
        copied=len(report["copied"]),
        new=len(report["new"]),
        dropped=len(report["dropped"]),
        seconds=seconds,
        **told,
    )
    result.unlink()
    return found


def _check_ends(files: list[Path], result: Path, copied: list[str]) -> None:
    origin = {name: tensor for file in files for name, tensor in read_header(file)[0].items()}
    written = read_header(result)[0]
    for name in copied:
        if _ends(origin[name]) != _ends(written[name]):
            raise RuntimeError(f"{name} of the result is not the source's")


def _ends(tensor: StoredTensor) -> tuple[bytes, bytes]:
    count = min(2 * ENDS, tensor.nbytes)
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        first = file.read(count)
        file.seek(tensor.start + tensor.nbytes - count)
        return first, file.read(count)


def _in_this_process(args: list[str]) -> None:
    """The command, as a shell would run it, and then what it took as a line of JSON."""
    from pixeldiff import cli
    from pixeldiff.models.l2p import conversion as _  # noqa: F401  # imports are no part of it

    meter = Meter(torch.device("cpu"))
    before, counted = meter.now(), _io()
    cli.main(args, standalone_mode=False)
    read, written = (now - then for now, then in zip(_io(), counted, strict=True))
    print(json.dumps({"before": before, "peak": meter.peak(), "read": read, "written": written}))


def _io() -> tuple[int, int]:
    """Bytes that this process asked to read and to write, cached or not."""
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows["rchar"]), int(rows["wchar"])


if __name__ == "__main__":
    _in_this_process(sys.argv[1:])
