"""Where tiles lie, and what each counts for."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pixeldiff.models.tiles import WINDOW_STEP, Layout


@st.composite
def layouts(draw) -> Layout:
    step, pixels = draw(st.sampled_from([(1, 1), (1, 6), (2, 8), (4, 4)]))
    lengths = []
    for _ in range(2):
        size, tile = draw(st.integers(1, 40)), draw(st.integers(1, 12))
        tile = min(size, tile)
        lengths.append((size, tile, draw(st.integers(0, tile // 3))))
    size, tile, overlap = ([n * step for n in axis] for axis in zip(*lengths, strict=True))
    assume(size[0] * size[1] * pixels**2 < 300_000)
    return Layout(tuple(size), tuple(tile), tuple(overlap), step, pixels)


@given(layouts())
def test_windows_sum_to_one_exactly(layout):
    total = torch.zeros(layout.image_pixels)
    for tile in layout.tiles:
        window = layout.window(tile)
        assert window.shape == layout.tile_pixels
        assert window.min() >= 0
        layout.crop(total, tile).add_(window)
    assert torch.equal(total, torch.ones(layout.image_pixels))


@given(layouts())
def test_tiles_cover_the_image_and_share_the_overlap(layout):
    for starts, size, tile, overlap in zip(
        layout.starts, layout.size, layout.tile, layout.overlap, strict=True
    ):
        assert starts[0] == 0
        assert starts[-1] + tile == size
        assert all(start % layout.step == 0 for start in starts)
        for before, after in itertools.pairwise(starts):
            assert after > before
            assert before + tile - after >= overlap
        if len(starts) > 1:  # one less would not do
            assert (len(starts) - 2) * (tile - overlap) + tile < size


def test_a_fade_is_a_raised_cosine_over_a_quarter_of_the_overlap_where_two_share_most():
    layout = Layout((12, 30), (12, 18), (0, 4), 1, 8)
    left, right = (layout.window(tile)[0].double() for tile in layout.tiles)
    assert layout.starts == ((0,), (0, 12))
    at = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    fade = torch.sin(at * torch.pi / 2) ** 2  # over 8 of the 48 pixels that both have
    assert left[:116].eq(1).all()
    assert right[:20].eq(0).all()
    torch.testing.assert_close(right[20:28], fade, rtol=0, atol=WINDOW_STEP / 2)
    assert torch.equal(left[116:124], 1 - right[20:28])
    assert left[124:].eq(0).all()
    assert right[28:].eq(1).all()


def test_the_shortest_overlap_still_fades():
    layout = Layout((1, 5), (1, 3), (0, 1), 1, 1)
    left, right = (layout.window(tile)[0] for tile in layout.tiles)
    assert left.tolist() == [1, 1, 0.5]
    assert right.tolist() == [0.5, 1, 1]


def test_without_overlap_one_tile_counts_alone():
    layout = Layout((4, 4), (2, 4), (0, 0), 1, 3)
    assert all(layout.window(tile).eq(1).all() for tile in layout.tiles)


def test_crops_share_the_images_memory():
    layout = Layout((5, 6), (3, 4), (1, 1), 1, 2)
    image, cells = torch.arange(120).view(1, 10, 12), torch.arange(30).view(5, 6)
    tile = layout.tiles[-1]
    assert (tile.row, tile.column) == (2, 2)
    assert torch.equal(layout.crop(image, tile), image[:, 4:, 4:])
    assert torch.equal(layout.cells(cells, tile), cells[2:, 2:])
    layout.crop(image, tile).zero_()
    assert image[:, 4:, 4:].eq(0).all()


def test_groups_are_the_tiles_in_order():
    layout = Layout((9, 9), (3, 3), (0, 0), 1, 1)
    assert sum(layout.groups(4), ()) == layout.tiles
    assert [len(group) for group in layout.groups(4)] == [4, 4, 1]


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        (((9, 9), (4, 4), (2, 2), 2), "multiples of 2 cells"),
        (((8, 8), (9, 4), (1, 1), 1), "1 to 8 cells long, got 9"),
        (((8, 8), (4, 0), (1, 0), 1), "1 to 8 cells long, got 0"),
        (((8, 8), (4, 4), (2, 1), 1), "a third of the tile's 4 cells, got 2"),
        (((8, 8), (4, 4), (1, -1), 1), "got -1"),
    ],
)
def test_lengths_that_do_not_fit(lengths, words):
    with pytest.raises(ValueError, match=words):
        Layout(*lengths, pixels=8)
