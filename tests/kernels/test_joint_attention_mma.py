"""The attention kernel of sm_80 and later without a GPU: faults planted on the emulator, and what
the compiler makes of it. tests/kernels/test_joint_attention_sm90.py runs it in random orders, and
tests/kernels/test_joint_attention.py the op's own cases, on the emulator and on a GPU."""

import re

import pytest
import torch
from emulated import EmulatorError, attention
from machine_code import compiled_for
from rules import Draw, assert_bitwise
from test_joint_attention import masks, oracles
from test_joint_attention_sm90 import arguments, dims

from bench.ptxas import ARCHS
from pixeldiff.ops.cuda import joint_attention as backend

ALWAYS = (0, 1000)
# Of the waits and barriers that a thread comes to, where queries go to registers (head dims to 80)
# the first is for them.
FAULTS = {
    "queries read before they are there": ("weak-wait", (0, 1)),
    "queries of others read before they are there": ("skip-sync", (0, 1)),
    "queries overwritten while they are read": ("skip-sync", (1, 2)),
    "keys and values read before they are there": ("weak-wait", (1, 1000)),
    "those of others read before, or overwritten while they are read": ("skip-sync", (2, 1000)),
    "no wait": ("weak-wait", ALWAYS),
    "another swizzle than is read": ("other-swizzle", ALWAYS),
    "columns of another lane": ("other-column", ALWAYS),
}


@dims
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_faults_are_noticed(d, fault):
    """In some order of a few: by the emulator, or because the result is wrong."""
    kind, where = fault
    q, k, v = arguments(d, 120, 500, heads=1)
    want, _ = oracles(q, k, v)
    for seed in range(16):
        try:
            o, _ = attention(q, k, v, kernel="mma", seed=seed, fault=kind, barriers=where)
        except EmulatorError:
            return
        if not (o.double() - torch.from_numpy(want)).abs().max() < 0.02:
            return
    pytest.fail("sixteen runs went by as if nothing were wrong")


@dims
def test_masked_values_are_not_copied(d):
    """Rows that hold NaN, in either stage, and in rows of a step of which others take part."""
    q, k, v = arguments(d, 20, 300)
    mask = masks(1, 300)["scattered"]
    want = attention(q, k, v, key_mask=mask, kernel="mma")[0]
    k[:, ~mask[0]] = v[:, ~mask[0]] = torch.nan
    got = attention(q, k, v, key_mask=mask, kernel="mma")[0]
    assert got.isfinite().all()
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "layout",
    [((2, 1, 1, 64), (2**31, 64, 64, 1)), ((1, 3, 1, 64), (0, 2**30 + 8, 64, 1))],
    ids=["images", "rows"],
)
def test_offsets_past_two_to_the_31(layout):
    base = torch.empty(2**31 + 128, dtype=torch.bfloat16)  # pages that are not touched cost nothing
    far = base.as_strided(*layout)
    near = Draw(torch.bfloat16)(*layout[0])
    far.copy_(near)
    for a, b in zip(
        attention(far, far, far, return_lse=True, kernel="mma"),
        attention(near, near, near, return_lse=True, kernel="mma"),
        strict=True,
    ):
        assert_bitwise(a, b)


# --- which devices run it


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((8, 0), "80;89;90a;100;120", True),
        ((8, 6), "80;89;90a;100;120", True),
        ((8, 9), "80;89;90a;100;120", True),
        ((9, 0), "80;89;90a;100;120", True),
        ((10, 0), "80;89;90a;100;120", True),
        ((10, 3), "80;89;90a;100;120", True),
        ((12, 1), "80;89;90a;100;120", True),
        ((13, 0), "80;89;90a;100;120", True),  # from the last one's PTX
        ((11, 0), "80;89;90a;100;120", False),
        ((9, 0), "80;90a", True),
        ((9, 0), "80", True),  # from PTX
        ((8, 9), "90a", False),
        ((10, 0), "90a", False),
        ((8, 0), "89;120", False),
        ((10, 0), "100a", True),
        ((10, 3), "100a", False),
    ],
)
def test_capabilities(capability, archs, runs):
    reason = backend.why_not_capability(capability, archs)
    name = "{}.{}".format(*capability)
    if runs:
        assert reason is None
    else:
        assert reason == f"was built for {archs} (PIXELDIFF_CUDA_ARCHS), this device is {name}"


def test_older_capability():
    reason = backend.why_not_capability((7, 5), "80;120")
    assert reason == "needs compute capability 8.0 or later, this device is 7.5"


# --- what the compiler makes of it


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("bf16", ["true", "false"], ids=["bf16", "fp16"])
def test_machine_code(bf16, arch):
    """Two blocks' registers, no spills; products, fragments and copies by their own instructions,
    every one of them once for a step, and 16 bytes at a time."""
    kernels, _ = compiled_for(arch, "joint_attention_mma.cu", f"PIXELDIFF_BF16={bf16}")
    names = [f"joint_attention_mma_kernel<{n}, {bf16}>" for n in (128, 64, 80)]
    assert [kernel.name for kernel in kernels] == names
    for kernel, channels, keys in zip(kernels, (128, 64, 80), (32, 64, 64), strict=True):
        assert kernel.registers * 2 * 128 <= 65536
        assert (kernel.stack, kernel.spills) == (0, 0)

        def count(pattern, code=kernel.sass):
            return len(re.findall(rf"\b{pattern}", code))

        products = 2 * 2 * (channels // 16) * (keys // 8)
        assert count(r"HMMA\.16816\.F32" + (r"\.BF16" if bf16 == "true" else r"\b")) == products
        assert count("HMMA") == products
        # 16 x 16 elements each: of queries, of keys, and transposed of values.
        queries = 2 * (channels // 16)
        assert count(r"LDSM\.16\.M88\.4") == queries + channels // 16 * (keys // 16)
        assert count(r"LDSM\.16\.MT88\.4") == channels // 16 * (keys // 16)
        # Of queries, and of keys and values of the first step and of the next.
        pieces = (128 + 2 * 2 * keys) * (channels // 8) // 128
        assert count(r"LDGSTS\.E\.BYPASS[.A-Z0-9]*\.128") == count("LDGSTS") == pieces
        assert count("BAR") == (1 if channels == 128 else 2)
        # None by polynomial; two factors in each row of 16 queries.
        assert count(r"MUFU\.EX2") == 2 * (keys // 2 + 2)
