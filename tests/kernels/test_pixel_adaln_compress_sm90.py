"""The sm_90a kernel of pixel_adaln_compress: its source on an emulator of a cluster, in random
orders and with faults planted, or on a GPU; and what the compiler makes of it."""

import re
from types import SimpleNamespace

import pytest
import torch
from emulated import EmulatorError
from emulated_pixel_adaln import Args, barriers, emulate, modulated, pixel_adaln_compress
from harness import NAMES, check_not_finite_like, launcher, on
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine_code import check_register_trade, compiled_for
from rules import (
    assert_bitwise,
    assert_one_rounding,
    check_captures,
    check_repeatable,
    f64,
    rms,
)
from test_pixel_adaln_compress import DEFINITION, OP, arguments, chunk, reference

from pixeldiff import native
from pixeldiff.ops.cuda import pixel_adaln_compress as backend
from pixeldiff.ops.registry import explain

HALVES = (torch.bfloat16, torch.float16)
each_backend = pytest.mark.parametrize(
    "where", ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
)
each_dtype = pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
# (patches, pixels, channels a pixel, D, A). A block's tile is 128 patches by 8 pixels, a cluster's
# twice both; a ring holds 4 steps of 64 of D.
SHAPES = {
    "few": (5, 7, 16, 40, 24),
    "one": (1, 1, 16, 8, 8),
    "next-row": (129, 2, 16, 16, 8),
    "next-pixel": (3, 9, 16, 64, 8),
    "next-cluster": (257, 17, 16, 24, 8),
    "primes": (131, 37, 16, 104, 13),
    "round-the-ring": (130, 11, 16, 64 * 9 + 8, 8),
}


def run(where, args, **how):
    """The result, on the CPU."""
    if where == "emulated":
        assert backend.why_not_call(*args) is None
        return pixel_adaln_compress(*args, **how)
    launch, device = launcher(OP, "cuda")
    args = on(device, args)
    reason = backend.why_not(*args, 1e-6)
    if reason is not None:
        pytest.skip(reason)
    return launch(*args, 1e-6).cpu()


def exact(dtype, shape):
    """Arguments whose chunks are sums of small integers, the same in any order."""
    q, u, ada_weight, ada_bias, *rest = arguments(dtype, shape)
    return (q, u.mul(2).round(), ada_weight.mul(8 * shape[3] ** 0.5).round() / 64, ada_bias, *rest)


def oracle_of_z(q, u, ada_weight, ada_bias, norm_weight):
    q, u, ada_weight, ada_bias, norm_weight = f64(q, u, ada_weight, ada_bias, norm_weight)
    shift, scale = (chunk(u, ada_weight, ada_bias, *q.shape[1:], c) for c in (0, 1))
    return (rms(q) * norm_weight * (1 + scale) + shift).reshape(q.shape[0], -1)


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


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@each_dtype
def test_exact_sums_leave_one_rounding(dtype, shape):
    """All of z, which the product with the weight would average."""
    args = exact(dtype, shape)[:5]
    assert_one_rounding(modulated(*args), oracle_of_z(*args))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(HALVES),
    st.integers(4, 280),
    st.integers(1, 36),
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(0, 2**63 - 1),
)
def test_random_sizes_in_random_orders(dtype, rows, pixels, eighths, clusters, seed):
    """Clusters with several tiles and with none."""
    args = arguments(dtype, (rows, pixels, 16, 8 * eighths, 8))
    DEFINITION.check(run("emulated", args, clusters=clusters, seed=seed), args)


def test_the_order_does_not_change_a_bit():
    args = arguments(torch.bfloat16, (130, 33, 16, 136, 8))
    want = run("emulated", args)
    for seed, clusters in ((1, 1), (2, 2), (3, 4)):
        assert_bitwise(run("emulated", args, seed=seed, clusters=clusters), want)


@each_backend
def test_strided(where):
    """Pixels before patches, rows of u and of the weight apart."""
    q, u, ada_weight, *rest = arguments(torch.bfloat16, (140, 9, 16, 72, 8))
    spread = torch.full((9, 140, 24), torch.nan).bfloat16()
    spread[..., :16] = q.transpose(0, 1)
    apart = [torch.full((t.shape[0], 88), torch.nan).bfloat16() for t in (u, ada_weight)]
    for t, value in zip(apart, (u, ada_weight), strict=True):
        t[:, 8:80] = value
    u, ada_weight = (t[:, 8:80] for t in apart)
    args = (spread[..., :16].transpose(0, 1), u, ada_weight, *rest)
    DEFINITION.check(run(where, args), args)


def test_offsets_past_2_31():
    """Of q, u and the weight, in elements; nothing between their rows is ever touched."""
    q, u, ada_weight, *rest = exact(torch.bfloat16, (5, 7, 16, 40, 8))

    def far(t, stride):
        wide = torch.empty((t.shape[0] - 1) * stride + t[0].numel(), dtype=t.dtype)
        view = wide.as_strided(t.shape, (stride, *t.stride()[1:]))
        return view.copy_(t)

    args = (far(q, 1 << 30), far(u, 1 << 30), far(ada_weight, 1 << 22), *rest[:2])
    assert all((t.shape[0] - 1) * t.stride(0) > 1 << 31 for t in args[:3])
    assert_bitwise(modulated(*args), modulated(q, u, ada_weight, *rest[:2]))


