"""The page of the CUDA kernels' registers: the assembler's report, parsed."""

from __future__ import annotations

import re
from pathlib import Path

from bench.ptxas import FOLDER, SOURCES, Kernel, cell, parse, readable

ROOT = Path(__file__).resolve().parents[2]
REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3one17first_some_kernelILi64ELb1EEEvi' for 'sm_90a'
ptxas info    : Function properties for _ZN3one17first_some_kernelILi64ELb1EEEvi
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 16 bytes cumulative stack size
ptxas info    : Compile time = 4199.225 ms
ptxas info    : Compiling entry function '_ZN3one11some_kernelI13__nv_bfloat16Li8EEEvi' for 'sm_80'
ptxas info    : Function properties for _ZN3one11some_kernelI13__nv_bfloat16Li8EEEvi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem
"""


def test_report():
    first, second = parse(REPORT)
    assert first == ("_ZN3one17first_some_kernelILi64ELb1EEEvi", "16", "12", "168")
    assert second[1:] == ("0", "0", "40")
    assert readable(first[0]) == "first_some_kernel<64, true>"
    assert readable(second[0]) == "some_kernel<bf16, 8>"
    assert readable("_ZN3one11some_kernelIfLi4EEEvi") == "some_kernel<fp32, 4>"
    assert readable("_ZN3one11some_kernelI6__halfEEvi") == "some_kernel<fp16>"
    assert readable("_ZN3one12_GLOBAL__N_111some_kernelENS_6ParamsE") == "some_kernel"


def test_cell():
    lean = Kernel("k", "90a", 168, 0, 0, "HGMMA.64x128x16 R24\nUTMALDG.4D [UR8]\nHGMMA")
    assert cell(lean) == "168 regs, HGMMA, UTMALDG"
    assert cell(Kernel("k", "80", 40, 16, 12, "")) == "40 regs, **16 B stack**, **12 B spills**"


def test_the_page_names_every_kernel():
    page = (ROOT / "docs" / "kernels" / "cuda.md").read_text()
    assert "**" not in page  # a stack or spills
    named = set(re.findall(r"^\| `(\w+)[<`]", page, re.M))
    for source in SOURCES:
        assert set(re.findall(r"\b(\w+_kernel)\(", (FOLDER / source.file).read_text())) <= named
