"""The CUDA kernels of local_decoder_up: their source on an emulator of a block, in random orders
and with faults planted, or on a GPU; and what the compiler makes of it."""

import ctypes
import re
from itertools import product

import numpy as np
import pytest
import torch
from emulated import EmulatorError, library
from emulated_local_decoder_up import SOURCE, Up, local_decoder_up
from harness import guarded_outputs, launcher, on
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine_code import compiled_for
from rules import (
    Draw,
    assert_bitwise,
    assert_within_twice_eager,
    assert_within_twice_eager_or_spacing,
    check_captures,
    check_repeatable,
    f64,
)
from taps import convolved
from test_local_decoder_up import OP, arguments, eager, oracle

from bench.ptxas import ARCHS
from pixeldiff.ops.cuda import local_decoder_up as backend
from pixeldiff.ops.registry import explain

bf16 = torch.bfloat16
each_backend = pytest.mark.parametrize(
    "where", ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
)
# (B, S, h, w, Ci, Cu, Cs, Co). A strip is 16 squares wide, a ring holds 8 rows of them.
SHAPES = {
    "level-0": (2, 1, 4, 35, 16, 16, 16, 16),
    "level-1": (1, 1, 3, 33, 32, 32, 32, 16),
    "one": (1, 1, 1, 1, 16, 16, 16, 16),
    "row": (1, 1, 1, 18, 8, 7, 16, 16),
    "column": (1, 1, 5, 1, 16, 3, 8, 16),
    "two-by-two": (1, 1, 2, 2, 24, 5, 16, 16),
    "round-the-ring": (1, 1, 19, 16, 16, 4, 24, 16),
    "skips": (4, 2, 2, 17, 8, 1, 8, 16),
    "8k-outermost": (2, 1, 4, 36, 16, 16, 3, 16),
    "packed-of-32": (1, 1, 11, 20, 32, 5, 3, 16),
    "packed-least": (2, 2, 1, 4, 8, 3, 3, 16),
}
TILES = list(product((1, 2), (0, 1, 2)))  # blocks of 16 channels; of skip 0 are three, packed
each_tile = pytest.mark.parametrize("blocks", TILES)


def run(where, args, **how):
    """The result, on the CPU."""
    if where == "emulated":
        assert refusal(args) is None
        return local_decoder_up(*args, **how)
    launch, device = launcher(OP, "cuda")
    args = on(device, args)
    if reason := backend.why_not(*args):
        pytest.skip(reason)
    return launch(*args).cpu()


def refusal(args):
    x, skip, up_weight, _, weight, _ = args
    return backend.why_not_call(x, skip, up_weight, weight)


# --- against fp64


