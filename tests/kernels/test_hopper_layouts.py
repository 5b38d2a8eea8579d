"""Index arithmetic of csrc/cuda/hopper and csrc/cuda/attention against models of what the PTX ISA
says of the hardware, written here without it."""

import ctypes
from itertools import product

import numpy as np
import pytest
from emulated import library
from hypothesis import given, settings
from hypothesis import strategies as st

WIDTHS = (32, 64, 128)
BLOCK = 128  # rows of a tile


@pytest.fixture(scope="module")
def lib():
    loaded = library("layouts.cpp")
    for name in ("k_major", "n_major", "advance"):
        getattr(loaded, name).restype = ctypes.c_uint64
    loaded.advance.argtypes = (ctypes.c_uint64, ctypes.c_uint32)
    return loaded


def integers(function, *args, count):
    out = (ctypes.c_int * count)()
    function(*args, out)
    return list(out)


def swizzled(address, width):
    """The figures of "Swizzling modes": lines of 128 bytes, 8 pieces of 16; in every line the
    pieces trade places by the line's number, modulo the width in pieces."""
    line, piece = address // 128, address // 16 % 8
    return line * 128 + (piece ^ line % (width // 16)) * 16 + address % 16


@settings(deadline=None)
@given(st.integers(0, 227 * 1024 - 1), st.sampled_from(WIDTHS))
def test_swizzle(address, width):
    assert library("layouts.cpp").swizzle(address, width) == swizzled(address, width)


@pytest.mark.parametrize("width", WIDTHS)
def test_eight_rows_of_a_piece_are_in_different_banks(lib, width):
    for piece in range(width // 16):
        places = {lib.swizzle(row * width + piece * 16, width) // 16 % 8 for row in range(8)}
        assert len(places) == 8


# --- matrix descriptors: the canonical layouts of the PTX ISA, in CuTe's notation, where T is 8
# elements of 16 bits.
#   K-major:   ((8, m), (T, 2k)) : ((W T, SBO), (1, T))
#   MN-major:  ((T, W, m), (8, k)) : ((1, T, LBO), (W T, SBO))          with W = width / 16 bytes


def fields(descriptor):
    assert descriptor >> 49 & 7 == 0  # base offset
    width = {1: 128, 2: 64, 3: 32}[descriptor >> 62]
    start, leading, stride = ((descriptor >> at & 0x3FFF) * 16 for at in (0, 16, 32))
    return start, leading, stride, width


def k_major_at(descriptor, mn, k):
    start, _, stride, width = fields(descriptor)
    t, w = 8, width // 16
    element = mn % 8 * (w * t) + k % t + k // t * t
    return swizzled(start + element * 2 + mn // 8 * stride, width)


def mn_major_at(descriptor, mn, k):
    start, leading, stride, width = fields(descriptor)
    t, w = 8, width // 16
    element = mn % t + mn // t % w * t + k % 8 * (w * t)
    return swizzled(start + element * 2 + mn // (t * w) * leading + k // 8 * stride, width)


def copied_to(start, row, column, width):
    """Where the copy engine puts an element of a tile of 128 rows, in panels of `width` bytes."""
    panel, within = divmod(column * 2, width)
    return swizzled(start + panel * BLOCK * width + row * width + within, width)


@pytest.mark.parametrize(("channels", "width"), [(64, 128), (80, 32), (128, 128)])
def test_descriptors_find_what_was_copied(lib, channels, width):
    start = 7 * 1024
    panel = BLOCK * width
    for first in range(0, channels, 16):  # 16 channels of Q or K, all rows
        at = start + first * 2 // width * panel + first * 2 % width
        for rows in (0, 64):  # the second warpgroup's queries
            descriptor = lib.advance(lib.k_major(start, width), at - start + rows * width)
            assert descriptor == lib.k_major(at + rows * width, width)
            for row, k in product(range(64), range(16)):
                want = copied_to(start, rows + row, first + k, width)
                assert k_major_at(descriptor, row, k) == want
    for first in range(0, BLOCK, 16):  # 16 rows of V, all channels
        descriptor = lib.advance(lib.n_major(start, width, panel), first * width)
        assert descriptor == lib.n_major(start + first * width, width, panel)
        for column, k in product(range(channels), range(16)):
            assert mn_major_at(descriptor, column, k) == copied_to(start, first + k, column, width)


# --- register fragments


def test_accumulator_fragment(lib):
    """ "Register Fragments for wgmma.mma_async.m64nNk16, D": warp w, lane, d[i]."""
    seen = set()
    for warp, lane, i in product(range(4), range(32), range(64)):
        row = 16 * warp + lane // 4 + (8 if i % 4 >= 2 else 0)
        column = i // 4 * 8 + lane % 4 * 2 + i % 2
        assert (lib.accumulator_row(warp, lane, i), lib.accumulator_column(lane, i)) == (
            row,
            column,
        )
        seen.add((row, column))
    assert seen == set(product(range(64), range(128)))


def test_operand_fragment_is_an_accumulator(lib):
    """A of m64nNk16: a[i] at row groupID, 8 below where i is 2, 3, 6, 7; column 2 tid + i % 2."""
    for k, lane, i in product(range(8), range(32), range(8)):
        row = lane // 4 + (8 if i in (2, 3, 6, 7) else 0)
        column = lane % 4 * 2 + i % 2 + (8 if i >= 4 else 0)
        register = lib.operand_from_accumulator(k, i // 2) + i % 2
        assert lib.accumulator_row(0, lane, register) == row
        assert lib.accumulator_column(lane, register) == 16 * k + column


# --- stages and tiles


class Barrier:
    """mbarrier: a wait for a parity ends when the phase under way has the other one."""

    def __init__(self):
        self.phase = 0

    def passes(self, parity):
        return self.phase % 2 != parity


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 40))
def test_ring(stages, ahead, uses):
    """The writer is up to `ahead` uses in front: it waits exactly until its stage is free, the
    reader exactly until it is filled."""
    lib = library("layouts.cpp")
    full, empty = ([Barrier() for _ in range(stages)] for _ in range(2))
    written = 0
    for n in range(uses):
        stage, reader, _ = integers(lib.ring, stages, n, count=3)
        assert stage == n % stages
        while written <= n + ahead:
            at, _, writer = integers(lib.ring, stages, written, count=3)
            free = written - n < stages
            assert empty[at].passes(writer) == free
            if not free:
                break
            full[at].phase += 1
            written += 1
        assert full[stage].passes(reader)
        if written - n == 1:  # the next use of this stage has not been written
            _, later, _ = integers(lib.ring, stages, n + stages, count=3)
            assert not full[stage].passes(later)
        empty[stage].phase += 1


@settings(deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 700), st.integers(1, 700), st.integers(1, 5),
    st.integers(1, 9),
)  # fmt: skip
def test_every_query_is_in_one_tile(B, L, S, G, blocks):
    lib = library("layouts.cpp")
    steps = ctypes.c_int()
    count = lib.tiles(B, L, S, G, ctypes.byref(steps))
    assert (steps.value - 1) * 128 < S <= steps.value * 128
    seen = {}
    for block in range(blocks):
        for i in range(block, count, blocks):
            b, g, row = integers(lib.tile, B, L, S, G, i, count=3)
            assert row % 128 == 0
            assert 0 <= row < L
            seen[b, g, row] = i
    assert len(seen) == count == B * G * -(-L // 128)
    # The tiles of a head are neighbours.
    assert sorted(seen) == sorted(seen, key=seen.get)


def test_shared_memory_fits(lib):
    """227 KB of a block on sm_90; two stages at least; panels as wide as the swizzle."""
    for channels, row_bytes in ((64, 128), (80, 32), (128, 128)):
        total, stages, row, tile = integers(lib.shared_memory, channels, count=4)
        assert (row, tile) == (row_bytes, 128 * channels * 2)
        assert stages >= 2
        assert (1 + 2 * stages) * tile < total <= 227 * 1024


# --- the exponential


def powers(x):
    x = np.ascontiguousarray(x, np.float32)
    y = np.empty_like(x)
    pointer = ctypes.POINTER(ctypes.c_float)
    library("layouts.cpp").exp2_polynomial(
        x.ctypes.data_as(pointer), y.ctypes.data_as(pointer), ctypes.c_int64(x.size)
    )
    return y


def test_exp2_polynomial():
    x = np.linspace(-126, 127, 2_000_003).astype(np.float32)
    error = np.abs(powers(x) / np.exp2(x.astype(np.float64)) - 1)
    assert error.max() < 3e-6


@settings(deadline=None)
@given(st.floats(-126, 127, width=32))
def test_exp2_polynomial_anywhere(x):
    assert abs(powers([x])[0] / np.exp2(np.float64(x)) - 1) < 3e-6


def test_exp2_polynomial_at_its_ends():
    assert (powers([0, -0.0]) == 1).all()
    assert (powers([-127, -128, -1e4, -1e38, -np.inf]) == 0).all()
    below = powers(np.linspace(-127, -126, 1001))
    assert ((below >= 0) & (below <= 2.0**-126)).all()
    assert (powers(np.arange(-126, 128)) == np.exp2(np.arange(-126.0, 128))).all()


# --- tensor maps

u32, u64 = ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.c_uint64)
DRIVER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p,
    u64, u64, u32, u32, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int,
)  # fmt: skip


def encode(sizes, strides, *, data=0x7F00_0000_0000, bf16=1, columns=64, rows=128, code=0):
    """What cuTensorMapEncodeTiled is called with, or what is said instead."""
    calls = []

    def driver(out, kind, rank, start, size, stride, box, every, interleave, swizzle, l2, fill):
        ctypes.memset(out, 0xAB, 128)
        calls.append(
            {
                "type": kind,
                "data": start,
                "size": size[:rank],
                "stride": stride[: rank - 1],
                "box": box[:rank],
                "every": every[:rank],
                "modes": (interleave, swizzle, l2, fill),
            }
        )
        return code

    message = ctypes.create_string_buffer(200)
    room = ctypes.create_string_buffer(128 + 8)
    failed = library("layouts.cpp").encode(
        DRIVER(driver), ctypes.c_void_p(data), bf16, (ctypes.c_int64 * 4)(*sizes),
        (ctypes.c_int64 * 3)(*strides), columns, rows, room, message,
    )  # fmt: skip
    if failed:
        return message.value.decode()
    assert room.raw == b"\xab" * 128 + bytes(8)
    return calls[0]


def test_tensor_map_of_a_view_of_the_joint_buffer():
    """(B, rows, G, d) = (2, 300, 24, 64), one of q, k, v interleaved: strides in bytes, innermost
    axis first, its own stride left out; CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 is 9, SWIZZLE_128B 3,
    L2_PROMOTION_L2_256B 3."""
    row = 3 * 24 * 64
    assert encode((2, 300, 24, 64), (300 * row, row, 64)) == {
        "type": 9,
        "data": 0x7F00_0000_0000,
        "size": [64, 24, 300, 2],
        "stride": [128, row * 2, 300 * row * 2],
        "box": [64, 1, 128, 1],
        "every": [1, 1, 1, 1],
        "modes": (0, 3, 3, 0),
    }


def test_tensor_map_of_panels_of_16():
    """FLOAT16 is 6, SWIZZLE_32B 1; channels past the 72 are outside, and read as 0."""
    call = encode((1, 40, 2, 72), (9, 144, 72), bf16=0, columns=16)
    assert call["type"] == 6
    assert call["size"] == [72, 2, 40, 1]
    assert call["stride"] == [144, 288, 16]  # the stride of a single image means nothing
    assert call["box"] == [16, 1, 128, 1]
    assert call["modes"] == (0, 1, 3, 0)


def test_tensor_maps_the_copy_engine_has_not_got():
    shape, strides = (2, 40, 2, 64), (5120, 128, 64)
    assert isinstance(encode(shape, strides), dict)
    positive = "k needs strides that are positive multiples of 16 bytes"
    assert encode(shape, strides, data=0x1008) == "k must start at a multiple of 16 bytes"
    assert encode(shape, (5120, 132, 64)) == positive
    assert encode(shape, (5120, 0, 64)) == positive
    assert encode(shape, (1 << 39, 128, 64)) == "k needs strides below 2^40 bytes"
    assert "2^31 - 1" in encode((1, 1 << 31, 2, 64), strides)
    assert "2^31 - 1" in encode((1, 0, 2, 64), strides)


def test_the_driver_refuses():
    said = encode((2, 40, 2, 64), (5120, 128, 64), code=1)
    assert said == "cuTensorMapEncodeTiled of k failed with CUDA error 1"
