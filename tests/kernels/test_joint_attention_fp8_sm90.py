"""The sm_90a attention in e4m3 without a GPU: its source on an emulator, in random orders and with
faults planted; and what the compiler makes of it. tests/kernels/test_joint_attention_fp8.py runs
the op's own cases on it, on the emulator and on a GPU."""

import ctypes
import math
import re
from importlib import import_module
from itertools import product

import numpy as np
import pytest
import torch
from e4m3_rules import nearest
from emulated import AttentionFp8, CallFp8, EmulatorError, attention_fp8, barriers_of, library
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from machine_code import check_products_overlap, compiled_for, instructions
from rules import Draw, assert_bitwise, assert_within_twice_eager, f64
from test_hopper_layouts import DRIVER, fields, swizzled
from test_joint_attention_fp8 import distance, exact

from bench.attention_error import attention as with_14_bits
from pixeldiff.ops.cuda import joint_attention_fp8 as backend

module = import_module("pixeldiff.ops.joint_attention_fp8")
SOURCE = "attention_fp8.cpp"
E4M3 = torch.float8_e4m3fn
DIMS = (64, 72, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dims = pytest.mark.parametrize("d", DIMS)


def arguments(d, queries=140, keys=300, images=1, heads=2, dtype=torch.float32):
    draw = Draw(dtype)
    q, k, v = (draw(images, rows, heads, d) for rows in (queries, keys, keys))
    k[:, 128:256] *= 8  # scales that differ from step to step
    q[:, queries // 2 :] *= 2  # and from row to row
    return q, k, v


def reference(q, k, v, scale=None):
    return module.reference(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)


# --- e4m3 as the emulator has it


def pointer(x, kind):
    return x.ctypes.data_as(ctypes.POINTER(kind))


def test_e4m3_of_the_emulator():
    """Every code and back, and the values between by comparing with all of them."""
    codes = np.arange(256, dtype=np.uint8)
    values = np.empty(256, np.float32)
    library(SOURCE).widen_e4m3(
        pointer(codes, ctypes.c_uint8), pointer(values, ctypes.c_float), ctypes.c_int64(256)
    )
    want = torch.from_numpy(codes).view(E4M3).float()
    assert torch.equal(torch.from_numpy(values).nan_to_num(1e9), want.nan_to_num(1e9))
    x = torch.cat((want[want.isfinite()], torch.linspace(-500, 500, 40001)))
    x = torch.cat((x, torch.linspace(-0.05, 0.05, 40001), torch.tensor([torch.inf, -torch.inf])))
    x = x.numpy().astype(np.float32)
    found = np.empty(x.size, np.uint8)
    library(SOURCE).round_e4m3(
        pointer(x, ctypes.c_float), pointer(found, ctypes.c_uint8), ctypes.c_int64(x.size)
    )
    assert torch.equal(torch.from_numpy(found), nearest(torch.from_numpy(x).double()))
    nan = np.array([np.nan], np.float32)
    library(SOURCE).round_e4m3(
        pointer(nan, ctypes.c_float), pointer(found, ctypes.c_uint8), ctypes.c_int64(1)
    )
    assert found[0] == 0x7F


def add_up(start, products):
    add = library(SOURCE).add_up_14_bits
    add.argtypes, add.restype = (ctypes.c_float, ctypes.POINTER(ctypes.c_float)), ctypes.c_float
    x = np.zeros(32, np.float32)
    x[: len(products)] = products
    return add(start, pointer(x, ctypes.c_float))


def test_sums_of_14_bits():
    """1 and what is below its 14 bits: cut off, towards 0; 13 and 14 bits are kept."""
    assert add_up(1.0, [2.0**-13]) == 1 + 2.0**-13
    assert add_up(1.0, [2.0**-14] * 32) == 1
    assert add_up(1.0, [-(2.0**-14)] * 32) == 1
    assert add_up(0.0, [2.0**-14] * 32) == 2.0**-9
    assert add_up(-1.0, [1.0, 2.0**-13]) == 2.0**-13
    assert math.isnan(add_up(1.0, [math.nan]))
    assert math.isnan(add_up(math.inf, [-math.inf]))
    assert add_up(0.0, []) == 0


# --- the order of the keys


@pytest.fixture(scope="module")
def layouts():
    loaded = library("layouts.cpp")
    loaded.k_major.restype = loaded.advance.restype = ctypes.c_uint64
    loaded.advance.argtypes = (ctypes.c_uint64, ctypes.c_uint32)
    return loaded


def operand8(lane, register, byte):
    """(row, column) of a byte of A. PTX ISA, "Register fragments for wgmma.mma_async.m64nNk32", A:
    groupID and threadID_in_group are lane / 4 and lane % 4; a[i] lies in row groupID for i in 0..3
    and 8..11, else 8 below; in column 4 threadID_in_group + i % 4, from i = 8 on 16 further."""
    i = 4 * register + byte
    row = lane // 4 + (0 if i // 4 in (0, 2) else 8)
    return row, lane % 4 * 4 + i % 4 + (16 if i >= 8 else 0)


def test_weights_are_operands_where_they_are(layouts):
    """A lane's accumulator registers, packed, are the bytes of A if the contraction meets the keys
    in the order of column_at: at position p what the lane has of column_at(p)."""
    bytes_of = (0, 1, 4, 5)
    for k, lane, r, byte in product(range(4), range(32), range(4), range(4)):
        register = layouts.operand8_from_accumulator(k, r) + bytes_of[byte]
        row, position = operand8(lane, r, byte)
        assert layouts.accumulator_row(0, lane, register) == row
        want = 32 * k + layouts.column_at(position)
        assert layouts.accumulator_column(lane, register) == want
    every = [layouts.operand8_from_accumulator(k, r) + b for k in range(4) for r in range(4)
             for b in bytes_of]  # fmt: skip
    assert sorted(every) == list(range(64))
    assert sorted(layouts.column_at(p) for p in range(32)) == list(range(32))


# --- swizzles and descriptors of bytes. The canonical layout is that of 16-bit elements in CuTe's
# notation with T = 16 elements to 16 bytes: ((8, m), (T, 2k)) : ((W T, SBO), (1, T)).


def k_major_at(descriptor, mn, k):
    start, _, stride, width = fields(descriptor)
    t, w = 16, width // 16
    element = mn % 8 * (w * t) + k % t + k // t * t
    return swizzled(start + element + mn // 8 * stride, width)


def copied_to(start, row, byte, rows, width):
    """Where the copy engine puts a byte of a tile of so many rows, in panels of `width` bytes."""
    panel, within = divmod(byte, width)
    return swizzled(start + panel * rows * width + row * width + within, width)


@pytest.mark.parametrize(("depth", "width"), [(64, 64), (96, 32), (128, 128)])
def test_descriptors_find_what_was_copied(layouts, depth, width):
    start = 7 * 1024
    for first in range(0, depth, 32):  # 32 channels of Q or K, all rows
        at = start + first // width * 128 * width + first % width
        for rows in (0, 64):  # the second warpgroup's queries
            descriptor = layouts.advance(layouts.k_major(start, width), at - start + rows * width)
            for row, k in product(range(64), range(32)):
                want = copied_to(start, rows + row, first + k, 128, width)
                assert k_major_at(descriptor, row, k) == want


@pytest.mark.parametrize("channels", [64, 80, 128])
def test_descriptors_find_values(layouts, channels):
    """Rows of 128 keys, one to a channel; of 128 channels the second half by itself."""
    start = 3 * 1024
    for part in range(2 if channels == 128 else 1):
        for first in range(0, 128, 32):
            descriptor = layouts.advance(layouts.k_major(start, 128), part * 64 * 128 + first)
            for channel, k in product(range(min(channels, 80)), range(32)):
                if 64 * part + channel >= channels:
                    continue
                want = copied_to(start, 64 * part + channel, first + k, channels, 128)
                assert k_major_at(descriptor, channel, k) == want


# --- what is quantised


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([8, 40, 64, 72, 80, 104, 128]),
    st.sampled_from(DTYPES),
    st.integers(1, 2),
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(1, 3),
    st.integers(0, 2**31 - 1),
)
@example(72, torch.bfloat16, 2, 3, 257, 3, 0)
def test_quantised(d, dtype, b, queries, keys, heads, seed):
    """Bit for bit what the definition makes of the same numbers: q by rows, k less its mean by 128
    keys, v by channels, its keys in their order."""
    draw = Draw(dtype, seed=seed)
    q, k, v = (draw(b, rows, heads, d) for rows in (queries, keys, keys))
    made = AttentionFp8(q, k, v, seed=seed).quantise()
    q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))

    codes, scale = module.quantized(q, (3,))
    assert torch.equal(made.q[..., :d], codes.to(E4M3).view(torch.uint8))
    assert torch.equal(made.q_scale, scale[..., 0])
    assert (made.q[..., d:] == 0).all()

    mean = k.double().mean(2)
    largest = k.double().abs().mean(2)
    assert ((made.mean - mean).abs() <= 8 * torch.finfo(torch.float32).eps * largest).all()
    codes, scale = module._by_blocks(k - made.mean[:, :, None])
    assert torch.equal(made.k[..., :d], codes.to(E4M3).view(torch.uint8))
    assert torch.equal(made.k_scale, scale[:, :, ::128])
    assert (made.k[..., d:] == 0).all()

    codes, scale = module.quantized(v, (2,))
    assert torch.equal(made.v_scale, scale[:, :, 0])
    padded = torch.zeros(*codes.shape[:2], made.v.shape[-1], d)
    padded[:, :, :keys] = codes
    column_at = library("layouts.cpp").column_at
    order = [p - p % 32 + column_at(p % 32) for p in range(padded.shape[2])]
    want = padded[:, :, order].transpose(2, 3).to(E4M3).contiguous().view(torch.uint8)
    assert torch.equal(made.v, want)


