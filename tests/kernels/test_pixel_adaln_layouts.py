"""Layouts of the sm_90a pixel_adaln kernels, against models of what the PTX ISA says of the
hardware, and what their host side asks of the driver."""

import ctypes
import itertools

import pytest
import torch
from emulated import library
from emulated_pixel_adaln import SOURCE, Args, common, is_compress
from test_hopper_layouts import DRIVER, integers

MLP, COMPRESS = "pixel_adaln_mlp", "pixel_adaln_compress"
each_op = pytest.mark.parametrize("op", [MLP, COMPRESS])
PIXELS = {MLP: 2, COMPRESS: 8}  # of a block's tile
COLUMNS = {MLP: 128, COMPRESS: 256}


@each_op
@pytest.mark.parametrize("rows", [1, 256, 257, 2048, 4096 + 77, 16384])
@pytest.mark.parametrize("pixels", [1, 4, 9, 256])
def test_schedule(rows, pixels, op):
    """Every tile once, and all patches of a group of 2048 before the next pixels."""
    schedule = library(SOURCE).pixel_adaln_schedule
    sizes = is_compress(op), ctypes.c_int64(rows), ctypes.c_int64(pixels)
    count = schedule(*sizes, None)
    found = (ctypes.c_int * (2 * count))()
    schedule(*sizes, found)
    groups = [
        [(row, pixel) for pixel in range(0, pixels, 2 * PIXELS[op]) for row in rows_of_group]
        for first in range(0, rows, 2048)
        for rows_of_group in [range(first, min(first + 2048, rows), 256)]
    ]
    assert list(zip(found[::2], found[1::2], strict=True)) == [at for g in groups for at in g]


def test_cluster():
    """Two by two; masks of those who have the same patches and of those who have the same pixels,
    and together all who write into a block's memory."""
    found = [integers(library(SOURCE).pixel_adaln_cluster, rank, count=7) for rank in range(4)]
    for rank, (line, column, row_mask, column_mask, *sharing) in enumerate(found):
        assert (line, column) == divmod(rank, 2)
        row = {r for r in range(4) if found[r][0] == line}
        same = {r for r in range(4) if found[r][1] == column}
        assert row_mask == sum(1 << r for r in row)
        assert column_mask == sum(1 << r for r in same)
        assert sharing[0] == rank
        assert set(sharing) == row | same
        assert len(sharing) == 3


@each_op
def test_shared_memory(op):
    """The barriers behind the stages, within a block's limit; what is left of 256 KB is the
    first-level cache, 28 KB of it or 60."""
    full, empty, stages, size = integers(
        library(SOURCE).pixel_adaln_memory, is_compress(op), count=4
    )
    assert full == stages * (128 + COLUMNS[op]) * 128 == 192 * 1024
    assert empty == full + 8 * stages
    assert empty + 8 * stages + 1024 == size <= 196 * 1024


def copied(op):
    """Of every row of a stage's weights in shared memory: its pixel of the tile, and which of the
    pixel's 96 rows lies there. The copy engine goes through a box's axes from the inside."""
    boxes = library(SOURCE).pixel_adaln_boxes
    compress, rows = is_compress(op), {}
    count = boxes(compress, 0, 0, (ctypes.c_int * 6)())
    for line, box in itertools.product(range(2), range(count)):
        out = (ctypes.c_int * 6)()
        boxes(compress, line, box, out)
        start, row, octet, of_octet, octets, pixels = out
        assert start % 1024 == 0  # the swizzle's period
        at = start // 128
        for pixel, o, r in itertools.product(range(pixels), range(octets), range(of_octet)):
            rows[at] = line * pixels + pixel, (octet + o) * 8 + row + r
            at += 1
    assert sorted(rows) == list(range(COLUMNS[op]))
    return rows


def column_of(lane, register):
    """PTX ISA, accumulator of wgmma .m64nN."""
    return register // 4 * 8 + lane % 4 * 2 + register % 2


