"""The sm_90a attention kernel without a GPU: its source on an emulator, in random orders and with
faults planted; and what the compiler makes of it. tests/kernels/test_joint_attention.py runs the
op's own cases on it, on the emulator and on a GPU. What asks for a `kernel` runs the one of sm_80
too, of which tests/kernels/test_joint_attention_mma.py has the rest."""

import re

import pytest
import torch
from emulated import EmulatorError, attention, barriers_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine_code import check_register_trade, compiled_for, instructions
from rules import Draw, assert_bitwise, assert_within_twice_eager
from test_joint_attention import eager, eager_lse, masks, oracles

from pixeldiff.ops.cuda import joint_attention as backend

DIMS = (64, 72, 128)
dims = pytest.mark.parametrize("d", DIMS)
kernels = pytest.mark.parametrize("kernel", ["sm90", "mma"])


def arguments(d, queries=140, keys=300, images=1, heads=2, dtype=torch.bfloat16):
    draw = Draw(dtype)
    return tuple(draw(images, rows, heads, d) for rows in (queries, keys, keys))


def check(args, key_mask=None, **how):
    o, lse = attention(*args, key_mask=key_mask, return_lse=True, **how)
    want, want_lse = oracles(*args, key_mask=key_mask)
    assert_within_twice_eager(o, eager(*args, key_mask), want)
    assert_within_twice_eager(lse, eager_lse(*args[:2], key_mask), want_lse)
    return o, lse


# --- in any order


@kernels
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(DIMS),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.integers(1, 2),
    st.integers(1, 140),
    st.integers(1, 400),
    st.integers(1, 2),
    st.integers(1, 4),
    st.sampled_from([None, *masks(1, 1)]),
    st.integers(0, 2**63 - 1),
)
def test_random_sizes_in_random_orders(
    kernel, d, dtype, b, queries, keys, heads, blocks, kind, seed
):
    """Against fp64: every length, blocks with several tiles and with none, each way to mask."""
    args = arguments(d, queries, keys, b, heads, dtype)
    mask = None if kind is None else masks(b, keys)[kind]
    if mask is not None and not mask.any(1).all():
        mask = ~mask
    check(args, mask, kernel=kernel, blocks=blocks, seed=seed)


@kernels
@dims
@pytest.mark.parametrize("masked", [False, True], ids=["all-keys", "masked"])
def test_the_order_does_not_change_a_bit(d, masked, kernel):
    args = arguments(d)
    mask = masks(1, 300)["scattered"] if masked else None
    want = check(args, mask, kernel=kernel)
    for seed, blocks in ((1, 1), (2, 3), (3, 1)):
        got = attention(*args, None, mask, True, kernel=kernel, seed=seed, blocks=blocks)
        for a, b in zip(got, want, strict=True):
            assert_bitwise(a, b)


# --- the rescale rule


