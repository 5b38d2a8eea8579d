"""pixel_adaln_mlp against fp64, with every modulation value found by its index."""

import math
from importlib import import_module

import aot
import harness
import numpy as np
import pytest
import torch
from harness import (
    TRITON,
    check_not_finite_like,
    check_threads,
    each_isa,
    launcher,
    on,
    usable_isas,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import (
    Draw,
    assert_bitwise,
    assert_within_twice_eager,
    assert_within_twice_eager_or_spacing,
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
    rms,
)
from torch.nn.functional import gelu, linear, rms_norm

from pixeldiff.ops import pixel_adaln_mlp
from pixeldiff.ops.cpu import pixel_adaln
from pixeldiff.ops.registry import explain

OP = "pixel_adaln_mlp"
reference = import_module("pixeldiff.ops.pixel_adaln_mlp").reference

# (R, P*P, p, D, A); the MLP is 4p wide.
SHAPES = {
    "production": (6, 256, 16, 96, 288),
    "primes": (7, 9, 4, 13, 11),
    "one": (1, 1, 1, 1, 1),
    "patch8": (5, 64, 8, 32, 48),
    "p12": (3, 4, 12, 16, 20),
    "p20": (4, 25, 20, 9, 16),
    "one-patch": (1, 64, 8, 24, 40),
    "empty": (0, 4, 4, 8, 8),
}
NAMES = [
    "q",
    "u",
    "attn",
    "expand_weight",
    "expand_bias",
    "ada_weight",
    "ada_bias",
    "norm_weight",
    "fc1_weight",
    "fc1_bias",
    "fc2_weight",
    "fc2_bias",
]
erf = np.vectorize(math.erf, otypes=[np.float64])


def arguments(dtype, shape, std=1.0):
    draw, (rows, pixels, p, d, a) = Draw(dtype), shape
    return (
        draw(rows, pixels, p, std=std),
        draw(rows, d, std=std),
        draw(rows, a, std=std),
        draw(pixels * p, a, std=a**-0.5),
        draw(pixels * p, std=std),
        draw(6 * p * pixels, d, std=d**-0.5),
        draw(6 * p * pixels, std=0.3),
        draw(p),
        draw(4 * p, p, std=p**-0.5),
        draw(4 * p),
        draw(p, 4 * p, std=(4 * p) ** -0.5),
        draw(p),
    )


def call(q, u, attn, expand_w, expand_b, ada_w, ada_b, norm_w, fc1_w, fc1_b, fc2_w, fc2_b):
    return pixel_adaln_mlp(
        q, u, attn, (expand_w, expand_b), (ada_w, ada_b), norm_w, (fc1_w, fc1_b), (fc2_w, fc2_b)
    )


def oracle(*tensors):
    q, u, attn, expand_w, expand_b, ada_w, ada_b, norm_w, fc1_w, fc1_b, fc2_w, fc2_b = f64(*tensors)
    pixels, p = q.shape[1:]

    def chunk(index):
        rows = np.arange(pixels)[:, None] * 6 * p + index * p + np.arange(p)
        return np.einsum("jid,rd->rji", ada_w[rows], u) + ada_b[rows]

    gate1, shift, scale, gate2 = (chunk(c) for c in (2, 3, 4, 5))
    q = q + gate1 * (attn @ expand_w.T + expand_b).reshape(q.shape)
    h = (rms(q) * norm_w * (1 + scale) + shift) @ fc1_w.T + fc1_b
    return q + gate2 * ((0.5 * h * (1 + erf(h / math.sqrt(2)))) @ fc2_w.T + fc2_b)


def eager(q, u, attn, expand_w, expand_b, ada_w, ada_b, norm_w, fc1_w, fc1_b, fc2_w, fc2_b):
    m = linear(u, ada_w, ada_b).reshape(*q.shape[:2], 6 * q.shape[2])
    _, _, gate1, shift, scale, gate2 = m.chunk(6, -1)
    q = q + gate1 * linear(attn, expand_w, expand_b).reshape(q.shape)
    h = rms_norm(q, q.shape[2:], norm_w, 1e-6) * (1 + scale) + shift
    return q + gate2 * linear(gelu(linear(h, fc1_w, fc1_b)), fc2_w, fc2_b)


@every_backend("pixel_adaln_mlp")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, backend):
    if backend == "triton" and shape == SHAPES["production"]:
        pytest.skip("too large for the interpreter; its smaller shapes are below")
    args = arguments(dtype, shape, std)
    with forced("pixel_adaln_mlp", backend):
        q = call(*args)
    assert q.dtype == dtype
    assert_within_twice_eager(q, eager(*args), oracle(*args))


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_instruction_set(dtype, shape, isa):
    launch, _ = launcher("pixel_adaln_mlp", f"cpu-{isa}")
    if shape[2] % 4:
        pytest.skip("the kernels take multiples of 4 channels")
    args = arguments(dtype, shape)
    assert_within_twice_eager_or_spacing(launch(*args, 1e-6), eager(*args), oracle(*args))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_shapes(data):
    """Chunks of any number of patches, groups of pixels with and without a rest."""
    draw = data.draw
    p, patch = 4 * draw(st.integers(1, 5)), draw(st.integers(1, 9))
    # Enough results that the largest is not itself a sum that cancels.
    rows, d, a = draw(st.integers(4, 12)), draw(st.integers(1, 20)), draw(st.integers(8, 24))
    shape = (rows, patch**2, p, d, a)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    args = arguments(dtype, shape, draw(st.sampled_from([1.0, 1e-3, 30.0])))
    launch, _ = launcher("pixel_adaln_mlp", f"cpu-{draw(st.sampled_from(usable_isas()))}")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pixel_adaln, "CHUNK_BYTES", draw(st.sampled_from([1, 3000, 10000])))
        patched.setattr(pixel_adaln, "GROUP", draw(st.sampled_from([1, 5, 16, 40])))
        y = launch(*args, 1e-6)
    assert_within_twice_eager_or_spacing(y, eager(*args), oracle(*args))


