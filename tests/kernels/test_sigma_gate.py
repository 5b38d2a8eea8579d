"""sigma_gate against fp64: y = x + sigmoid(x W^T + lq_logit) * feature."""

from importlib import import_module

import aot
import harness
import numpy as np
import pytest
import torch
from harness import NAMES, check_not_finite_like, launcher, one_rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import (
    Draw,
    assert_bitwise,
    assert_one_rounding,
    assert_within_twice_eager,
    at_odd_stride,
    check_captures,
    check_compiles,
    check_gradients,
    check_meta,
    check_registered,
    check_repeatable,
    every_backend,
    f64,
    forced,
    precisions,
    sigmoid,
)

import pixeldiff
from pixeldiff import native
from pixeldiff.ops import sigma_gate
from pixeldiff.ops.cpu import sigma_gate as cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
each_isa = pytest.mark.parametrize("isa", native.ISA_CODES)
each_kind = pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-token"])
needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")

# (B, N, D); every one runs with K = D and K = 1.
SHAPES = {"production": (2, 24, 384), "primes": (3, 7, 13), "one": (1, 1, 1), "empty": (2, 0, 8)}


def arguments(dtype, shape, k, std=1.0):
    draw, (b, n, d) = Draw(dtype), shape
    return (
        draw(b, n, d, std=std),
        draw(b, n, d, std=std),
        draw(k, d, std=d**-0.5),
        draw(b, n, k),
    )


def oracle(x, feature, weight, lq_logit):
    x, feature, weight, lq_logit = f64(x, feature, weight, lq_logit)
    return x + sigmoid(np.einsum("bnd,kd->bnk", x, weight) + lq_logit) * feature


def eager(x, feature, weight, lq_logit):
    return x + torch.sigmoid(x @ weight.T + lq_logit) * feature


@every_backend("sigma_gate")
@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-token"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, per_channel, backend):
    args = arguments(dtype, shape, shape[-1] if per_channel else 1, std)
    with forced("sigma_gate", backend):
        y = sigma_gate(*args)
    assert_within_twice_eager(y, eager(*args), oracle(*args))


@every_backend("sigma_gate")
def test_a_closed_gate_returns_x(backend):
    x, feature, weight, logit = arguments(torch.bfloat16, (2, 3, 8), 1)
    with forced("sigma_gate", backend):
        assert_bitwise(sigma_gate(x, feature, weight, torch.full_like(logit, -1e4)), x)


def test_logit_in_fp32_with_a_bf16_stream():
    """A per-token logit stays in fp32: its fraction below bf16's step is not lost."""
    x, feature, weight, _ = arguments(torch.bfloat16, (2, 30, 8), 1)
    x, logit = torch.zeros_like(x), Draw(seed=1)(2, 30, 1) * 0.3 - 6
    y = sigma_gate(x, feature, weight, logit)
    assert y.dtype == torch.bfloat16
    assert_one_rounding(y, oracle(x, feature, weight, logit))


def test_column_slice_and_strided_stream():
    x, feature, weight, logit = arguments(torch.float32, (2, 3, 8), 8)
    y = sigma_gate(at_odd_stride(x), at_odd_stride(feature), at_odd_stride(weight), logit)
    assert y.is_contiguous()
    torch.testing.assert_close(y, sigma_gate(x, feature, weight, logit), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [8, 1])
def test_runs_everywhere(k):
    args = arguments(torch.bfloat16, (2, 3, 8), k)
    check_registered("sigma_gate", sigma_gate, *args)
    check_compiles("sigma_gate", sigma_gate, args, arguments(torch.bfloat16, (1, 5, 8), k))
    check_meta(sigma_gate, *args)
    check_repeatable(sigma_gate, *args)


@pytest.mark.parametrize("k", [3, 1])
def test_gradients(k):
    check_gradients(sigma_gate, *arguments(torch.float32, (1, 2, 3), k))


