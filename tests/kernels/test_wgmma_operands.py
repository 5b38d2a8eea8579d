"""Registers of a wgmma are the tensor cores' from its fence to its wait: no instruction between may
touch them. The compiler may move arithmetic past an asm statement that does not name it, and the
emulator does not see that; here its output is read.

Source: PTX ISA, "wgmma.fence" and "wgmma.wait_group".
"""

import re
import shutil
import subprocess

import pytest

from bench.ptxas import FOLDER

FILES = {
    "joint_attention_sm90": 82,  # wgmma in it
    "joint_attention_fp8_sm90": 50,
    "pixel_adaln_compress_sm90": 12,
    "pixel_adaln_mlp_sm90": 24,
    "qkv_norm_rope_sm90": 84,
}
REGISTER = re.compile(r"%[fr]\d+\b")


def touched(ptx: str) -> list[str]:
    """Instructions that break the rule, line by line as they stand, loops not unrolled."""
    found = []
    for kernel in ptx.split(".entry ")[1:]:
        groups: list[set[str]] = []  # committed, not waited for
        issued: set[str] = set()  # since the last commit
        seen: set[str] | None = None  # read or written since the fence; None where there was none
        for line in map(str.strip, kernel.splitlines()):
            if line.startswith("wgmma.fence"):
                seen = set()
            elif line.startswith("wgmma.mma_async"):
                own = operands(line)
                if seen is None or own & seen:
                    found.append(line)
                issued |= own
            elif line.startswith("wgmma.commit_group"):
                groups.append(issued)
                issued = set()
            elif line.startswith("wgmma.wait_group"):
                pending = int(re.search(r"aligned (\d+)", line)[1])
                groups = groups[len(groups) - pending :] if pending else []
            else:
                registers = set(REGISTER.findall(line))
                if registers & issued.union(*groups):
                    found.append(line)
                if seen is not None:
                    seen |= registers
    return found


def operands(line: str) -> set[str]:
    """Of D, and of A where it is in registers."""
    braces = re.findall(r"\{([^}]*)\}", line)
    return {register for inside in braces for register in REGISTER.findall(inside)}


@pytest.mark.parametrize("name", FILES)
def test_nothing_touches_what_the_tensor_cores_have(name, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    out = tmp_path / "kernels.ptx"
    command = ["nvcc", "-std=c++17", "-O3", "-arch=sm_90a", "-ptx", "-o", str(out)]
    command += ["-DPIXELDIFF_BF16=true", str(FOLDER / f"{name}.cu")]
    subprocess.run(command, check=True)
    ptx = out.read_text()
    assert ptx.count("wgmma.mma_async") == FILES[name]
    assert touched(ptx) == []


PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2}, {%r1, %r2}, %rd1, 1;"
ALLOWED = [
    "mul.f32 %f1, %f1, %f9;",
    "wgmma.fence.sync.aligned;",
    "add.s64 %rd1, %rd2, 2;",
    PRODUCT,
    PRODUCT,
    "wgmma.commit_group.sync.aligned;",
    "mul.f32 %f5, %f10, %f20;",
    "wgmma.wait_group.sync.aligned 0;",
    "mul.f32 %f1, %f1, %f9;",
]


@pytest.mark.parametrize(
    ("at", "line", "breaks"),
    [
        (0, "", []),
        (2, "mov.f32 %f2, %f9;", [PRODUCT, PRODUCT]),
        (2, "mov.b32 %r1, {%rs1, %rs2};", [PRODUCT, PRODUCT]),
        (2, "mov.b32 %r9, {%rs1, %rs2};", []),
        (2, "mov.f32 %f9, %f2;", [PRODUCT, PRODUCT]),
        (1, "mov.f32 %f9, %f2;", []),
        (4, "mov.f32 %f2, %f9;", None),
        (6, "cvt.rn.bf16x2.f32 %r2, %f9, %f8;", None),
        (7, "add.f32 %f9, %f1, %f8;", None),
        (7, "wgmma.wait_group.sync.aligned 1;\nadd.f32 %f9, %f1, %f8;", ["add.f32 %f9, %f1, %f8;"]),
        (7, "wgmma.wait_group.sync.aligned 0;\nadd.f32 %f9, %f1, %f8;", []),
    ],
)
def test_the_reader_tells_them(at, line, breaks):
    lines = [*ALLOWED[:at], line, *ALLOWED[at:]]
    found = touched(".entry kernel()\n" + "\n".join(lines))
    if breaks is None:
        assert line in found
    else:
        assert found == breaks


def test_a_product_needs_a_fence():
    assert touched(".entry kernel()\n" + PRODUCT) == [PRODUCT]
