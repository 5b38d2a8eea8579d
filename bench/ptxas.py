"""What the CUDA kernels of csrc/cuda take of a device, by the assembler's own report; no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .aot import TENSOR_CORES, machine_code

FOLDER = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
ARCHS = ("80", "89", "90a", "100", "120")
DOC = """# CUDA kernels: what they take of a device

Compiled with nvcc {version} by `python -m bench cuda-resources -o docs/kernels/cuda.md`. Each cell:
registers per thread at launch, and among the machine code tensor-core instructions and those that
feed them (UTMALDG the copy engine, LDGSTS cp.async, LDSM ldmatrix). A stack or spills would stand
there in bold. Shared memory of the attention and projection kernels is asked for at launch:
[attention.md](attention.md), [qkv.md](qkv.md).

"""


@dataclass(frozen=True)
class Source:
    """A file of csrc/cuda and how CMake compiles it."""

    file: str
    archs: tuple[str, ...] = ARCHS
    definition: str = ""


SOURCES = (
    Source("gated_residual_norm.cu"),
    Source("joint_attention_fp8_sm90.cu", ("90a",)),
    Source("joint_attention_mma.cu", definition="PIXELDIFF_BF16=true"),
    Source("joint_attention_mma.cu", definition="PIXELDIFF_BF16=false"),
    Source("joint_attention_sm90.cu", ("90a",), "PIXELDIFF_BF16=true"),
    Source("joint_attention_sm90.cu", ("90a",), "PIXELDIFF_BF16=false"),
    Source("local_decoder_down.cu"),
    Source("local_decoder_up.cu"),
    Source("pixel_adaln_compress_sm90.cu", ("90a",), "PIXELDIFF_BF16=true"),
    Source("pixel_adaln_compress_sm90.cu", ("90a",), "PIXELDIFF_BF16=false"),
    Source("pixel_adaln_mlp_sm90.cu", ("90a",), "PIXELDIFF_BF16=true"),
    Source("pixel_adaln_mlp_sm90.cu", ("90a",), "PIXELDIFF_BF16=false"),
    Source("qkv_norm_rope_sm90.cu", ("90a",), "PIXELDIFF_BF16=true"),
    Source("qkv_norm_rope_sm90.cu", ("90a",), "PIXELDIFF_BF16=false"),
    Source("rms_norm_modulate.cu"),
)


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled. Bytes of `stack` and `spills` are per thread."""

    name: str  # with its template arguments
    arch: str
    registers: int
    stack: int
    spills: int
    sass: str

    @property
    def engines(self) -> set[str]:
        return {m[0] for m in re.finditer(TENSOR_CORES + r"|\b(UTMALDG|LDSM|LDGSTS)\b", self.sass)}


def compile_source(source: Source, arch: str) -> tuple[list[Kernel], str]:
    """Its kernels, and all that the compiler said.

    Raises:
        FileNotFoundError: no nvcc. RuntimeError: it does not compile. ImportError: no Triton,
        which brings the disassembler.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc was not found")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [nvcc, "-std=c++17", "-O3", "-cubin", "-Xptxas=-v", "-o", str(cubin)]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", str(FOLDER / source.file)]
        if source.definition:
            command.append(f"-D{source.definition}")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source.file} for sm_{arch}: {done.stderr[-2000:]}")
        code = machine_code(cubin)
    bodies = dict(re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\.text\.|\Z)", code, re.M | re.S))
    found = [
        Kernel(readable(symbol), arch, int(registers), int(stack), int(spills), bodies[symbol])
        for symbol, stack, spills, registers in parse(done.stderr)
    ]
    return sorted(found, key=lambda kernel: kernel.name), done.stderr


def parse(report: str) -> list[tuple[str, str, str, str]]:
    """(symbol, stack, spill stores, registers) of each kernel in the output of ptxas -v."""
    return re.findall(
        r"Function properties for (\S+)\n"
        r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores.*\n"
        r".*Used (\d+) registers",
        report,
    )


def readable(symbol: str) -> str:
    """The name of a kernel and what stands between its angle brackets, if it has them, from its
    mangled symbol."""
    name, arguments = re.search(r".*\d([a-z]\w*?_kernel)(?:I(.*?)EEv|E)", symbol).groups()
    if arguments is None:
        return name
    words = {"Lb0": "false", "Lb1": "true", "13__nv_bfloat16": "bf16", "6__half": "fp16"}
    words |= {"DTypeE0": "fp32", "DTypeE1": "bf16", "DTypeE2": "fp16"}
    pattern = r"Lb[01]|Li(\d+)|13__nv_bfloat16|6__half|DTypeE\d|^f"
    found = re.finditer(pattern, arguments)
    values = [m[1] or words.get(m[0], "fp32") for m in found]
    return f"{name}<{', '.join(values)}>"


def measure(sources: Sequence[Source] = SOURCES) -> Iterator[Kernel]:
    for source in sources:
        for arch in source.archs:
            yield from compile_source(source, arch)[0]


def cell(kernel: Kernel) -> str:
    parts = [f"{kernel.registers} regs", *sorted(kernel.engines)]
    parts += [f"**{kernel.stack} B stack**"] if kernel.stack else []
    parts += [f"**{kernel.spills} B spills**"] if kernel.spills else []
    return ", ".join(parts)


def document(kernels: Sequence[Kernel]) -> str:
    """The page docs/kernels/cuda.md."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release ([\d.]+)", said)[1]
    archs = sorted({k.arch for k in kernels}, key=lambda arch: int(arch.rstrip("af")))
    lines = ["| kernel | " + " | ".join(f"sm_{arch}" for arch in archs) + " |"]
    lines.append("|" + "---|" * (1 + len(archs)))
    for name in dict.fromkeys(k.name for k in kernels):
        at = {k.arch: cell(k) for k in kernels if k.name == name}
        lines.append(f"| `{name}` | " + " | ".join(at.get(arch, "-") for arch in archs) + " |")
    return DOC.format(version=version) + "\n".join(lines) + "\n"