def test_chunks_do_not_change_the_result(monkeypatch):
    """Beyond the rounding of the GEMMs, whose order of summation may depend on their size."""
    launch, _ = launcher("pixel_adaln_mlp", f"cpu-{usable_isas()[-1]}")
    args = arguments(torch.float32, (37, 64, 8, 24, 40))
    whole = launch(*args, 1e-6)
    for chunk, group in ((1, 16), (20_000, 7), (50_000, 64)):
        monkeypatch.setattr(pixel_adaln, "CHUNK_BYTES", chunk)
        monkeypatch.setattr(pixel_adaln, "GROUP", group)
        torch.testing.assert_close(launch(*args, 1e-6), whole, rtol=1e-5, atol=1e-5)


@each_isa
def test_threads_do_not_change_the_result(isa):
    check_threads("pixel_adaln_mlp", isa, *arguments(torch.bfloat16, (300, 64, 8, 16, 24)), 1e-6)


@each_isa
def test_inference_mode(isa):
    launch, _ = launcher("pixel_adaln_mlp", f"cpu-{isa}")
    args = arguments(torch.float32, (3, 9, 8, 13, 11))
    want = launch(*args, 1e-6)
    with torch.inference_mode():
        assert_bitwise(launch(*args, 1e-6), want)


@each_isa
def test_not_finite(isa):
    """Of a pixel its own channels, of u and attn all that they reach."""
    launch, _ = launcher("pixel_adaln_mlp", f"cpu-{isa}")
    q, u, attn, *rest = arguments(torch.float32, (6, 16, 8, 24, 40))
    q[1, 5, 3], q[2, 15, 7], u[4, 0], attn[5, 1] = torch.nan, torch.inf, torch.inf, -torch.inf
    y = launch(q, u, attn, *rest, 1e-6)
    check_not_finite_like(y, reference(q, u, attn, *rest, 1e-6))
    assert (~y.isfinite()).any(2).sum(1).tolist() == [0, 1, 1, 0, 16, 16]


