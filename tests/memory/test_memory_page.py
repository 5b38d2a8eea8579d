"""docs/memory.md: its tables are what is chosen today, and what it says of one decode is so."""

from __future__ import annotations

import pytest

from bench import plans
from pixeldiff import native
from pixeldiff.memory import estimate_memory


def test_the_tables_are_those_of_the_command():
    if native.why_not() is not None:
        pytest.skip("the CPU's tables are of the C++ kernels, which are not built here")
    page = plans.PAGE.read_text()
    assert plans.rewritten(page) == page


def test_a_page_without_a_place_is_refused():
    with pytest.raises(ValueError, match="once each"):
        plans.rewritten("no tables")


def test_the_worst_moment_is_the_one_described():
    table = estimate_memory("flux-2k", 2048, device="cuda").table
    largest = [float(line.split()[0]) for line in table]
    text = plans.PAGE.read_text()
    assert f"| {largest[0] + largest[1]:.0f} |" in text  # features and logits
    assert f"| {largest[2]:.0f} |" in text
    assert f"| {largest[3] + largest[4]:.0f} |" in text
    assert text.count(f"| {largest[5]:.0f} |") >= 2
