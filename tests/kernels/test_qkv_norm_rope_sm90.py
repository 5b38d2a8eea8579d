"""The sm_90a projection kernel without a GPU: its layouts, its source on an emulator in random
orders and with faults planted, and what the compiler makes of it; with one, the op itself."""

import ctypes
import re
from itertools import product

import pytest
import torch
from emulated import EmulatorError, library
from emulated_qkv import SOURCE, Call, barriers_of, call_of, qkv_norm_rope, shared_memory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine_code import check_register_trade, compiled_for, instructions
from rules import (
    assert_bitwise,
    assert_one_rounding,
    assert_within_twice_eager_or_spacing,
    check_captures,
)
from test_hopper_layouts import DRIVER, integers
from test_qk_norm_rope import oracle as rest
from test_qkv_norm_rope import arguments, eager, oracle, projected
from torch.nn.functional import linear

import pixeldiff
from pixeldiff import native
from pixeldiff.ops import qkv_norm_rope as op
from pixeldiff.ops.cuda import qkv_norm_rope as backend
from pixeldiff.ops.cuda.hopper import why_not_hopper

DIMS = (64, 72, 128)
TYPES = (torch.bfloat16, torch.float16)
dims = pytest.mark.parametrize("d", DIMS)


def tensors(stream):
    return None if stream is None else (*stream[:4], *stream[4])


def emulate(image, text, heads, **how):
    return qkv_norm_rope(tensors(image), tensors(text), heads, **how)


def check(args, **how):
    out = emulate(*args, **how)
    want, plain = oracle(*args), eager(*args)
    for part in range(3):
        assert_within_twice_eager_or_spacing(out[part], plain[part], want[part])
    return out


def whole(args, unit=1.0):
    """The same with small integers for W, and small multiples of a power of two for x: their
    products are exact, in any order."""

    def rounded(stream):
        x, weight, *others = stream
        return x.mul(2).round().mul(unit), weight.mul(8).round(), *others

    image, text, heads = args
    return rounded(image), text and rounded(text), heads


# --- layouts, against models of the hardware written from the PTX ISA


