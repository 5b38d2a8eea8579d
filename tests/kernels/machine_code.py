"""What nvcc makes of one of the CUDA sources, and what no Hopper kernel may have in it."""

import re
import shutil
from collections import Counter

import pytest

from bench.ptxas import Source, compile_source


def compiled_for(arch, file, definition=None):
    """(kernels, what the compiler said) of csrc/cuda/`file`."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    pytest.importorskip("triton", reason="brings the disassembler")
    return compile_source(Source(file, definition=definition), arch)


def check_register_trade(kernel, said, producer, consumers):
    """No spills; the block's 384 threads start with 168 registers each, and then trade them: a
    warpgroup keeps `producer`, two take `consumers`."""
    assert (kernel.registers, kernel.stack, kernel.spills) == (168, 0, 0), kernel.name
    assert 128 * producer + 256 * consumers <= 384 * 168 <= 65536
    check_products_overlap(said)


def check_products_overlap(said):
    """Neither setmaxnreg ignored nor products that wait for each other."""
    assert "C7508" not in said
    assert "C7510" not in said
    assert "serializ" not in said


def instructions(sass):
    """How often each instruction stands in it, by its name without modifiers; 0 for the others."""
    return Counter(re.findall(r"\b[A-Z][A-Z0-9]{1,}\b", sass))
