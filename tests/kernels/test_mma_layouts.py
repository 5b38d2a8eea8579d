"""Index arithmetic of csrc/cuda/ampere and of the mma.sync attention kernel against models of what
the PTX ISA says of ldmatrix and mma.sync, written here without it."""

import ctypes
from itertools import product

import pytest
from emulated import library

CHANNELS = (64, 80, 128)
channels_of_rows = pytest.mark.parametrize("channels", [16, 32, *CHANNELS])
channels_of_heads = pytest.mark.parametrize("channels", CHANNELS)


@pytest.fixture(scope="module")
def lib():
    return library("layouts.cpp")


def integers(function, *args, count):
    out = (ctypes.c_int * count)()
    function(*args, out)
    return list(out)


def banks(address):
    """The group of four banks of 4 bytes that 16 bytes lie in."""
    assert address % 16 == 0
    return address // 16 % 8


# --- rows in shared memory


@channels_of_rows
def test_every_piece_has_its_place(lib, channels):
    """Side by side, row below row: whole rows of 16 bytes an 8 channels, nothing between."""
    pieces = channels // 8
    places = [lib.piece_at(channels, *at, 0) for at in product(range(128), range(pieces))]
    assert sorted(places) == [16 * i for i in range(128 * pieces)]
    for row, piece in product(range(128), range(pieces)):
        assert lib.piece_at(channels, row, piece, 0) // (16 * pieces) == row
        # The constant way from the first pair of a row to the others.
        same = lib.piece_at(channels, row, piece % 2, piece - piece % 2)
        assert same == lib.piece_at(channels, row, piece, 0)
        # And down: rows of 8 further are a constant away.
        below = lib.piece_at(channels, row + 8, piece, 0)
        assert below == lib.piece_at(channels, row, piece, 0) + 8 * 16 * pieces


