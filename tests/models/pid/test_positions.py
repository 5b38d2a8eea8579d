"""Positional tables against their formulas in fp64, evaluated entry by entry."""

import math

import pytest
import torch

from pixeldiff.models.pid.positions import (
    pixel_sincos,
    rope_1d,
    rope_2d,
    time_embedding,
    time_frequencies,
)


@pytest.mark.parametrize("mode", ["original", "ntk_aware"])
@pytest.mark.parametrize("head_dim", [4, 8, 72])
@pytest.mark.parametrize("grid", [(3, 5), (1, 1), (1, 4), (7, 2)])
def test_rope_2d(mode, head_dim, grid):
    """Even slots turn with the column, odd with the row; both spans are [0, 16]."""
    cos, sin = rope_2d(grid, head_dim, mode=mode, reference=(4, 2))
    assert cos.shape == sin.shape == (grid[0] * grid[1], head_dim // 2)
    assert cos.dtype == torch.float32
    g = head_dim / 2
    k = g / (g - 2) if mode == "ntk_aware" and g > 2 else 0
    for row in range(grid[0]):
        for col in range(grid[1]):
            for slot in range(head_dim // 2):
                cells, at, ref = ((grid[1], col, 2), (grid[0], row, 4))[slot % 2]
                base = 10000 * (cells / ref) ** k
                coordinate = 16 * at / (cells - 1) if cells > 1 else 0
                angle = coordinate * base ** (-4 * (slot // 2) / head_dim)
                n = row * grid[1] + col
                assert cos[n, slot].item() == pytest.approx(math.cos(angle), abs=4e-6)
                assert sin[n, slot].item() == pytest.approx(math.sin(angle), abs=4e-6)


def test_ntk_aware_at_its_reference_is_original():
    for ours, plain in zip(
        rope_2d((6, 4), 64, mode="ntk_aware", reference=(6, 4)),
        rope_2d((6, 4), 64, mode="original"),
        strict=True,
    ):
        assert torch.equal(ours, plain)
    bigger = rope_2d((6, 4), 64, mode="ntk_aware", reference=(3, 4))[0]
    plain = rope_2d((6, 4), 64, mode="original")[0]
    assert torch.equal(bigger[:, 0::2], plain[:, 0::2])  # columns: as the reference
    assert not torch.equal(bigger[:, 1::2], plain[:, 1::2])


@pytest.mark.parametrize(("length", "head_dim"), [(7, 8), (1, 2), (300, 64)])
def test_rope_1d(length, head_dim):
    cos, sin = rope_1d(length, head_dim)
    rows = torch.arange(length, dtype=torch.float64)[:, None]
    angle = rows * 10000.0 ** (-2 * torch.arange(head_dim // 2).double() / head_dim)
    torch.testing.assert_close(cos.double(), angle.cos(), rtol=0, atol=4e-5)
    torch.testing.assert_close(sin.double(), angle.sin(), rtol=0, atol=4e-5)
    assert torch.equal(cos[0], torch.ones(head_dim // 2))


@pytest.mark.parametrize(("channels", "start"), [(4, 0), (16, 0), (16, 4000)])
def test_pixel_sincos(channels, start):
    table = pixel_sincos(9, channels, start=start)
    m = channels // 4
    assert table.shape == (9, 2 * m)
    for i in range(9):
        for j in range(m):
            angle = (start + i) * 10000 ** (-j / m)
            want = torch.tensor([math.sin(angle), math.cos(angle)])
            torch.testing.assert_close(table[i, [j, m + j]], want, rtol=0, atol=6e-8)


def test_pixel_tables_of_bands_join():
    whole = pixel_sincos(24, 16)
    assert torch.equal(torch.cat((pixel_sincos(8, 16), pixel_sincos(16, 16, start=8))), whole)


def test_time_embedding():
    """Period 10, cosines first; arguments reach 999, so fp32 leaves 1e-4."""
    t = torch.tensor([0.0, 1.0, 342.0, 999.0])
    embedding = time_embedding(t)
    frequency = torch.exp(-math.log(10) * torch.arange(128).double() / 128)
    assert embedding.shape == (4, 256)
    torch.testing.assert_close(time_frequencies().double(), frequency, rtol=2e-7, atol=0)
    angle = t.double()[:, None] * frequency
    want = torch.cat((angle.cos(), angle.sin()), -1)
    torch.testing.assert_close(embedding.double(), want, rtol=0, atol=2e-4)
    assert torch.equal(embedding[0], torch.cat((torch.ones(128), torch.zeros(128))))


def test_tables_do_not_follow_a_default_device():
    with torch.device("meta"):
        tables = [*rope_2d((2, 3), 8, mode="original"), *rope_1d(3, 8), pixel_sincos(4, 8)]
        tables += [time_frequencies()]
    assert {t.device.type for t in tables} == {"cpu"}


def test_unknown_rope_mode():
    with pytest.raises(ValueError, match="mode must be ntk_aware or original, got 'yarn'"):
        rope_2d((2, 2), 8, mode="yarn")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_time_frequencies_are_those_of_the_cpu_on_a_gpu():
    """Made there, from fp64: a copy could not be part of a captured graph."""
    assert torch.equal(time_frequencies("cuda").cpu(), time_frequencies())