@each_backend
@pytest.mark.parametrize("std", [1.0, 1e-3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_oracle(shape, std, where):
    args = arguments(bf16, shape, std)
    y = run(where, args)
    assert y.dtype == bf16
    assert_within_twice_eager_or_spacing(y, eager(*args), oracle(*args))


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 40)),
    st.tuples(st.integers(1, 4), st.integers(1, 32), st.integers(0, 4)),
    st.integers(1, 7),
    st.integers(0, 2**63 - 1),
)
def test_random_sizes_in_random_orders(size, channels, slots, seed):
    """Segments of one row and of many, neighbours in the same strip and in others."""
    (images, rows, columns), (before, up, beside) = size, channels
    if beside == 0:
        columns = -(-columns // 4) * 4
    shape = (images, images, rows, columns, 8 * before, up, 8 * beside or 3, 16)
    args = arguments(bf16, shape)
    y = run("emulated", args, slots=slots, seed=seed)
    assert_within_twice_eager_or_spacing(y, eager(*args), oracle(*args))


@pytest.mark.parametrize("beside", [16, 3])
def test_neither_order_nor_division_changes_a_bit(beside):
    call = Up(*arguments(bf16, (1, 1, 11, 20, 16, 6, beside, 16)))
    weights = call.compose().clone()
    want = call.multiply().clone()
    for seed, slots in ((1, 1), (2, 6), (3, 30)):
        assert_bitwise(call.compose(seed=seed), weights)
        call.out.fill_(torch.nan)
        assert_bitwise(call.multiply(seed=seed, slots=slots), want)


@each_backend
def test_strided(where):
    """Part of wider pixels, rows apart, columns first, one image for two; weights channels last."""
    x, skip, up_weight, up_bias, weight, bias = args = arguments(bf16, (2, 2, 3, 5, 8, 6, 16, 16))
    want = run(where, args)

    def apart(t):
        wide = torch.full((*t.shape[:3], t.shape[3] + 16), torch.nan).to(bf16)
        wide[..., 8:-8] = t
        return wide.repeat_interleave(2, 1)[:, ::2, :, 8:-8]

    def last(t):
        return t.contiguous(memory_format=torch.channels_last)

    def spread(t):
        return torch.stack((t, t), -1)[..., 0]

    views = (apart(x), skip.transpose(1, 2).contiguous().transpose(1, 2))
    rest = (last(up_weight), spread(up_bias), last(weight), spread(bias))
    assert_bitwise(run(where, (*views, *rest)), want)
    repeated = (x[:1].expand(2, -1, -1, -1), skip[:1].expand(2, -1, -1, -1))
    both = run(where, (*repeated, up_weight, up_bias, weight, bias))
    assert_bitwise(both, want[:1].repeat(2, 1, 1, 1))


@each_backend
def test_strided_packed(where):
    """Part of larger images, one image for two."""
    x, skip, *rest = args = arguments(bf16, (2, 2, 3, 20, 8, 6, 3, 16))
    want = run(where, args)
    wide = torch.full((2, 13, 56, 3), torch.nan).to(bf16)
    for column in (0, 8):
        wide[:, 1:13:2, column : column + 40] = skip
        assert_bitwise(run(where, (x, wide[:, 1:13:2, column : column + 40], *rest)), want)
    both = run(where, (x[:1].expand(2, -1, -1, -1), skip[:1].expand(2, -1, -1, -1), *rest))
    assert_bitwise(both, want[:1].repeat(2, 1, 1, 1))


@each_backend
@pytest.mark.parametrize("beside", [8, 3])
def test_image_b_reads_skip_b_modulo_s(beside, where):
    x, skip, *rest = arguments(bf16, (4, 2, 2, 4, 8, 6, beside, 16))
    y = run(where, (x, skip, *rest))
    for b in range(4):
        alone = run(where, (x[b : b + 1], skip[b % 2 : b % 2 + 1], *rest))
        assert_bitwise(y[b : b + 1], alone)


@each_backend
@pytest.mark.parametrize("at", [(0, 0), (3, 17), (1, 15), (2, 16)], ids=str)
def test_not_finite(at, where):
    """At corners, and at either side of a border of strips. An infinity of x becomes one of u's, of
    either sign, so that the result may be NaN or not."""
    row, column = at
    for which, value in ((0, torch.inf), (0, torch.nan), (1, torch.nan), (1, -torch.inf)):
        args = arguments(bf16, (1, 1, 4, 18, 8, 3, 8, 16))
        args[which][0, row * (1 + which), column * (1 + which), 1] = value
        y, want = run(where, args), eager(*(a.float() for a in args))
        assert torch.equal(y.isfinite(), want.isfinite())
        assert not want.isfinite().all()
        assert want.isfinite().any()
        if which or value != torch.inf:
            assert torch.equal(y.isnan(), want.isnan())


@each_backend
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_not_finite_packed(value, where):
    """Each channel of pixels everywhere in a strip and at its borders: in nine pixels, and not in
    those that find it in a word of theirs."""
    args = arguments(bf16, (1, 1, 6, 20, 8, 3, 3, 16))
    skip, places = args[1], ((0, 0), (3, 7), (6, 14), (1, 31), (4, 32), (9, 39), (11, 18))
    for i, (row, column) in enumerate(places):
        skip[0, row, column, i % 3] = value
    y, want = run(where, args), eager(*(a.float() for a in args))
    assert torch.equal(y.isfinite(), want.isfinite())
    assert torch.equal(y.isnan(), want.isnan())
    assert 4 < (~want.isfinite()).any(-1).sum() <= 9 * len(places)
    for channel, column in product(range(3), range(8, 16)):
        args[1].nan_to_num_(0, 0, 0)
        args[1][0, 5, column, channel] = value
        y, want = run(where, args), eager(*(a.float() for a in args))
        assert torch.equal(y.isfinite(), want.isfinite())


@pytest.mark.parametrize(
    "layout",
    [((2, 2, 2, 8), (2**31, 16, 8, 1)), ((1, 3, 2, 8), (0, 2**30 + 8, 8, 1))],
    ids=["images", "rows"],
)
def test_offsets_past_two_to_the_31(layout):
    base = torch.empty(2**31 + 128, dtype=bf16)  # pages that are not touched cost nothing
    far = base.as_strided(*layout)
    near = Draw(bf16)(*layout[0])
    far.copy_(near)
    b, rows, columns, _ = near.shape
    _, other, *rest = arguments(bf16, (b, b, rows, columns, 8, 3, 8, 16))
    assert_bitwise(local_decoder_up(far, other, *rest), local_decoder_up(near, other, *rest))
    x, _, *rest = arguments(bf16, (b, b, rows // 2, 1, 8, 3, 8, 16))
    if rows % 2 == 0:
        assert_bitwise(local_decoder_up(x, far, *rest), local_decoder_up(x, near, *rest))


# --- the weights that it multiplies by


def integers(function, *args, count):
    out = (ctypes.c_int * count)()
    function(*args, out)
    return list(out)


SIZE = 4  # squares of an image that has an inside and edges


def model_of(up_weight, up_bias, weight, bias):
    """({(ey, ex, a, b, row, column): (Ci, Co)}, (rows, columns, a, b, Co) of biases) of squares, in
    fp64: what an impulse in x makes of the two convolutions."""
    up_weight, up_bias, weight, bias = f64(up_weight, up_bias, weight, bias)
    before, middle = up_weight.shape[1], up_weight.shape[0]

    def both(x, up_bias, bias):
        raised = convolved(x.repeat(2, axis=1).repeat(2, axis=2), up_weight) + up_bias
        y = convolved(raised, weight[:, :middle]) + bias
        return y.reshape(len(x), SIZE, 2, SIZE, 2, -1).transpose(0, 1, 3, 2, 4, 5)

    taps = {}
    for i, j in product(range(SIZE), range(SIZE)):
        x = np.zeros((before, SIZE, SIZE, before))
        x[np.arange(before), i, j, np.arange(before)] = 1
        y = both(x, 0, 0)
        for row, column, a, b in product(range(SIZE), range(SIZE), range(2), range(2)):
            taps[i - row, j - column, a, b, row, column] = y[:, row, column, a, b]
    return taps, both(np.zeros((1, SIZE, SIZE, before)), up_bias, bias)[0]


def square_of(edge, parity):
    """A row or column of squares where pixels of this parity are at their edge, or are not."""
    return (SIZE - 1 if parity else 0) if edge else 1


def close(got, want):
    """Of one rounding to bf16 after sums in fp32."""
    slack = 1e-5 * np.abs(want).max()
    assert (np.abs(got - want) <= torch.finfo(bf16).eps / 2 * np.abs(want) + slack).all()


@pytest.mark.parametrize("channels", [(16, 16, 16), (24, 5, 32), (8, 32, 8)], ids=str)
def test_composed_weights(channels):
    before, middle, beside = channels
    args = arguments(bf16, (1, 1, 1, 1, before, middle, beside, 16))
    weights = Up(*args).compose().view(torch.int16)
    taps, biases = model_of(*args[2:])
    lib = library(SOURCE)
    at = [lib.up_fragment_at(k, c) for k, c in product(range(16), range(16))]
    assert sorted(at) == list(range(256))

    def fragment(first):
        return f64(weights[first // 2 : first // 2 + 256].view(bf16))[at].reshape(16, 16)

    blocks, seen = -(-before // 16), set()
    for parity, slot, block in product(range(4), range(16), range(blocks)):
        a, b = divmod(parity, 2)
        edge_y, edge_x, ey, ex = integers(lib.up_slot, slot, count=4)
        row, column = square_of(edge_y, a), square_of(edge_x, b)
        want = np.zeros((16, 16))
        part = taps[ey, ex, a, b, row, column][16 * block : 16 * block + 16]
        want[: len(part)] = part
        first, _, _ = integers(lib.up_weights, before, beside, parity, slot, block, count=3)
        seen.add(first)
        close(fragment(first), want)
    theirs = f64(args[4])[:, middle:].transpose(2, 3, 1, 0).reshape(9, beside, 16)
    for tap, block in product(range(9), range(-(-beside // 16))):
        _, first, _ = integers(lib.up_weights, before, beside, 0, tap, block, count=3)
        seen.add(first)
        want = np.zeros((16, 16))
        part = theirs[tap, 16 * block : 16 * block + 16]
        want[: len(part)] = part
        assert np.array_equal(fragment(first), want)
    for parity, edge_y, edge_x in product(range(4), range(2), range(2)):
        a, b = divmod(parity, 2)
        kind = 2 * edge_y + edge_x
        _, _, first = integers(lib.up_weights, before, beside, parity, kind, 0, count=3)
        got = weights[first // 2 : first // 2 + 32].view(torch.float32)
        want = biases[square_of(edge_y, a), square_of(edge_x, b), a, b]
        assert np.abs(f64(got) - want).max() < 1e-6 * np.abs(want).max() + 1e-6
        seen.update((first, first + 32))
    # Side by side from the start, and nothing else.
    count = 256 * (4 * 16 * blocks + 9 * -(-beside // 16)) * 2 + 16 * 16 * 4
    assert weights.numel() * 2 == count
    assert len(seen) == 4 * 16 * blocks + 9 * -(-beside // 16) + 32


def test_which_taps_an_edge_changes():
    """Only those that have slots of their own, where x is not outside too."""
    args = arguments(bf16, (1, 1, 1, 1, 3, 2, 8, 16))
    taps, _ = model_of(*args[2:])
    lib = library(SOURCE)
    for (ey, ex, a, b, row, column), weight in taps.items():
        if abs(ey) > 1 or abs(ex) > 1:
            assert not weight.any()
            continue
        edge_y, edge_x = row == (a and SIZE - 1), column == (b and SIZE - 1)
        inner, of_row, of_column = integers(lib.up_slots, edge_y, ey, ex, count=3)
        slot = inner
        if edge_x and ex == 0:
            slot = of_column
        elif edge_y and ey == 0:
            slot = of_row
        has_y, has_x, *place = integers(lib.up_slot, slot, count=4)
        assert place == [ey, ex]
        same = taps[ey, ex, a, b, square_of(has_y, a), square_of(has_x, b)]
        assert np.allclose(weight, same, atol=1e-12)
        assert (has_y, has_x) == (edge_y and ey == 0, edge_x and ex == 0)


def test_fragments_are_b():
    """PTX ISA, m16n8k16: b[i] is at row 2 threadID_in_group + i % 2, for i >= 2 8 further, and
    column groupID; c[i] at column 2 threadID_in_group + i % 2, and rows 8 below for i >= 2. A
    lane's c of both products are four channels."""
    lib = library(SOURCE)
    for lane, word, side in product(range(32), range(4), range(2)):
        n, i = word // 2, word % 2 * 2 + side
        k, column = lane % 4 * 2 + i % 2 + (8 if i >= 2 else 0), lane // 4
        channel = 4 * (column // 2) + lib.up_accumulator_channel(4 * n + column % 2)
        assert lib.up_fragment_at(k, channel) == (lane * 4 + word) * 2 + side
        for half in range(2):
            i = 4 * n + 2 * half + column % 2
            assert lib.up_accumulator_channel(i) == 2 * n + column % 2


# --- shared memory, and who does what


def test_packed_words():
    """The nine values of a pixel are from the word on where it starts; two words a lane of a
    product are where 8 lanes of four neighbours read 25 words side by side. Of those that only the
    first of four lanes needs, none is read outside of the stage."""
    lib = library(SOURCE)
    for square, b in product(range(16), range(2)):
        at = lib.up_packed_at(square, b)
        assert at % 4 == 0
        # The row starts 16 bytes before the strip's first pixel.
        pixel = 16 + 6 * (2 * square + b)
        places = {lib.up_packed_value(b, k): at + 2 * k for k in range(16)}
        assert [places[i] for i in range(9)] == [pixel - 6 + 2 * i for i in range(9)]
        outside = {k for k in range(16) if not 0 <= lib.up_packed_value(b, k) < 9}
        assert outside == ({0, *range(10, 16)} if b == 0 else set(range(9, 16)))
        assert places[8] + 2 <= lib.up_packed_row()
        assert at + 32 <= lib.up_packed_row() + 16
    for b in range(2):
        words = {lib.up_packed_at(s, b) // 4 + t for s in range(8) for t in range(4)}
        assert len({word % 32 for word in words}) == len(words)


@pytest.mark.parametrize("channels", [(16, 16), (24, 5), (8, 32)], ids=str)
def test_packed_weights(channels):
    """The second convolution's, nine of a row side by side, zero beyond them; then the biases."""
    before, middle = channels
    args = arguments(bf16, (1, 1, 1, 4, before, middle, 3, 16))
    weights = Up(*args).compose().view(torch.int16)
    lib, dec = library(SOURCE), args[4]
    at = [lib.up_fragment_at(k, c) for k, c in product(range(16), range(16))]
    for b, row in product(range(2), range(3)):
        first = lib.up_packed(before, b, row) // 2
        got = weights[first : first + 256][at].view(bf16).reshape(16, 16)
        want = torch.zeros(16, 16).to(bf16)
        for tap, c in product(range(3), range(3)):
            (k,) = (k for k in range(16) if lib.up_packed_value(b, k) == 3 * tap + c)
            want[k] = dec[:, middle + c, row, tap]
        assert_bitwise(got, want)
    _, biases = model_of(*args[2:])
    for parity, edge_y, edge_x in product(range(4), range(2), range(2)):
        kind = 2 * edge_y + edge_x
        *_, first = integers(lib.up_weights, before, 3, parity, kind, 0, count=3)
        got = f64(weights[first // 2 : first // 2 + 32].view(torch.float32))
        a, b = divmod(parity, 2)
        want = biases[square_of(edge_y, a), square_of(edge_x, b), a, b]
        assert np.abs(got - want).max() <= 1e-5 * np.abs(biases).max()


@each_tile
def test_copies(blocks):
    """Every piece of a stage once, to a place of its own; neighbours in at most two to a bank."""
    lib = library(SOURCE)
    stage, shared, columns, threads, _ = integers(lib.up_tile, *blocks, count=5)
    count = lib.up_copies(*blocks, None)
    assert count % threads == 0
    found = (ctypes.c_int * (7 * count))()
    lib.up_copies(*blocks, found)
    rows = [found[7 * i : 7 * i + 7] for i in range(count)]
    real = [row for row in rows if row[5]]
    assert real == rows[: len(real)]
    assert all(row[0] == row[6] for row in real)
    x_pieces, skip_pieces = (2 * n for n in blocks)
    want = [(0, *at) for at in product(range(2), range(2 * columns + 2), range(skip_pieces))]
    if skip_pieces == 0:  # 32 pixels of 6 bytes, and what is beside them
        want = [(0, row, 0, piece) for row, piece in product(range(2), range(14))]
    want += [(1, 0, *at) for at in product(range(columns + 2), range(x_pieces))]
    assert [tuple(row[:4]) for row in real] == want
    places = [row[4] for row in real]
    assert len(set(places)) == len(places)
    assert all(at % 16 == 0 and 0 <= at < stage for at in places)
    assert shared == 8 * stage
    for i in range(0, len(places) - 7, 8):
        banks = [at // 16 % 8 for at in places[i : i + 8]]
        assert max(banks.count(bank) for bank in banks) <= 2


# KB of a block without asking for more, and of a multiprocessor of 8.6, 8.9 and 12.0.
BLOCK, MULTIPROCESSOR = 48, 100


@each_tile
def test_shared_memory_fits(blocks):
    _, shared, _, _, blocks = integers(library(SOURCE).up_tile, *blocks, count=5)
    assert shared + 128 <= BLOCK * 1024
    assert blocks * (shared + 128 + 1024) <= MULTIPROCESSOR * 1024


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (7, 33), (2048, 2048), (1024, 1000), (5120, 5120)])
@pytest.mark.parametrize("slots", [1, 264, 396])
def test_segments(images, size, slots):
    """Every row of every strip once, and no more than a tenth longer than without a rest."""
    lib, (rows, columns) = library(SOURCE), size
    count = lib.up_segments(images, rows, columns, slots, None)
    found = (ctypes.c_int * (4 * count))()
    lib.up_segments(images, rows, columns, slots, found)
    segments = [tuple(found[4 * i : 4 * i + 4]) for i in range(count)]
    strips = list(product(range(images), range(0, columns, 16)))
    assert [at[:2] for at in segments] == strips * (count // len(strips))
    for image, column in strips[:3]:
        parts = [at[2:] for at in segments if at[:2] == (image, column)]
        assert [row for first, last in parts for row in range(first, last)] == list(range(rows))
    if rows > 1000:
        longest = max(last - first + 2 for *_, first, last in segments)
        ideal = len(strips) * rows / slots
        assert -(-count // slots) * longest < 1.1 * ideal


# --- what goes wrong is noticed

ALWAYS = (0, 1000)
FAULTS = {
    "rows read before they are there": ("weak-wait", ALWAYS),
    "rows of others read before, or overwritten while they are read": ("skip-sync", ALWAYS),
    "another swizzle than is read": ("other-swizzle", ALWAYS),
    "columns of another lane": ("other-column", ALWAYS),
}


@pytest.mark.parametrize("channels", [(16, 16), (32, 32), (16, 3)], ids=str)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_faults_are_noticed(fault, channels):
    """In some order of a few: by the emulator, or because the result is wrong."""
    kind, which = fault
    before, beside = channels
    args = arguments(bf16, (1, 1, 20, 4 if beside == 3 else 5, before, 4, beside, 16))
    call = Up(*args)
    call.compose()
    want, near = oracle(*args), eager(*args)
    for seed in range(16):
        try:
            y = call.multiply(seed=seed, fault=kind, which=which, slots=1)
            assert_within_twice_eager(y, near, want)
        except (EmulatorError, AssertionError):
            return
    pytest.fail("sixteen runs went by as if nothing were wrong")


def test_a_barrier_missing_in_the_composition_is_noticed():
    args = arguments(bf16, (1, 1, 1, 1, 8, 9, 8, 16))
    call = Up(*args)
    want = call.compose().clone()
    call.workspace.fill_(torch.nan)
    try:
        got = call.compose(fault="skip-sync", which=ALWAYS)
    except EmulatorError:
        return
    assert not torch.equal(got.view(torch.int16), want.view(torch.int16))


def of(call, parity, slot):
    """A fragment of the workspace."""
    first, *_ = integers(library(SOURCE).up_weights, 16, 16, parity, slot, 0, count=3)
    return call.workspace[first // 2 : first // 2 + 256]


def biases_of(call, parity, kind):
    *_, first = integers(library(SOURCE).up_weights, 16, 16, parity, kind, 0, count=3)
    return call.workspace[first // 2 : first // 2 + 32]


# What to write where: (parity, slot) of fragments.
WRONG = {
    "a tap off by one": ((0, 3), (0, 4)),
    "the tap above for the one below": ((3, 1), (3, 7)),
    "another pixel of the square": ((1, 4), (2, 4)),
    "no edge above": ((0, 10), (0, 4)),
    "no edge below": ((3, 9), (3, 3)),
    "no edge on the left": ((2, 13), (2, 4)),
    "no edge on the right": ((1, 14), (1, 7)),
    "no corner": ((0, 15), (0, 13)),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_other_weights_are_noticed(wrong):
    args = arguments(bf16, (1, 1, 5, 17, 16, 16, 16, 16))
    call = Up(*args)
    call.compose()
    to, source = (of(call, *place) for place in wrong)
    to.copy_(source.clone())
    with pytest.raises(AssertionError, match="error"):
        assert_within_twice_eager(call.multiply(), eager(*args), oracle(*args))


@pytest.mark.parametrize("kind", [1, 2, 3], ids=["column", "row", "corner"])
@pytest.mark.parametrize("parity", range(4))
def test_other_biases_are_noticed(parity, kind):
    args = arguments(bf16, (1, 1, 3, 3, 16, 16, 16, 16))
    call = Up(*args)
    call.compose()
    biases_of(call, parity, kind).copy_(biases_of(call, parity, 0).clone())
    with pytest.raises(AssertionError, match="error"):
        assert_within_twice_eager(call.multiply(), eager(*args), oracle(*args))


# --- what is refused


def test_why_not():
    text_of_strides = "side by side and its other strides multiples of 16 bytes, got"
    x, skip, up_weight, _, weight, _ = args = arguments(bf16, (2, 1, 3, 4, 16, 6, 24, 16))
    assert refusal(args) is None
    assert refusal(arguments(torch.float16, SHAPES["one"])) == "takes bfloat16, got torch.float16"
    for channels in (4, 12, 40):
        assert refusal(arguments(bf16, (1, 1, 1, 1, 16, 4, channels, 16))) == (
            f"takes a multiple of 8 channels of skip, at most 32, or 3, got {channels}"
        )
    for channels in (3, 12, 40):
        assert refusal(arguments(bf16, (1, 1, 1, 1, channels, 4, 16, 16))) == (
            f"takes a multiple of 8 channels of x, at most 32, got {channels}"
        )
    assert refusal(arguments(bf16, (1, 1, 1, 1, 16, 33, 16, 16))) == (
        "takes 1 to 32 channels of u, got 33"
    )
    assert refusal(arguments(bf16, (1, 1, 1, 1, 16, 4, 16, 8))) == (
        "takes 16 channels of the result, got 8"
    )

    def other(x=x, skip=skip):
        return backend.why_not_call(x, skip, up_weight, weight)

    packed = torch.zeros(1, 6, 16, 6).to(bf16)
    less, three = x[:, :, :2], weight[:, : 6 + 3]
    words = "needs pixels of 3 channels of skip side by side, in a multiple of 8 columns, got "
    for picture, pixels in (
        (packed[:, :, :4, :3].contiguous(), less),
        (packed[:, :, :8, :3], x),
    ):
        assert backend.why_not_call(pixels, picture, up_weight, three) == words + (
            f"{tuple(picture.shape)} at {picture.stride()} elements"
        )
    rows = torch.zeros(1, 6, 12, 3).to(bf16)
    assert text_of_strides in backend.why_not_call(x, rows[:, :, :8], up_weight, three)
    assert backend.why_not_call(x, rows[:, :, 4:], up_weight, three) == (
        "needs skip to start at a multiple of 16 bytes"
    )
    assert backend.why_not_call(x, rows[:, ::2, :8][:, :3], up_weight, three) is None
    wide = torch.zeros(1, 6, 8, 28).to(bf16)
    assert text_of_strides in other(skip=wide[..., :24])
    assert other(skip=wide[..., 4:]) == "needs skip to start at a multiple of 16 bytes"
    first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert other(x=first) == (
        f"needs the channels of x {text_of_strides} (192, 4, 1, 12) elements; call .contiguous()"
    )
    assert other(x=x[:1].expand(2, -1, -1, -1)) is None
    huge = torch.empty(2**17, 1, 2**8, 16, dtype=bf16, device="meta")
    assert other(x=huge) == (
        "takes at most 2^20 strips of 16 columns of x, got (131072, 1, 256, 16)"
    )


REFUSED = {
    "skips": ({"S": 3}, "S must divide B"),
    "no skip": ({"S": 0}, "S must divide B"),
    "no rows": ({"rows": 0}, "sizes must be positive, and at most 2^20 strips of 16 columns of x"),
    "strips": ({"columns": 1 << 26}, "sizes must be positive, and at most 2^20 strips of 16"),
    "x": ({"Ci": 12}, "x must have a multiple of 8 channels up to 32, skip too or 3"),
    "three of x": ({"Ci": 3}, "x must have a multiple of 8 channels up to 32, skip too or 3"),
    "skip": ({"Cs": 40}, "x must have a multiple of 8 channels up to 32, skip too or 3"),
    "packed": ({"Cs": 3, "columns": 4}, "pixels of 3 channels of skip must be side by side, and "),
    "u": ({"Cu": 33}, "up_weight must have 1 to 32 rows, weight 16"),
    "out": ({"Co": 8}, "up_weight must have 1 to 32 rows, weight 16"),
    "workspace": ({"workspace": 4096 + 8}, "out and workspace must start at a multiple of 16"),
    "nowhere": ({"out": 0}, "out and workspace must start at a multiple of 16 bytes"),
    "bias": ({"bias": 4097}, "weights and biases must start at a multiple of 2 bytes"),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED)
def test_launch_refuses(changed, message):
    """What the launch checks before it starts anything."""
    args = arguments(bf16, (2, 1, 1, 1, 16, 4, 16, 16))
    with pytest.raises(EmulatorError, match=f"^{re.escape(message)}"):
        local_decoder_up(*args, changed=changed)


@pytest.mark.parametrize(
    ("which", "field", "value", "message"),
    [
        ("x", "stride_w", 12, "strides of x and skip must be multiples of 16 bytes"),
        ("skip", "stride_b", 4, "strides of x and skip must be multiples of 16 bytes"),
        ("skip", "data", 4104, "x and skip must start at a multiple of 16 bytes"),
    ],
)
def test_launch_refuses_pictures(which, field, value, message):
    call = Up(*arguments(bf16, (2, 1, 1, 1, 16, 4, 16, 16)))
    setattr(getattr(call.args, which), field, value)
    with pytest.raises(EmulatorError, match=f"^{message}$"):
        call.compose()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("columns", 6, "pixels of 3 channels of skip must be side by side, and their columns a"),
        ("stride_w", 6, "pixels of 3 channels of skip must be side by side, and their columns a"),
        ("stride_h", 20, "strides of x and skip must be multiples of 16 bytes"),
        ("data", 4104, "x and skip must start at a multiple of 16 bytes"),
    ],
)
def test_launch_refuses_packed(field, value, message):
    call = Up(*arguments(bf16, (1, 1, 2, 4, 16, 4, 3, 16)))
    setattr(call.args if field == "columns" else call.args.skip, field, value)
    with pytest.raises(EmulatorError, match=f"^{message}"):
        call.compose()


def test_on_request_only():
    args = arguments(bf16, SHAPES["one"])
    assert ("cuda", None) not in explain(OP, *args)[:1]
    assert any(name == "cuda" and reason for name, reason in explain(OP, *args))


# --- what the compiler makes of it


@pytest.mark.parametrize("arch", ARCHS)
def test_machine_code(arch):
    """No spills; the registers of the blocks that share a multiprocessor; every product, fragment
    and copy of a step by its own instruction, three times: for each turn of the sums."""
    kernels, _ = compiled_for(arch, "local_decoder_up.cu")
    names = [f"local_decoder_up_kernel<{x}, {skip}>" for x, skip in TILES]
    assert [kernel.name for kernel in kernels] == ["local_decoder_up_compose_kernel", *names]
    for kernel in kernels:
        assert (kernel.stack, kernel.spills) == (0, 0)
    for kernel, (x, skip) in zip(kernels[1:], TILES, strict=True):
        _, _, _, threads, blocks = integers(library(SOURCE).up_tile, x, skip, count=5)
        assert kernel.registers * threads * blocks <= 65536
        assert blocks == {(1, 0): 4, (1, 1): 3}.get((x, skip), 2)

        def count(pattern, code=kernel.sass):
            return len(re.findall(rf"\b{pattern}", code))

        # 9 taps of x for 3 rows of squares and those of an edge, 9 of skip, two products each.
        products = 3 * 2 * (9 * x + 3 * x + (9 * skip or 3))
        assert count(r"HMMA\.16816\.F32\.BF16") == count("HMMA") == products
        # Those of the edge's column are read again.
        assert count(r"LDSM\.16\.M88\.4") == count("LDSM") == 3 * (4 * x + 2 * 3 * skip)
        if skip == 0:  # four words of two rows
            assert count(r"LDS R\d") == 3 * 2 * 4
        assert count(r"LDGSTS\.E\.BYPASS[.A-Z0-9]*\.128") == count("LDGSTS") > 0
        assert count("BAR") == 3
        # Of 8 values: 2^x and 1 / x.
        assert count(r"MUFU\.EX2") == 3 * 8
        assert count(r"MUFU\.RCP") >= 3 * 8
        # 8 bytes for two pixels; weights 16 at a time.
        assert count(r"STG\.E\.64") == count("STG") == 3 * 2
        assert count(r"LDG\.E\.128") == count(r"LDG\.") > 0


# --- on a GPU

# (h, w, channels of x and u, of skip) of levels 0 and 1 at 4096 x 4096, and of level 0 beyond it.
RELEASED = [
    *((2048, 2048, 16, 16), (1024, 1024, 32, 32)),
    *((4096, 4096, 16, 3), (5120, 5120, 16, 3)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("guided", [1, 2])
@pytest.mark.parametrize("size", RELEASED, ids=str)
def test_released_shapes_on_gpu(size, guided):
    """Parts of it: the corners, and what is far from them."""
    h, w, before, beside = size
    launch, device = launcher(OP, "cuda")
    _, _, *weights = on(device, arguments(bf16, (1, 1, 1, 1, before, before, beside, 16)))
    x = torch.randn(guided, h, w, before, device=device, dtype=bf16)
    skip = torch.randn(1, 2 * h, 2 * w, beside, device=device, dtype=bf16)
    if reason := backend.why_not(x, skip, *weights):
        pytest.skip(reason)
    y = launch(x, skip, *weights)
    n = 12  # squares of a part; two at each side that the image goes on behind are not compared
    for row, column in product((0, h // 2 - 3, h - n), (0, w // 2 - 3, w - n)):
        part = x[-1:, row : row + n, column : column + n]
        beside = skip[:, 2 * row : 2 * row + 2 * n, 2 * column : 2 * column + 2 * n]
        args = on("cpu", (part, beside, *weights))
        kept = tuple(
            slice(4 * (first > 0), 2 * n - 4 * (first + n < size))
            for first, size in ((row, h), (column, w))
        )
        got = y[-1:, 2 * row : 2 * row + 2 * n, 2 * column : 2 * column + 2 * n].cpu()
        inside = (slice(None), *kept)
        assert_within_twice_eager(got[inside], eager(*args)[inside], oracle(*args)[inside])
    check_repeatable(launch, x, skip, *weights)


@pytest.mark.gpu
def test_like_triton_on_gpu():
    """Everywhere, at a size that is no multiple of anything."""
    launch, device = launcher(OP, "cuda")
    triton, _ = launcher(OP, "triton-gpu")
    for width, *channels in (
        (517, 16, 16, 16, 16),
        (517, 32, 32, 32, 16),
        (517, 8, 5, 24, 16),
        (516, 16, 16, 3, 16),
        (516, 32, 7, 3, 16),
    ):
        args = on(device, arguments(bf16, (2, 1, 333, width, *channels)))
        if reason := backend.why_not(*args):
            pytest.skip(reason)
        with guarded_outputs():
            y = launch(*args)
        torch.testing.assert_close(y, triton(*args), rtol=0.02, atol=0.02)


@pytest.mark.gpu
def test_captured_on_gpu():
    launch, device = launcher(OP, "cuda")
    for channels in ((16, 16, 16, 16), (32, 32, 32, 16), (16, 16, 3, 16)):
        args = on(device, arguments(bf16, (2, 1, 32, 48, *channels)))
        if reason := backend.why_not(*args):
            pytest.skip(reason)
        check_captures(launch, *args)