@channels_of_rows
def test_eight_lanes_are_in_different_banks(lib, channels):
    """Of ldmatrix, the same piece of 8 rows; of cp.async, 8 pieces of a row, and what is left of 4
    rows, two each."""
    pieces = channels // 8
    for first, piece in product(range(0, 128, 8), range(pieces)):
        read = {banks(lib.piece_at(channels, first + row, piece, 0)) for row in range(8)}
        assert len(read) == 8
    for row, first in product(range(128), range(0, pieces // 8 * 8, 8)):
        written = {banks(lib.piece_at(channels, row, first + i, 0)) for i in range(8)}
        assert len(written) == 8
    rest = range(pieces // 8 * 8, pieces)
    for first in range(0, 128, 4) if rest else ():
        at = product(range(first, first + 4), rest)
        assert len({banks(lib.piece_at(channels, *where, 0)) for where in at}) == 8


# --- ldmatrix and mma.sync


def ldmatrix(tile, addresses, transposed):
    """What register i of each lane holds, a pair. "ldmatrix": lanes 8 i to 8 i + 7 give the rows of
    matrix i; lane l receives row l / 4, elements 2 (l % 4) and the next; with .trans, of the
    transposed matrix."""
    registers = []
    for lane in range(32):
        held = []
        for i in range(4):
            matrix = [[tile[at + 2 * j] for j in range(8)] for at in addresses[8 * i : 8 * i + 8]]
            if transposed:
                matrix = list(zip(*matrix, strict=True))
            row = matrix[lane // 4]
            held.append((row[lane % 4 * 2], row[lane % 4 * 2 + 1]))
        registers.append(held)
    return registers


def a_of(registers):
    """A of m16n8k16, {(row, k): element}. "Matrix Fragments for mma.m16n8k16": a[i] is at row
    groupID for i in 0, 1, 4, 5, else 8 below; at column 2 threadID_in_group + i % 2, for i >= 4 8
    further."""
    a = {}
    for lane, i in product(range(32), range(8)):
        row = lane // 4 if i in (0, 1, 4, 5) else lane // 4 + 8
        column = lane % 4 * 2 + i % 2 + (8 if i >= 4 else 0)
        a[row, column] = registers[lane][i // 2][i % 2]
    return a


def b_of(registers, first):
    """B of m16n8k16, {(k, column): element}, from two registers: b[i] is at row 2
    threadID_in_group + i % 2, for i >= 2 8 further, and column groupID."""
    b = {}
    for lane, i in product(range(32), range(4)):
        row = lane % 4 * 2 + i % 2 + (8 if i >= 2 else 0)
        b[row, lane // 4] = registers[lane][first + i // 2][i % 2]
    return b


def stored(lib, channels, rows):
    """{address: (row, channel)} of a tile."""
    return {
        lib.piece_at(channels, row, channel // 8, 0) + channel % 8 * 2: (row, channel)
        for row, channel in product(range(rows), range(channels))
    }


def addresses(lib, corner, channels, row, channel):
    """Of each lane, as the kernel finds them: 16 rows and 16 channels from (row, channel) on."""
    found = []
    for lane in range(32):
        down, piece = integers(corner, lane, count=2)
        assert piece in (0, 1)
        found.append(lib.piece_at(channels, down, piece, channel // 8) + row * channels * 2)
    return found


@channels_of_rows
def test_queries_are_a(lib, channels):
    tile = stored(lib, channels, 48)
    for row, channel in product(range(0, 48, 16), range(0, channels, 16)):
        at = addresses(lib, lib.down_first, channels, row, channel)
        a = a_of(ldmatrix(tile, at, transposed=False))
        assert a == {(i, k): (row + i, channel + k) for i, k in product(range(16), range(16))}


@channels_of_heads
def test_keys_are_b(lib, channels):
    """B(k, n) is channel k of key n: two products of 8 keys over 16 channels."""
    tile = stored(lib, channels, 64)
    for key, channel in product(range(0, 64, 16), range(0, channels, 16)):
        at = addresses(lib, lib.across_first, channels, key, channel)
        registers = ldmatrix(tile, at, transposed=False)
        for half in (0, 1):
            want = {
                (k, n): (key + 8 * half + n, channel + k) for k, n in product(range(16), range(8))
            }
            assert b_of(registers, 2 * half) == want


@channels_of_heads
def test_values_are_b(lib, channels):
    """B(k, n) is channel n of key k: two products of 8 channels over 16 keys."""
    tile = stored(lib, channels, 64)
    for key, channel in product(range(0, 64, 16), range(0, channels, 16)):
        at = addresses(lib, lib.down_first, channels, key, channel)
        registers = ldmatrix(tile, at, transposed=True)
        for half in (0, 1):
            want = {
                (k, n): (key + k, channel + 8 * half + n) for k, n in product(range(16), range(8))
            }
            assert b_of(registers, 2 * half) == want


def test_accumulator_is_that_of_wgmma(lib):
    """C of m16n8k16: c[i] is at row groupID, 8 below for i >= 2, column 2 threadID_in_group + i %
    2; and the j-th product of 8 columns has registers 4 j to 4 j + 3 of 16 rows."""
    for j, lane, i in product(range(16), range(32), range(4)):
        row = lane // 4 + (8 if i >= 2 else 0)
        assert lib.accumulator_row(0, lane, 4 * j + i) == row
        assert lib.accumulator_column(lane, 4 * j + i) == 8 * j + lane % 4 * 2 + i % 2


def test_weights_are_a(lib):
    """The accumulators of 16 keys as A of a product over them."""
    for k, lane, i in product(range(4), range(32), range(8)):
        register = lib.operand_from_accumulator(k, i // 2) + i % 2
        row = lane // 4 if i in (0, 1, 4, 5) else lane // 4 + 8
        column = 16 * k + lane % 4 * 2 + i % 2 + (8 if i >= 4 else 0)
        assert lib.accumulator_row(0, lane, register) == row
        assert lib.accumulator_column(lane, register) == column


# --- shared memory

# KB of a block, and of a multiprocessor: "Technical Specifications per Compute Capability".
LIMITS = {"8.0": (163, 164), "8.6": (99, 100), "8.9": (99, 100), "12.0": (99, 100)}


@channels_of_heads
def test_shared_memory_fits(lib, channels):
    total, keys, blocks, q, *stages = integers(lib.mma_memory, channels, count=8)
    tile = keys * channels * 2
    assert stages == [0, tile, 2 * tile, 3 * tile]
    end = max(4 * tile, q + 128 * channels * 2)
    # Queries share no byte with the stage that is filled together with them.
    assert q >= 2 * tile
    assert end <= total - 128
    for capability, (block, all_blocks) in LIMITS.items():
        assert total <= block * 1024
        room = all_blocks * 1024 // (total + 1024)
        assert room >= (1 if channels == 128 and capability != "8.0" else blocks)
