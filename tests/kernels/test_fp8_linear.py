"""fp8_linear against fp64, by the rule of low precision inside: no worse than twice eager's error.

Eager is PyTorch's linear on the values multiplied out.
"""

from __future__ import annotations

import functools
import math
from importlib import import_module

import pytest
import torch
from rules import assert_within_twice_eager_or_spacing, check_compiled_like_eager

import pixeldiff
from pixeldiff.ops import explain, fp8_linear, quantize_rows

OP = "fp8_linear"
E4M3 = torch.float8_e4m3fn
BF16, FP32 = torch.bfloat16, torch.float32
vendor = import_module("pixeldiff.ops.cuda.fp8_linear")
# torch._scaled_mm has the same signature on a CPU, so the call itself runs here too, where PyTorch
# is new enough to have scales by rows there.
CALLS = ["reference", "vendor", pytest.param("vendor-gpu", marks=pytest.mark.gpu)]
each_call = pytest.mark.parametrize("call", CALLS)


def arguments(rows, k, channels, *, bias=True, std=1.0, out=BF16, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    x, x_scale = quantize_rows(torch.randn(math.prod(rows), k, generator=g) * std)
    weight, weight_scale = quantize_rows(torch.randn(1, channels, k, generator=g) * k**-0.5)
    bias = torch.randn(channels, generator=g).to(out) if bias else None
    x, x_scale = x.view(*rows, k), x_scale.view(rows)
    tensors = (x, x_scale, weight[0], weight_scale[0], bias)
    return (*(None if t is None else t.to(device) for t in tensors), out)


@functools.cache
def why_no_rows_on_a_cpu() -> str | None:
    side, one = 16, torch.ones(16, 1)
    ones = torch.ones(side, side).to(E4M3)
    try:
        torch._scaled_mm(ones, ones.t(), scale_a=one, scale_b=one.t(), out_dtype=BF16)
    except RuntimeError as e:
        return str(e)
    return None


def device_of(call):
    if call == "vendor" and why_no_rows_on_a_cpu():
        pytest.skip(why_no_rows_on_a_cpu())
    if call != "vendor-gpu":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    return "cuda"


def run(call, *args):
    if call == "reference":
        with pixeldiff.backend("reference"):
            return fp8_linear(*args[:-1], out_dtype=args[-1])
    if call == "vendor-gpu" and vendor.why_not(*args) is not None:
        pytest.skip(vendor.why_not(*args))
    return vendor.launch(*args)


def dequantized(x, x_scale, weight, weight_scale, bias, dtype):
    values = x.to(dtype) * x_scale.to(dtype)[..., None]
    weights = weight.to(dtype) * weight_scale.to(dtype)[:, None]
    return values, weights, None if bias is None else bias.to(dtype)


def check(y, args):
    *tensors, out = args
    eager = torch.nn.functional.linear(*dequantized(*(_cpu(t) for t in tensors), FP32)).to(out)
    oracle = torch.nn.functional.linear(*dequantized(*(_cpu(t) for t in tensors), torch.float64))
    assert y.dtype == out
    assert y.is_contiguous()
    assert_within_twice_eager_or_spacing(y.cpu(), eager, oracle.numpy())


def _cpu(t):
    return None if t is None else t.cpu()


@each_call
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("std", [1.0, 1e-3])
@pytest.mark.parametrize(
    ("rows", "k", "channels"),
    [((2, 40), 1536, 96), ((3, 7), 48, 16), ((1,), 16, 32), ((257,), 32, 4608)],
    ids=str,
)
def test_within_twice_eager(rows, k, channels, std, bias, call):
    device = device_of(call)
    args = arguments(rows, k, channels, bias=bias, std=std, device=device)
    check(run(call, *args), args)


@pytest.mark.parametrize("out", [FP32, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "k", "channels"), [((2, 5), 257, 31), ((3,), 1, 1)], ids=str)
def test_odd_sizes_and_other_results_take_the_reference(rows, k, channels, out):
    args = arguments(rows, k, channels, out=out)
    reasons = dict(explain(OP, *args))
    assert "bfloat16" in reasons["cuda"]
    assert reasons["reference"] is None
    check(fp8_linear(*args[:-1], out_dtype=out), args)
    odd = arguments(rows, k, channels)
    assert f"multiples of 16, got K = {k}, N = {channels}" in dict(explain(OP, *odd))["cuda"]


@pytest.mark.gpu
def test_free_choice_takes_the_vendor_library():
    args = arguments((2, 40), 64, 96, device=device_of("vendor-gpu"))
    reason = vendor.why_not(*args)
    if reason is not None:
        pytest.skip(reason)
    free = fp8_linear(*args[:-1])
    assert torch.equal(free, vendor.launch(*args))


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "channels"), [(1536, 4608), (4096, 1536), (1536, 8192)], ids=str)
def test_released_shapes(k, channels):
    """All tokens of a 2048 x 2048 picture, 32 of them held against fp64."""
    args = arguments((16384,), k, channels, device=device_of("vendor-gpu"))
    y, some = run("vendor-gpu", *args), slice(None, None, 512)
    x, x_scale, *rest = args
    check(y[some].contiguous(), (x[some], x_scale[some], *rest))