@each_backend
@each_dtype
def test_not_finite(dtype, where):
    """A pixel's NaN or infinity, and one in u, take the tokens of their patches."""
    q, u, *rest = arguments(dtype, (6, 9, 16, 24, 40))
    q[1, 5, 3], q[2, 8, 7], u[4, 0] = torch.nan, torch.inf, torch.inf
    a = run(where, (q, u, *rest))
    wide = [t.float() for t in (q, u, *rest)]
    check_not_finite_like(a, reference(*wide, 1e-6).to(dtype))
    assert a.isfinite().all(1).tolist() == [True, False, False, True, False, True]


@each_dtype
def test_a_pixel_that_is_not_finite_is_alone(dtype):
    q, u, *rest = arguments(dtype, (6, 9, 16, 24, 8))
    q[1, 5, 3], q[2, 8, 7] = torch.nan, torch.inf
    z = modulated(q, u, *rest[:3]).unflatten(1, (9, 16))
    assert (~z.isfinite()).any(2).nonzero().tolist() == [[1, 5], [2, 8]]


# --- the launch


def test_launch_in_pieces(monkeypatch):
    """What Python gives the extension, with the emulator in its place: two pieces and a rest."""
    sizes = []

    def kernel(shape, dtype, q, u, ada, vectors, z, eps, device, stream):
        sizes.append(shape)
        emulate("emulate_pixel_adaln_compress", Args(*shape, dtype, *q, *u, *ada, *vectors, z, eps))

    monkeypatch.setattr(native, "load", lambda: SimpleNamespace(pixel_adaln_compress_cuda=kernel))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(backend, "PIECE", 33)
    args = arguments(torch.bfloat16, (70, 7, 16, 24, 24))
    DEFINITION.check(backend.launch(*args, 1e-6), args)
    assert sizes == [(33, 7, 24), (33, 7, 24), (4, 7, 24)]


@pytest.mark.parametrize(("patches", "pixels"), [(3, 0), (0, 4)])
def test_nothing_to_launch(patches, pixels):
    q, u, ada_weight, ada_bias, norm, weight, bias = arguments(torch.bfloat16, (3, 4, 16, 8, 4))
    few = slice(16 * pixels)
    args = (q[:patches, :pixels], u[:patches], ada_weight[: 96 * pixels], ada_bias[: 96 * pixels])
    y = backend.launch(*args, norm, weight[:, few], bias, 1e-6)
    assert_bitwise(y, bias.expand(patches, 4))


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
    args = exact(torch.bfloat16, (70, 33, 16, 64 * 5, 8))[:5]
    where = barriers(OP)[barrier] if barrier else (0, 0)
    for seed in range(16):
        try:
            z = modulated(*args, seed=seed, fault=kind, barriers=where)
            assert_one_rounding(z, oracle_of_z(*args))
        except (EmulatorError, AssertionError):
            return
    pytest.fail("sixteen runs went by as if nothing were wrong")


# --- what is refused


def test_why_not():
    args = arguments(torch.bfloat16, (3, 4, 16, 16, 8))
    q, u, ada, *rest = args

    def wide(t, by, first=0):
        return torch.zeros(t.shape[0], t.shape[1] + by).bfloat16()[:, first : first + t.shape[1]]

    assert backend.why_not_call(*args) is None
    float32 = arguments(torch.float32, (3, 4, 16, 16, 8))
    assert backend.why_not_call(*float32) == "takes bfloat16 and float16, got torch.float32"
    assert backend.why_not_call(*arguments(torch.bfloat16, (3, 4, 8, 16, 8))) == (
        "takes 16 channels of a pixel, got 8"
    )
    assert backend.why_not_call(*args[:6], args[6].half()) == (
        "needs every tensor in the dtype of q, torch.bfloat16, got torch.float16"
    )
    assert backend.why_not_call(q, wide(u, 8), *args[2:]) is None
    assert backend.why_not_call(q, wide(u, 4), *args[2:]) == (
        "needs rows of u that are a positive multiple of 16 bytes apart, got 40"
    )
    assert backend.why_not_call(q, u, wide(ada, 8, 4), *rest) == (
        "needs ada_weight to start at a multiple of 16 bytes"
    )
    assert backend.why_not_call(q, u, ada[:1].expand_as(ada), *rest) == (
        "needs rows of ada_weight that are a positive multiple of 16 bytes apart, got 0"
    )
    strided = torch.zeros(3, 4, 20).bfloat16()[..., :16]
    assert backend.why_not_call(strided, *args[1:]) == (
        "needs strides of q in multiples of 8, got (80, 20, 1) elements; call .contiguous()"
    )
    between = torch.zeros(20).bfloat16()[4:]
    assert backend.why_not_call(*args[:4], between, *args[5:]) == (
        "needs norm_weight to start at a multiple of 16 bytes"
    )
    big = torch.empty(3, 2**20 + 1, 16, dtype=torch.bfloat16, device="meta")
    assert backend.why_not_call(big, *args[1:]) == (
        "takes 1 to 2^20 channels of u and pixels, got 16 and 1048577"
    )