def copied(d):
    """Of every row of the tile in shared memory, the row of W that lies there: the boxes follow
    each other; in a box the rows of an octet come before the next octet's."""
    _, columns, boxes, box_rows, _, _ = integers(library(SOURCE).qkv_columns, d, count=6)
    of_octet = box_rows // (columns // 8)
    return [
        8 * octet + box * of_octet + row
        for box in range(boxes)
        for octet in range(columns // 8)
        for row in range(of_octet)
    ]


@dims
def test_a_thread_finds_its_channels(d):
    """Column c of the product is row c of the tile in shared memory; the accumulator register i of
    a lane is column 8 (i / 4) + 2 (lane % 4) + i % 2, of its second row where i % 4 >= 2."""
    lib = library(SOURCE)
    heads, columns, boxes, box_rows, pairs, runs = integers(lib.qkv_columns, d, count=6)
    assert heads * d == columns <= 256
    assert columns + d > 256
    assert boxes * box_rows == columns
    assert sorted(copied(d)) == list(range(columns))
    for half in range(2):
        seen = {}
        for lane, head, run, pair, e in product(
            range(4), range(heads), range(runs), range(pairs), range(2)
        ):
            i = lib.qkv_accumulator(d, head, run, pair, half) + e
            assert i % 4 // 2 == half
            column = i // 4 * 8 + lane * 2 + i % 2
            channel = lib.qkv_channel(d, lane, run) + 2 * pair + e
            assert copied(d)[column] == head * d + channel
            seen[head, channel] = column
        assert len(seen) == columns
    # Of heads of 64 and 128: 16 bytes of a thread.
    assert pairs == (1 if d == 72 else 4)


@dims
def test_shared_memory(d):
    """227 KB of a block on sm_90; boxes start at a multiple of 1024."""
    total, stages, stage, x, full, empty = shared_memory(d)
    assert (total, stages) == ({72: 221440}.get(d, 197888), {72: 5}.get(d, 4))
    assert total <= 227 * 1024
    assert x == 128 * 64 * 2
    _, columns, _boxes, box_rows, _, _ = integers(library(SOURCE).qkv_columns, d, count=6)
    assert stage == x + columns * 128
    assert box_rows * 128 % 1024 == 0
    assert full == stage * stages
    assert empty == full + 8 * stages


@settings(deadline=None)
@given(
    st.integers(1, 3), st.integers(0, 3000), st.integers(0, 400), st.integers(1, 40),
    st.integers(1, 9),
)  # fmt: skip
def test_every_part_is_in_one_tile(B, image, text, columns, blocks):
    lib = library(SOURCE)
    count = lib.qkv_tiles(B, image, text, columns)
    seen = set()
    for block in range(blocks):
        for i in range(block, count, blocks):
            stream, b, row, column = integers(lib.qkv_tile, B, image, text, columns, i, count=4)
            assert row % 128 == 0
            assert 0 <= row < (text if stream else image)
            assert 0 <= b < B
            assert 0 <= column < columns
            seen.add((stream, b, row, column))
    assert len(seen) == count == B * columns * (-(-image // 128) + -(-text // 128))


def test_what_runs_together_reads_little():
    """132 neighbours of PiD's image at 2048 read at most 16 tiles of rows and all 18 of W."""
    lib = library(SOURCE)
    for first in range(0, 128 * 18 - 132, 97):
        at = [
            integers(lib.qkv_tile, 1, 16384, 300, 18, i, count=4) for i in range(first, first + 132)
        ]
        assert len({row for _, _, row, _ in at}) <= 16


# --- tensor maps, with a driver of the test's own


def encoded(call: Call, code=0):
    calls = []

    def driver(out, kind, rank, start, size, stride, box, every, interleave, swizzle, l2, fill):
        ctypes.memset(out, 0xAB, 128)
        shape = size[:rank], stride[: rank - 1], box[:rank], every[:rank]
        calls.append((kind, start, *shape, (interleave, swizzle, l2, fill)))
        return code

    rooms = [ctypes.create_string_buffer(128 + 8) for _ in range(2)]
    message = ctypes.create_string_buffer(200)
    if library(SOURCE).qkv_encode(DRIVER(driver), ctypes.byref(call), *rooms, message):
        return message.value.decode()
    assert all(room.raw == b"\xab" * 128 + bytes(8) for room in rooms)
    return calls


@pytest.mark.parametrize(("d", "box"), [(64, [64, 2, 32, 1]), (72, [64, 8, 27, 1])])
def test_tensor_maps(d, box):
    """x: (B, N, K) as rows of one head; W: octets of rows. Strides in bytes, the innermost axis's
    left out; BFLOAT16 is 9, SWIZZLE_128B 3, L2_PROMOTION_L2_256B 3."""
    image, _, heads = arguments(torch.bfloat16, (2, 5, None, 48, 4, d))
    out = torch.empty(0)
    x, weight = encoded(call_of(tensors(image), None, out, heads))
    modes = (0, 3, 3, 0)
    assert x == (
        *(9, image[0].data_ptr(), [48, 1, 5, 2], [16, 96, 480]),
        *([64, 1, 128, 1], [1] * 4, modes),
    )
    assert weight == (
        *(9, image[1].data_ptr(), [48, 8, 3 * heads * d // 8, 1], [96, 768, 16]),
        *(box, [1] * 4, modes),
    )


def test_tensor_maps_the_copy_engine_has_not_got():
    image, _, heads = arguments(torch.float16, (1, 5, None, 48, 4, 64))
    call = call_of(tensors(image), None, torch.empty(0), heads)
    assert encoded(call)[0][0] == 6  # FLOAT16
    call.image.weight_stride = 52
    assert encoded(call) == "weight needs strides that are positive multiples of 16 bytes"
    call.image.x += 8
    assert encoded(call) == "x must start at a multiple of 16 bytes"
    call.image.x -= 8
    assert encoded(call, 1) == "cuTensorMapEncodeTiled of x failed with CUDA error 1"


# --- in any order


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(DIMS),
    st.sampled_from(TYPES),
    st.integers(1, 2),
    st.integers(0, 270),
    st.one_of(st.none(), st.integers(0, 140)),
    st.integers(1, 50).map(lambda n: 8 * n),
    st.integers(1, 5),
    st.sampled_from([1.0, 1e-3]),
    st.integers(1, 4),
    st.integers(0, 2**63 - 1),
)
def test_random_sizes_in_random_orders(d, dtype, b, n, t, k, heads, std, blocks, seed):
    """Against fp64: tiles that are not full, blocks with several tiles and with none."""
    if n == 0 and not t:
        return
    check(arguments(dtype, (b, n, t, k, heads, d), std), blocks=blocks, seed=seed)


@dims
@pytest.mark.parametrize("dtype", TYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("unit", [1.0, 2.0**-14], ids=["std20", "std1e-3"])
def test_exact_products_leave_one_rounding(d, dtype, unit):
    """Then nothing but the order of a head's squares is free: v is the projection bit for bit, and
    q and k are those of `qk_norm_rope` to one rounding."""
    args = whole(arguments(dtype, (2, 130, 9, 136, 4, d)), unit)
    out = emulate(*args)
    image, text, heads = args
    want = rest(projected(image, linear), projected(text, linear), heads)
    assert_one_rounding(out[0], want[0])
    assert_one_rounding(out[1], want[1])
    assert_bitwise(out[2], torch.from_numpy(want[2]).to(dtype))


@dims
def test_the_order_does_not_change_a_bit(d):
    args = arguments(torch.bfloat16, (1, 140, 20, 328, 3, d))
    want = check(args)
    for seed, blocks in ((1, 1), (2, 3), (3, 1)):
        assert_bitwise(emulate(*args, seed=seed, blocks=blocks), want)


@dims
def test_strides(d):
    """Rows of x and W and of the tables that lie apart, with NaN between."""

    def apart(t, by):
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + by), torch.nan)
        view = wide[..., : t.shape[-1]]
        view.copy_(t)
        return view

    image, text, heads = arguments(torch.bfloat16, (2, 20, 5, 72, 2, d))

    def strided(stream):
        x, weight, *gains, rope = stream
        return apart(x, 8), apart(weight, 24), *gains, tuple(apart(t, 4) for t in rope)

    got = emulate(strided(image), strided(text), heads)
    assert_bitwise(got, emulate(image, text, heads))


@dims
def test_not_finite(d):
    """A NaN in a row of x takes that row and no other; an infinite value of the projection takes
    its own pair of channels, and the rest of its head is 0, as in the reference."""
    image, text, heads = whole(arguments(torch.bfloat16, (1, 70, 3, 64, 4, d)))
    image[0][0, 65, 9] = torch.nan
    image[0][0, :, 1] = 1
    image[1][:, 1] = 0
    image[1][d + 5, 1] = torch.inf  # q, head 1
    out = emulate(image, text, heads)
    with pixeldiff.backend("reference"):
        want = op(*image, heads=heads, text=text)
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out.isinf(), want.isinf())
    assert out[:, 0, 3 + 65].isnan().all()
    assert out[0, 0, 3:68, 1].isnan().any(-1).all()
    assert (out[0, 0, 3:68, 1] == 0).sum() >= 65 * (d - 2)
    assert out[:, :, :3].isfinite().all()


# --- what goes wrong is noticed

FAULTS = {
    "a stage read before it is there": ("skip-wait", "full"),
    "a stage overwritten while it is read": ("skip-wait", "empty"),
    "an arrival lost": ("drop-arrival", "empty"),
    "sums read before they are there": ("no-product-wait", None),
    "another swizzle than the products read": ("other-swizzle", None),
    "fewer bytes announced than arrive": ("short-copy", None),
}


@dims
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_faults_are_noticed(d, fault):
    """In some order of a few: by the emulator, or because the result is wrong."""
    kind, barrier = fault
    args = arguments(torch.bfloat16, (1, 200, 5, 520, 2, d))
    where = barriers_of(d)[barrier] if barrier else (0, 0)
    want = torch.from_numpy(oracle(*args))
    for seed in range(16):
        try:
            out = emulate(*args, blocks=1, seed=seed, fault=kind, barriers=where)
        except EmulatorError:
            return
        if not ((out.double() - want).abs() <= 0.02 * (1 + want.abs())).all():
            return
    pytest.fail("sixteen runs went by as if nothing were wrong")


# --- what the backend refuses


def test_why_not():
    def reason(shape=(1, 4, 3, 64, 2, 64), dtype=torch.bfloat16, change=None):
        image, text, heads = arguments(dtype, shape)
        image = list(tensors(image))
        if change:
            at, make = change
            image[at] = make(image[at])
        empty = (None,) * 6
        return backend.why_not_call(tuple(image), tensors(text) or empty, heads)

    for d in DIMS:
        assert reason((1, 4, 3, 64, 2, d)) is None
        assert reason((1, 4, None, 64, 2, d), torch.float16) is None
    assert reason((1, 4, 3, 64, 2, 80)) == "takes head dims 64, 72, 128, got 80"
    assert reason(dtype=torch.float32) == "takes bfloat16 and float16, got torch.float32"
    assert reason((1, 4, None, 0, 2, 64)) == "needs at least one channel of x, got 0"
    assert reason(change=(2, lambda t: t.float())) == (
        "takes q_weight in torch.bfloat16, got torch.float32"
    )
    assert (
        reason(change=(4, lambda t: t.double())) == "takes cos in torch.float32, got torch.float64"
    )
    assert reason((2, 4, None, 60, 2, 64)) == (
        "needs strides of x that are positive multiples of 16 bytes, got (240, 60, 1) elements; "
        "call .contiguous()"
    )
    assert reason(change=(5, lambda t: t[:1].expand(4, 32))) == (
        "needs strides of sin that are positive multiples of 16 bytes, got (0, 1) elements; "
        "call .contiguous()"
    )
    assert reason(
        change=(1, lambda t: torch.zeros(384 * 64 + 8).bfloat16()[1:-7].view(384, 64))
    ) == ("needs weight to start at a multiple of 16 bytes")
    x = torch.empty(2**20, 2**18, 64, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(384, 64, dtype=torch.bfloat16, device="meta")
    assert "fewer than 2^31 tiles" in backend.why_not_call((x, weight), (None,), 2)


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [
        (1, 4096, 300, 1536, 24, 64),
        (1, 1024, None, 1152, 16, 72),
        (1, 1055, None, 3840, 30, 128),
        (2, 130, 9, 136, 4, 64),
        (3, 1, 0, 8, 1, 128),
    ],
    ids=["mmdit", "pit", "l2p", "odd", "small"],
)
@pytest.mark.parametrize("dtype", TYPES, ids=["bf16", "fp16"])
def test_on_a_gpu(dtype, shape):
    args = arguments(dtype, shape)
    reason = native.why_not_cuda() or why_not_hopper("qkv_norm_rope_cuda", torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(reason)

    def to_gpu(t):
        return None if t is None else t.cuda()

    image, text = (tuple(map(to_gpu, tensors(s) or (None,) * 6)) for s in args[:2])
    flat = (*image, *text, args[2], 1e-6)
    assert backend.why_not(*flat) is None
    out = backend.launch(*flat)
    want, plain = oracle(*args), eager(*args)
    for part in range(3):
        assert_within_twice_eager_or_spacing(out[part].cpu(), plain[part], want[part])
    assert_bitwise(backend.launch(*flat), out)
    check_captures(backend.launch, *flat)


# --- what the compiler makes of it


@pytest.fixture(scope="module", params=["true", "false"], ids=["bf16", "fp16"])
def compiled(request):
    """(kernels for heads of 128, 64 and 72, what the compiler said)"""
    kernels, said = compiled_for("90a", "qkv_norm_rope_sm90.cu", f"PIXELDIFF_BF16={request.param}")
    names = [f"qkv_norm_rope_sm90_kernel<{n}, {request.param}>" for n in (128, 64, 72)]
    assert [k.name for k in kernels] == names
    return kernels, said


def test_registers(compiled):
    kernels, said = compiled
    for kernel in kernels:
        check_register_trade(kernel, said, producer=40, consumers=232)


def test_instructions(compiled):
    """Hopper's tensor cores and copy engine; results leave 16 bytes at a time."""
    for kernel, d in zip(compiled[0], (128, 64, 72), strict=True):
        count = instructions(kernel.sass)
        assert count["HGMMA"] % 4 == 0
        assert count["HGMMA"] > 0
        assert count["UTMALDG"] % (1 if d == 72 else 5) == 0
        assert count["UTMALDG"] > 0
        assert count["USETMAXREG"] == 2
        assert count["STL"] == count["LDL"] == count["LDSM"] == count["HMMA"] == 0
        assert set(re.findall(r"HGMMA\.(\w+)", kernel.sass)) == {f"64x{216 if d == 72 else 256}x16"}
        if d != 72:
            stores = re.findall(r"\bSTG\S*", kernel.sass)
            assert set(stores) == {"STG.E.128"}
            assert len(stores) == 16
