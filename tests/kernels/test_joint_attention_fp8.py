"""joint_attention_fp8: the Triton and the CUDA kernels against the emulation of their rounding in
PyTorch, all against exact attention in fp64."""

from importlib import import_module

import aot
import emulated
import harness
import pytest
import torch
from harness import NAMES, launcher
from rules import (
    Draw,
    assert_bitwise,
    assert_within_twice_eager,
    at_odd_stride,
    check_captures,
    check_compiles,
    check_meta,
    check_registered,
    check_repeatable,
    f64,
    precisions,
)

import pixeldiff
from pixeldiff.ops import joint_attention, joint_attention_fp8
from pixeldiff.ops.registry import OPS

OP = "joint_attention_fp8"
reference = import_module("pixeldiff.ops.joint_attention_fp8").reference
exact_attention = import_module("pixeldiff.ops.joint_attention").reference
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRITON = ["triton", pytest.param("triton-gpu", marks=pytest.mark.gpu)]
# The CUDA kernels, on the emulator with sums as Hopper makes them, and on a GPU.
HOPPER = ["sm90-emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
triton_kernel = pytest.mark.parametrize("backend", TRITON)
fused_kernel = pytest.mark.parametrize("backend", [*TRITON, *HOPPER])
every_kernel = pytest.mark.parametrize("backend", [*TRITON, *HOPPER, "reference"])


def arguments(dtype, shape, std=1.0):
    draw, (b, queries, keys, g, d) = Draw(dtype), shape
    return tuple(draw(b, rows, g, d, std=std) for rows in (queries, keys, keys))


def on(backend, q, k, v, scale=None, **config):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "reference":
        return reference(q, k, v, scale)
    if backend == "sm90-emulated":
        if harness.INTERPRETER:
            pytest.skip("needs no interpreter")
        return emulated.attention_fp8(q, k, v, scale, bits14=True)
    launch, device = launcher(OP, backend)
    if device == "cuda":  # at the same strides
        q, k, v = (
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(t)
            for t in (q, k, v)
        )
    return launch(q, k, v, scale, **config).cpu()


def exact(q, k, v, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return exact_attention(q.double(), k.double(), v.double(), scale, None, False)[0]


def distance(a, b):
    """Norm of the difference over that of b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# Around every boundary: 128 rows of a scale, tiles of 64 keys, both parts of a head dim.
SHAPES = {
    "released": (1, 130, 200, 1, 64),
    "released-pit": (2, 33, 129, 1, 72),
    "l2p": (1, 20, 128, 1, 128),
    "keys-15": (2, 3, 15, 2, 40),
    "keys-17": (1, 1, 17, 1, 24),
    "keys-63": (1, 5, 63, 1, 80),
    "keys-64": (1, 129, 64, 1, 32),
    "keys-65": (1, 9, 65, 2, 104),
    "keys-127": (1, 128, 127, 1, 16),
    "one-key": (2, 5, 1, 1, 8),
    "no-query": (2, 0, 4, 2, 8),
    "no-image": (0, 3, 4, 2, 8),
}


@fused_kernel
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_within_twice_the_emulation(dtype, std, shape, backend, record_property):
    args = arguments(dtype, shape, std)
    o, emulated, want = on(backend, *args), reference(*args, shape[-1] ** -0.5), exact(*args)
    assert (o.dtype, o.shape) == (dtype, args[0].shape)
    assert o.is_contiguous()
    assert_within_twice_eager(o, emulated, f64(want))
    if o.numel():
        errors = {"e4m3": distance(o, want), "emulated": distance(emulated, want)}
        errors["bf16"] = distance(
            exact_attention(*(t.bfloat16() for t in args), shape[-1] ** -0.5, None, False)[0], want
        )
        for name, value in errors.items():
            record_property(name, value)
        assert errors["e4m3"] <= 1.1 * errors["emulated"] + 1e-6
        assert errors["e4m3"] <= 0.08


@triton_kernel
@pytest.mark.parametrize("block_n", [64, 128])
@pytest.mark.parametrize("d", [64, 72])
def test_it_is_the_emulation(d, block_n, backend):
    """The two differ by far less than either from the truth: only where a sum taken in another
    order, or a maximum of fewer keys, turns a rounding."""
    args = arguments(torch.float32, (2, 140, 300, 2, d))
    args[1][:, 128:256] *= 8  # scales that differ from block to block
    args[0][:, 128:] *= 4  # and from row to row
    launcher(OP, backend)
    config = import_module("pixeldiff.triton_kernels.joint_attention_fp8").Config(block_n, 8, 2)
    o, emulated = on(backend, *args, config=config), reference(*args, d**-0.5)
    share = 0.05 if block_n == 128 else 0.7
    assert distance(o, emulated) <= share * distance(emulated, exact(*args))


@every_kernel
def test_the_mean_of_the_keys_costs_nothing(backend):
    q, k, v = arguments(torch.float32, (1, 40, 200, 1, 64))
    plain = distance(on(backend, q, k, v), exact(q, k, v))
    k = k + 20 * Draw(seed=1)(64)
    assert distance(on(backend, q, k, v), exact(q, k, v)) <= 1.3 * plain


@every_kernel
@pytest.mark.parametrize("factor", [30.0, 1e6, 1e12])
def test_one_key_takes_all(factor, backend):
    """Its weight is stored exactly: what remains is the rounding of its row of v."""
    _, _, v = arguments(torch.float32, (1, 1, 96, 1, 96))
    k = torch.eye(96)[None, :, None] * factor
    o = on(backend, k, k, v, scale=1.0)
    v8 = import_module("pixeldiff.ops.joint_attention_fp8").quantized(v, (1,))
    torch.testing.assert_close(o, v8[0] * v8[1], rtol=1e-6, atol=1e-6)


@every_kernel
@pytest.mark.parametrize("keys", [1, 63, 129, 300])
def test_equal_keys_give_the_mean(keys, backend):
    q, k, v = arguments(torch.float32, (1, 20, keys, 1, 16))
    k = k[:, :1].expand_as(k).contiguous()
    v8, scale = import_module("pixeldiff.ops.joint_attention_fp8").quantized(v, (1,))
    want = (v8 * scale).mean(1, keepdim=True).expand(1, 20, 1, 16)
    torch.testing.assert_close(on(backend, q, k, v), want, rtol=1e-5, atol=1e-5)


@every_kernel
def test_zeros(backend):
    q, k, v = arguments(torch.bfloat16, (1, 5, 70, 1, 16))
    zero = torch.zeros_like
    assert (on(backend, q, k, zero(v)) == 0).all()
    mean = v.float().mean(1, keepdim=True)
    for a, b in ((zero(q), k), (q, zero(k)), (zero(q), zero(k))):
        torch.testing.assert_close(
            on(backend, a, b, v).float(), mean.expand(1, 5, 1, 16), atol=0.02, rtol=0.02
        )


@fused_kernel
@pytest.mark.parametrize("d", [64, 72])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_views_are_read_in_place(dtype, d, backend):
    q, k, v = Draw(dtype)(3, 2, 37, 2, d).unbind(0)
    q = q[:, 5:]
    want = on(backend, q.contiguous(), k.clone(), v.clone())
    heads_first = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    odd = map(at_odd_stride, (q, k, v))  # the CUDA kernels refuse these
    for views in ((q, k, v), heads_first, *([] if backend in ("sm90-emulated", "cuda") else [odd])):
        assert_bitwise(on(backend, *views), want)


@fused_kernel
def test_a_row_does_not_depend_on_its_neighbours(backend):
    q, k, v = arguments(torch.float32, (1, 140, 70, 1, 72))
    whole = on(backend, q, k, v)
    q[:, :7] *= 100
    assert_bitwise(on(backend, q, k, v)[:, 7:], whole[:, 7:])


@fused_kernel
def test_repeats_and_leaves_its_inputs(backend):
    args = arguments(torch.bfloat16, (2, 20, 200, 1, 72))
    before = [t.clone() for t in args]
    assert_bitwise(on(backend, *args), on(backend, *args))
    assert all(map(torch.equal, args, before))


@triton_kernel
def test_triton_statistics_of_many_chunks(backend):
    """More keys than one program takes the mean and the maximum of."""
    launcher(OP, backend)
    module = import_module("pixeldiff.triton_kernels.joint_attention_fp8")
    q, k, v = arguments(torch.float32, (1, 3, module.CHUNK * 2 + 5, 1, 16))
    k[:, module.CHUNK : -5] += 4
    v[:, -1] = 50
    emulated, want = reference(q, k, v, 0.25), exact(q, k, v)
    o = on(backend, q, k, v)
    assert_within_twice_eager(o, emulated, f64(want))
    assert distance(o, emulated) <= 0.7 * distance(emulated, want)


@triton_kernel
def test_triton_why_not(backend):
    launcher(OP, backend)
    module = import_module("pixeldiff.triton_kernels.joint_attention_fp8")
    device = "cuda" if backend == "triton-gpu" else "cpu"
    q = torch.zeros(1, 2, 1, 64, device=device)
    assert module.why_not(q, q, q, 1.0) is None
    few = q[..., :12]
    assert "multiples of 8 up to 128, got 12" in module.why_not(few, few, few, 1.0)
    many = torch.zeros(1, 1, 1, 8, device=device).expand(1, module.MAX_KEYS + 1, 1, 8)
    assert "takes at most 8388608 keys" in module.why_not(q[..., :8], many, many, 1.0)


RELEASED = {
    "mmdit-2048": (1, 16684, 16684, 24, 64),
    "pit-2048": (1, 16384, 16384, 16, 72),
    "mmdit-4096": (1, 65836, 65836, 24, 64),
    "l2p": (1, 4224, 4224, 30, 128),
}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton-gpu", "cuda"])
@pytest.mark.parametrize("shape", RELEASED.values(), ids=RELEASED)
def test_gpu_at_released_shapes(shape, backend, record_property):
    """All rows run; some are judged against the emulation of the first two heads."""
    launch, device = launcher(OP, backend)
    b, rows, _, g, d = shape
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = torch.randn(
        3, b, rows, g, d, generator=generator, device=device, dtype=torch.bfloat16
    ).unbind(0)
    o = launch(q, k, v, d**-0.5)[:, :128, :2].cpu()
    some = (q[:, :128, :2], k[:, :, :2], v[:, :, :2])
    emulated = reference(*some, d**-0.5).cpu()
    want = exact_attention(*(t.double() for t in some), d**-0.5, None, False)[0].cpu()
    for name, value in (("e4m3", o), ("emulated", emulated)):
        record_property(name, distance(value, want))
    assert_within_twice_eager(o, emulated, f64(want))
    assert distance(o, want) <= 1.1 * distance(emulated, want)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton-gpu", "cuda"])
def test_gpu_under_graph_capture(backend):
    launch, device = launcher(OP, backend)
    args = [t.to(device) for t in arguments(torch.bfloat16, (1, 200, 300, 2, 72))]
    check_captures(launch, *args, 0.1)


# --- without a GPU --------------------------------------------------------------------------------


def test_triton_in_interpreter():
    harness.run_in_interpreter(__file__)


def on_meta(shape):
    b, rows, keys, g, d = shape
    q, k, v = torch.empty(3, b, keys, g, d, device="meta", dtype=torch.bfloat16).unbind(0)
    return q[:, keys - rows :], k, v, d**-0.5


INSTRUCTIONS = {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA", 120: "QMMA"}


@pytest.mark.parametrize("target", INSTRUCTIONS)
def test_triton_compiles_ahead_of_time(target):
    module = pytest.importorskip("pixeldiff.triton_kernels.joint_attention_fp8")
    for shape in RELEASED.values():
        args = on_meta(shape)
        *prepare, attention = aot.compile_launch(lambda args=args: module.launch(*args), target)
        for kernel in (*prepare, attention):
            aot.assert_lean(kernel)
            assert "ld.global.v4.b32" in kernel.ptx
        assert attention.tensor_cores == {INSTRUCTIONS[target]}
        assert "cp.async.cg.shared.global" in attention.ptx
        assert "st.global.v4.b32" in prepare[1].ptx
        assert "st.global.v4.b32" in attention.ptx


def test_e4m3_needs_its_hardware():
    launching = pytest.importorskip("pixeldiff.triton_kernels.launching")
    module = import_module("pixeldiff.triton_kernels.joint_attention_fp8")
    with launching.compiling_for((8, 0)):
        reason = module.why_not(*on_meta((1, 4, 4, 1, 64)))
    assert reason == "e4m3 needs compute capability 8.9, this device is 8.0"
    with launching.compiling_for((8, 9)):
        assert module.why_not(*on_meta((1, 4, 4, 1, 64))) is None


@pytest.mark.parametrize("d", [64, 72])
def test_triton_compiles_once_for_all_sizes(d):
    sizes = [(1, 16384, 16684), (1, 65536, 65836), (2, 1517, 1594), (1, 1, 1)]
    calls = [on_meta((*size, 16, d)) for size in sizes]
    aot.check_compiles_once(OP, calls, launches=3, compilations=3)


# --- the registered op and the public function ----------------------------------------------------


def test_runs_everywhere():
    args = arguments(torch.bfloat16, (2, 5, 7, 3, 8))
    check_registered(OP, joint_attention_fp8, *args)
    check_compiles(OP, joint_attention_fp8, args, arguments(torch.bfloat16, (1, 6, 9, 3, 8)))
    check_meta(joint_attention_fp8, *args)
    check_repeatable(joint_attention_fp8, *args)


def test_runs_on_request_only():
    assert not OPS[OP].backends[0].offers(*arguments(torch.float32, (1, 2, 2, 1, 8)), 1.0)


def test_reference_by_chunks(monkeypatch):
    args = arguments(torch.float32, (2, 300, 140, 2, 16))
    whole = reference(*args, 0.25)
    monkeypatch.setattr(import_module("pixeldiff.ops.joint_attention_fp8"), "CHUNK", 7 * 4 * 128)
    torch.testing.assert_close(reference(*args, 0.25), whole)


def test_default_scale():
    args = arguments(torch.float32, (1, 5, 7, 1, 16))
    with pixeldiff.backend("reference"):
        assert_bitwise(joint_attention_fp8(*args), joint_attention_fp8(*args, scale=0.25))
        assert distance(joint_attention_fp8(*args), joint_attention(*args)) < 0.1


def test_errors():
    q, k, v = arguments(torch.float32, (2, 5, 7, 3, 8))
    for args, error, text in (
        ((q[0], k, v), ValueError, r"q must be \(B, L, G, d\), 4 axes, got \(5, 3, 8\)"),
        ((q, k, v[:, 1:]), ValueError, r"v must be \(B, S, G, d\) = \(2, 7, 3, 8\), got .*"),
        ((q, k[:, :0], v[:, :0]), ValueError, r"k must have at least one row, got \(2, 0, 3, 8\)"),
        ((q, k.half(), v), TypeError, r"k and v must have the dtype of q, torch.float32, got .*"),
        ((q.int(), k, v), TypeError, r"q must be float32, .* got torch.int32"),
        ((q.requires_grad_(), k, v), RuntimeError, r"an argument requires a gradient, and .*"),
    ):
        with pytest.raises(error, match=f"^joint_attention_fp8: {text}$"):
            joint_attention_fp8(*args)
    with pytest.raises(ValueError, match=r"^joint_attention_fp8: scale must be positive, got -1$"):
        joint_attention_fp8(k, k, v, scale=-1)