def test_errors():
    x, feature, weight, logit = arguments(torch.float32, (2, 3, 8), 8)
    with pytest.raises(
        ValueError,
        match=r"^sigma_gate: weight must be \(D, D\) or \(1, D\) with D = 8, got \(2, 8\)$",
    ):
        sigma_gate(x, feature, weight[:2], logit)
    with pytest.raises(
        ValueError, match=r"^sigma_gate: weight must be \(K, D\) = \(8, 8\), got \(8, 7\)$"
    ):
        sigma_gate(x, feature, weight[:, :7], logit)
    with pytest.raises(
        ValueError,
        match=r"^sigma_gate: feature must be \(B, N, D\) = \(2, 3, 8\), got \(2, 2, 8\)$",
    ):
        sigma_gate(x, feature[:, :2], weight, logit)
    with pytest.raises(
        ValueError,
        match=r"^sigma_gate: lq_logit must be \(B, N, K\) = \(2, 3, 1\), got \(2, 3, 8\)$",
    ):
        sigma_gate(x, feature, weight[:1], logit)
    with pytest.raises(
        ValueError, match=r"^sigma_gate: x must be \(B, N, D\), 3 axes, got \(3, 8\)$"
    ):
        sigma_gate(x[0], feature, weight, logit)
    with pytest.raises(
        TypeError,
        match=r"^sigma_gate: weight must have the dtype of x, torch.float32, got torch.bfloat16$",
    ):
        sigma_gate(x, feature, weight.bfloat16(), logit)
    with pytest.raises(TypeError, match=r"^sigma_gate: lq_logit must be .* got torch.int64$"):
        sigma_gate(x, feature, weight, logit.long())
    with pytest.raises(ValueError, match=r"^sigma_gate: feature must be on cpu, got meta$"):
        sigma_gate(x, feature.to("meta"), weight, logit)


# --- the CPU kernels, every instruction set -------------------------------------------------------

# Tails of every length class, the widths of the demo and of the released networks.
WIDTHS = [1, 3, 8, 15, 16, 17, 67, 128, 1536]


@needs_extension
@each_isa
@each_kind
@each_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_cpu_within_twice_eager(dtype, per_channel, isa, width):
    launch, _ = launcher("sigma_gate", f"cpu-{isa}")
    for std in (1.0, 1e-3):
        args = arguments(dtype, (2, 5, width), width if per_channel else 1, std)
        y = launch(*args)
        assert y.is_contiguous()
        assert_within_twice_eager(y, eager(*args), oracle(*args))


@needs_extension
@each_isa
@each_dtype
def test_cpu_per_token_rounds_once(dtype, isa):
    """Everything is fp32 inside, the product with the weight too: no rounding but the last."""
    launch, _ = launcher("sigma_gate", f"cpu-{isa}")
    args = arguments(dtype, (2, 9, 515), 1)
    assert_one_rounding(launch(*args), oracle(*args))
    args = (*args[:3], Draw(seed=1)(2, 9, 1))  # the logit in fp32
    assert_one_rounding(launch(*args), oracle(*args))


@needs_extension
@each_isa
@each_dtype
def test_cpu_per_channel_rounds_the_product_and_the_result(dtype, isa):
    """With the product known to be zero, one rounding is left."""
    launch, _ = launcher("sigma_gate", f"cpu-{isa}")
    x, feature, weight, logit = arguments(dtype, (2, 9, 67), 67)
    for given_logit in (logit, Draw(seed=1)(2, 9, 67)):
        args = (x, feature, torch.zeros_like(weight), given_logit)
        assert_one_rounding(launch(*args), oracle(*args))


@needs_extension
@each_isa
def test_cpu_sigmoid_to_three_ulp(isa):
    """Relative, without the slack that the rule gives to small values."""
    launch, _ = launcher("sigma_gate", f"cpu-{isa}")
    logit = torch.linspace(-87, 120, 200_001)[None, :, None]
    zero, one = torch.zeros_like(logit), torch.ones_like(logit)
    want = 1 / (1 + np.exp(-f64(logit)))
    ulp = np.spacing(want.astype(np.float32)).astype(np.float64)
    y = launch(zero, one, torch.zeros(1, 1), logit)
    assert (np.abs(f64(y) - want) <= 3 * ulp).all()