def test_registers_of_mlp():
    """Each chunk's channels where mma.sync has those of an operand."""
    value, rows = library(SOURCE).pixel_adaln_mlp_value, copied(MLP)
    sides = [range(2)] * 3
    for pixel, chunk, half, row, side in itertools.product(range(2), range(4), *sides):
        register = value(pixel, chunk, half, row, side)
        assert register // 2 % 2 == row
        for lane in range(32):
            channel = 8 * half + lane % 4 * 2 + side
            assert rows[column_of(lane, register)] == (pixel, (2 + chunk) * 16 + channel)


def test_registers_of_compress():
    """An octet of one of two pixels, of both chunks; every register is one of its values."""
    lib, rows = library(SOURCE), copied(COMPRESS)
    seen = set()
    for two, chunk, pair, row, side, lane in itertools.product(
        range(4), range(2), range(4), range(2), range(2), range(32)
    ):
        register = lib.pixel_adaln_compress_value(two, chunk, pair, row, side)
        assert register // 2 % 2 == row
        pixel = lib.pixel_adaln_compress_pixel(lane, two)
        channel = lib.pixel_adaln_compress_channel(lane) + 2 * pair + side
        assert rows[column_of(lane, register)] == (pixel, chunk * 16 + channel)
        seen.add((lane % 4, register))
    assert len(seen) == 4 * 128
    # Four lanes of a row have two pixels, 64 bytes side by side.
    places = [
        (lib.pixel_adaln_compress_pixel(lane, 1), lib.pixel_adaln_compress_channel(lane))
        for lane in range(4)
    ]
    assert places == [(2, 0), (2, 8), (3, 0), (3, 8)]


# --- tensor maps, with a driver of the test's own


def encoded(op: str, args: Args, code=0):
    calls = []

    def driver(out, kind, rank, start, size, stride, box, every, interleave, swizzle, l2, fill):
        ctypes.memset(out, 0xAB, 128)
        shape = size[:rank], stride[: rank - 1], box[:rank], every[:rank]
        calls.append((kind, start, *shape, (interleave, swizzle, l2, fill)))
        return code

    rooms = [ctypes.create_string_buffer(128 + 8) for _ in range(2)]
    message = ctypes.create_string_buffer(200)
    if library(SOURCE).pixel_adaln_encode(
        DRIVER(driver), is_compress(op), ctypes.byref(args), *rooms, message, 200
    ):
        return message.value.decode()
    assert all(room.raw == b"\xab" * 128 + bytes(8) for room in rooms)
    return calls


def given(dtype=torch.bfloat16, rows=5, pixels=7, d=48):
    q, u = torch.zeros(rows, pixels, 16, dtype=dtype), torch.zeros(rows, d + 8, dtype=dtype)
    weight, bias = torch.zeros(96 * pixels, d, dtype=dtype), torch.zeros(96 * pixels, dtype=dtype)
    norm = torch.zeros(16, dtype=dtype)
    return common(q, u[:, :d], weight, bias, norm, torch.empty_like(q))


@pytest.mark.parametrize(("op", "box"), [(MLP, [64, 8, 8, 1]), (COMPRESS, [64, 2, 2, 4])])
def test_tensor_maps(op, box):
    """u: rows, half a block's patches at a time; the weight: pixels of 12 octets of rows. Strides
    in bytes, the innermost axis's left out; BFLOAT16 is 9, SWIZZLE_128B 3, L2_PROMOTION_L2_256B 3.
    """
    args = given()
    u, weight = encoded(op, args)
    modes = (0, 3, 3, 0)
    assert u == (*(9, args.u, [48, 1, 5, 1], [16, 112, 16], [64, 1, 64, 1], [1] * 4, modes),)
    assert weight == (*(9, args.ada_weight, [48, 8, 12, 7], [96, 768, 9216], box, [1] * 4, modes),)


@each_op
def test_tensor_maps_the_copy_engine_has_not_got(op):
    args = given(torch.float16)
    assert encoded(op, args)[0][0] == 6  # FLOAT16
    args.ada_stride = 52
    assert encoded(op, args) == "ada_weight needs strides that are positive multiples of 16 bytes"
    args.u += 8
    assert encoded(op, args) == "u must start at a multiple of 16 bytes"
    args.u -= 8
    assert encoded(op, args, 1) == "cuTensorMapEncodeTiled of u failed with CUDA error 1"
