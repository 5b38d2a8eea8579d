"""Every fused kernel once or twice, small and quick: the first thing to run on a new machine, and
what compute-sanitizer is run on.

Arguments, the oracle and eager's own error come from the CPU, so that hardly any kernel is launched
but the one in question.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import pixeldiff
from bench.accuracy import Judge
from bench.shapes import SYSTEMS
from bench.work import WORK
from pixeldiff.ops.examples import Geometry, arguments
from pixeldiff.ops.registry import OPS, explain

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Odd numbers of rows, so that the last tile of every kernel is cut. The widths of released networks
# are the only ones some kernels take; those of PiT's attention and of L2P's differ.
_PID = {"text": 13, "width": 1536, "heads": 24, "hidden": 4096, "attn": 1152}
GEOMETRIES = {
    "small": Geometry(grid=(3, 5)),
    "pid": Geometry(grid=(5, 7), **_PID),
    "pit": Geometry(grid=(5, 7), **{**_PID, "text": 0, "width": 1152, "heads": 16, "head_dim": 72}),
    "l2p": Geometry(grid=(3, 5), text=5, width=3840, heads=30, head_dim=128, hidden=10240),
}
# Of these only the attention's own differ; the others would be the same rows, wider.
WIDE = {"joint_attention", "joint_attention_fp8", "qk_norm_rope", "qkv_norm_rope"}
DECODER = {"local_decoder_down", "local_decoder_up"}


def geometries(op: str) -> dict[str, Geometry]:
    if op in DECODER:
        # Of the form with three channels outermost: that one, two thin ones and a wide one.
        whole = replace(SYSTEMS["l2p"].at(8192), grid=(3, 5), patch=32)
        return {f"level{i}": replace(whole, level=i) for i in (0, 1, 2, 4)}
    names = ("small", "pid", "pit", "l2p") if op in WIDE else ("small", "pid")
    return {name: GEOMETRIES[name] for name in names}


def cases(*backends: str) -> list:
    return [
        pytest.param(op.name, b.name, dtype, name, id=f"{op.name}-{b.name}-{dtype}-{name}")
        for op in OPS.values()
        for b in op.backends
        if b.name in backends
        for dtype in DTYPES
        for name in geometries(op.name)
    ]


@functools.lru_cache(maxsize=2)  # the backends of an op take turns
def given(op: str, dtype: str, geometry: str) -> tuple[tuple, Judge]:
    args = arguments(op, "cpu", DTYPES[dtype], geometries(op)[geometry])
    return args, Judge(op, WORK[op], args, OPS[op].reference)


def check(op: str, backend: str, dtype: str, geometry: str, device: str) -> None:
    args, judge = given(op, dtype, geometry)
    args = tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)
    reason = dict(explain(op, *args))[backend]
    if reason is not None:
        pytest.skip(reason)
    with torch.no_grad(), pixeldiff.backend(**{op: backend}):
        result = getattr(torch.ops.pixeldiff, op).default(*args)
    results = (result,) if isinstance(result, Tensor) else result
    accuracy = judge(tuple(r.cpu() for r in results))
    assert accuracy.of_budget <= 1, (
        f"error {accuracy.error:.2g}, eager's {accuracy.eager_error:.2g}"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("op", "backend", "dtype", "geometry"), cases("triton", "cuda"))
def test_on_a_gpu(op, backend, dtype, geometry):
    check(op, backend, dtype, geometry, "cuda")


@pytest.mark.parametrize(
    ("op", "backend", "dtype", "geometry"),
    [c for c in cases("cpu") if c.values[3] == "small" or "level" in c.values[3]],
)
def test_on_a_cpu(op, backend, dtype, geometry):
    check(op, backend, dtype, geometry, "cpu")


@pytest.mark.parametrize("op", sorted(OPS))
def test_there_is_such_a_call(op):
    """Without a GPU: a geometry that an op has not got would be found on one only."""
    for geometry in geometries(op).values():
        made = arguments(op, "meta", torch.bfloat16, geometry)
        assert all(a.numel() for a in made if isinstance(a, Tensor))


def test_every_op_that_has_a_kernel_is_here():
    fused = {op.name for op in OPS.values() if {b.name for b in op.backends} & {"triton", "cuda"}}
    assert {c.values[0] for c in cases("triton", "cuda")} == fused
    assert fused <= WORK.keys()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_kernel_takes_one_of_these_calls():
    """A kernel that refuses all of them would be left out without a word."""
    left = set()
    for op in OPS.values():
        for b in op.backends:
            if b.name in ("triton", "cuda"):
                reasons = [
                    dict(explain(op.name, *arguments(op.name, "cuda", dtype, g)))[b.name]
                    for dtype in DTYPES.values()
                    for g in geometries(op.name).values()
                ]
                if None not in reasons:
                    left.add(f"{op.name} {b.name}: {reasons[0]}")
    assert not left


def test_a_wrong_result_is_noticed(monkeypatch):
    """One value in the last row, off by four times what a rounding may be."""
    right = torch.ops.pixeldiff.swiglu.default

    class Wrong:
        @staticmethod
        def default(*args):
            result = right(*args).clone()
            result[..., -1, -1] *= 1 + 2**-5
            return result

    monkeypatch.setattr(torch.ops.pixeldiff, "swiglu", Wrong)
    with pytest.raises(AssertionError, match="error"):
        check("swiglu", "cpu", "bf16", "small", "cpu")