@needs_extension
@each_isa
@each_kind
@each_dtype
def test_cpu_not_finite(dtype, per_channel, isa):
    """NaN and infinity anywhere give NaN and infinity where the reference has them."""
    launch, _ = launcher("sigma_gate", f"cpu-{isa}")
    clean = arguments(dtype, (2, 3, 37), 37 if per_channel else 1)
    for which in (0, 1, 3):
        for value in (torch.nan, torch.inf, -torch.inf):
            args = [t.clone() for t in clean]
            args[which][1, 2, -1] = value
            y = launch(*args)
            with pixeldiff.backend("reference"):
                want = sigma_gate(*args)
            torch.testing.assert_close(y, want, rtol=2e-2, atol=2e-2, equal_nan=True)


@needs_extension
@each_isa
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_cpu_magnitudes(magnitude, isa):
    launch, _ = launcher("sigma_gate", f"cpu-{isa}")
    x, feature, weight, logit = arguments(torch.float32, (2, 5, 64), 1)
    args = (x * magnitude, feature * magnitude, weight / magnitude, logit)
    assert_one_rounding(launch(*args), oracle(*args))


@needs_extension
@each_isa
@each_dtype
def test_cpu_threads_do_not_change_the_result(dtype, isa):
    launcher("sigma_gate", f"cpu-{isa}")
    for k in (1, 700):
        args = arguments(dtype, (3, 101, 700), k)
        one = cpu.launch(*args, isa=native.ISA_CODES[isa], threads=1)
        for threads in (2, 7):
            again = cpu.launch(*args, isa=native.ISA_CODES[isa], threads=threads)
            assert_bitwise(again, one)


@needs_extension
@each_isa
@each_dtype
def test_cpu_writes_nothing_outside_its_rows(dtype, isa):
    launcher("sigma_gate", f"cpu-{isa}")
    x, feature, weight, logit = arguments(dtype, (1, 3, 19), 1)
    code = native.DTYPE_CODES[dtype]
    logit = logit.expand_as(x).contiguous()
    product = (x @ weight.T).expand_as(x).contiguous()
    stream, logits = [native.rows(x), native.rows(feature)], [native.rows(logit), code]
    for call, middle in (
        (native.load().sigma_gate_per_token_cpu, native.vector(weight[0])),
        (native.load().sigma_gate_per_channel_cpu, native.rows(product)),
    ):
        buffer = torch.full((3 * 19 + 64,), 7.0, dtype=dtype)
        where = (buffer[32:].data_ptr(), native.ISA_CODES[isa], 2)
        call(x.shape, code, *stream, middle, *logits, *where)
        assert (buffer[:32] == 7).all()
        assert (buffer[32 + 57 :] == 7).all()
        y = buffer[32:89].view(1, 3, 19)
        assert_within_twice_eager(
            y, eager(x, feature, weight, logit), oracle(x, feature, weight, logit)
        )


@needs_extension
@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_cpu_pieces_of_the_product(pieces, monkeypatch):
    """However many rows the product is made for at a time, strided images included."""
    x, feature, weight, logit = arguments(torch.float32, (3, 11, 24), 24)
    x, feature = (at_odd_stride(t.transpose(0, 1).contiguous()) for t in (x, feature))
    args = (x.transpose(0, 1), feature.transpose(0, 1), at_odd_stride(weight), logit)
    monkeypatch.setattr(cpu, "PRODUCT_BYTES", -(-11 // pieces) * 24 * 4)
    y = cpu.launch(*args)
    assert y.is_contiguous()
    assert_within_twice_eager(y, eager(*args), oracle(*args))


@needs_extension
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 70)),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(sorted(native.ISA_CODES)),
)
def test_cpu_random_shapes(dtype, shape, per_channel, wide_logit, strided, isa):
    """Any shape, rows that start anywhere, the logit in fp32 or in the dtype of the stream."""
    if not native.load().isa_usable(native.ISA_CODES[isa]):
        return
    x, feature, weight, logit = arguments(dtype, shape, shape[-1] if per_channel else 1)
    if wide_logit:
        logit = logit.float() / 3
    if strided:
        x, feature, weight = at_odd_stride(x), at_odd_stride(feature), at_odd_stride(weight)
        logit = at_odd_stride(logit)
    args = (x, feature, weight, logit)
    y = cpu.launch(*args, isa=native.ISA_CODES[isa])
    assert_within_twice_eager(y, eager(*args).to(dtype), oracle(*args))


