"""The page of estimates: its columns are counted in machine code, and counting is right."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from bench.estimates import (
    BEGIN,
    END,
    Estimate,
    cases,
    estimate,
    rewrite,
    tables,
    throughputs,
    version,
)
from bench.sass import count, follow, instructions, waits, widths

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


LOADS = """
        /*0000*/              @!P0 LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0010*/                   LDG.E.U16 R12, desc[UR6][R8.64+0x800] ;
        /*0020*/                   FADD R3, R7, R7 ;
        /*0030*/                   FADD R3, R12, R3 ;
.L_x_0:
        /*0040*/                   LDG.E.64 R4, desc[UR6][R2.64] ;
        /*0050*/                   FMUL R6, R6, R6 ;
        /*0060*/                   STG.E.128 desc[UR6][R2.64], R4 ;
        /*0070*/                   @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0080*/                   FMUL R6, R6, R6 ;
        /*0090*/                   @P0 BRA `(.L_x_1) ;
        /*00a0*/                   CALL.REL.NOINC `($__internal_0_$__sqrt_slowpath) ;
        /*00b0*/                   EXIT ;
$__internal_0_$__sqrt_slowpath:
        /*00c0*/                   FADD R3, R3, R3 ;
        /*00d0*/                   FADD R3, R3, R3 ;
"""


def test_loads_and_loops():
    """Two loads before the first use are one wait; two loops one behind the other are two; a slow
    path is not counted."""
    assert waits(LOADS) == 2
    assert widths(LOADS) == ({16, 8, 2}, {16})
    assert [i.outermost for i in instructions(LOADS) if i.loop] == [0, 0, 0, 0, 1, 1]
    assert count(LOADS, (10, 100)).kinds["fp32"] == 2 + 10 + 100
    with pytest.raises(ValueError, match="loop 2 of a kernel said to have"):
        count(LOADS, (10,))


def test_blocks_on_their_way():
    """One alone waits for everything itself; many are as fast as the slowest unit; two with one
    unit find each other in it half of the time."""
    rates = throughputs([30.0, 10.0], 60.0, 1000)
    assert rates[0] == pytest.approx(1 / 100)
    assert rates[-1] == pytest.approx(1 / 30, rel=1e-2)
    assert rates == sorted(rates)
    assert throughputs([50.0], 50.0, 2)[-1] == pytest.approx(2 / (50 + 50 * 1.5))


@pytest.fixture(scope="module")
def few() -> list[Estimate]:
    pytest.importorskip("triton")
    ops = "pixel_adaln_mlp", "local_decoder_down", "rms_norm"
    return [estimate(next(cases((op,)))) for op in ops]


def test_what_is_known_of_the_released_shapes(few):
    """Work that does not depend on the compiler's choices."""
    mlp, down, norm = few
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
    assert mlp.passage is None
    # 300 rows on 132 multiprocessors, of 3 KB each.
    assert norm.passage.resident == 3
    assert norm.passage.in_flight == pytest.approx(3 * 1537 * 2, rel=0.01)
    assert norm.passage.ms > norm.floor + 2e-3
    assert down.units["memory"] == pytest.approx(down.floor)


def test_the_page_is_what_is_counted(few):
    """Rows of three of its ops, if this is the Triton that it names."""
    page = PAGE.read_text()
    if f"\n{version()}\n" not in page:
        pytest.skip(f"the page was not counted with {version()}")
    for table in tables(few).values():
        for line in table.splitlines():
            assert line in page


CHOOSES = """
.text.some_kernel:
        /*0000*/               @!P0 EXIT ;
.L_x_0:
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;
        /*0030*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0040*/                   IMAD R2, R2, R2, RZ ;
.L_x_2:
        /*0050*/               @P0 BRA `(.L_x_4) ;
        /*0060*/               @P1 BRA `(.L_x_3) ;
        /*0070*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0080*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;
.L_x_3:
        /*0090*/                   FADD R4, R4, R4 ;
.L_x_4:
        /*00a0*/              @!P2 BRA `(.L_x_0) ;
        /*00b0*/                   EXIT ;
$__internal_0_$__cuda_sm20_div_s64:
        /*00c0*/                   FADD R3, R3, R3 ;
"""


@pytest.mark.parametrize(
    ("taken", "ran"),
    [
        ([True], ["EXIT", "BRA", "IMAD", "BRA", "BRA", "EXIT"]),
        ([False, True], ["EXIT", "BRA", "IMAD", "BRA", "BRA", "FADD", "BRA", "EXIT"]),
        (
            [False, False],
            ["EXIT", "BRA", "IMAD", "BRA", "BRA", "LDG", "CALL", "FADD", "BRA", "EXIT"],
        ),
    ],
)
def test_what_runs(taken, ran):
    """Slow paths never; of branches over loads what is asked for; once through the loop."""
    found = follow(CHOOSES, taken)
    assert [i.name for i in instructions(found)] == ran
    with pytest.raises(ValueError, match=r"1 of . branches were not met"):
        follow(CHOOSES, [*taken, True])
    with pytest.raises(ValueError, match="more branches than decisions"):
        follow(CHOOSES, taken[:-1])


def test_cuda_norms():
    """What runs of their code loads and stores a row once, its vectors once; the page has it."""
    pytest.importorskip("triton")
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    from bench import estimates_cuda

    found = list(estimates_cuda.estimates())
    for e in found:
        rows, vectors = {"rms_norm_modulate": (1, 3), "gated_residual_norm": (2, 4)}[e.case.op]
        vectors -= e.case.site == "trunk"  # has no shift
        written = 2 if e.case.op == "gated_residual_norm" else 1
        # Two pieces a thread: 1536 = 2 * 8 * 96, and of 3840 the last 32 threads have one.
        assert e.kernel.warps == {1536: 3, 3840: 8}[e.case.geometry.width]
        assert e.kernel.sass.count("LDG.E.128") == 2 * (rows + vectors), e.case.label
        assert e.kernel.sass.count("STG.E.128") == 2 * written, e.case.label
        assert widths(e.kernel.sass) == ({16}, {16})
        assert e.passage.ms > 1e3 * e.units["memory"]
    page = PAGE.read_text()
    if f"\n{version()}\n" in page and f"\n{estimates_cuda.version()}\n" in page:
        for line in estimates_cuda.table(found).splitlines():
            assert line in page


def test_rewriting_keeps_the_text(few, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    text = rewrite(page, tables(few))

    def prose(text):
        return re.sub(r"(<!-- counted: \w+ -->\n).*?(?=<!-- end -->)", r"\1", text, flags=re.S)

    assert prose(text) == prose(PAGE.read_text())
    for name, table in tables(few).items():
        assert f"{BEGIN.format(name)}\n{table}\n{END}" in text
    page.write_text("no tables")
    with pytest.raises(
        ValueError, match="no line '<!-- counted: version -->' to put a table behind"
    ):
        rewrite(page, tables(few))


def test_the_page_has_every_case():
    page = PAGE.read_text()
    for case in cases():
        assert f"| `{case.op}` | {case.system} {case.size}" in page