@each_isa
@pytest.mark.parametrize("std", [1e15, 1e-15])
def test_magnitudes(isa, std):
    launch, _ = launcher("pixel_adaln_mlp", f"cpu-{isa}")
    q, u, attn, *rest = arguments(torch.float32, (6, 16, 8, 24, 40))
    args = (q * std, u, attn, *rest)
    assert_within_twice_eager_or_spacing(launch(*args, 1e-6), eager(*args), oracle(*args))


@each_isa
def test_gelu_over_its_whole_range(isa):
    """With q = 0, scale = -1 and identities for the MLP the result is gelu(shift)."""
    launch, _ = launcher("pixel_adaln_mlp", f"cpu-{isa}")
    x = torch.cat([torch.linspace(-14, 14, 16300), torch.logspace(-30, 30, 84)])[:16384]
    x[-40::2] *= -1
    ada_bias = torch.zeros(4096, 6, 4)
    ada_bias[:, 3], ada_bias[:, 4], ada_bias[:, 5] = x.view(4096, 4), -1, 1
    zeros, one = torch.zeros, torch.eye(4)
    y = launch(
        zeros(1, 4096, 4), zeros(1, 1), zeros(1, 1), zeros(16384, 1), zeros(16384),
        zeros(6 * 16384, 1), ada_bias.flatten(), torch.ones(4), one, zeros(4), one, zeros(4), 1e-6,
    ).flatten()  # fmt: skip
    x, y = f64(x, y)
    want = x * np.vectorize(lambda t: 0.5 * math.erfc(-t / math.sqrt(2)))(x)
    error = np.abs(y - want)
    assert (error <= 1e-7 * np.maximum(np.abs(x), 0.1)).all()
    near = x > -1
    assert (error[near] <= 3e-7 * np.abs(want[near])).all()
    assert (y[x < -8] == 0).all()


def test_gelu_is_the_exact_form():
    """The tanh approximation is off by up to 5e-4: far outside fp32."""
    q, u, attn, ew, eb, aw, ab, nw, fc1_w, fc1_b, fc2_w, fc2_b = arguments(
        torch.float32, (64, 1, 4, 1, 1)
    )
    rest = (ew, eb, aw, ab, nw, fc1_w * 2, fc1_b, fc2_w, fc2_b)
    np.testing.assert_allclose(f64(call(q, u, attn, *rest)), oracle(q, u, attn, *rest), atol=3e-6)


def test_closed_gates_return_q():
    q, u, attn, *rest = arguments(torch.bfloat16, (3, 4, 4, 8, 8))
    named = dict(zip(NAMES[3:], rest, strict=True))
    named["ada_weight"], named["ada_bias"] = (
        torch.zeros_like(named["ada_weight"]),
        torch.zeros_like(named["ada_bias"]),
    )
    assert_bitwise(call(q, u, attn, *named.values()), q)


def test_strided():
    q, u, attn, *rest = arguments(torch.float32, (7, 9, 4, 13, 11))
    y = call(at_odd_stride(q), at_odd_stride(u), at_odd_stride(attn), *rest)
    assert y.is_contiguous()
    torch.testing.assert_close(y, call(q, u, attn, *rest), rtol=1e-5, atol=1e-5)


def test_runs_everywhere():
    args = arguments(torch.bfloat16, (3, 4, 4, 8, 8))
    check_registered("pixel_adaln_mlp", call, *args)
    larger = (*arguments(torch.bfloat16, (5, 4, 4, 8, 8))[:3], *args[3:])
    check_compiles("pixel_adaln_mlp", call, args, larger)
    check_meta(call, *args)
    check_repeatable(call, *args)


def test_gradients():
    check_gradients(call, *arguments(torch.float32, (2, 2, 2, 3, 3)))


