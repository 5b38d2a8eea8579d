"""The CUDA kernel of local_decoder_down: its source on an emulator of a block, in random orders and
with faults planted, or on a GPU; and what the compiler makes of it."""

import ctypes
import re
from itertools import product

import pytest
import torch
from emulated import EmulatorError, library
from emulated_local_decoder_down import SOURCE, local_decoder_down
from harness import check_not_finite_like, guarded_outputs, launcher, on
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
)
from test_local_decoder_down import OP, arguments, check, eager, oracle

from bench.ptxas import ARCHS
from pixeldiff.ops.cuda import local_decoder_down as backend
from pixeldiff.ops.registry import explain

bf16, fp32 = torch.bfloat16, torch.float32
each_backend = pytest.mark.parametrize(
    "where", ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
)
# Whether x is in planes of fp32, and channels of the result.
KINDS = {"packed": (False, 16), "planes": (True, 16), "planes-to-3": (True, 3)}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
PACKED, PLANES, TO_THREE = KINDS.values()
# (B, H, W). A strip is 128 columns wide, a ring holds 4 times two rows.
SHAPES = {
    "two-strips": (2, 6, 136),
    "least": (1, 2, 8),
    "two-images": (2, 4, 16),
    "row": (1, 2, 264),
    "round-the-ring": (1, 22, 24),
}


def given_to(kind, shape, std=1.0, seed=0):
    """x as the kernel takes it, a weight and a bias."""
    planes, channels = kind
    x, weight, bias = arguments(bf16, (*shape, 3, channels), std)
    if planes:
        draw = Draw(seed=seed)
        x = draw(shape[0], 3, *shape[1:], std=std).permute(0, 2, 3, 1)
    return x, weight, bias


def run(where, args, **how):
    """Both results, on the CPU."""
    if where == "emulated":
        assert backend.why_not_call(*args[:2]) is None
        return local_decoder_down(*args, **how)
    launch, device = launcher(OP, "cuda")
    args = tuple(as_it_lies(a, device) for a in args)
    if reason := backend.why_not(*args):
        pytest.skip(reason)
    return tuple(y.cpu() for y in launch(*args))


def as_it_lies(t, device):
    """On that device, with the same strides."""
    to = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    return to.copy_(t)


def check_both(got, args, rule=assert_within_twice_eager_or_spacing):
    """Of an fp32 image what counts is what it is rounded to."""
    x, weight, bias = args
    check(got, (x.to(bf16), weight, bias), rule)


# --- against fp64


@each_backend
@each_kind
@pytest.mark.parametrize("std", [1.0, 1e-3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_oracle(shape, std, kind, where):
    args = given_to(kind, shape, std)
    check_both(run(where, args), args)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([*KINDS.values()]),
    st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 40)),
    st.integers(1, 7),
    st.integers(0, 2**63 - 1),
)
def test_random_sizes_in_random_orders(kind, size, slots, seed):
    """Segments of one row and of many, neighbours in the same strip and in others."""
    images, rows, columns = size
    shape = (images, 2 * rows, columns * (4 if kind[0] else 8))
    args = given_to(kind, shape, seed=seed)
    check_both(run("emulated", args, slots=slots, seed=seed), args)


@each_kind
def test_neither_order_nor_division_changes_a_bit(kind):
    args = given_to(kind, (1, 22, 40))
    want = run("emulated", args)
    for seed, slots in ((1, 1), (2, 6), (3, 30)):
        for y, other in zip(run("emulated", args, seed=seed, slots=slots), want, strict=True):
            assert_bitwise(y, other)


@each_backend
def test_both_kinds_agree(where):
    """To the order in which nine values are summed."""
    x, weight, bias = given_to(PACKED, (2, 6, 136))
    planes = x.float().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for a, b in zip(run(where, (x, weight, bias)), run(where, (planes, weight, bias)), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-5)


