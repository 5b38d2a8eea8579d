"""The page of estimates: its columns are counted in machine code, and counting is right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.estimates import BEGIN, END, Estimate, cases, estimate, rewrite, tables, version
from bench.sass import count, instructions

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels" / "estimates.md"
SASS = """
.text.some_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R47], desc[UR16][R26.64], P1 ;
.L_x_1:
        /*0030*/                   LDGSTS.E.BYPASS.128 [R47], desc[UR16][R26.64], P1 ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24 ;
        /*0050*/                   HGMMA.64x32x16.F32.BF16 R24, R92, gdesc[UR12], R24, gsb0 ;
        /*0060*/              @UP0 FFMA R3, R4, R5, R6 ;
        /*0070*/              @!P4 BRA `(.L_x_1) ;
.L_x_0:
        /*0080*/                   LDSM.16.M88.4 R88, [R117+UR8] ;
        /*0090*/                   MUFU.EX2 R7, R7 ;
        /*00a0*/                   STS.U16 [R2], R7 ;
        /*00b0*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*00c0*/                   EXIT ;
.L_x_2:
        /*00d0*/                   BRA `(.L_x_2);
        /*00e0*/                   NOP ;
"""


def test_loops():
    """Inside from the label to the branch back; the end of the function is no loop."""
    found = [(i.name, i.loop) for i in instructions(SASS)]
    assert [name for name, loop in found if loop] == ["LDGSTS", "HGMMA", "HGMMA", "FFMA", "BRA"]
    assert len(found) == 13


def test_counts():
    """Worked out by hand, for ten iterations."""
    each = count(SASS, 10)
    assert each.kinds == {
        "fp32": 10,
        "integer": 0,
        "special": 1,
        "memory": 1 + 1 + 10 + 2,
        "tensor": 21,
        "other": 1 + 10 + 1,
    }
    assert each.instructions == 58
    assert each.special == 2
    # A quarter of 64 x 128 x 16 and of 64 x 32 x 16; mma.sync at 62 %.
    assert each.tensor == pytest.approx(10 * (64 + 16) / 4 + 1 / 0.62)
    # 2 KB of A where it is shared, 4 and 1 KB of B; the copies, the matrices, 64 bytes.
    operands = 10 * (2048 + 4096 + 1024) / 128 / 4
    assert each.shared == pytest.approx(operands + 11 * 4 + 4 + 1)
    assert each.copied == 10 * 512


@pytest.fixture(scope="module")
def two() -> list[Estimate]:
    pytest.importorskip("triton")
    first, *_ = cases(("pixel_adaln_mlp",))
    levels = list(cases(("local_decoder_down",)))
    return [estimate(first), estimate(levels[0])]


def test_what_is_known_of_the_released_shapes(two):
    """Work that does not depend on the compiler's choices."""
    mlp, down = two
    ((kernel, blocks, each),) = mlp.kernels
    assert blocks == 16384 * 256 * 16 // (128 * 32)
    # 4 chunks of a tile, in products as wide as they are; the MLP's on top.
    product = 2 * 16384 * 4096 * 4 * 1536
    assert each.tensor * 4096 * kernel.warps * blocks == pytest.approx(product, rel=0.03)
    # u and the weights of a tile, each time; the last two copies of each block are left out.
    assert each.copied * kernel.warps == 256 * 1536 * 2
    assert mlp.vendor == pytest.approx(2 * 16384 * 4096 * 1152 / 700e9, rel=1e-6)
    assert mlp.floor == pytest.approx(1.25, abs=0.01)
    assert down.floor == pytest.approx(4096**2 * (3 * 4 + 1.25 * 16 * 2) / 3.0e9, rel=1e-3)
    # Exponential and reciprocal of each value, 16 channels of four pixels for each of 64 squares.
    ((kernel, blocks, each),) = down.kernels
    assert each.special * 16 * kernel.warps * blocks >= 2 * 4096**2 * 16
    assert down.vendor == 0
    assert down.units["memory"] == pytest.approx(down.floor)


def test_the_page_is_what_is_counted(two):
    """Rows of two of its ops, if this is the Triton that it names."""
    page = PAGE.read_text()
    if f"\n{version()}\n" not in page:
        pytest.skip(f"the page was not counted with {version()}")
    for table in tables(two).values():
        for line in table.splitlines():
            assert line in page


def test_rewriting_keeps_the_text(two, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    text = rewrite(page, two)

    def prose(text):
        return re.sub(r"(<!-- counted: \w+ -->\n).*?(?=<!-- end -->)", r"\1", text, flags=re.S)

    assert prose(text) == prose(PAGE.read_text())
    for name, table in tables(two).items():
        assert f"{BEGIN.format(name)}\n{table}\n{END}" in text
    page.write_text("no tables")
    with pytest.raises(ValueError, match="no line '<!-- counted: units -->' to put a table behind"):
        rewrite(page, two)


def test_the_page_has_every_case():
    page = PAGE.read_text()
    for case in cases():
        assert f"| `{case.op}` | {case.system} {case.size}" in page
