"""pixel_adaln_mlp against fp64, with every modulation value found by its index."""

import math
from importlib import import_module

import aot
import harness
import numpy as np
import pixel_adaln_rules
import pytest
import torch
from harness import (
    TRITON,
    check_not_finite_like,
    check_threads,
    each_isa,
    launcher,
    on,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pixel_adaln_rules import SHAPES
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

OP = "pixel_adaln_mlp"
reference = import_module("pixeldiff.ops.pixel_adaln_mlp").reference

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


DEFINITION = pixel_adaln_rules.Definition(OP, arguments, eager, oracle)


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
    pixel_adaln_rules.check_instruction_set(DEFINITION, dtype, shape, isa)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_shapes(data):
    pixel_adaln_rules.check_random_shape(DEFINITION, data)


def test_chunks_do_not_change_the_result(monkeypatch):
    pixel_adaln_rules.check_chunks(DEFINITION, monkeypatch)


@each_isa
def test_threads_do_not_change_the_result(isa):
    check_threads("pixel_adaln_mlp", isa, *arguments(torch.bfloat16, (300, 64, 8, 16, 24)), 1e-6)


@each_isa
def test_inference_mode(isa):
    pixel_adaln_rules.check_inference_mode(DEFINITION, isa)


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
    pixel_adaln_rules.check_magnitude(DEFINITION, std, f"cpu-{isa}")


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
TRITON_SHAPES = {
    **pixel_adaln_rules.TRITON_SHAPES,
    "next-pixel": (2, 3, 16, 64, 32),  # one more than a tile of pixels
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
    pixel_adaln_rules.check_on_triton(DEFINITION, dtype, std, shape, backend)


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
    config = (16, 32, 16, 8, 2)  # 5 tiles of patches by 4 of pixels
    pixel_adaln_rules.check_pieces_and_groups(
        DEFINITION, backend, monkeypatch, config=config, whole_piece=4096
    )


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
    pixel_adaln_rules.check_magnitude(DEFINITION, std, backend)


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
    pixel_adaln_rules.check_released_shape_on_gpu(DEFINITION, dtype, patches, of_patches=3)


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
    pieces = (4, 16, 1, 1)
    aot.check_compiles_once(OP, aot.released_sizes(OP), launches=pieces)