@needs_extension
@each_kind
def test_free_choice_runs_the_cpu_kernel(per_channel):
    args = arguments(torch.bfloat16, (2, 3, 40), 40 if per_channel else 1)
    with pixeldiff.backend("cpu"):
        forced_result = sigma_gate(*args)
    assert_bitwise(sigma_gate(*args), forced_result)
    assert_bitwise(forced_result, cpu.launch(*args))


@needs_extension
def test_forced_cpu_refuses():
    x, feature, weight, logit = arguments(torch.float32, (2, 3, 8), 8)
    refused = [
        ((x.double(), feature, weight.double(), logit), "takes float32, bfloat16 and float16, got"),
        ((x, feature.mT.contiguous().mT, weight, logit), "needs a contiguous last axis, got stri"),
        ((x, feature.bfloat16(), weight, logit), "needs feature in the dtype of x, torch.float32,"),
        ((x, feature, weight, logit.half()), "needs lq_logit in float32 or the dtype of x, torch."),
    ]
    for args, reason in refused:
        with (
            pixeldiff.backend("cpu"),
            pytest.raises(NotImplementedError, match=rf'^sigma_gate\(backend="cpu"\): {reason}'),
        ):
            sigma_gate(*args)
        assert sigma_gate(*args).shape == x.shape


# --- the Triton kernels: in the interpreter, on a GPU, and compiled without one -------------------

triton_backends = pytest.mark.parametrize(
    "backend", ["triton", pytest.param("triton-gpu", marks=pytest.mark.gpu)]
)
# Prime sizes; rows and channels just past a tile; a tail of every tile along the sum; size 1.
ODD = [(2, 5, 7), (1, 131, 200), (3, 3, 67), (2, 129, 64), (1, 1, 1)]


def on(device, args, strided=False, wide_logit=False):
    """The arguments on a device; strided: rows that are not adjacent, W a column slice, batch and
    token axes swapped in x."""
    x, feature, weight, logit = args
    if wide_logit:
        logit = logit.float() / 3
    if strided:
        x = at_odd_stride(x.transpose(0, 1)).transpose(0, 1)
        feature, weight, logit = (at_odd_stride(t) for t in (feature, weight, logit))
    return tuple(t.to(device) for t in (x, feature, weight, logit))


def check_triton(launch, args):
    x, feature, weight, logit = (t.double() for t in args)
    want = x + torch.sigmoid(x @ weight.T + logit) * feature
    y = launch(*args)
    assert y.dtype == args[0].dtype
    assert y.is_contiguous()
    # The tensor cores sum to less than fp32; the interpreter runs the same lines in fp32.
    if args[2].shape[0] == 1 or y.device.type == "cpu":
        assert one_rounding(y, want) <= 1
    assert_within_twice_eager(y.cpu(), eager(*args).to(y.dtype).cpu(), want.cpu().numpy())


@triton_backends
@each_kind
@each_dtype
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_triton_odd_shapes(shape, dtype, per_channel, backend):
    launch, device = launcher("sigma_gate", backend)
    for std in (1.0, 1e-3):
        args = arguments(dtype, shape, shape[-1] if per_channel else 1, std)
        check_triton(launch, on(device, args))
        check_triton(launch, on(device, args, strided=True, wide_logit=True))