def test_errors():
    args = dict(zip(NAMES, arguments(torch.float32, (3, 4, 4, 8, 8)), strict=True))

    def raises(error, message, **changed):
        with pytest.raises(error, match=f"^pixel_adaln_mlp: {message}$"):
            call(*{**args, **changed}.values())

    raises(ValueError, r"u must be \(R, D\) = \(3, 8\), got \(2, 8\)", u=args["u"][:2])
    raises(ValueError, r"attn must be \(R, A\) = \(3, 8\), got \(2, 8\)", attn=args["attn"][:2])
    for name, message in (
        ("expand_weight", r"expand weight must be \(P\*P\*p, A\) = \(16, 8\), got \(15, 8\)"),
        ("expand_bias", r"expand bias must be \(P\*P\*p,\) = \(16,\), got \(15,\)"),
        ("ada_weight", r"ada_weight must be \(6\*p\*P\*P, D\) = \(96, 8\), got \(95, 8\)"),
        ("norm_weight", r"norm_weight must be \(p,\) = \(4,\), got \(3,\)"),
        ("fc1_bias", r"fc1 bias must be \(F,\) = \(16,\), got \(15,\)"),
        ("fc2_weight", r"fc2 weight must be \(p, F\) = \(4, 16\), got \(3, 16\)"),
        ("fc2_bias", r"fc2 bias must be \(p,\) = \(4,\), got \(3,\)"),
    ):
        raises(ValueError, message, **{name: args[name][1:]})
    raises(
        ValueError,
        r"fc1 weight must be \(F, p\) = \(16, 4\), got \(16, 3\)",
        fc1_weight=args["fc1_weight"][:, 1:],
    )
    raises(TypeError, r"attn must be float32, .* got torch.int64", attn=args["attn"].long())
    raises(
        TypeError,
        r"u must have the dtype of q, torch.float32, got torch.bfloat16",
        u=args["u"].bfloat16(),
    )


# --- Triton: in the interpreter and on a GPU ------------------------------------------------------

each_triton = pytest.mark.parametrize("backend", TRITON)
# Fewer patches and pixels than a tile, one more than a tile, D of one block and with a rest.
TRITON_SHAPES = {
    "p8": (7, 9, 8, 13, 11),
    "p16": (5, 7, 16, 40, 24),
    "p32": (3, 3, 32, 19, 8),
    "next-row": (129, 2, 16, 16, 8),
    "next-pixel": (2, 3, 16, 64, 32),
    "one": (1, 1, 8, 1, 1),
    "no-patch": (0, 4, 16, 8, 8),
}


def with_hidden(args, hidden):
    """The arguments with an MLP of another width."""
    p, draw = args[0].shape[2], Draw(args[0].dtype, seed=1)
    fc1 = draw(hidden, p, std=p**-0.5), draw(hidden)
    return (*args[:8], *fc1, draw(p, hidden, std=hidden**-0.5), args[11])


@each_triton
@pytest.mark.parametrize("shape", TRITON_SHAPES.values(), ids=TRITON_SHAPES)
@pytest.mark.parametrize("std", [1.0, 1e-3])
@pytest.mark.parametrize("dtype", harness.NAMES, ids=harness.NAMES.get)
def test_on_triton(dtype, std, shape, backend):
    launch, device = launcher(OP, backend)
    args = arguments(dtype, shape, std)
    y = launch(*on(device, args), 1e-6)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_within_twice_eager_or_spacing(y.cpu(), eager(*args), oracle(*args))


@each_triton
@pytest.mark.parametrize("hidden", [16, 48, 256])
@pytest.mark.parametrize("p", [8, 32])
def test_mlp_width_on_triton(p, hidden, backend):
    launch, device = launcher(OP, backend)
    for dtype in (torch.float32, torch.bfloat16):
        args = with_hidden(arguments(dtype, (5, 3, p, 16, 8)), hidden)
        y = launch(*on(device, args), 1e-6)
        assert_within_twice_eager_or_spacing(y.cpu(), eager(*args), oracle(*args))


