"""sigma_gate_norm: y by the rules of sigma_gate; the norm, by "one rounding", of y as stored."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import aot
import harness
import pytest
import torch
from harness import NAMES, launcher, one_rounding
from rules import (
    Draw,
    assert_bitwise,
    assert_within_twice_eager,
    at_odd_stride,
    check_captures,
    check_compiled_like_eager,
    check_gradients,
    check_registered,
)

import pixeldiff
from pixeldiff import native
from pixeldiff.ops import rms_norm_modulate, sigma_gate, sigma_gate_norm

OP = "sigma_gate_norm"
reference = import_module("pixeldiff.ops.sigma_gate_norm").reference
norm_reference = import_module("pixeldiff.ops.rms_norm_modulate").reference
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6
BACKENDS = [
    *("cpu-portable", "cpu-avx2", "cpu-avx512", "triton"),
    pytest.param("triton-gpu", marks=pytest.mark.gpu),
]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
each_kind = pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-token"])
needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    B: int
    N: int
    D: int
    per_channel: bool
    std: float = 1.0
    strided: bool = False  # and the logits in fp32
    vectors: torch.dtype = torch.float32  # of norm_weight, scale and shift
    shift: bool = True

    def __str__(self) -> str:
        name = f"{NAMES[self.dtype]}-B{self.B}-N{self.N}-D{self.D}-std{self.std:g}"
        name += "-channel" if self.per_channel else "-token"
        name += f"-{NAMES[self.vectors]}vectors"
        return name + "-strided" * self.strided + "-noshift" * (not self.shift)

    def arguments(self, device: str = "cpu"):
        draw, B, N, D = Draw(self.dtype, seed=self.N * 7919 + self.D), self.B, self.N, self.D
        K = D if self.per_channel else 1
        x, feature = draw(N, B, D, std=self.std).transpose(0, 1), draw(B, N, D, std=self.std)
        weight, logit = draw(K, 2 * D, std=(D or 1) ** -0.5)[:, :D], draw(B, N, K)
        draw.dtype = self.vectors
        mod, norm_weight = draw(B, 6 * D), 1 + 0.1 * draw(D)
        scale, shift = mod[:, D : 2 * D], mod[:, :D]
        if self.strided:
            feature, logit = at_odd_stride(feature), at_odd_stride(logit.float() / 3)
            x = at_odd_stride(x.transpose(0, 1)).transpose(0, 1)
        else:
            x, weight = x.contiguous(), weight.contiguous()
        args = (x, feature, weight, logit, norm_weight, scale, shift if self.shift else None)
        return (*(None if t is None else t.to(device) for t in args), EPS)


def check(args, y, h):
    for out in (y, h):
        assert out.dtype == args[0].dtype
        assert out.is_contiguous()
        assert out.shape == args[0].shape
    x, feature, weight, logit = (t.double() for t in args[:4])
    want = x + torch.sigmoid(x @ weight.T + logit) * feature
    x, feature, weight, logit = args[:4]
    eager = (x + torch.sigmoid(x @ weight.T + logit) * feature).to(y.dtype)
    if weight.shape[0] == 1:
        assert one_rounding(y, want) <= 1
    assert_within_twice_eager(y.cpu(), eager.cpu(), want.cpu().numpy())
    vectors = (None if t is None else t.double() for t in args[4:7])
    assert one_rounding(h, norm_reference(y.double(), *vectors, args[7])) <= 1


SHAPES = [(2, 5, 7), (1, 131, 40), (3, 3, 67), (5, 1, 16), (1, 1, 1)]
GRID = [
    Case(dtype, *shape, per_channel, std, strided)
    for dtype in DTYPES
    for shape in SHAPES
    for per_channel in (True, False)
    for std in (1.0, 1e-3)
    for strided in (False, True)
]
GRID += [Case(d, 2, 5, 72, k, vectors=d) for d in DTYPES[1:] for k in (True, False)]
GRID += [Case(d, 2, 5, 72, k, shift=False) for d in DTYPES for k in (True, False)]
# The narrowest that Triton takes in three pieces.
GRID += [Case(d, 2, 3, 768, k) for d in DTYPES for k in (True, False)]


@each_backend
@pytest.mark.parametrize("case", GRID, ids=str)
def test_matches_oracle(case, backend):
    launch, device = launcher(OP, backend)
    args = case.arguments(device)
    check(args, *launch(*args))


@each_kind
def test_reference_matches_oracle(per_channel):
    for dtype in DTYPES:
        args = Case(dtype, 2, 5, 67, per_channel).arguments()
        y, h = reference(*args)
        vectors = (t.double() for t in args[4:7])
        assert one_rounding(h, norm_reference(y.double(), *vectors, EPS)) <= 1
        with pixeldiff.backend("reference"):
            assert_bitwise(sigma_gate(*args[:4]), y)


@each_backend
@each_kind
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_empty(shape, per_channel, backend):
    launch, device = launcher(OP, backend)
    for out in launch(*Case(torch.float32, *shape, per_channel).arguments(device)):
        assert out.shape == shape


@each_backend
@each_kind
@each_dtype
def test_not_finite(dtype, per_channel, backend):
    """A NaN of a feature stays one element of y and takes its row of h; one of x takes both."""
    launch, device = launcher(OP, backend)
    args = Case(dtype, 2, 3, 37, per_channel).arguments(device)
    args[1][0, 1, 5] = torch.nan
    args[1][0, 2, 36] = -torch.inf
    args[0][1, 2, 0] = torch.nan
    y, h = launch(*args)
    for got, want in zip((y, h), reference(*args), strict=True):
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.isinf())
    assert (y.isnan().sum(), y.isinf().sum(), h.isnan().sum()) == (38, 1, 3 * 37 - 36)


@each_backend
@each_kind
def test_repeats_bitwise_and_leaves_its_arguments(per_channel, backend):
    launch, device = launcher(OP, backend)
    args = Case(torch.bfloat16, 2, 9, 72, per_channel).arguments(device)
    before = [t.clone() for t in args[:-1]]
    for a, b in zip(launch(*args), launch(*args), strict=True):
        assert_bitwise(a, b)
    for now, was in zip(args[:-1], before, strict=True):
        assert_bitwise(now, was)


@needs_extension
@each_kind
@pytest.mark.parametrize("isa", native.ISA_CODES)
def test_cpu_is_its_two_halves(isa, per_channel):
    """Nothing is lost against calling them: bit for bit, on any number of threads."""
    args = Case(torch.bfloat16, 2, 33, 200, per_channel).arguments()
    y = launcher("sigma_gate", f"cpu-{isa}")[0](*args[:4])
    h = launcher("rms_norm_modulate", f"cpu-{isa}")[0](y, *args[4:])
    launch, code = import_module("pixeldiff.ops.cpu.sigma_gate_norm").launch, native.ISA_CODES[isa]
    for threads in (None, 1, 7):
        for got, want in zip(launch(*args, isa=code, threads=threads), (y, h), strict=True):
            assert_bitwise(got, want)


# --- the registered op and the public function ----------------------------------------------------


@needs_extension
@each_kind
def test_free_choice_runs_the_cpu_kernels(per_channel):
    *args, eps = Case(torch.bfloat16, 2, 5, 72, per_channel).arguments()
    launch = import_module("pixeldiff.ops.cpu.sigma_gate_norm").launch
    free = sigma_gate_norm(*args, eps=eps)
    with pixeldiff.backend("cpu"):
        forced = sigma_gate_norm(*args, eps=eps)
    y = sigma_gate(*args[:4])
    apart = (y, rms_norm_modulate(y, *args[4:], eps=eps))
    for a, b, c, d in zip(free, forced, launch(*args, eps), apart, strict=True):
        assert_bitwise(a, b)
        assert_bitwise(b, c)
        assert_bitwise(c, d)


@needs_extension
def test_forced_cpu_refuses():
    *args, _ = Case(torch.float32, 2, 3, 8, True).arguments()
    refused = [
        (1, args[1].bfloat16(), "needs feature in the dtype of x, torch.float32,"),
        (3, args[3].half(), "needs lq_logit in float32 or the dtype of x, torch."),
        (4, args[4].double(), "takes float32, bfloat16 and float16, got torch.float64"),
    ]
    for position, value, reason in refused:
        bad = [*args[:position], value, *args[position + 1 :]]
        with (
            pixeldiff.backend("cpu"),
            pytest.raises(
                NotImplementedError, match=rf'^sigma_gate_norm\(backend="cpu"\): {reason}'
            ),
        ):
            sigma_gate_norm(*bad)
        assert sigma_gate_norm(*bad)[1].shape == (2, 3, 8)


@each_kind
@pytest.mark.parametrize("shift", [True, False])
def test_opcheck(per_channel, shift):
    *args, _ = Case(torch.bfloat16, 2, 3, 40, per_channel, strided=True, shift=shift).arguments()
    check_registered(OP, sigma_gate_norm, *args)


@each_kind
def test_compile_fullgraph_at_two_sizes(per_channel):
    calls = (
        Case(torch.bfloat16, 2, n, 72, per_channel, strided=True).arguments()[:-1] for n in (5, 11)
    )
    check_compiled_like_eager(sigma_gate_norm, *calls, eps=EPS)


@each_kind
def test_meta(per_channel):
    *args, eps = Case(torch.bfloat16, 2, 3, 40, per_channel, strided=True).arguments("meta")
    for out in sigma_gate_norm(*args, eps=eps):
        assert (out.device.type, out.dtype) == ("meta", torch.bfloat16)
        assert tuple(out.shape) == (2, 3, 40)
        assert out.is_contiguous()


@each_kind
def test_gradients(per_channel):
    *args, _ = Case(torch.float32, 1, 2, 3, per_channel).arguments()
    check_gradients(lambda *args: torch.cat(sigma_gate_norm(*args)), *args)


X = torch.zeros(2, 3, 8)
W, V = torch.zeros(8), torch.zeros(2, 8)
SQUARE = torch.zeros(8, 8)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((X, X, SQUARE[:2], X, W, V, V), ValueError, "weight must be (D, D) or (1, D) with D = 8"),
        (
            (X, X[:, :2], SQUARE, X, W, V, V),
            ValueError,
            "feature must be (B, N, D) = (2, 3, 8), go",
        ),
        ((X, X, SQUARE, X, W[:7], V, V), ValueError, "norm_weight must be (D,) = (8,), got (7,)"),
        ((X, X, SQUARE, X, W.long(), V, V), TypeError, "norm_weight must be float32, float16 or b"),
        (
            (X, X, SQUARE, X, W, V[:, :7], V),
            ValueError,
            "scale must be (B, D) = (2, 8), got (2, 7)",
        ),
        ((X, X, SQUARE, X, W, V, V[:1]), ValueError, "shift must be (B, D) = (2, 8), got (1, 8)"),
        ((X, X, SQUARE, X, W.to("meta"), V, V), ValueError, "norm_weight must be on cpu, got meta"),
        ((X.mT.contiguous().mT, X, SQUARE, X, W, V, V), ValueError, "the last axis of x must be c"),
    ],
)
def test_bad_arguments(args, error, text):
    with pytest.raises(error) as raised:
        sigma_gate_norm(*args)
    assert str(raised.value).startswith("sigma_gate_norm: ")
    assert text in str(raised.value)


# --- Triton: candidates, a GPU, and without one ---------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", pytest.param("triton-gpu", marks=pytest.mark.gpu)])
@each_kind
def test_triton_every_candidate(per_channel, backend):
    launch, device = launcher(OP, backend)
    args = Case(torch.bfloat16, 2, 11, 136, per_channel).arguments(device)
    for tile in import_module("pixeldiff.triton_kernels.sigma_gate_norm").candidates(*args):
        check(args, *launch(*args, config=tile))


@pytest.mark.parametrize("backend", ["triton", pytest.param("triton-gpu", marks=pytest.mark.gpu)])
def test_triton_gate_is_that_of_sigma_gate(backend):
    """One logit a channel: the two ops share the product, bit for bit."""
    launch, device = launcher(OP, backend)
    args = Case(torch.bfloat16, 2, 9, 72, True).arguments(device)
    assert_bitwise(launch(*args)[0], launcher("sigma_gate", backend)[0](*args[:4]))


@pytest.mark.gpu
@each_kind
@each_dtype
@pytest.mark.parametrize("tokens", [16384, 4096, 65536, 1517])
def test_triton_gpu_production(tokens, dtype, per_channel):
    launch, device = launcher(OP, "triton-gpu")
    args = Case(dtype, 1, tokens, 1536, per_channel, vectors=dtype).arguments(device)
    check(args, *launch(*args))


@pytest.mark.parametrize("backend", ["triton", pytest.param("triton-gpu", marks=pytest.mark.gpu)])
@each_kind
def test_triton_offsets_past_two_to_the_31(per_channel, backend):
    """Strides that are int32 and whose multiples are not, between images and between rows."""
    launch, device = launcher(OP, backend)
    far = torch.empty(2**31 + 2**23, dtype=torch.bfloat16, device=device)
    for B, N, strides in ((3, 3, (2**30 + 24, 48, 1)), (1, 1027, (0, 2**21, 1))):
        args = Case(torch.bfloat16, B, N, 40, per_channel).arguments(device)
        x, feature = (far[first:].as_strided((B, N, 40), strides) for first in (0, 400))
        x.copy_(args[0])
        feature.copy_(args[1])
        for got, want in zip(launch(x, feature, *args[2:]), launch(*args), strict=True):
            assert_bitwise(got, want)


@pytest.mark.gpu
@each_kind
def test_triton_gpu_results_past_two_to_the_31(per_channel):
    """y and h of 2.15 G values: the last rows are those of a small call."""
    launch, device = launcher(OP, "triton-gpu")
    rows, d = 1_400_003, 1536
    small = Case(torch.bfloat16, 1, 5, d, per_channel).arguments(device)
    feature, logit = small[1][:, :1], small[3][:, :1]
    x = torch.zeros(1, rows, d, dtype=torch.bfloat16, device=device)
    x[:, -5:] = small[0]
    wide = (feature.expand(1, rows, d), small[2], logit.expand(1, rows, -1))
    narrow = (feature.expand(1, 5, d), small[2], logit.expand(1, 5, -1))
    want = launch(small[0], *narrow, *small[4:])
    for got, tail in zip(launch(x, *wide, *small[4:]), want, strict=True):
        assert_bitwise(got[:, -5:], tail)


@pytest.mark.gpu
@each_kind
def test_triton_gpu_in_a_captured_graph(per_channel):
    launch, device = launcher(OP, "triton-gpu")
    check_captures(launch, *Case(torch.bfloat16, 1, 300, 1536, per_channel).arguments(device))


def test_triton_refuses():
    module = pytest.importorskip("pixeldiff.triton_kernels.sigma_gate_norm")
    *args, eps = Case(torch.float32, 2, 3, 8, True).arguments()
    bad = (*args[:4], args[4].double(), *args[5:], eps)
    with module.launching.compiling_for((9, 0)):  # which every device can
        assert module.why_not(*args, eps) is None
        assert module.why_not(*bad) == "takes float32, bfloat16, float16, got torch.float64"
    wide = Case(torch.float32, 1, 1, 8193, False).arguments()
    assert module.why_not(*wide) == "takes at most 8192 channels, got 8193"


def test_triton_in_interpreter():
    harness.run_in_interpreter(__file__)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_triton_compiles_ahead_of_time(target):
    module = pytest.importorskip("pixeldiff.triton_kernels.sigma_gate_norm")
    widest = module.sigma_gate.MAX_D
    for dtype, width, gates in (
        (torch.bfloat16, 1536, 1),
        (torch.float32, 1536, 1),
        (torch.bfloat16, widest, 1),
        (torch.float32, widest, 1),
        (torch.bfloat16, 1536, None),
        (torch.float32, widest, None),
    ):
        args = aot.released(OP, dtype, width=width, gates=gates)
        *product, norm = aot.compile_launch(lambda args=args: module.launch(*args), target)
        for kernel in product:
            aot.assert_lean(kernel, tensor_cores=dtype == torch.bfloat16)
        assert len(product) == (gates is None)
        aot.assert_lean(norm)
        assert "ld.global.v4.b32" in norm.ptx
        assert "st.global.v4.b32" in norm.ptx


@each_kind
def test_triton_compiles_once_for_all_sizes(per_channel):
    calls = aot.released_sizes(OP, gates=None if per_channel else 1)
    kernels = 1 + per_channel
    aot.check_compiles_once(OP, calls, launches=kernels, compilations=kernels)
