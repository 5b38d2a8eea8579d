"""What ops are raced against that is none of their backends: the same results, and rows that say
why where it cannot run."""

from __future__ import annotations

import pytest
import torch

from bench.accuracy import Judge
from bench.ceilings import Ceilings
from bench.kernels import Plan, measure
from bench.rivals import RIVALS
from bench.shapes import cases
from bench.work import WORK
from pixeldiff.ops.examples import arguments
from pixeldiff.ops.registry import OPS

CPU = torch.device("cpu")
TOP = Ceilings(gb_s=10.0, tflop_s=0.1)
PLAN = Plan(
    CPU, sizes=(1024,), scale=16, rounds=3, seconds=0, compiled=False, rivals=True, matrix=64
)
# Of PyTorch and of other ops; the others are kernels of the GPU.
EVERYWHERE = [
    (op, name) for op, all in RIVALS.items() for name, rival in all.items() if rival.needs is None
]


@pytest.mark.parametrize(("op", "name"), EVERYWHERE)
def test_computes_the_op(op, name):
    (case, *_) = cases(op, (1024,), 16)
    args = arguments(op, CPU, torch.bfloat16, case.geometry)
    # Its context chooses a kernel of the GPU.
    result = RIVALS[op][name].call(*args)
    assert Judge(op, WORK[op], args, OPS[op].reference)(result).of_budget <= 1


def test_rows_of_rivals():
    (case, *_) = cases("joint_attention", (1024,), 16)
    rows = {r.backend: r for r in measure(PLAN, case, "bf16", TOP)}
    assert rows.keys() >= {"eager", "triton", "cuda", *RIVALS["joint_attention"]}
    for name in RIVALS["joint_attention"]:
        assert rows[name].status == "refused"
        assert rows[name].reason == "runs on cuda, the tensors are on cpu"


def test_names_are_no_backends():
    for op, rivals in RIVALS.items():
        backends = {b.name for b in OPS[op].backends}
        assert not rivals.keys() & {*backends, "eager", "compiled"}
        assert {r.needs for r in rivals.values()} <= {None, *backends}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
@pytest.mark.parametrize("op", RIVALS)
def test_races_on_a_gpu(op):
    (case, *_) = cases(op, (1024,), 16)
    plan = Plan(torch.device("cuda"), rounds=3, seconds=0, compiled=False, rivals=True)
    rows = {r.backend: r for r in measure(plan, case, "bf16", TOP)}
    for name in RIVALS[op]:
        # Not every PyTorch has cuDNN's attention.
        assert rows[name].status in ("measured", "refused") or name == "cudnn", rows[name].reason