@each_call
@pytest.mark.parametrize(("rows", "k", "channels"), [((0,), 16, 16), ((2, 0), 16, 16)], ids=str)
def test_empty(rows, k, channels, call):
    device = device_of(call)
    args = arguments(rows, k, channels, device=device)
    assert run(call, *args).shape == (*rows, channels)


def test_no_inputs_leave_the_bias():
    args = (torch.zeros(3, 0).to(E4M3), torch.ones(3), torch.zeros(16, 0).to(E4M3), torch.ones(16))
    bias = torch.arange(16.0).to(BF16)
    for call in ("reference", "vendor"):
        assert torch.equal(run(call, *args, bias, BF16), bias.expand(3, 16))
        assert torch.equal(run(call, *args, None, BF16), torch.zeros(3, 16, dtype=BF16))


@each_call
def test_a_row_that_is_not_finite_stays_one_row(call):
    device = device_of(call)
    x = torch.randn(1, 4, 32, device=device)
    x[0, 1, 3], x[0, 2, 0] = torch.nan, torch.inf
    rows, row_scale = quantize_rows(x)
    _, _, weight, weight_scale, bias, out = arguments((1,), 32, 48, device=device)
    y = run(call, rows, row_scale, weight, weight_scale, bias, out)
    assert y.isnan().all(-1).tolist() == [[False, True, True, False]]
    assert y[0, [0, 3]].isfinite().all()


@each_call
def test_views_are_taken(call):
    """Some rows of a batch, as a piece of the feed-forward is, and a part of a fused weight."""
    device = device_of(call)
    x, x_scale, weight, weight_scale, bias, out = arguments((2, 9), 32, 48, device=device)
    args = (x[:, 2:5], x_scale[:, 2:5], weight[16:], weight_scale[16:], bias[16:], out)
    check(run(call, *args), args)


@each_call
def test_a_single_row_without_other_axes(call):
    *args, out = arguments((), 32, 48, device=device_of(call))
    check(run(call, *args, out), (*args, out))


@each_call
def test_rows_that_start_anywhere_in_memory(call):
    x, x_scale, *rest = arguments((9,), 32, 48, device=device_of(call))
    weight, weight_scale, bias, out = rest
    args = (x[3:], x_scale[3:], weight[5:], weight_scale[5:], bias[5:], out)
    if call == "vendor-gpu":  # N must be a multiple of 16
        args = (x[3:], x_scale[3:], weight, weight_scale, bias, out)
    check(run(call, *args), args)