@each_backend
@each_kind
def test_strided(kind, where):
    """Part of larger images, from another row and column on, one image twice; weights channels
    last, a spread bias."""
    x, weight, bias = args = given_to(kind, (2, 6, 40))
    want = run(where, args)
    planes, _ = kind
    wide = torch.full((2, 3, 13, 56) if planes else (2, 13, 56, 3), torch.nan).to(x.dtype)
    wide = wide.permute(0, 2, 3, 1) if planes else wide
    rest = (
        weight.contiguous(memory_format=torch.channels_last),
        torch.stack((bias, bias), -1)[..., 0],
    )
    for column in (0, 8):
        part = wide[:, 1:13:2, column : column + 40]
        part.copy_(x)
        for y, other in zip(run(where, (part, *rest)), want, strict=True):
            assert_bitwise(y, other)
    twice = run(where, (x[:1].expand(2, -1, -1, -1), weight, bias))
    for y, other in zip(twice, want, strict=True):
        assert_bitwise(y, other[:1].expand_as(y))


@each_backend
@each_kind
def test_pooled_is_the_maximum_of_the_skip_as_stored(kind, where):
    """Of results far below zero too, whose order is another one than that of the sums."""
    x, weight, bias = given_to(kind, (2, 6, 136))
    for shifted in (bias, bias - 4):
        skip, pooled = run(where, (x, weight, shifted))
        assert_bitwise(pooled, skip.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).amax((2, 4)))


@each_backend
@each_kind
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_not_finite(value, kind, where):
    """Each channel of pixels everywhere in a strip and at its borders: in nine pixels and in their
    squares, and not in those that find it in a word of theirs."""
    args = given_to(kind, (1, 12, 136))
    x, weight, bias = args
    places = ((0, 0), (3, 7), (6, 14), (1, 31), (4, 32), (9, 127), (11, 128), (7, 135))
    for i, (row, column) in enumerate(places):
        x[0, row, column, i % 3] = value
    want = eager(x.to(bf16).float(), weight.float(), bias.float())
    for y, expected in zip(run(where, args), want, strict=True):
        check_not_finite_like(y, expected.bfloat16())
    assert 4 < (~want[0].isfinite()).any(-1).sum() <= 9 * len(places)
    for channel, column in product(range(3), range(8, 16)):
        x[0].nan_to_num_(0, 0, 0)[5, column, channel] = value
        want = eager(x.to(bf16).float(), weight.float(), bias.float())
        for y, expected in zip(run(where, args), want, strict=True):
            assert torch.equal(y.isfinite(), expected.isfinite())