def test_statistics_of_many_steps():
    """More keys than the threads of a block sum, and one that is far larger than the others."""
    q, k, v = arguments(16, 3, 1500, heads=1)
    k[:, 700:-5] += 4
    v[:, -1] = 50
    o, emulated = attention_fp8(q, k, v), reference(q, k, v)
    assert_within_twice_eager(o, emulated, f64(exact(q, k, v)))
    assert distance(o, emulated) <= 0.05 * distance(emulated, exact(q, k, v))


# --- in any order


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(DIMS),
    st.sampled_from(DTYPES),
    st.integers(1, 2),
    st.integers(1, 140),
    st.integers(1, 400),
    st.integers(1, 2),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 2**63 - 1),
)
def test_random_sizes_in_random_orders(d, dtype, b, queries, keys, heads, blocks, bits14, seed):
    """Every length, blocks with several tiles and with none, sums in fp32 and of 14 bits."""
    args = arguments(d, queries, keys, b, heads, dtype)
    o = attention_fp8(*args, blocks=blocks, seed=seed, bits14=bits14)
    emulated, want = reference(*args), exact(*args)
    assert_within_twice_eager(o, emulated, f64(want))
    assert distance(o, want) <= 1.1 * distance(emulated, want) + 1e-6


@dims
def test_the_order_does_not_change_a_bit(d):
    args = arguments(d)
    want = attention_fp8(*args)
    for seed, blocks in ((1, 1), (2, 3), (3, 1)):
        assert_bitwise(attention_fp8(*args, seed=seed, blocks=blocks), want)