# --- the registered op and the public function ----------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    args = arguments((2, 3), 32, 16, bias=bias)
    # Not "test_schema": it multiplies the arguments, and PyTorch multiplies no e4m3 numbers.
    torch.library.opcheck(
        torch.ops.pixeldiff.fp8_linear.default,
        args,
        test_utils=(
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_dynamic",
        ),
    )


def test_compile_fullgraph_at_two_sizes():
    check_compiled_like_eager(fp8_linear, *(arguments((2, n), 32, 16)[:-1] for n in (5, 11)))


def test_meta():
    *args, _ = arguments((2, 3), 32, 16)
    y = fp8_linear(*(t.to("meta") for t in args))
    assert (y.device.type, y.dtype, tuple(y.shape)) == ("meta", BF16, (2, 3, 16))


X, S = torch.zeros(2, 32).to(E4M3), torch.ones(2)
W, T, B = torch.zeros(16, 32).to(E4M3), torch.ones(16), torch.zeros(16)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((X.float(), S, W, T), TypeError, "x must be torch.float8_e4m3fn, got torch.float32; quan"),
        ((X, S, W.float(), T), TypeError, "weight must be torch.float8_e4m3fn, got torch.float32"),
        ((X, S.double(), W, T), TypeError, "x_scale must be torch.float32, got torch.float64"),
        ((X, S, W, T.half()), TypeError, "weight_scale must be torch.float32, got torch.float16"),
        ((X, S, W, T, B.int()), TypeError, "bias must be float32, float16 or bfloat16, got torch"),
        ((X, S, W[:, :16], T), ValueError, "weight must be (N, K) = (16, 32), got (16, 16)"),
        ((X, S, W[0], T), ValueError, "x must be (..., K) and weight (N, K), got (2, 32) and (32,"),
        ((X, S[:1], W, T), ValueError, "x_scale must be (...) = (2,), got (1,)"),
        ((X, S, W, T[:8]), ValueError, "weight_scale must be (N,) = (16,), got (8,)"),
        ((X, S, W, T, B[:8]), ValueError, "bias must be (N,) = (16,), got (8,)"),
        ((X, S, W.to("meta"), T), ValueError, "weight must be on cpu, got meta"),
        ((X, S, W, T, B.clone().requires_grad_()), RuntimeError, "call it under torch.no_grad()"),
    ],
)
def test_bad_arguments(args, error, text):
    with pytest.raises(error) as raised:
        fp8_linear(*args)
    assert str(raised.value).startswith("fp8_linear: ")
    assert text in str(raised.value)


def test_bad_result_type():
    with pytest.raises(TypeError, match=r"^fp8_linear: out_dtype must be .* got torch.int8$"):
        fp8_linear(X, S, W, T, out_dtype=torch.int8)


# --- what a device is asked before it is used -----------------------------------------------------


@pytest.fixture
def device(monkeypatch):
    """A CUDA device of any capability, whose products come from the CPU."""
    vendor._probe.cache_clear()
    real = torch.device
    monkeypatch.setattr(torch, "device", lambda *a: real("cpu"))

    def become(capability, multiply=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        if multiply is not None:
            monkeypatch.setattr(torch, "_scaled_mm", multiply)
        return vendor._probe(0)

    yield become
    vendor._probe.cache_clear()


@pytest.mark.skipif(why_no_rows_on_a_cpu() is not None, reason="no scales by rows on this CPU")
def test_probe_accepts_right_products(device):
    assert device((9, 0)) is None


def test_probe_refuses_old_devices(device):
    assert device((8, 6)) == "e4m3 needs compute capability 8.9, this device is 8.6"


def test_probe_reports_what_pytorch_refuses(device):
    def refuse(*args, **kwargs):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling ...\nmore")

    assert device((12, 0), refuse).endswith(
        "refuses row-wise scales: CUBLAS_STATUS_NOT_SUPPORTED when calling ..."
    )


def test_probe_notices_wrong_products(device):
    assert "multiplies wrongly" in device((10, 0), lambda a, b, **_: torch.zeros(256, 256))
