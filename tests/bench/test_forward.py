"""One network call of L2P: what is counted, what is compared, and what a failure costs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import forward, report, schema
from bench.forward import CHOICES, NETWORKS, Plan, flops, run
from pixeldiff.models.l2p import VARIANTS, L2PNet
from pixeldiff.ops.registry import forced_backend

CPU = torch.device("cpu")
PLAN = Plan("tiny", 32, CPU, "fp32", caption=5, rounds=3, seconds=0.0, threads=1)


@pytest.fixture(autouse=True)
def _threads_stay():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def rows_of(**changes) -> dict[str, schema.Row]:
    (rows,) = run(dataclasses.replace(PLAN, **changes))
    return {row.backend: row for row in rows}


@pytest.mark.parametrize("guided", [False, True])
def test_the_variants_agree_and_are_whole_rows(guided, tmp_path):
    rows = rows_of(variants=("source", "reference", "pixeldiff-no-graphs"), guided=guided, batch=2)
    assert list(rows) == ["pixeldiff", "pixeldiff-no-graphs", "reference", "source"]
    for row in rows.values():
        assert row.status == "measured", row.reason
        assert row.timing.first_ms > 0
        assert len(row.timing.samples_ms) == 3
        assert row.memory.peak_bytes >= row.memory.weight_bytes > 0
        assert row.rates.flops > 0
        assert row.site == ("guided" if guided else "")
    ours, source = rows["pixeldiff"], rows["source"]
    assert ours.shape["tokens"] == source.shape["tokens"] == 4  # 16 pixels, or 2 cells of 8
    assert 0 < ours.reference_error < 1e-4
    assert source.reference_error is None
    assert rows["reference"].speedup_eager == 1
    schema.save(tmp_path / "r.json", list(rows.values()), "test")
    assert len(schema.load(tmp_path / "r.json")) == 4
    page = report.page(list(rows.values()), [], [])
    kind = "tiny, guided" if guided else "tiny"
    for name in rows:
        assert f"| {kind} | 32x32 | fp32 | {name} |" in page


def test_a_result_that_is_not_the_references_is_no_time(monkeypatch):
    """Also where it is not finite, whatever the reference gives."""
    step, factors = L2PNet.step, {None: 1.01, "reference": 1.0}

    def wrong(self, x, t, condition, **options):
        return step(self, x, t, condition, **options) * factors[forced_backend("swiglu")]

    monkeypatch.setattr(L2PNet, "step", wrong)
    rows = rows_of(variants=("reference",))
    assert rows["reference"].status == "measured"
    row = rows["pixeldiff"]
    assert (row.status, row.timing) == ("failed", None)
    assert row.reason.startswith("its result differs from the reference's by 0.01")
    factors[None] = float("nan")
    assert rows_of()["pixeldiff"].reason == "its result is not finite"


def test_a_variant_that_fails_is_a_row_and_the_others_go_on(monkeypatch):
    def never(*args, **kwargs):
        raise RuntimeError("no compiler\nlong text")

    monkeypatch.setattr(torch, "compile", never)
    rows = rows_of(variants=("compile", "reference"))
    assert (rows["compile"].status, rows["compile"].reason) == (
        "failed",
        "RuntimeError: no compiler",
    )
    assert rows["pixeldiff"].status == rows["reference"].status == "measured"


def test_what_was_not_timed_when_interrupted_says_so(monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(forward, "interleave", stop)
    measured = run(dataclasses.replace(PLAN, variants=("reference",)))
    rows = next(measured)
    assert [r.reason for r in rows] == ["interrupted before it was timed"] * 2
    with pytest.raises(KeyboardInterrupt):
        next(measured)


def test_the_compiled_step_is_the_networks(monkeypatch):
    compiled, graphs = torch.compile, []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **o: compiled(f, **{**o, "backend": keep}))
    torch._dynamo.reset()
    rows = rows_of(variants=("compile", "reference"), guided=True)
    assert rows["compile"].status == "measured", rows["compile"].reason
    assert rows["compile"].reference_error < 1e-5
    assert len(graphs) == 1


def test_unknown_networks_and_sizes():
    with pytest.raises(ValueError, match="config must be one of tiny, 1k, 4k, 8k, 10k, got '2k'"):
        next(run(dataclasses.replace(PLAN, config="2k")))
    with pytest.raises(ValueError, match="multiples of 16"):
        next(run(dataclasses.replace(PLAN, side=40)))
    assert NETWORKS["8k"] == (8192, VARIANTS["8k"].config)
    assert CHOICES[0] == forward.FIRST


# TFLOP of the specification: trunk less the captions' path, decoder with the doubling folded in.
PUBLISHED = {
    "1k": 56.60 - 0.094 + 0.662,
    "4k": 56.96 - 0.094 + 0.975,
    "8k": 58.12 - 0.094 + 1.495,
    "10k": 58.99 - 0.094 + 2.234 - (0.107 - 0.0228),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_flops_are_those_published(name):
    """Less 128 caption rows' queries, output projection and feed-forward in the last block."""
    c, side = VARIANTS[name].config, VARIANTS[name].native_size
    last = 128 * (4 * c.dim**2 + 6 * c.dim * c.ffn_hidden + 4 * 4224 * c.dim) / 1e12
    assert flops(c, (side, side), 128) / 1e12 == pytest.approx(PUBLISHED[name] - last, rel=5e-4)


def test_guidance_shares_what_the_specification_says():
    """At 4K 116.4 becomes 112.2 TFLOP, with the captions' path and unfolded doubling in both."""
    c = VARIANTS["4k"].config
    one, two = (flops(c, (4096, 4096), 128, guided=g) for g in (False, True))
    assert (2 * one - two) / 1e12 == pytest.approx(116.4 - 112.2, abs=0.15)
    odd = (4096 - 64, 4096 - 64)  # padded: each branch has a noise refiner of its own
    shared = 2 * flops(c, odd, 128) - flops(c, odd, 128, guided=True)
    assert shared < 0.3 * (2 * one - two)
    source = dataclasses.replace(c, patch_size=2, in_channels=16, local_decoder=None)
    assert flops(source, (512, 512), 128) / 1e12 == pytest.approx(2862, rel=2e-3)


def test_the_command_line(tmp_path):
    from click.testing import CliRunner

    from bench.__main__ import main

    path = tmp_path / "f.json"
    done = CliRunner().invoke(
        main,
        [*("forward", "--config", "tiny", "--size", "32", "--device", "cpu", "--threads", "1"),
         *("--compare", "reference", "--rounds", "3", "--seconds", "0", "--json", str(path))],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "tiny" in done.output
    assert [r.backend for r in schema.load(path)] == ["pixeldiff", "reference"]