@triton_backends
@each_kind
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_triton_empty(shape, per_channel, backend):
    launch, device = launcher("sigma_gate", backend)
    k = shape[-1] if per_channel else 1
    shapes = (shape, shape, (k, shape[-1]), (*shape[:2], k))
    assert launch(*(torch.empty(s, device=device) for s in shapes)).shape == shape


@triton_backends
@pytest.mark.parametrize(("group", "pieces"), [(1, 4), (3, 2), (8, 1)])
def test_triton_every_tile_is_written_once(group, pieces, backend):
    """4 row tiles of an image in groups of less, more and as many; 3 column tiles."""
    launch, device = launcher("sigma_gate", backend)
    config = import_module("pixeldiff.triton_kernels.sigma_gate").Config
    tile = config(16, 32, 16, group=group, pieces=pieces, num_warps=4, num_stages=2)
    args = on(device, arguments(torch.bfloat16, (2, 51, 68), 68))
    check_triton(lambda *args: launch(*args, config=tile), args)


@triton_backends
@pytest.mark.parametrize("k", [1, 136])
def test_triton_every_candidate(k, backend):
    """What tuning may choose, and what another device's heuristic chooses, is right too."""
    launch, device = launcher("sigma_gate", backend)
    module = import_module("pixeldiff.triton_kernels.sigma_gate")
    args = on(device, arguments(torch.bfloat16, (1, 130 if k > 1 else 19, 136), k))
    devices = [(8, 0), (9, 0), (12, 0)] if backend == "triton" else []
    tiles = module.candidates(*args) + [module.heuristic(c, *args) for c in devices]
    for tile in dict.fromkeys(tiles):
        check_triton(lambda *args, tile=tile: launch(*args, config=tile), args)


@triton_backends
@each_kind
@each_dtype
def test_triton_not_finite(dtype, per_channel, backend):
    launch, device = launcher("sigma_gate", backend)
    clean = arguments(dtype, (2, 3, 37), 37 if per_channel else 1)
    for which in (0, 1, 3):
        for value in (torch.nan, torch.inf, -torch.inf):
            args = [t.clone() for t in clean]
            args[which][1, 2, -1] = value
            with pixeldiff.backend("reference"):
                want = sigma_gate(*args)
            y = launch(*on(device, args)).cpu()
            if want.isfinite().all():  # a gate of exactly 0 or 1
                torch.testing.assert_close(y, want, rtol=2e-2, atol=2e-2)
            else:
                check_not_finite_like(y, want)


@triton_backends
@each_kind
def test_triton_repeats_and_leaves_its_arguments(per_channel, backend):
    launch, device = launcher("sigma_gate", backend)
    check_repeatable(
        launch, *on(device, arguments(torch.bfloat16, (2, 9, 72), 72 if per_channel else 1))
    )


@triton_backends
@each_kind
def test_triton_offsets_past_two_to_the_31(per_channel, backend):
    """Strides that are int32 and whose multiples are not, between images and between rows."""
    launch, device = launcher("sigma_gate", backend)
    far = torch.empty(2**31 + 2**23, dtype=torch.bfloat16, device=device)
    for shape, strides in (
        ((3, 3, 40), (2**30 + 24, 48, 1)),
        ((1, 1027, 40), (0, 2**21, 1)),
    ):
        args = on(device, arguments(torch.bfloat16, shape, 40 if per_channel else 1))
        x, feature = (far[first:].as_strided(shape, strides) for first in (0, 400))
        x.copy_(args[0])
        feature.copy_(args[1])
        assert_bitwise(launch(x, feature, *args[2:]), launch(*args))


@pytest.mark.gpu
@each_kind
def test_triton_gpu_results_past_two_to_the_31(per_channel):
    """y and x of 2.15 G values: the last rows are those of a small call."""
    launch, device = launcher("sigma_gate", "triton-gpu")
    rows, d = 1_400_003, 1536
    x = torch.zeros(1, rows, d, dtype=torch.bfloat16, device=device)
    (*small,) = on(device, arguments(torch.bfloat16, (1, 5, d), d if per_channel else 1))
    x[:, -5:] = small[0]
    feature = small[1][:, :1].expand(1, rows, d)
    logit = small[3][:, :1].expand(1, rows, -1)
    want = launch(small[0], feature[:, :5], small[2], logit[:, :5])
    assert_bitwise(launch(x, feature, small[2], logit)[:, -5:], want)