@each_triton
def test_pieces_and_groups_on_triton(backend, monkeypatch):
    launch, device = launcher(OP, backend)
    kernel = import_module("pixeldiff.triton_kernels.pixel_adaln_mlp")
    config = kernel.Config(16, 32, 16, 8, 2)  # 5 tiles of patches by 4 of pixels
    args = arguments(torch.float32, (70, 7, 16, 24, 24))
    whole = launch(*on(device, args), 1e-6, config=config)
    assert_within_twice_eager_or_spacing(whole.cpu(), eager(*args), oracle(*args))
    for piece, group in ((4096, 32), (33, 16), (70, 48)):
        monkeypatch.setattr(kernel, "PIECE", piece)
        monkeypatch.setattr(kernel.pixel_adaln, "GROUP_PATCHES", group)
        y = launch(*on(device, args), 1e-6, config=config)
        torch.testing.assert_close(y, whole, rtol=1e-5, atol=1e-5)


@each_triton
def test_strided_on_triton(backend):
    """Every argument of more than one axis, rows and pixels apart and rows at odd addresses."""
    launch, device = launcher(OP, backend)
    args = arguments(torch.bfloat16, (7, 9, 8, 13, 11))
    q, u, attn, *rest = on(device, args)
    rest = [at_odd_stride(t) if t.dim() == 2 else t for t in rest]
    pixels = at_odd_stride(q.transpose(0, 1)).transpose(0, 1)
    y = launch(pixels, at_odd_stride(u), at_odd_stride(attn), *rest, 1e-6)
    assert y.is_contiguous()
    assert_within_twice_eager_or_spacing(y.cpu(), eager(*args), oracle(*args))


@each_triton
def test_not_finite_on_triton(backend):
    launch, device = launcher(OP, backend)
    for p in (8, 16):
        q, u, attn, *rest = arguments(torch.float32, (6, 16, p, 24, 40))
        q[1, 5, 3], q[2, 15, 7], u[4, 0], attn[5, 1] = torch.nan, torch.inf, torch.inf, -torch.inf
        y = launch(*on(device, (q, u, attn, *rest)), 1e-6).cpu()
        check_not_finite_like(y, reference(q, u, attn, *rest, 1e-6))
        assert (~y.isfinite()).any(2).sum(1).tolist() == [0, 1, 1, 0, 16, 16]


@each_triton
@pytest.mark.parametrize("std", [1e15, 1e-15])
def test_magnitudes_on_triton(std, backend):
    launch, device = launcher(OP, backend)
    q, u, attn, *rest = arguments(torch.float32, (6, 16, 8, 24, 40))
    args = (q * std, u, attn, *rest)
    y = launch(*on(device, args), 1e-6).cpu()
    assert_within_twice_eager_or_spacing(y, eager(*args), oracle(*args))


@each_triton
def test_repeats_on_triton(backend):
    launch, device = launcher(OP, backend)
    check_repeatable(launch, *on(device, arguments(torch.bfloat16, (5, 7, 16, 40, 24))), 1e-6)


@each_triton
@pytest.mark.parametrize("dtype", harness.NAMES, ids=harness.NAMES.get)
def test_gelu_over_its_whole_range_on_triton(dtype, backend):
    """With q = 0, scale = -1 and identities for the MLP the result is gelu(shift)."""
    launch, device = launcher(OP, backend)
    config = None
    if backend == "triton":  # one patch: fewer rows for the interpreter to go through
        config = import_module("pixeldiff.triton_kernels.pixel_adaln_mlp").Config(16, 64, 16, 4, 2)
    x = torch.cat([torch.linspace(-14, 14, 4000), torch.logspace(-4, 3, 96)])
    x[4000::2] *= -1
    x = x.to(dtype)
    ada_bias = torch.zeros(256, 6, 16)
    ada_bias[:, 3], ada_bias[:, 4], ada_bias[:, 5] = x.view(256, 16), -1, 1
    zeros, one = torch.zeros, torch.eye(16)
    args = (
        zeros(1, 256, 16), zeros(1, 16), zeros(1, 1), zeros(4096, 1), zeros(4096),
        zeros(6 * 4096, 16), ada_bias.flatten(), torch.ones(16), one, zeros(16), one, zeros(16),
    )  # fmt: skip
    y = launch(*(t.to(device, dtype) for t in args), 1e-6, config=config).cpu().flatten()
    x, y = f64(x, y)
    want = x * np.vectorize(lambda t: 0.5 * math.erfc(-t / math.sqrt(2)))(x)
    error, info = np.abs(y - want), torch.finfo(dtype)
    approximate = 1e-7 * np.maximum(np.abs(x), 0.1) if dtype == torch.float32 else 2e-6
    rounding = info.eps / 2 * np.maximum(np.abs(want), info.smallest_normal)
    assert (error <= rounding + approximate).all()
    if dtype != torch.float32:
        tail = (x > -5) & (x < 0)
        assert (error[tail] <= rounding[tail] + 0.004 * np.abs(want[tail])).all()


