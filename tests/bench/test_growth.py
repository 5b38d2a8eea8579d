"""Exponents of time over pixels, and the columns of the original: from made-up rows."""

from __future__ import annotations

import pytest
from rows import decode_row

from bench.decode import compare
from bench.growth import exponent, growth
from bench.report import page


def test_exponents():
    assert exponent({512: 10.0, 1024: 40.0}) == pytest.approx(1.0)
    assert exponent({512: 10.0, 1024: 160.0, 2048: 2560.0}) == pytest.approx(2.0)
    assert exponent({256: 7.0, 1024: 7.0}) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="two sizes or more, got 1"):
        exponent({256: 7.0})


def test_growth_of_whole_single_images():
    rows = [decode_row(ms=10.0, side=512), decode_row(ms=80.0, side=1024)]
    (found,) = growth(rows)
    assert found.ms == {512: 10.0, 1024: 80.0}
    assert found.exponent == pytest.approx(1.5)
    tiled, batch = decode_row(ms=1.0, side=256), decode_row(ms=1.0, side=256)
    tiled.shape["tile"], batch.shape["batch"] = 128, 2
    assert growth([*rows, tiled, batch, decode_row("reference", side=256)]) == [found]
    # Measured again: the last counts.
    again = growth([*rows, decode_row(ms=40.0, side=1024)])
    assert again[0].exponent == pytest.approx(1.0)


def test_page_has_the_exponent_and_the_original():
    rows = [decode_row("pixeldiff", 10.0, 512), decode_row("upstream", 45.0, 512)]
    rows += [decode_row("upstream+compile", 25.0, 512)]
    compare(rows)
    assert rows[0].speedup_upstream == 4.5
    assert rows[0].speedup_upstream_compiled == 2.5
    rows.append(decode_row("pixeldiff", 40.0, 1024))
    tiled = decode_row("pixeldiff", 30.0, 1024)
    tiled.shape["tile"] = 512
    text = page([*rows, tiled], [], [])
    assert "| demo | fp32 | pixeldiff | 10 | 40 | 1.00 |" in text
    assert "x original | x original compiled" in text
    assert "| 4.50 | 2.50 |" in text
    assert "1024x1024 in tiles of 512" in text