@pytest.mark.gpu
@each_kind
@each_dtype
@pytest.mark.parametrize("tokens", [16384, 4096, 65536, 1517])
def test_triton_gpu_production(tokens, dtype, per_channel):
    """The released width at 2048, 1024, 4096 and an odd size; W a column slice of the linear."""
    launch, device = launcher("sigma_gate", "triton-gpu")
    x, feature, _, logit = arguments(dtype, (1, tokens, 1536), 1536 if per_channel else 1)
    weight = Draw(dtype, seed=2)(logit.shape[-1], 2 * 1536, std=1536**-0.5)[:, :1536]
    check_triton(launch, (x.to(device), feature.to(device), weight.to(device), logit.to(device)))


@pytest.mark.gpu
@each_kind
def test_triton_gpu_in_a_captured_graph(per_channel):
    launch, device = launcher("sigma_gate", "triton-gpu")
    args = on(device, arguments(torch.bfloat16, (1, 300, 1536), 1536 if per_channel else 1))
    check_captures(launch, *args)


def test_triton_refuses():
    module = pytest.importorskip("pixeldiff.triton_kernels.sigma_gate")
    x, feature, weight, logit = arguments(torch.float32, (2, 3, 8), 8)
    assert module.why_not(x.double(), feature, weight, logit) == (
        "takes float32, bfloat16, float16, got torch.float64"
    )
    assert "needs a contiguous last axis" in module.why_not(
        x, feature.mT.contiguous().mT, weight, logit
    )
    far = torch.empty_strided(x.shape, (1, module.MAX_STRIDE, 1), device="meta")
    assert module.why_not(far, feature, weight, logit) == (
        "needs less than 8388608 elements from a row to the next"
    )
    wide = torch.empty(1, 1, module.MAX_D + 1, device="meta")
    assert module.why_not(wide, wide, wide[0], wide[..., :1]) == (
        "takes at most 8192 channels with one logit a token, got 8193"
    )


def test_triton_in_interpreter():
    harness.run_in_interpreter(__file__)


# Bytes of shared memory of a multiprocessor; each program takes 1 KB beside its own.
MULTIPROCESSOR = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024, 120: 100 * 1024}


@pytest.mark.parametrize("target", aot.TARGETS)
def test_triton_product_compiles_ahead_of_time(target):
    module = pytest.importorskip("pixeldiff.triton_kernels.sigma_gate")
    for dtype, logit_dtype in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
    ):
        *args, logit = aot.released("sigma_gate", dtype)
        args = (*args, logit.to(logit_dtype))
        (kernel,) = aot.compile_launch(lambda args=args: module.launch(*args), target)
        low = dtype != torch.float32
        aot.assert_lean(kernel, tensor_cores=low)
        assert "cp.async.cg.shared.global" in kernel.ptx  # of 16 bytes
        assert "st.global.v4.b32" in kernel.ptx
        if dtype == torch.bfloat16:
            assert 2 * kernel.registers * kernel.warps * 32 <= 65536, "two programs do not fit"
            assert 2 * (kernel.shared + 1024) <= MULTIPROCESSOR[target], "two programs do not fit"


@pytest.mark.parametrize("target", aot.TARGETS)
def test_triton_dot_compiles_ahead_of_time(target):
    module = pytest.importorskip("pixeldiff.triton_kernels.sigma_gate")
    sites = [*aot.widths(module.MAX_D), {"dtype": torch.float32, "width": module.MAX_D}]
    aot.check_streams("sigma_gate", target, [{**site, "gates": 1} for site in sites])


@pytest.mark.parametrize("gates", [None, 1])
def test_triton_compiles_once_for_all_sizes(gates):
    aot.check_compiles_once("sigma_gate", aot.released_sizes("sigma_gate", gates=gates))