@each_backend
@each_kind
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_not_finite_weights(value, kind, where):
    """A product meets none but with the value that it is the weight of: an infinity makes
    infinities, and where a lane has no weight of its own it has none of another's. Not at the
    edges, where it meets zeros."""
    for tap, channel in product(range(9), range(3)):
        x, weight, bias = args = given_to(kind, (1, 4, 16))
        n = 5 % len(weight)
        weight[n, channel, tap // 3, tap % 3] = value
        want, _ = eager(x.to(bf16).float(), weight.float(), bias.float())
        skip, _ = run(where, args)
        inside = (slice(None), slice(1, -1), slice(1, -1))
        check_not_finite_like(skip[inside], want[inside].to(bf16))
        assert not want[..., n].isfinite().all()


@pytest.mark.parametrize(
    ("kind", "shape", "strides"),
    [
        (PACKED, (2, 2, 8, 3), (2**31, 24, 3, 1)),
        (PACKED, (1, 4, 8, 3), (0, 2**30 + 8, 3, 1)),
        (PLANES, (2, 2, 8, 3), (2**30, 8, 1, 16)),
        (PLANES, (1, 2, 8, 3), (0, 8, 1, 2**29)),
        (PLANES, (1, 4, 8, 3), (0, 2**28 + 8, 1, 8)),
        (TO_THREE, (1, 2, 8, 3), (0, 8, 1, 2**29)),
    ],
    ids=["images", "rows", "images-of-planes", "planes", "rows-of-planes", "planes-to-3"],
)
def test_offsets_past_two_to_the_31(kind, shape, strides):
    """In bytes or elements."""
    near, weight, bias = given_to(kind, shape[:3])
    count = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    far = torch.empty(count, dtype=near.dtype)  # pages that are not touched cost nothing
    far = far.as_strided(shape, strides).copy_(near)
    got = local_decoder_down(far, weight, bias)
    for y, want in zip(got, local_decoder_down(near, weight, bias), strict=True):
        assert_bitwise(y, want)


# --- which value is where


def integers(function, *args, count):
    out = (ctypes.c_int * count)()
    function(*args, out)
    return list(out)


def test_fragments_are_b():
    """PTX ISA, m16n8k16: a thread's two registers of B hold rows 2 threadID_in_group and the next,
    and those 8 further, of column groupID. The inverse of where weights are put."""
    lib = library(SOURCE)
    for lane, word, side in product(range(32), range(4), range(2)):
        channel, k = lib.down_fragment_channel(lane, word), lib.down_fragment_k(lane, word)
        assert k == lane % 4 * 2 + 8 * (word % 2)
        assert lib.down_fragment_at(k + side, channel) == (lane * 4 + word) * 2 + side


@pytest.mark.parametrize("planes", [False, True], ids=["packed", "planes"])
def test_every_value_once(planes):
    values = [library(SOURCE).down_value(planes, k) for k in range(16)]
    assert sorted(v for v in values if 0 <= v < 9) == list(range(9))


def test_packed_words():
    """The nine values of a square's right pixel are from the word on where it starts, those of the
    left one 6 bytes before, in the row's own bytes; what 8 lanes of four neighbours read at once
    are 25 words side by side."""
    lib = library(SOURCE)
    _, _, row, *_ = integers(lib.down_tile, *PACKED, count=7)
    for square in range(64):
        at = lib.down_at(0, square, 0)
        assert at % 4 == 0
        # The row starts 16 bytes before the strip's first pixel.
        right = 16 + 6 * (2 * square + 1)
        places = {lib.down_value(0, k): at + 2 * k for k in range(16)}
        assert [places[i] for i in range(9)] == [right - 6 + 2 * i for i in range(9)]
        assert at - 8 >= 0
        assert at + 32 <= row  # all that lanes read
        assert places[8] + 2 <= row - 16
    words = {lib.down_at(0, s, 0) // 4 + t for s in range(8) for t in range(4)}
    assert len({word % 32 for word in words}) == len(words)


def test_words_of_planes():
    """A lane reads the four pixels around a square's of its channel: the value of tap t is the t-th
    for the left pixel, the next for the right one. At most two lanes to a bank."""
    lib = library(SOURCE)
    _, _, row, part, *_ = integers(lib.down_tile, *PLANES, count=7)
    for square, channel in product(range(64), range(3)):
        at = lib.down_at(1, square, channel)
        assert at == channel * part + 16 + 4 * (2 * square - 1)
        assert at + 16 <= (channel + 1) * part <= row
        for k in (2 * channel, 2 * channel + 1, 2 * channel + 8):
            tap = k % 2 if k < 8 else 2
            assert lib.down_value(1, k) == 3 * tap + channel
    words = [lib.down_at(1, s, c) // 4 % 32 for s in range(8) for c in range(3)]
    assert max(words.count(word) for word in words) <= 2


def test_values_of_a_square_are_columns():
    """PTX ISA, m16n8k16: a lane's two words of B are of column groupID, its accumulators of columns
    2 threadID_in_group and the next. Of three channels column n is the n-th of the six values of a
    square; the maximum of a lane's first and its partner's second one is that of a channel."""
    lib = library(SOURCE)
    found = {}
    for lane, i in product(range(32), range(2)):
        found[lane, i] = integers(lib.down_packed_result, lane, i, count=7)
        weight, channel, left, partner, skip_at, pooled_at, real = found[lane, i]
        assert weight == lane // 4 % 3
        n = lane % 4 * 2 + i
        assert real == (n < 6)
        if real:
            assert (channel, bool(left)) == (n % 3, n < 3)
            assert skip_at + 2 * i == 2 * n
    for lane in range(32):
        channel, left, partner, _, pooled_at, real = found[lane, 0][1:]
        assert partner // 4 == lane // 4
        if real:
            other = found[partner, 1]
            assert (other[1], other[2], other[6]) == (channel, not left, 1)
            assert pooled_at == 2 * channel


@each_kind
def test_copies(kind):
    """Every piece of a stage once, to a place of its own; neighbours in banks of their own."""
    lib, (planes, _) = library(SOURCE), kind
    stage, shared, row, part, columns, threads, _ = integers(lib.down_tile, *kind, count=7)
    count = lib.down_copies(planes, None)
    assert count % threads == 0
    found = (ctypes.c_int * (5 * count))()
    lib.down_copies(planes, found)
    copies = [found[5 * i : 5 * i + 5] for i in range(count)]
    real = [copy for copy in copies if copy[4]]
    assert real == copies[: len(real)]
    pieces = columns * (8 if planes else 12) // 16 + 2
    parts = 3 if planes else 1
    assert [tuple(c[:3]) for c in real] == list(product(range(2), range(parts), range(pieces)))
    assert [c[3] for c in real] == [r * row + p * part + 16 * i for r, p, i, *_ in real]
    assert 16 * pieces <= part
    assert (parts * part, 2 * row, 4 * stage) == (row, stage, shared)


# KB of a block without asking for more, and of a multiprocessor of 8.6, 8.9 and 12.0.
BLOCK, MULTIPROCESSOR = 48, 100


@each_kind
def test_shared_memory_fits(kind):
    _, shared, *_, blocks = integers(library(SOURCE).down_tile, *kind, count=7)
    assert shared + 128 <= BLOCK * 1024
    assert blocks * (shared + 128 + 1024) <= MULTIPROCESSOR * 1024


@pytest.mark.parametrize("size", [(1, 1), (7, 129), (2048, 2048), (2560, 2560), (1024, 1000)])
@pytest.mark.parametrize("slots", [1, 660])
def test_segments(size, slots):
    """Every row of every strip once, and no more than a tenth longer than without a rest."""
    lib, (rows, columns) = library(SOURCE), size
    count = lib.down_segments(2, rows, columns, slots, None)
    found = (ctypes.c_int * (4 * count))()
    lib.down_segments(2, rows, columns, slots, found)
    segments = [tuple(found[4 * i : 4 * i + 4]) for i in range(count)]
    strips = list(product(range(2), range(0, columns, 64)))
    assert [at[:2] for at in segments] == strips * (count // len(strips))
    for image, column in strips[:3]:
        parts = [at[2:] for at in segments if at[:2] == (image, column)]
        assert [row for first, last in parts for row in range(first, last)] == list(range(rows))
    if rows > 1000:
        longest = max(last - first + 1 for *_, first, last in segments)
        assert -(-count // slots) * longest < 1.1 * len(strips) * rows / slots


# --- what goes wrong is noticed

ALWAYS = (0, 1000)
FAULTS = {
    "rows read before they are there": ("weak-wait", ALWAYS),
    "rows of others read before, or overwritten while they are read": ("skip-sync", ALWAYS),
}


@each_kind
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_faults_are_noticed(fault, kind):
    """In some order of a few: by the emulator, or because the result is wrong."""
    what, which = fault
    args = given_to(kind, (1, 40, 40))
    for seed in range(16):
        try:
            got = run("emulated", args, seed=seed, fault=what, which=which, slots=1)
            check_both(got, args, assert_within_twice_eager)
        except (EmulatorError, AssertionError):
            return
    pytest.fail("sixteen runs went by as if nothing were wrong")


WRONG = {
    "rows of taps for columns": {"weight.stride_r": 1, "weight.stride_s": 3},
    "columns of taps one further": {"weight.stride_s": 2},
    "another channel": {"weight.stride_c": 8},
    "another row": {"x.stride_h": 40 * 24},
}


@each_kind
@pytest.mark.parametrize("changed", WRONG.values(), ids=WRONG)
def test_other_weights_and_rows_are_noticed(changed, kind):
    """Read, as the taps of a larger tensor, from the wrong place."""
    x, weight, bias = given_to(kind, (1, 6, 40))
    larger = torch.zeros(4 * weight.numel()).to(bf16)
    larger[: weight.numel()] = weight.flatten()
    inside = larger[: weight.numel()].view_as(weight)
    room = torch.zeros(8 * x.numel(), dtype=x.dtype)
    room = room[: x.numel()].as_strided(x.shape, x.stride()).copy_(x)
    args = (room, inside, bias)
    check_both(run("emulated", args), args)
    with pytest.raises(AssertionError, match="error"):
        check_both(run("emulated", args, changed=changed), args)


# --- what is refused


def test_why_not():
    packed, weight, _ = given_to(PACKED, (2, 4, 24))
    planes, *_ = given_to(PLANES, (2, 4, 24))

    def of(x, weight=weight):
        return backend.why_not_call(x, weight)

    assert of(packed) is None
    assert of(planes) is None
    assert of(packed, torch.zeros(16, 3, 3, 3)) == (
        "takes weights in bfloat16 and x in bfloat16 or float32, got torch.float32 and "
        "torch.bfloat16"
    )
    assert "got torch.bfloat16 and torch.float16" in of(packed.half())
    to_three = torch.zeros(3, 3, 3, 3).to(bf16)
    assert of(planes, to_three) is None
    words = "takes 3 channels to 16, or to 3 of x in float32, got "
    assert of(packed, to_three) == words + "3 to 3 of x in torch.bfloat16"
    for x in (packed, planes):
        eight = torch.zeros(8, 3, 3, 3).to(bf16)
        assert of(x, eight) == f"{words}3 to 8 of x in {x.dtype}"
    four = torch.zeros(1, 2, 8, 4).to(bf16)
    assert of(four, torch.zeros(16, 4, 3, 3).to(bf16)) == f"{words}4 to 16 of x in torch.bfloat16"
    words = "needs x in torch.bfloat16 with pixels and their channels side by side, in a multiple "
    for x in (packed[:, :, :12], planes.to(bf16), packed.transpose(1, 2), packed[:, :, ::3]):
        assert of(x) == words + (
            f"of 8 columns, and its other strides multiples of 16 bytes, got {tuple(x.shape)} at "
            f"{tuple(x.stride())} elements"
        )
    words = "needs x in torch.float32 with a row's pixels of a channel side by side, in a multiple "
    for x in (planes[:, :, :22], packed.float(), planes.transpose(1, 2)):
        assert of(x) == words + (
            f"of 4 columns, and its strides multiples of 16 bytes, got {tuple(x.shape)} at "
            f"{tuple(x.stride())} elements"
        )
    assert of(planes[:, :, :20]) is None
    assert of(packed[:, :, 4:20]) == "needs x to start at a multiple of 16 bytes"
    assert of(packed[:, :, 8:]) is None
    odd = torch.zeros(1, 4, 12, 3).to(bf16)[:, :, :8]
    assert of(odd).endswith("multiples of 16 bytes, got (1, 4, 8, 3) at (144, 36, 3, 1) elements")
    far = torch.empty_strided((16, 3, 3, 3), (2**25, 9, 3, 1), dtype=bf16, device="meta")
    assert of(packed, far) == (
        "takes weights at strides of at most 2^24 elements, got (33554432, 9, 3, 1); "
        "call .contiguous()"
    )
    huge = torch.empty(2**17, 2, 2**10, 3, dtype=bf16, device="meta")
    assert of(huge) == ("takes at most 2^20 strips of 128 columns of x, got (131072, 2, 1024, 3)")


SIDE = "pixels of a row of x must be side by side, of f32 channel by channel, and a multiple of"
CHANNELS = "x must have 3 channels, weight 16 rows, or 3 where x is f32"
REFUSED = {
    "no images": ({"B": 0}, "sizes must be positive, and at most 2^20 strips of 128 columns of x"),
    "no rows": ({"rows": 0}, "sizes must be positive, and at most 2^20 strips of 128 columns"),
    "strips": ({"columns": 1 << 27}, "sizes must be positive, and at most 2^20 strips of 128"),
    "channels": ({"Ci": 4}, CHANNELS),
    "out": ({"Co": 8}, CHANNELS),
    "out of bf16": ({"Co": 3}, CHANNELS),
    "out of planes": ({"x_dtype": 0, "Co": 8}, CHANNELS),
    "fp16": ({"x_dtype": 2}, "x must be bf16 or f32"),
    "columns": ({"columns": 6}, SIDE),
    "pixels": ({"x.stride_w": 4}, SIDE),
    "a plane of bf16": ({"x_plane": 64}, SIDE),
    "packed fp32": ({"x_dtype": 0}, SIDE),
    "rows apart": ({"x.stride_h": 28}, "strides of x must be multiples of 16 bytes"),
    "images apart": ({"x.stride_b": 4}, "strides of x must be multiples of 16 bytes"),
    "planes apart": (
        {"x_dtype": 0, "x.stride_w": 1, "x_plane": 6},
        "strides of x must be multiples of 16 bytes",
    ),
    "x": ({"x.data": 4104}, "x, skip and pooled must start at a multiple of 16 bytes"),
    "nowhere": ({"skip": 0}, "x, skip and pooled must start at a multiple of 16 bytes"),
    "pooled": ({"pooled": 4104}, "x, skip and pooled must start at a multiple of 16 bytes"),
    "weight": ({"weight.stride_n": 1 << 25}, "strides of weight must be at most 2^24 elements"),
    "bias": ({"bias": 4097}, "weight and bias must start at a multiple of 2 bytes"),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED)
def test_launch_refuses(changed, message):
    """What the launch checks before it starts anything."""
    with pytest.raises(EmulatorError, match=f"^{re.escape(message)}"):
        local_decoder_down(*given_to(PACKED, (2, 4, 8)), changed=changed)


def test_on_request_only():
    args = given_to(PACKED, SHAPES["least"])
    assert ("cuda", None) not in explain(OP, *args)[:1]
    assert any(name == "cuda" and reason for name, reason in explain(OP, *args))


# --- what the compiler makes of it


@pytest.mark.parametrize("arch", ARCHS)
def test_machine_code(arch):
    """No spills; the registers of the blocks that share a multiprocessor; every product, copy,
    exchange and store of a step by its own instruction."""
    kernels, _ = compiled_for(arch, "local_decoder_down.cu")
    names = [f"local_decoder_down_kernel<{kind}>" for kind in ("false, 16", "true, 16", "true, 3")]
    assert sorted(kernel.name for kernel in kernels) == names
    for kernel in kernels:
        planes, channels = kind = KINDS[dict(zip(names, KINDS, strict=True))[kernel.name]]
        *_, threads, blocks = integers(library(SOURCE).down_tile, *kind, count=7)
        assert (kernel.stack, kernel.spills) == (0, 0)
        assert blocks == (5 if channels == 16 else 7)
        assert kernel.registers * threads * blocks <= 65536

        def count(pattern, code=kernel.sass):
            return len(re.findall(rf"\b{pattern}", code))

        # Of two rows: three rows of taps, two pixels, two products each; of three channels one.
        products = 2 * 3 * 2 * (2 if channels == 16 else 1)
        assert count(r"HMMA\.16816\.F32\.BF16") == count("HMMA") == products
        assert count(r"LDS R\d") == 2 * (8 if planes else 10)
        assert count(r"LDGSTS\.E\.BYPASS[.A-Z0-9]*\.128") == count("LDGSTS") > 0
        assert count("BAR") == 1
        # Of 32 values, or two words in each half of two rows: 2^x and 1 / x.
        values = 32 if channels == 16 else 8
        assert count(r"MUFU\.EX2") == values
        assert count(r"MUFU\.RCP") >= values
        # Two values at once; a NaN stays (test_not_finite).
        most = count("HMNMX2") + 2 * count("VHMNMX")
        if channels == 16:
            # 8 bytes for each of eight pixels and two squares.
            assert count(r"STG\.E\.64") == count("STG") == 10
            assert count("SHFL") == 0
            assert 8 <= most <= 12
        else:
            # 4 bytes in each half of two rows, 2 in each half of a row of squares.
            assert (count("STG"), count(r"STG\.E desc|STG\.E \["), count(r"STG\.E\.U16")) == (
                6,
                4,
                2,
            )
            assert count("SHFL") == 2
            assert most == 4


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "side"), [(PACKED, 4096), (PACKED, 5120), (PLANES, 4096), (TO_THREE, 8192)]
)
def test_released_shapes_on_gpu(side, kind):
    """Parts of it: the corners, and what is far from them."""
    launch, device = launcher(OP, "cuda")
    _, *weights = on(device, given_to(kind, SHAPES["least"]))
    if kind[0]:
        x = torch.randn(1, 3, side, side, device=device).permute(0, 2, 3, 1)
    else:
        x = torch.randn(1, side, side, 3, device=device, dtype=bf16)
    if reason := backend.why_not(x, *weights):
        pytest.skip(reason)
    skip, pooled = launch(x, *weights)
    n = 24  # pixels of a part; those at a side that the image goes on behind are not compared
    for row, column in product((0, side // 2 - 4, side - n), repeat=2):
        args = on("cpu", (x[:, row : row + n, column : column + n].to(bf16), *weights))
        kept = [slice(2 * (at > 0), n - 2 * (at + n < side)) for at in (row, column)]
        inside = (slice(None), *kept)
        half = (slice(None), *(slice(at.start // 2, at.stop // 2) for at in kept))
        parts = (
            skip[:, row : row + n, column : column + n].cpu(),
            pooled[:, row // 2 : (row + n) // 2, column // 2 : (column + n) // 2].cpu(),
        )
        near, want = eager(*args), oracle(*args)
        for y, e, w, at in zip(parts, near, want, (inside, half), strict=True):
            assert_within_twice_eager(y[at], e[at], w[at])
    check_repeatable(launch, x, *weights)


@pytest.mark.gpu
@each_kind
def test_like_triton_on_gpu(kind):
    """Everywhere, at a size that is a multiple of little."""
    launch, device = launcher(OP, "cuda")
    triton, _ = launcher(OP, "triton-gpu")
    args = tuple(as_it_lies(a, device) for a in given_to(kind, (2, 334, 520)))
    if reason := backend.why_not(*args):
        pytest.skip(reason)
    with guarded_outputs():
        got = launch(*args)
    for y, want in zip(got, triton(*args), strict=True):
        torch.testing.assert_close(y, want, rtol=0.02, atol=0.02)


@pytest.mark.gpu
@each_kind
def test_captured_on_gpu(kind):
    launch, device = launcher(OP, "cuda")
    args = tuple(as_it_lies(a, device) for a in given_to(kind, (1, 64, 96)))
    if reason := backend.why_not(*args):
        pytest.skip(reason)
    check_captures(launch, *args)
