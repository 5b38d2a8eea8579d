"""The page of registers: measured from real compilation, and every kernel of ours is on it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.resources import document, measure

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def test_one_op_compiled_for_two_devices():
    usages = list(measure(2048, "bf16", (80, 90), ("gated_residual_norm",)))
    page = document(usages, 2048, "bf16")
    (row,) = [line for line in page.splitlines() if line.startswith("| `gated_residual_norm`")]
    # Both places of the op run the same kernel, and have one row.
    assert re.fullmatch(
        r"\| `gated_residual_norm` \| image, text \| `gated_residual_norm_kernel` "
        r"\| \d+ regs, 2 warps \| \d+ regs, 2 warps \|",
        row,
    )


def test_unknown_op():
    with pytest.raises(ValueError, match=r"'patch' has no Triton kernel; ops are .*rms_norm_mod"):
        list(measure(2048, "bf16", (90,), ("patch",)))


def test_the_page_names_every_op_with_a_triton_kernel():
    from pixeldiff.ops.registry import OPS

    page = (ROOT / "docs" / "kernels" / "triton.md").read_text()
    having = {o.name for o in OPS.values() if any(b.name == "triton" for b in o.backends)}
    assert set(re.findall(r"^\| `(\w+)`", page, re.M)) == having
    assert "**" not in page  # a stack or spills