# --- it is the definition


@dims
@pytest.mark.parametrize(("bits14", "share"), [(False, 1e-3), (True, 0.1)], ids=["fp32", "14-bits"])
def test_it_is_the_emulation(d, bits14, share):
    """With sums in fp32 but for the order of sums. What 14 bits add to the error is a tenth of it
    at most, over 300 keys and over 1500."""
    for keys in (300, 1500):
        args = arguments(d, 140 if keys < 1000 else 20, keys)
        o, emulated = attention_fp8(*args, bits14=bits14), reference(*args)
        assert distance(o, emulated) <= share * distance(emulated, exact(*args))


@dims
def test_sums_of_14_bits_are_those_of_the_bench(d):
    """Which makes its figures with a model of its own."""
    args = arguments(d, 20)
    o, model, emulated = (
        attention_fp8(*args, bits14=True),
        with_14_bits(*args, d**-0.5),
        reference(*args),
    )
    assert distance(o, model) <= 0.1 * distance(model, emulated)


@dims
def test_a_row_does_not_depend_on_its_neighbours(d):
    """Not even on one whose logits are so large that differences are taken first."""
    q, k, v = arguments(d, heads=1)
    whole = attention_fp8(q, k, v)
    q[:, :7] *= 1000
    assert_bitwise(attention_fp8(q, k, v)[:, 7:], whole[:, 7:])