REFUSED = {
    "fp32": ({"dtype": 0}, "fp32 has no such kernel"),
    "no patches": ({"rows": 0}, "sizes must be positive"),
    "no channels": ({"D": 0}, "sizes must be positive"),
    "many": ({"rows": 1 << 30, "pixels": 1 << 20}, "too many patches, pixels or channels"),
    "odd": ({"q_stride_pixel": 20}, "strides of q must be multiples of 8"),
    "nowhere": ({"ada_bias": 0}, "every tensor must start at a multiple of 16 bytes"),
    "between": ({"out": 1032}, "every tensor must start at a multiple of 16 bytes"),
    "rows of u": ({"u_stride": 20}, "needs strides that are positive multiples of 16 bytes"),
    "start": ({"ada_weight": 1028}, "must start at a multiple of 16 bytes"),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED)
def test_launch_refuses(changed, message):
    """What the launch checks before it starts anything."""
    args = arguments(torch.bfloat16, (3, 4, 16, 16, 8))
    with pytest.raises(EmulatorError, match=f"^{re.escape(message)}$"):
        modulated(*args[:5], changed=changed)


def test_on_request_only():
    args = arguments(torch.bfloat16, (3, 4, 16, 16, 8))
    assert ("cuda", None) not in explain(OP, *args, 1e-6)[:1]
    assert any(name == "cuda" and reason for name, reason in explain(OP, *args, 1e-6))


# --- what the compiler makes of it


@pytest.fixture(scope="module", params=["true", "false"], ids=["bf16", "fp16"])
def compiled(request):
    """(the kernel, what the compiler said)"""
    definition = f"PIXELDIFF_BF16={request.param}"
    (kernel,), said = compiled_for("90a", "pixel_adaln_compress_sm90.cu", definition)
    assert kernel.name == f"pixel_adaln_compress_sm90_kernel<{request.param}>"
    return kernel, said


def test_registers(compiled):
    kernel, said = compiled
    check_register_trade(kernel, said, producer=40, consumers=232)


def test_instructions(compiled):
    sass = compiled[0].sass
    names = re.findall(r"\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]+)", sass)
    count = {
        name: sum(found.split(".")[0] == name for found in names)
        for name in ("HGMMA", "UTMALDG", "USETMAXREG", "STL", "LDL", "STS", "LDS", "CALL")
    }
    # A step of 64 is 4 products, and the loop is unrolled.
    assert count["HGMMA"] % 4 == 0
    assert len(re.findall(r"HGMMA\.64x256x16", sass)) == count["HGMMA"] > 0
    # The patches, and four pairs of each of two chunks.
    assert count["UTMALDG"] == len(re.findall(r"UTMALDG\.4D\.MULTICAST", sass)) == 1 + 8
    assert count["USETMAXREG"] == 2
    assert not any(count[name] for name in ("STL", "LDL", "STS", "LDS", "CALL"))
    # q and the biases before the product, 16 bytes at a time, and the result.
    loads = [i for i, name in enumerate(names) if name.startswith("LDG")]
    first = next(i for i, name in enumerate(names) if name.startswith("HGMMA"))
    assert {names[i] for i in loads} == {"LDG.E.128.CONSTANT"}
    assert len(loads) == 4 * 2 * 2 + 1
    assert max(loads) < first
    assert sum(name == "STG.E.128" for name in names) == 4 * 2
    # The whole device's order is asked for at the cluster's barrier alone: before the product, and
    # at the end of both roles.
    assert sum(name.startswith("MEMBAR") and name.endswith("GPU") for name in names) == 3


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("patches", [16384, 8192 + 77, 300])
@each_dtype
def test_released_shape_on_gpu(dtype, patches):
    launch, device = launcher(OP, "cuda")
    args = on(device, arguments(dtype, (patches, 256, 16, 1536, 1152)))
    if reason := backend.why_not(*args, 1e-6):
        pytest.skip(reason)
    y = launch(*args, 1e-6)
    some = torch.tensor([0, 1, 127, 128, 299, patches // 2, patches - 2, patches - 1])
    DEFINITION.check(y[some], on("cpu", (*(t[some] for t in args[:2]), *args[2:])))
    check_repeatable(launch, *args, 1e-6)


@pytest.mark.gpu
def test_captured_on_gpu():
    launch, device = launcher(OP, "cuda")
    args = on(device, arguments(torch.bfloat16, (300, 64, 16, 64, 48)))
    if reason := backend.why_not(*args, 1e-6):
        pytest.skip(reason)
    check_captures(launch, *args, 1e-6)
