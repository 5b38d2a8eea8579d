"""What the kernel tests share: the tolerance, the backends, and compiling without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module, util
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pixeldiff import native
from pixeldiff.sources import demo_asset

ROOT = Path(__file__).resolve().parents[2]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# Where a kernel runs. "triton" is skipped here and run again in a process of its own with Triton's
# interpreter switched on (`run_in_interpreter`), because Triton reads that switch on import.
BACKENDS = [
    "cpu-portable",
    "cpu-avx2",
    "cpu-avx512",
    "triton",
    pytest.param("triton-gpu", marks=pytest.mark.gpu),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
TRITON = ["triton", pytest.param("triton-gpu", marks=pytest.mark.gpu)]
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"


def _round_to_nearest_bf16() -> None:
    """Triton's interpreter cuts fp32 down to bf16 (and a NaN at times to infinity), up to a whole
    spacing away; every GPU rounds to nearest even, and so does the interpreter after this."""
    import triton.language as tl
    from triton.runtime import interpreter

    cut = interpreter._convert_float

    def convert(values, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return cut(values, source, target, rounding_mode)
        return torch.tensor(values).bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = convert


if INTERPRETER:
    _round_to_nearest_bf16()


def one_rounding(y: Tensor, oracle: Tensor) -> float:
    """Worst |y - oracle| over its bound, for fp32 arithmetic that rounds once: at most 1 passes."""
    assert y.shape == oracle.shape
    assert oracle.dtype == torch.float64
    if y.numel() == 0:
        return 0.0
    oracle = oracle.to(y.device)
    slack = 4 * torch.finfo(torch.float32).eps * oracle.abs().max()
    # Below its smallest normal number (6e-5 in fp16) a type keeps that number's spacing.
    info = torch.finfo(y.dtype)
    bound = info.eps * oracle.abs().clamp(min=info.smallest_normal) + slack
    return ((y.double() - oracle).abs() / bound).max().item()


def launcher(op: str, backend: str) -> tuple[Callable, str]:
    """(launch function, device) of a backend; skips the test, with the reason, if it cannot run."""
    kind, _, variant = backend.partition("-")
    if kind == "cpu":
        if native.why_not() is not None:
            pytest.skip(native.why_not())
        code = native.ISA_CODES[variant]
        if not native.load().isa_usable(code):
            pytest.skip(f"this processor or build has no {variant}")
        module = import_module(f"pixeldiff.ops.cpu.{op}")
        return lambda *args: module.launch(*args, isa=code), "cpu"
    if backend == "triton":
        if not INTERPRETER:
            pytest.skip("runs in the interpreter's own process")
        return import_module(f"pixeldiff.triton_kernels.{op}").launch, "cpu"
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    if kind == "triton":
        return import_module(f"pixeldiff.triton_kernels.{op}").launch, "cuda"
    if native.why_not_cuda() is not None:
        pytest.skip(native.why_not_cuda())
    return import_module(f"pixeldiff.ops.cuda.{op}").launch, "cuda"


def on(device: str, args: tuple) -> tuple:
    """The same arguments with their tensors on a device."""
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)


@contextmanager
def guarded_outputs() -> Iterator[None]:
    """What `torch.empty` allocates inside lies between guards that must stay as they are."""
    buffers = []

    def empty(shape, *, dtype, device):
        shape = torch.Size([shape]) if isinstance(shape, int) else torch.Size(shape)
        buffers.append(torch.full((shape.numel() + 128,), 7.0, dtype=dtype, device=device))
        return buffers[-1][64:-64].view(shape)

    with mock.patch.object(torch, "empty", empty):
        yield
    assert buffers
    for buffer in buffers:
        assert (buffer[:64] == 7).all()
        assert (buffer[-64:] == 7).all()


def demo_weights(*names: str, of: str) -> list[Tensor]:
    """The demo network's own parameters of one module, fp32."""
    with safe_open(demo_asset("pid.safetensors"), "pt") as f:
        return [f.get_tensor(f"{of}.{name}") for name in names]


def usable_isas() -> list[str]:
    """Instruction sets the CPU kernels were compiled for and this processor runs."""
    if native.why_not() is not None:
        pytest.skip(native.why_not())
    return [name for name, code in native.ISA_CODES.items() if native.load().isa_usable(code)]


each_isa = pytest.mark.parametrize("isa", native.ISA_CODES)


def check_threads(op: str, isa: str, *args) -> None:
    """The kernel's result does not depend on its number of threads, bit for bit."""
    launcher(op, f"cpu-{isa}")  # skips where this instruction set cannot run
    launch, code = import_module(f"pixeldiff.ops.cpu.{op}").launch, native.ISA_CODES[isa]

    def run(threads: int) -> tuple[Tensor, ...]:
        result = launch(*args, isa=code, threads=threads)
        return result if isinstance(result, tuple) else (result,)

    for threads in (2, 7, 1000):
        for a, b in zip(run(1), run(threads), strict=True):
            assert torch.equal(a, b)


def check_not_finite_like(y: Tensor, want: Tensor) -> None:
    """NaN and infinities in the same places, the rest about equal; `want` holds some of each."""
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.isinf(), want.isinf())
    assert not want.isfinite().all()
    assert want.isfinite().any()
    tolerance = 16 * torch.finfo(y.dtype).eps
    ok = want.isfinite()
    torch.testing.assert_close(y[ok], want[ok], rtol=tolerance, atol=tolerance * 8)


def run_in_interpreter(test_file: str) -> None:
    """Run the "triton" cases of a test file in Triton's interpreter."""
    if util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test_file]
    done = subprocess.run(
        [*command, "-m", "not gpu", "-k", "triton and not interpreter and not ahead"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-2000:]
    assert int(passed[1]) >= 10, done.stdout[-2000:]


def ptxas_report(source: str, folder: Path) -> list[tuple[int, int, int]]:
    """Compile csrc/cuda/<source> for every target: (stack, spill stores, registers) per kernel."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", version)
    recent = release is not None and (int(release[1]), int(release[2])) >= (12, 8)
    archs = ["80", "89", "90a", "100", "120"] if recent else ["80", "89", "90a"]
    command = [nvcc, "-std=c++17", "-O3", "-c", str(ROOT / "csrc" / "cuda" / source)]
    command += ["-Xptxas", "-v", "-o", str(folder / "kernel.o")]
    for arch in archs:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    registers = re.findall(r"Used (\d+) registers", done.stderr)
    assert len(stacks) == len(registers)
    assert len(registers) % len(archs) == 0
    return [(int(a), int(b), int(c)) for (a, b), c in zip(stacks, registers, strict=True)]