@kernels
def test_weights_may_grow_before_the_maximum_follows(kernel):
    """Logits that climb from tile to tile, by less than the slack of 2^8 and by more: the same
    result, and that of the exact softmax."""
    for step in (1.0, 5.0, 40.0):
        q = torch.ones(1, 64, 1, 64).bfloat16() / 8
        k = torch.zeros(1, 640, 1, 64)
        k[..., 0] = (torch.arange(640) // 128)[None, :, None] * step * 8
        k[..., 1] = torch.linspace(-8, 8, 640)[None, :, None]
        v = Draw(torch.bfloat16)(1, 640, 1, 64)
        args = (q, k.bfloat16(), v)
        o, lse = attention(*args, scale=1.0, return_lse=True, kernel=kernel)
        want, want_lse = oracles(*args, scale=1.0)
        plain = torch.softmax(torch.einsum("blgd,bsgd->bgls", *(t.float() for t in args[:2])), -1)
        plain = torch.einsum("bgls,bsgd->blgd", plain.bfloat16(), v)
        assert_within_twice_eager(o, plain, want)
        torch.testing.assert_close(lse.double(), torch.from_numpy(want_lse), rtol=1e-6, atol=3e-6)


@kernels
def test_one_huge_row_does_not_disturb_its_neighbours(kernel):
    """It makes the warp move maxima and take differences first; the other rows of the warp stay
    what they are without it, to the bit."""
    q, k, v = arguments(64, 64, 400, heads=1)
    alone = attention(q, k, v, return_lse=True, kernel=kernel)
    q[0, 5] *= 3e4
    check((torch.cat((q[:, :5], q[:, 6:]), 1), k, v), kernel=kernel)
    o, lse = attention(q, k, v, return_lse=True, kernel=kernel)
    rest = [row for row in range(64) if row != 5]
    for a, b in zip((o, lse), alone, strict=True):
        assert_bitwise(a[:, rest], b[:, rest])
    want, want_lse = oracles(q[:, rest], k, v)
    assert_within_twice_eager(o[:, rest], eager(q[:, rest], k, v), want)
    torch.testing.assert_close(lse[:, rest].double(), torch.from_numpy(want_lse), rtol=0, atol=3e-4)
    assert o[:, 5].isfinite().all()


@kernels
def test_one_infinite_logit_makes_its_row_nan(kernel):
    """At whichever key: the polynomial, which makes numbers of NaN, computes some of them."""
    q, k, v = arguments(64, 16, 32, heads=32)
    q[..., 0] = 1
    for head in range(32):
        k[0, head, head, 0] = torch.inf
    o, lse = attention(q, k, v, return_lse=True, kernel=kernel)
    assert o.isnan().all()
    assert lse.isnan().all()


# --- what goes wrong is noticed

FAULTS = {
    "queries read before they are there": ("skip-wait", "q_full"),
    "queries overwritten while they are read": ("skip-wait", "q_empty"),
    "keys read before they are there": ("skip-wait", "k_full"),
    "keys overwritten while they are read": ("skip-wait", "k_empty"),
    "values read before they are there": ("skip-wait", "v_full"),
    "values overwritten while they are read": ("skip-wait", "v_empty"),
    "values read before they are cleared": ("skip-wait", "v_clean"),
    "an arrival lost": ("drop-arrival", "k_empty"),
    "values cleared but not published": ("no-proxy-fence", None),
    "logits read before they are there": ("no-product-wait", None),
    "another swizzle than the products read": ("other-swizzle", None),
    "fewer bytes announced than arrive": ("short-copy", None),
}


@dims
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_faults_are_noticed(d, fault):
    """In some order of a few: by the emulator, or because the result is wrong."""
    kind, barrier = fault
    q, k, v = arguments(d, 130, 700, heads=1)
    mask = masks(1, 700)["scattered"] if barrier == "v_clean" or kind == "no-proxy-fence" else None
    if mask is not None:
        v[~mask] = torch.nan
    where = barriers_of(d)[barrier] if barrier else (0, 0)
    want, _ = oracles(q, k, torch.nan_to_num(v), key_mask=mask)
    for seed in range(16):
        try:
            o, _ = attention(
                q, k, v, key_mask=mask, blocks=1, seed=seed, fault=kind, barriers=where
            )
        except EmulatorError:
            return
        if not (o.double() - torch.from_numpy(want)).abs().max() < 0.02:
            return
    pytest.fail("sixteen runs went by as if nothing were wrong")


def test_a_deadlock_says_who_waits():
    q, k, v = arguments(64, 64, 900, heads=1)
    where = barriers_of(64)["k_empty"]
    with pytest.raises(EmulatorError, match=r"deadlock: .*1 threads waiting for barrier \d+"):
        attention(q, k, v, fault="drop-arrival", barriers=where)


# --- what the backend refuses


def test_why_not():
    def reason(d=64, scale=0.125, dtype=torch.bfloat16, stretch=1):
        q, k, v = (torch.zeros(1, 2, 3, d * stretch, dtype=dtype)[..., :d] for _ in range(3))
        return backend.why_not_call(q, k, v, scale)

    for d in (8, 64, 72, 128):
        assert reason(d) is None
    for d in (4, 12, 136):
        assert reason(d) == f"takes head dims that are multiples of 8 up to 128, got {d}"
    assert reason(dtype=torch.float32) == "takes bfloat16 and float16, got torch.float32"
    assert reason(scale=0.0) == "takes a positive scale, got 0.0"
    assert reason(stretch=2) is None
    q = torch.zeros(1, 2, 3, 68, dtype=torch.bfloat16)
    v = q[..., :64]
    k = torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16)
    assert backend.why_not_call(k, k, v, 1.0) == (
        "needs strides of v that are positive multiples of 16 bytes, got (408, 204, 68, 1) "
        "elements; call .contiguous()"
    )
    assert "positive multiples" in backend.why_not_call(k, k[:, :1].expand(1, 2, 3, 64), k, 1.0)
    assert backend.why_not_call(k, k, torch.zeros(400).bfloat16()[1:385].view_as(k), 1.0) == (
        "needs v to start at a multiple of 16 bytes"
    )
    q = torch.empty(2**20, 128, 2**11, 64, dtype=torch.bfloat16, device="meta")
    assert "fewer than 2^31 tiles" in backend.why_not_call(q, q, q, 1.0)


# --- what the compiler makes of it


@pytest.fixture(scope="module", params=["true", "false"], ids=["bf16", "fp16"])
def compiled(request):
    """(kernels for 128, 64 and 80 channels, what the compiler said)"""
    kernels, said = compiled_for(
        "90a", "joint_attention_sm90.cu", f"PIXELDIFF_BF16={request.param}"
    )
    names = [f"joint_attention_sm90_kernel<{n}, {request.param}>" for n in (128, 64, 80)]
    assert [k.name for k in kernels] == names
    return kernels, said


def test_registers(compiled):
    kernels, said = compiled
    for kernel in kernels:
        check_register_trade(kernel, said, producer=56, consumers=224)


def test_instructions(compiled):
    """Hopper's tensor cores and copy engine, and an eighth of the exponentials elsewhere."""
    for kernel, channels in zip(compiled[0], (128, 64, 80), strict=True):
        count = instructions(kernel.sass)
        # In the first step, in the others, and after the last.
        assert count["HGMMA"] == 2 * (channels // 16) + 2 * 8
        panels = channels // (64 if channels % 64 == 0 else 16)
        assert count["UTMALDG"] == 3 * panels
        assert count["USETMAXREG"] == 2
        assert count["STL"] == count["LDL"] == count["LDSM"] == count["HMMA"] == 0
        # 64 logits a thread, in the first step and in the others, and two factors in each.
        assert len(re.findall(r"MUFU\.EX2", kernel.sass)) == 2 * (56 + 2)
