"""Compiling, for a GPU that is not here, exactly the kernels that a launch would run.

`compile_launch(call, target)` runs `call` with Triton's launcher replaced by one that records the
kernel and its arguments, typed and specialised as Triton would, and compiles what it recorded. The
tensors are on the meta device, so a call can have its real size:

    args = arguments("swiglu", "meta", torch.bfloat16, GEOMETRY)
    for kernel in compile_launch(lambda: module.launch(*args), 90): ...
"""

from __future__ import annotations

import functools
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

TARGETS = (80, 90, 100, 120)
TENSOR_CORES = r"\b(HMMA|HGMMA|QMMA|QGMMA|UTCHMMA|UTCQMMA|OMMA)\b"


@dataclass(frozen=True)
class Compiled:
    """One kernel of a launch, compiled. Bytes of `stack` and `spills` are per thread."""

    name: str
    target: int
    registers: int
    stack: int
    spills: int
    shared: int
    warps: int
    ptx: str
    sass: str
    constants: dict[str, Any] = field(default_factory=dict)  # what the launch fixed by name

    @property
    def tensor_cores(self) -> set[str]:
        """The tensor-core instructions among the machine code."""
        return set(re.findall(TENSOR_CORES, self.sass))


@dataclass(frozen=True)
class Recorded:
    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grid: tuple[int, ...]


def compile_launch(call: Callable[[], Any], target: int) -> list[Compiled]:
    """The kernels that `call` launches on a device of capability `target` (90 is 9.0), compiled."""
    return [_compile(r, target) for r in record(call, target)]


def compile_once(call: Callable[[], Any], target: int) -> list[tuple[Compiled, int]]:
    """Each different kernel among them once, with the blocks that all its launches have."""
    blocks: dict[str, int] = {}
    first: dict[str, Recorded] = {}
    for r in record(call, target):
        key = str(_specialise(r, target)[1:])
        first.setdefault(key, r)
        blocks[key] = blocks.get(key, 0) + math.prod(r.grid)
    return [(_compile(r, target), blocks[key]) for key, r in first.items()]


def keys(call: Callable[[], Any], target: int = 90) -> list[str]:
    """One string for each kernel `call` launches; equal strings are one compilation."""
    return [str(_specialise(r, target)[1:]) for r in record(call, target)]


def record(call: Callable[[], Any], target: int) -> list[Recorded]:
    """Run `call` with launches recorded instead of done, its configs chosen for `target`.

    Not for threads: Triton's launcher is replaced for the whole process meanwhile.

    Raises:
        ImportError: no Triton. RuntimeError: Triton interprets here, or nothing was launched.
    """
    from pixeldiff.triton_kernels.launching import INTERPRETED, compiling_for

    if INTERPRETED:
        raise RuntimeError(
            "Triton interprets in this process (TRITON_INTERPRET=1), nothing compiles"
        )
    with _recording() as found, compiling_for(divmod(target, 10)):
        call()
    if not found:
        raise RuntimeError("nothing was launched")
    return found


@contextmanager
def _recording() -> Iterator[list[Recorded]]:
    from triton.runtime import JITFunction

    found: list[Recorded] = []

    def run(self, *args, grid, warmup, **kwargs):
        found.append(Recorded(self, args, kwargs, grid))

    # Triton reads a tensor's address for its alignment; a meta tensor has none, and the allocator
    # of a real device starts every tensor on 256 bytes.
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(Tensor, "data_ptr", _address),
    ):
        yield found


def _address(tensor: Tensor) -> int:
    return tensor.storage_offset() * tensor.element_size()


def _specialise(r: Recorded, target: int) -> tuple[Any, ...]:
    """(source, signature, constants, attributes, options) of a recorded launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", target, 32))
    bind = create_function_from_signature(r.kernel.signature, r.kernel.params, backend)
    bound, specialization, options = bind(*r.args, **r.kwargs)
    packed = r.kernel._pack_args(backend, r.kwargs, bound, specialization, options)
    options, signature, constants, attributes = packed
    source = ASTSource(r.kernel, signature, constants, attributes)
    return source, r.kernel.__name__, signature, constants, attributes, options


def _compile(r: Recorded, target: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget

    source, name, *_, options = _specialise(r, target)
    out = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options.__dict__)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(out.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", cubin)
        sass = machine_code(cubin)
    resources = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        name=name,
        target=target,
        registers=resources["REG"],
        stack=resources["STACK"],
        spills=4 * len(re.findall(r"\bSTL\b", sass)),
        shared=out.metadata.shared,
        warps=out.metadata.num_warps,
        ptx=out.asm["ptx"],
        sass=sass,
        constants=dict(r.kwargs),
    )


def machine_code(cubin: Path) -> str:
    """The disassembly of a compiled file."""
    return _tool("nvdisasm", "-c", cubin)


def _tool(name: str, *arguments: Any) -> str:
    done = subprocess.run(
        [_tool_path(name), *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return done.stdout


@functools.cache
def _tool_path(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)