def test_scales_so_small_that_their_product_is_0():
    """All logits are 0 then: the mean of the values, though a step is not full."""
    q, k, v = arguments(64, 5, 200)
    o = attention_fp8(q * 1e-25, k * 1e-25, v)
    assert_within_twice_eager(o, reference(q * 0, k, v), f64(exact(q * 0, k, v)))


def spoiled(value, what):
    q, k, v = arguments(64, 70, 200, heads=2)
    {"q": q, "k": k, "v": v}[what][0, 66, 1, 3] = value
    return q, k, v


@pytest.mark.parametrize("what", ["q", "k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_as_the_definition(value, what):
    args = spoiled(value, what)
    o, want = attention_fp8(*args), reference(*args)
    assert torch.equal(o.isnan(), want.isnan())
    assert o.isnan().any()
    assert not o.isnan().all()
    assert not o.isinf().any()
    good = ~want.isnan()
    torch.testing.assert_close(o[good], want[good], rtol=1e-4, atol=1e-4)


def test_logits_beyond_fp32_make_their_rows_nan():
    q, k, v = arguments(64, 20, 200, heads=1)
    q[:, 3] *= 1e22
    k *= 1e18
    o, want = attention_fp8(q, k, v), reference(q, k, v)
    assert o[:, 3].isnan().all()
    assert want[:, 3].isnan().all()
    rest = [row for row in range(20) if row != 3]
    assert o[:, rest].isfinite().all()


# --- what goes wrong is noticed

FAULTS = {
    "queries read before they are there": ("skip-wait", "q_full"),
    "queries overwritten while they are read": ("skip-wait", "q_empty"),
    "keys read before they are there": ("skip-wait", "k_full"),
    "keys overwritten while they are read": ("skip-wait", "k_empty"),
    "values read before they are there": ("skip-wait", "v_full"),
    "values overwritten while they are read": ("skip-wait", "v_empty"),
    "an arrival lost": ("drop-arrival", "k_empty"),
    "logits read before they are there": ("no-product-wait", None),
    "another swizzle than the products read": ("other-swizzle", None),
    "fewer bytes announced than arrive": ("short-copy", None),
}


@dims
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_faults_are_noticed(d, fault):
    """In some order of a few: by the emulator, or because the result is wrong."""
    kind, barrier = fault
    args = arguments(d, 130, 700, heads=1)
    where = barriers_of(d, SOURCE)[barrier] if barrier else (0, 0)
    want = reference(*args)
    for seed in range(16):
        call = AttentionFp8(*args, blocks=1, seed=seed, fault=kind, barriers=where)
        call.quantise()
        try:
            o = call.attend()
        except EmulatorError:
            return
        if not distance(o, want) < 1e-3:
            return
    pytest.fail("sixteen runs went by as if nothing were wrong")


def _plain_order(made):
    order = [p - p % 32 + library("layouts.cpp").column_at(p % 32) for p in range(made.v.shape[3])]
    made.v[..., order] = made.v.clone()


def _order_of_pairs(made):
    """That of 16-bit operands: 16 keys at a time."""
    made.v[:] = made.v.unflatten(3, (-1, 2, 16)).flip(4).flatten(3)


def _next_panel(made):
    made.k[..., :64] = made.k[..., :64].roll(32, 3)


def _one(name):
    def change(made):
        getattr(made, name).fill_(1)

    return change


def _next_step(made):
    made.k_scale[:] = made.k_scale.roll(1, 2)


def _next_row(made):
    made.q_scale[:] = made.q_scale.roll(1, 2)


WRONG = {
    "values in the order of the keys": _plain_order,
    "values in another order": _order_of_pairs,
    "channels of another panel": _next_panel,
    "no scale of q": _one("q_scale"),
    "no scale of k": _one("k_scale"),
    "no scale of v": _one("v_scale"),
    "the scale of another step": _next_step,
    "the scale of another row": _next_row,
}


@dims
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_wrong_operands_are_noticed(d, change):
    """The limits of this file would reject what these make."""
    args = arguments(d)
    call = AttentionFp8(*args)
    change(call.quantise())
    o, emulated, want = call.attend(), reference(*args), exact(*args)
    assert distance(o, emulated) > 0.1 * distance(emulated, want)
    assert distance(o, want) > 1.1 * distance(emulated, want)


# --- what the launch tells the driver


def maps(args, code=0):
    """What cuTensorMapEncodeTiled is called with for q, k and v, or what is said instead."""
    calls = []

    def driver(out, kind, rank, start, size, stride, box, every, interleave, swizzle, l2, fill):
        ctypes.memset(out, 0xA0 + len(calls), 128)
        calls.append({
            "type": kind,
            "offset": start - call.call.workspace,
            "size": size[:rank],
            "stride": stride[: rank - 1],
            "box": box[:rank],
            "modes": (*every[:rank], interleave, swizzle, l2, fill),
        })  # fmt: skip
        return code

    call = AttentionFp8(*args)
    message = ctypes.create_string_buffer(200)
    room = ctypes.create_string_buffer(3 * 128 + 8)
    if library(SOURCE).encode_maps(ctypes.byref(call.call), DRIVER(driver), room, message, 200):
        return message.value.decode()
    assert room.raw == b"".join(bytes([0xA0 + i]) * 128 for i in range(3)) + bytes(8)
    return calls, call.quantised


# Type UINT8 is 0; swizzles of 32, 64, 128 bytes 1, 2, 3; L2_PROMOTION_L2_256B 3.
@pytest.mark.parametrize(
    ("d", "width", "panel", "rows", "mode"),
    [(64, 64, 64, 64, 2), (40, 48, 64, 64, 2), (72, 80, 32, 80, 1), (128, 128, 128, 128, 3)],
)
def test_maps(d, width, panel, rows, mode):
    (q, k, v), made = maps(arguments(d, 140, 300, 2, 3))
    base = made.q.data_ptr()
    for found, part, count in ((q, made.q, 140), (k, made.k, 300)):
        assert found == {
            "type": 0,
            "offset": part.data_ptr() - base,
            "size": [width, 3, count, 2],
            "stride": [count * width, width, 3 * count * width],
            "box": [panel, 1, 128, 1],
            "modes": (1, 1, 1, 1, 0, mode, 3, 0),
        }
    assert v == {
        "type": 0,
        "offset": made.v.data_ptr() - base,
        "size": [320, 3, d, 2],
        "stride": [d * 320, 320, 3 * d * 320],
        "box": [128, 1, rows, 1],
        "modes": (1, 1, 1, 1, 0, 3, 3, 0),
    }


def test_maps_of_one_head():
    """The stride of an axis of one is not used, and the driver wants it to be positive."""
    (q, k, v), _ = maps(arguments(64, 5, 1, heads=1))
    assert q["stride"] == [16, 64, 16]
    assert k["stride"] == [16, 16, 16]
    assert v["stride"] == [16, 32, 16]


def test_the_driver_refuses():
    said = maps(arguments(64, 5, 7), code=1)
    assert said == "cuTensorMapEncodeTiled of q failed with CUDA error 1"


def test_workspace():
    """q, k and v in e4m3 and little else: at PiD 2048 a third of what bf16 takes."""
    q = torch.empty(1, 16684, 24, 64, dtype=torch.bfloat16, device="meta")
    plan = (ctypes.c_int64 * 10)()
    library(SOURCE).plan(ctypes.byref(CallFp8(1, 16684, 16684, 24, 64)), plan)
    assert all(at % 256 == 0 for at in plan[1:8])
    operands = 3 * q.numel()
    assert operands <= plan[0] <= 1.05 * operands


# --- what the backend refuses


def test_why_not():
    def reason(d=64, scale=0.125, dtype=torch.bfloat16, stretch=1):
        q, k, v = (torch.zeros(1, 2, 3, d * stretch, dtype=dtype)[..., :d] for _ in range(3))
        return backend.why_not_call(q, k, v, scale)

    for d in (8, 64, 72, 128):
        for dtype in DTYPES:
            assert reason(d, dtype=dtype) is None
    for d in (4, 12, 136):
        assert reason(d) == f"takes head dims that are multiples of 8 up to 128, got {d}"
    assert reason(dtype=torch.float64) == ("takes float32, bfloat16 and float16, got torch.float64")
    assert reason(scale=0.0) == "takes a positive scale, got 0.0"
    assert reason(stretch=2) is None
    k = torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16)
    v = torch.zeros(1, 2, 3, 68, dtype=torch.bfloat16)[..., :64]
    assert backend.why_not_call(k, k, v, 1.0) == (
        "needs strides of v that are multiples of 16 bytes, got (408, 204, 68, 1) elements; call "
        ".contiguous()"
    )
    assert backend.why_not_call(k, k[:, :1].expand(1, 2, 3, 64), k, 1.0) is None
    assert backend.why_not_call(k, k, torch.zeros(400).bfloat16()[1:385].view_as(k), 1.0) == (
        "needs v to start at a multiple of 16 bytes"
    )
    q = torch.empty(2**20, 2**7, 2**4, 64, dtype=torch.bfloat16, device="meta")
    assert backend.why_not_call(q[:, 1:], q, q, 1.0) == (
        f"takes fewer than 2^31 rows of k in all heads, got {(2**20, 2**7, 2**4, 64)}"
    )


# --- what the compiler makes of it


@pytest.fixture(scope="module")
def compiled():
    """(kernels by name, what the compiler said)"""
    kernels, said = compiled_for("90a", "joint_attention_fp8_sm90.cu")
    return {kernel.name: kernel for kernel in kernels}, said


ATTENTION = [f"joint_attention_fp8_sm90_kernel<{n}>" for n in (64, 80, 128)]


def test_kernels(compiled):
    types = ("fp32", "bf16", "fp16")
    quantising = [f"quantize_{part}_kernel<{t}>" for part in ("statistics", "values")
                  for t in types]  # fmt: skip
    quantising += [f"quantize_{part}_kernel<{t}, {lanes}>" for part in ("queries", "keys")
                   for t in types for lanes in (8, 16)]  # fmt: skip
    assert set(compiled[0]) == {*ATTENTION, *quantising, "quantize_totals_kernel<fp32>"}


def test_registers(compiled):
    """No spills; the block's 384 threads start with 168 registers each, and then trade them."""
    kernels, said = compiled
    for name, kernel in kernels.items():
        assert (kernel.stack, kernel.spills) == (0, 0), name
        assert kernel.registers == 168 if name in ATTENTION else kernel.registers <= 80
    check_products_overlap(said)


@pytest.mark.parametrize("channels", [64, 80, 128])
def test_instructions(compiled, channels):
    """Hopper's tensor cores in e4m3, its copy engine, hardware conversions, and an eighth of the
    exponentials elsewhere."""
    sass = compiled[0][f"joint_attention_fp8_sm90_kernel<{channels}>"].sass
    count = instructions(sass)
    depth = -(-channels // 32) * 32
    parts = 2 if channels == 128 else 1
    # In the first step, in the others, and after the last.
    assert count["QGMMA"] == 2 * (depth // 32) + 2 * 4 * parts
    panels = depth // (128 if depth == 128 else 64 if depth == 64 else 32)
    assert count["UTMALDG"] == 2 * panels + 1
    assert count["USETMAXREG"] == 2
    assert all(count[name] == 0 for name in ("STL", "LDL", "LDSM", "HGMMA", "HMMA"))
    assert len(re.findall(r"QGMMA\.64x128x32\.F32\.E4M3\.E4M3", sass)) >= 2 * (depth // 32)
    # 64 logits a thread, in the first step and in the others, and two factors in each.
    assert len(re.findall(r"MUFU\.EX2", sass)) == 2 * (56 + 2)
    assert len(re.findall(r"F2FP\.SATFINITE\.E4M3\.F32", sass)) == 2 * 32


def test_quantising_instructions(compiled):
    """Loads of 16 bytes, conversions in hardware."""
    for name, kernel in compiled[0].items():
        if "queries" in name or "keys" in name:
            assert "LDG.E.128" in kernel.sass, name
        if "queries" in name or "keys" in name or "values" in name:
            assert "F2FP.SATFINITE.E4M3" in kernel.sass, name
