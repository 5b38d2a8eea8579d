"""The page of registers: measured from real compilation, and every kernel of ours is on it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.resources import document, measure

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def test_one_op_compiled_for_two_devices():
    usages = list(measure(2048, "bf16", (80, 90), ("rms_norm_modulate",)))
    page = document(usages, 2048, "bf16")
    rows = [line for line in page.splitlines() if line.startswith("| `rms_norm_modulate`")]
    # Both places of the op in PiD run the same kernel, and have one row; L2P's are wider.
    for row, (places, warps) in zip(rows, (("image, text", 4), ("trunk", 8)), strict=True):
        assert re.fullmatch(
            rf"\| `rms_norm_modulate` \| {places} \| `rms_norm_modulate_kernel` "
            rf"\| \d+ regs, {warps} warps \| \d+ regs, {warps} warps \|",
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
