"""sigma_gate against fp64: y = x + sigmoid(x W^T + lq_logit) * feature."""

import numpy as np
import pytest
import torch
from harness import NAMES, launcher
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import (
    Draw,
    assert_bitwise,
    assert_one_rounding,
    assert_within_twice_eager,
    at_odd_stride,
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
