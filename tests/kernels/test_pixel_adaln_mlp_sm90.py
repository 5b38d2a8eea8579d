"""The sm_90a kernel of pixel_adaln_mlp: its source on an emulator of a cluster, in random orders
and with faults planted, or on a GPU; and what the compiler makes of it."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from emulated import EmulatorError
from emulated_pixel_adaln import Args, MlpArgs, barriers, emulate, pixel_adaln_mlp
from harness import NAMES, check_not_finite_like, launcher, on
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine_code import check_register_trade, compiled_for, instructions
from rules import assert_bitwise, check_captures, check_repeatable, f64
from test_pixel_adaln_mlp import DEFINITION, OP, arguments, reference, with_hidden

from pixeldiff import native
from pixeldiff.ops.cuda import pixel_adaln_mlp as backend
from pixeldiff.ops.registry import explain

HALVES = (torch.bfloat16, torch.float16)
each_backend = pytest.mark.parametrize(
    "where", ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
)
each_dtype = pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
# (patches, pixels, channels a pixel, D, A). A block's tile is 128 patches by 2 pixels, a cluster's
# twice both; a ring holds 6 steps of 64 of D.
SHAPES = {
    "few": (5, 7, 16, 40, 24),
    "one": (1, 1, 16, 8, 8),
    "next-row": (129, 2, 16, 16, 8),
    "next-pixel": (3, 3, 16, 64, 8),
    "next-cluster": (257, 5, 16, 24, 8),
    "primes": (131, 11, 16, 104, 13),
    "round-the-ring": (130, 3, 16, 64 * 7 + 8, 8),
}


def run(where, args, **how):
    """The result, on the CPU."""
    if where == "emulated":
        assert backend.why_not_call(*args) is None
        return pixel_adaln_mlp(*args, **how)
    launch, device = launcher(OP, "cuda")
    args = on(device, args)
    reason = backend.why_not(*args, 1e-6)
    if reason is not None:
        pytest.skip(reason)
    return launch(*args, 1e-6).cpu()


# --- against fp64


@each_backend
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("dtype", "std"),
    [(torch.bfloat16, 1.0), (torch.bfloat16, 1e-3), (torch.float16, 1.0)],
    ids=["bf16", "bf16-small", "fp16"],
)
def test_matches_oracle(dtype, std, shape, where):
    args = arguments(dtype, shape, std)
    y = run(where, args)
    assert y.dtype == dtype
    DEFINITION.check(y, args)


@each_backend
@pytest.mark.parametrize("hidden", [16, 48, 256])
@each_dtype
def test_mlp_width(dtype, hidden, where):
    args = with_hidden(arguments(dtype, (140, 3, 16, 16, 8)), hidden)
    DEFINITION.check(run(where, args), args)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(HALVES),
    st.integers(4, 280),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(0, 2**63 - 1),
)
def test_random_sizes_in_random_orders(dtype, rows, pixels, eighths, clusters, seed):
    """Clusters with several tiles and with none, consumers with different numbers of them."""
    args = arguments(dtype, (rows, pixels, 16, 8 * eighths, 8))
    DEFINITION.check(run("emulated", args, clusters=clusters, seed=seed), args)


def test_the_order_does_not_change_a_bit():
    args = arguments(torch.bfloat16, (130, 9, 16, 136, 8))
    want = run("emulated", args)
    for seed, clusters in ((1, 1), (2, 2), (3, 4)):
        assert_bitwise(run("emulated", args, seed=seed, clusters=clusters), want)


@each_backend
def test_strided(where):
    """Pixels before patches, rows of u and of the weight apart."""
    q, u, attn, expand_weight, expand_bias, ada_weight, *rest = args = arguments(
        torch.bfloat16, (140, 5, 16, 72, 8)
    )
    spread = torch.full((5, 140, 18), torch.nan).bfloat16()
    spread[..., :16] = q.transpose(0, 1)
    apart = [torch.full((t.shape[0], 88), torch.nan).bfloat16() for t in (u, ada_weight)]
    for t, value in zip(apart, (u, ada_weight), strict=True):
        t[:, 8:80] = value
    u, ada_weight = (t[:, 8:80] for t in apart)
    q = spread[..., :16].transpose(0, 1)
    DEFINITION.check(run(where, (q, u, attn, expand_weight, expand_bias, ada_weight, *rest)), args)


@each_backend
@each_dtype
def test_not_finite(dtype, where):
    """Of a pixel its own channels, of u and attn all that they reach."""
    q, u, attn, *rest = arguments(dtype, (6, 8, 16, 24, 40))
    q[1, 5, 3], q[2, 7, 7], u[4, 0], attn[5, 1] = torch.nan, torch.inf, torch.inf, -torch.inf
    y = run(where, (q, u, attn, *rest))
    wide = [t.float() for t in (q, u, attn, *rest)]
    want = reference(*wide, 1e-6).to(dtype)
    check_not_finite_like(y, want)
    assert (~y.isfinite()).any(2).sum(1).tolist() == [0, 1, 1, 0, 8, 8]


@each_backend
@each_dtype
def test_gelu_over_its_whole_range(dtype, where):
    """With q = 0, scale = -1 and identities for the MLP the result is gelu(shift)."""
    x = torch.cat([torch.linspace(-14, 14, 448), torch.logspace(-4, 3, 64)])
    x[448::2] *= -1
    x = x.to(dtype)
    ada_bias = torch.zeros(32, 6, 16)
    ada_bias[:, 3], ada_bias[:, 4], ada_bias[:, 5] = x.view(32, 16), -1, 1
    zeros, one = torch.zeros, torch.eye(16)
    args = (
        zeros(1, 32, 16), zeros(1, 16), zeros(1, 1), zeros(512, 1), zeros(512),
        zeros(6 * 512, 16), ada_bias.flatten(), torch.ones(16), one, zeros(16), one, zeros(16),
    )  # fmt: skip
    y = run(where, tuple(t.to(dtype) for t in args)).flatten()
    x, y = f64(x, y)
    want = x * np.vectorize(lambda t: 0.5 * math.erfc(-t / math.sqrt(2)))(x)
    error, info = np.abs(y - want), torch.finfo(dtype)
    rounding = info.eps / 2 * np.maximum(np.abs(want), info.smallest_normal)
    assert (error <= rounding + 2e-6).all()
    tail = (x > -5) & (x < 0)
    assert (error[tail] <= rounding[tail] + 0.004 * np.abs(want[tail])).all()


# --- the launch


def test_launch_in_pieces(monkeypatch):
    """What Python gives the extension, with the emulator in its place: two pieces and a rest."""
    sizes = []

    def kernel(shape, dtype, q, u, a, ada, vectors, mlp, out, eps, device, stream):
        sizes.append(shape)
        hidden, *weights = mlp
        common = Args(*shape, dtype, *q, *u, *ada, *vectors, out, eps)
        emulate("emulate_pixel_adaln_mlp", MlpArgs(common, hidden, a, *weights))

    monkeypatch.setattr(native, "load", lambda: SimpleNamespace(pixel_adaln_mlp_cuda=kernel))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(backend, "PIECE", 33)
    args = arguments(torch.bfloat16, (70, 5, 16, 24, 24))
    DEFINITION.check(backend.launch(*args, 1e-6), args)
    assert sizes == [(33, 5, 24), (33, 5, 24), (4, 5, 24)]


# --- what goes wrong is noticed

FAULTS = {
    "a stage read before it is there": ("skip-wait", "full"),
    "a stage overwritten while it is read": ("skip-wait", "empty"),
    "an arrival lost": ("drop-arrival", "empty"),
    "sums read before they are there": ("no-product-wait", None),
    "another swizzle than the products read": ("other-swizzle", None),
    "fewer bytes announced than arrive": ("short-copy", None),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_faults_are_noticed(fault):
    """In some order of a few: by the emulator, or because the result is wrong."""
    kind, barrier = fault
    args = arguments(torch.bfloat16, (5, 9, 16, 64 * 7, 8))
    where = barriers(OP)[barrier] if barrier else (0, 0)
    for seed in range(16):
        try:
            DEFINITION.check(run("emulated", args, seed=seed, fault=kind, barriers=where), args)
        except (EmulatorError, AssertionError):
            return
    pytest.fail("sixteen runs went by as if nothing were wrong")


# --- what is refused


def test_why_not():
    args = arguments(torch.bfloat16, (3, 4, 16, 16, 8))

    def reason(**changed):
        names = ("q", "u", "attn", "expand_weight", "expand_bias", "ada_weight", "ada_bias")
        names += ("norm_weight", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
        return backend.why_not_call(**{**dict(zip(names, args, strict=True)), **changed})

    def wide(t, by, first=0):
        return torch.zeros(t.shape[0], t.shape[1] + by).bfloat16()[:, first : first + t.shape[1]]

    assert backend.why_not_call(*args) is None
    float32 = arguments(torch.float32, (3, 4, 16, 16, 8))
    assert backend.why_not_call(*float32) == "takes bfloat16 and float16, got torch.float32"
    assert backend.why_not_call(*arguments(torch.bfloat16, (3, 4, 8, 16, 8))) == (
        "takes 16 channels of a pixel, got 8"
    )
    for hidden in (8, 24, 272):
        assert backend.why_not_call(*with_hidden(args, hidden)) == (
            f"takes an MLP width that is a multiple of 16, at most 256, got {hidden}"
        )
    assert backend.why_not_call(*args[:11], args[11].half()) == (
        "needs every tensor in the dtype of q, torch.bfloat16, got torch.float16"
    )
    (
        _,
        u,
        *_,
    ) = args
    ada = args[5]
    assert backend.why_not_call(args[0], wide(u, 8), *args[2:]) is None
    assert backend.why_not_call(args[0], wide(u, 4), *args[2:]) == (
        "needs rows of u that are a positive multiple of 16 bytes apart, got 40"
    )
    assert backend.why_not_call(*args[:5], wide(ada, 8, 4), *args[6:]) == (
        "needs ada_weight to start at a multiple of 16 bytes"
    )
    assert backend.why_not_call(*args[:5], ada[:1].expand_as(ada), *args[6:]) == (
        "needs rows of ada_weight that are a positive multiple of 16 bytes apart, got 0"
    )
    q = torch.zeros(3, 4, 17).bfloat16()[..., :16]
    assert backend.why_not_call(q, *args[1:]) == (
        "needs even strides of q, got (68, 17, 1) elements; call .contiguous()"
    )
    odd = torch.zeros(17).bfloat16()[1:]
    assert backend.why_not_call(*args[:7], odd, *args[8:]) == (
        "needs norm_weight to start at a multiple of 4 bytes"
    )
    assert backend.why_not_call(*args[:11], odd) == (
        "needs fc2 bias to start at a multiple of 4 bytes"
    )
    big = torch.empty(3, 2**20 + 1, 16, dtype=torch.bfloat16, device="meta")
    assert backend.why_not_call(big, *args[1:]) == (
        "takes 1 to 2^20 channels of u and pixels, got 16 and 1048577"
    )


REFUSED = {
    "fp32": ({"dtype": 0}, "fp32 has no such kernel"),
    "no patches": ({"rows": 0}, "sizes must be positive"),
    "no channels": ({"D": 0}, "sizes must be positive"),
    "narrow": ({"hidden": 24}, "the MLP's width must be a multiple of 16 up to 256"),
    "wide": ({"hidden": 272}, "the MLP's width must be a multiple of 16 up to 256"),
    "many": ({"rows": 1 << 30, "pixels": 1 << 20}, "too many patches, pixels or channels"),
    "odd": ({"q_stride_pixel": 17}, "strides of q must be even"),
    "nowhere": ({"fc1_bias": 0}, "every tensor must start at a multiple of 4 bytes"),
    "between": ({"out": 1026}, "every tensor must start at a multiple of 4 bytes"),
    "rows of u": ({"u_stride": 20}, "needs strides that are positive multiples of 16 bytes"),
    "start": ({"ada_weight": 1028}, "must start at a multiple of 16 bytes"),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED)
def test_launch_refuses(changed, message):
    """What the launch checks before it starts anything."""
    args = arguments(torch.bfloat16, (3, 4, 16, 16, 8))
    with pytest.raises(EmulatorError, match=f"^{re.escape(message)}$"):
        pixel_adaln_mlp(*args, changed=changed)


def test_on_request_only():
    args = arguments(torch.bfloat16, (3, 4, 16, 16, 8))
    assert ("cuda", None) not in explain(OP, *args, 1e-6)[:1]
    assert any(name == "cuda" and reason for name, reason in explain(OP, *args, 1e-6))


# --- what the compiler makes of it


@pytest.fixture(scope="module", params=["true", "false"], ids=["bf16", "fp16"])
def compiled(request):
    """(the kernel, what the compiler said)"""
    definition = f"PIXELDIFF_BF16={request.param}"
    (kernel,), said = compiled_for("90a", "pixel_adaln_mlp_sm90.cu", definition)
    assert kernel.name == f"pixel_adaln_mlp_sm90_kernel<{request.param}>"
    return kernel, said


def test_registers(compiled):
    kernel, said = compiled
    check_register_trade(kernel, said, producer=40, consumers=232)


def test_instructions(compiled):
    sass = compiled[0].sass
    count = instructions(sass)
    # A step of 64 is 4 products of each m64, and the loop is unrolled.
    assert count["HGMMA"] % 8 == 0
    assert len(re.findall(r"HGMMA\.64x128x16", sass)) == count["HGMMA"] > 0
    # 16 hidden values: two halves of N twice, for two m16, for each of two pixels.
    assert count["HMMA"] == 2 * 2 * 4
    assert count["UTMALDG"] == len(re.findall(r"UTMALDG\.4D\.MULTICAST", sass)) == 2
    assert count["USETMAXREG"] == 2
    assert not any(count[name] for name in ("STL", "LDL", "STS", "LDS", "CALL"))
    # The whole device's order is asked for at the cluster's barrier alone: before the product, and
    # at the end of both roles.
    assert len(re.findall(r"\bMEMBAR\S*\.GPU\b", sass)) == 3


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("patches", [16384, 4096 + 77, 300])
@each_dtype
def test_released_shape_on_gpu(dtype, patches):
    launch, device = launcher(OP, "cuda")
    args = on(device, arguments(dtype, (patches, 256, 16, 1536, 1152)))
    if reason := backend.why_not(*args, 1e-6):
        pytest.skip(reason)
    y = launch(*args, 1e-6)
    some = torch.tensor([0, 1, 127, 128, 299, patches // 2, patches - 2, patches - 1])
    DEFINITION.check(y[some], on("cpu", (*(t[some] for t in args[:3]), *args[3:])))
    check_repeatable(launch, *args, 1e-6)


@pytest.mark.gpu
def test_captured_on_gpu():
    launch, device = launcher(OP, "cuda")
    args = on(device, arguments(torch.bfloat16, (300, 64, 16, 64, 48)))
    if reason := backend.why_not(*args, 1e-6):
        pytest.skip(reason)
    check_captures(launch, *args, 1e-6)