@each_triton
def test_refusals_of_triton(backend):
    launcher(OP, backend)
    why_not = import_module("pixeldiff.triton_kernels.pixel_adaln_mlp").why_not
    args = arguments(torch.float32, (3, 4, 8, 16, 20))

    def reason(*args):
        return why_not(*args, 1e-6)

    assert reason(*args) is None
    assert reason(*arguments(torch.float32, (3, 4, 24, 16, 20))) == (
        "takes 8, 16 or 32 channels of a pixel, got 24"
    )
    for hidden in (8, 24, 272):
        assert reason(*with_hidden(args, hidden)) == (
            f"takes an MLP width that is a multiple of 16, at most 256, got {hidden}"
        )
    assert reason(*args[:11], args[11].half()) == (
        "needs every tensor in the dtype of q, torch.float32, got torch.float16"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=harness.NAMES.get)
@pytest.mark.parametrize("patches", [16384, 4096 + 77, 300])
def test_released_shape_on_triton_gpu(patches, dtype):
    """Every tile that fits the device, held against fp64 at some patches of each piece."""
    launch, device = launcher(OP, "triton-gpu")
    kernel = import_module("pixeldiff.triton_kernels.pixel_adaln_mlp")
    args = on(device, arguments(dtype, (patches, 256, 16, 1536, 1152)))
    assert explain(OP, *args, 1e-6)[0] == ("triton", None)
    some = torch.tensor([0, 1, 127, 128, 299, patches // 2, patches - 2, patches - 1])
    q, u, attn, *rest = args
    picked = (q[some], u[some], attn[some], *rest)
    want, baseline = oracle(*on("cpu", picked)), eager(*picked).cpu()
    assert_within_twice_eager(launch(*args, 1e-6)[some].cpu(), baseline, want)
    for config in kernel.candidates(*args):
        try:
            y = launch(*args, 1e-6, config=config)
        except kernel.triton.runtime.errors.OutOfResources:
            continue
        assert_within_twice_eager(y[some].cpu(), baseline, want)


@pytest.mark.gpu
def test_captured_on_triton_gpu():
    launch, device = launcher(OP, "triton-gpu")
    args = on(device, arguments(torch.bfloat16, (300, 64, 16, 64, 48)))
    check_captures(launch, *args, 1e-6)


# --- Triton without a GPU -------------------------------------------------------------------------


def test_triton_in_interpreter():
    harness.run_in_interpreter(__file__)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize(
    ("dtype", "p"), [(torch.bfloat16, 16), (torch.float32, 16), (torch.float32, 8)]
)
def test_triton_compiles_ahead_of_time(dtype, p, target):
    module = pytest.importorskip("pixeldiff.triton_kernels.pixel_adaln_mlp")
    args = aot.released(OP, dtype, pixel=p)
    for kernel in aot.compile_launch(lambda: module.launch(*args), target):
        aot.assert_lean(kernel, tensor_cores=dtype != torch.float32)
        assert dtype != torch.float32 or not kernel.tensor_cores  # TF32 would be
        assert kernel.ptx.count("cp.async.cg.shared.global") >= 2  # 16 bytes each
        if p == 16:
            assert "ld.global.v4.b32" in kernel.ptx
            assert "st.global.v4.b32" in kernel.ptx


def test_triton_compiles_once_for_all_sizes():
    module = pytest.importorskip("pixeldiff.triton_kernels.pixel_adaln_mlp")
    pieces = (4, 16, 1, 1)
    aot.check_compiles_once(module.launch, aot.released_sizes(OP), launches=pieces)
