"""Pages, plots and README's figures: only what the result files say, the same every time."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from rows import MACHINE, decode_row, kernel_row, refused_row

from bench import schema, show
from bench.__main__ import main
from bench.report import BEGIN, END, NOTHING, readme_block, regenerated, update_readme, write

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    kernel_row("eager", 6.0, speedup_eager=1.0, speedup_compiled=0.4),
    kernel_row("cpu", 2.0),
    refused_row(),
    decode_row("pixeldiff", 100.0, 256),
    decode_row("reference", 200.0, 256),
    decode_row("pixeldiff", 400.0, 512),
]


@pytest.fixture
def result(tmp_path):
    path = tmp_path / "cpu.json"
    schema.save(path, ROWS, "command")
    return path


def cells(text: str, *start: str) -> list[str]:
    """The table row whose first cells are `start`."""
    for line in text.splitlines():
        found = [c.strip() for c in line.strip("|").split("|")]
        if found[: len(start)] == list(start):
            return found
    raise AssertionError(f"no row {start} in\n{text}")


def test_page(result, tmp_path):
    written = write([result], tmp_path / "performance")
    names = sorted(p.name for p in written)
    assert names == [
        "README.md",
        "decode-a-processor.svg",
        "memory-a-processor.svg",
        "roofline-a-processor-fp32.svg",
    ]
    page = (tmp_path / "performance" / "README.md").read_text()
    row = cells(page, "`swiglu`", "image 1024", "cpu")
    assert row[3:] == ["3", "2 to 4", "33 GB/s", "66", "3.00", "1.25", "1.0e-07", "2.0e-07", "0.50"]
    assert "- triton (swiglu): refused, takes float32 only" in page
    row = cells(page, "demo", "512x512", "fp32", "pixeldiff")
    assert row[4] == "400"
    assert "0.50 GB" in row
    for text in ("a processor", "torch 2.9.0", "2 threads", "0123456789", "2026-01-02"):
        assert text in page
    for name in names[1:]:
        assert f"({name})" in page


def test_plots_are_svg_with_their_machine_and_the_same_every_time(result, tmp_path):
    first = {p.name: p.read_bytes() for p in write([result], tmp_path / "a")}
    again = {p.name: p.read_bytes() for p in write([result], tmp_path / "b")}
    assert first == again
    for name, data in first.items():
        if name.endswith(".svg"):
            text = data.decode()
            assert text.startswith("<?xml")
            assert "a processor" in text
            assert "torch 2.9.0" in text
            assert "0123456789" in text
            assert "2026-01-02" in text
    assert "swiglu image" in first["roofline-a-processor-fp32.svg"].decode()


def test_two_machines_are_two_sections(tmp_path):
    path = tmp_path / "r.json"
    other = dataclasses.replace(MACHINE, device_name="another processor")
    schema.save(path, [*ROWS, kernel_row(machine=other)], "command")
    write([path], tmp_path / "out")
    page = (tmp_path / "out" / "README.md").read_text()
    assert re.findall(r"^## (.+)$", page, re.M) == ["a processor", "another processor"]


def test_nothing_measured_is_an_error_not_an_empty_page(tmp_path):
    path = tmp_path / "r.json"
    schema.save(path, [refused_row()], "command")
    with pytest.raises(ValueError, match="none of the result files holds a measured row"):
        write([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def readme(tmp_path, names: str = " cpu.json ") -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\nbefore\n\n{BEGIN}{names}-->\nold\n{END}\n\nafter\n")
    return path


def test_readme_is_generated_between_its_markers(result, tmp_path):
    path = readme(tmp_path)
    assert not update_readme(path, check=True)
    assert "old" in path.read_text()
    assert not update_readme(path)
    text = path.read_text()
    assert "old" not in text
    assert text.startswith(f"# Title\n\nbefore\n\n{BEGIN} cpu.json -->\n")
    assert text.endswith(f"{END}\n\nafter\n")
    assert cells(text, "`swiglu`", "image 1024", "fp32", "cpu")[4:] == ["3", "66", "3.00", "1.25"]
    assert update_readme(path, check=True)
    # A changed figure is found.
    path.write_text(text.replace("| 3.00 |", "| 4.00 |"))
    assert not update_readme(path, check=True)


def test_readme_without_files_says_that_nothing_was_measured(tmp_path):
    path = readme(tmp_path, " ")
    update_readme(path)
    assert NOTHING in path.read_text()
    assert readme_block([refused_row()]) == NOTHING + "\n"


@pytest.mark.parametrize(
    "text", ["", f"{BEGIN} -->", f"{END}\n{BEGIN} -->", f"{BEGIN} {BEGIN} {END}"]
)
def test_missing_markers_are_an_error(text):
    with pytest.raises(ValueError, match="README needs one line"):
        regenerated(text, Path())


def test_the_readme_of_this_repository_is_what_its_files_give():
    assert update_readme(ROOT / "README.md", check=True), (
        "run python -m bench report --readme README.md"
    )


def test_every_committed_result_is_valid():
    for path in (ROOT / "bench" / "results").glob("*.json"):
        assert schema.load(path), path


def test_command_line(result, tmp_path):
    run = CliRunner().invoke
    done = run(main, ["report", str(result), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    path = readme(tmp_path)
    assert run(main, ["report", "--readme", str(path), "--check"]).exit_code == 1
    assert run(main, ["report", "--readme", str(path)]).exit_code == 0
    assert run(main, ["report", "--readme", str(path), "--check"]).exit_code == 0
    assert run(main, ["report"]).exit_code == 2
    done = run(main, ["summary", str(result)])
    assert done.exit_code == 0, done.output


def test_tables_on_the_terminal(capsys, monkeypatch):
    from rich.console import Console

    monkeypatch.setattr(show, "console", Console(width=140))
    show.kernels(ROWS[:3])
    show.decodes(ROWS[3:])
    text = capsys.readouterr().out
    assert "swiglu pid/image at 1024, fp32" in text
    assert "triton: refused, takes float32 only" in text
    assert "33 GB/s" in text
    assert "0.50 GB" in text
