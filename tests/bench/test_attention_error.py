"""Sums of 14 bits, in PyTorch and on the emulator, and what the command writes."""

from pathlib import Path

import pytest
import torch

from bench import attention_error
from bench.attention_error import add_up, attention, distance, load, multiply, table
from pixeldiff.ops.joint_attention_fp8 import reference

ROOT = Path(__file__).resolve().parents[2]
RAW = ROOT / "bench/results/epyc-2core/attention-error.json"


def test_add_up():
    small = torch.full((32,), 2.0**-14)
    assert add_up(torch.tensor(1.0), small) == 1
    assert add_up(torch.tensor(1.0), -small) == 1
    assert add_up(torch.tensor(1.0), 2 * small) == 1 + 2.0**-8
    assert add_up(torch.tensor(0.0), small) == 2.0**-9
    assert add_up(torch.tensor(0.0), 0 * small) == 0


@pytest.mark.parametrize("k", [32, 72, 128])
def test_multiply(k):
    """Wrong by at most a cut of every term, at the largest one's size."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-7, 8, (rows, k), generator=generator).float() for rows in (5, 9))
    assert torch.equal(multiply(a, b), a @ b.T)  # integers below 2^14
    a, b = (torch.randn(rows, k, generator=generator) for rows in (5, 9))
    assert (multiply(a, b) - a @ b.T).abs().max() <= k * 16 * 2.0**-14 * 2
    assert not torch.equal(multiply(a, b), a @ b.T)


def test_many_keys_around_a_mean():
    """One sum over all keys drifts towards 0; that of a step does not."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, rows, 1, 32, generator=generator) for rows in (8, 2048, 2048))
    v = v + 1
    emulated = reference(q, k, v, 0.1)
    steps, one_sum = attention(q, k, v, 0.1), attention(q, k, v, 0.1, one_sum=True)
    assert distance(steps, emulated.double()) < 0.001
    assert distance(one_sum, emulated.double()) > 0.01
    assert one_sum.mean() < steps.mean()


def test_the_page_has_the_committed_figures():
    text = (ROOT / "docs/kernels/attention.md").read_text()
    assert table(load(RAW)) in text


def test_measure(tmp_path):
    report = attention_error.measure("command", divide=64)
    attention_error.save(report, tmp_path / "report.json")
    assert load(tmp_path / "report.json") == report
    assert len(table(report).splitlines()) == 2 + len(report.errors)
    for e in report.errors:
        assert e.bf16 < 0.01
        assert e.each_step <= 1.1 * e.e4m3
