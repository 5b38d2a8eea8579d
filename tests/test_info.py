"""`pixeldiff info` tells the truth about which backend runs each op."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

import pixeldiff
from pixeldiff import info, native, ops
from pixeldiff.ops.examples import arguments
from pixeldiff.ops.registry import OPS


def text(width=100):
    out = io.StringIO()
    info.render(Console(file=out, width=width, highlight=False, soft_wrap=True))
    return out.getvalue()


def table(forced=None, **per_op):
    with pixeldiff.backend(forced, **per_op):
        return {name: (chosen, dict(refused)) for name, chosen, refused in rows()}


def rows():
    return info.backend_rows("cpu", torch.float32)


def test_every_op_is_listed_with_a_backend_that_takes_the_call():
    found = table()
    assert found.keys() == OPS.keys()
    for name, (chosen, refused) in found.items():
        reasons = dict(ops.explain(name, *arguments(name, "cpu", torch.float32)))
        assert reasons[chosen] is None
        assert chosen not in refused
        assert refused.keys() <= reasons.keys()
        assert all(refused.values()), "a backend is passed over without a reason"


def test_the_backend_shown_is_the_one_that_runs(caplog):
    for name, (chosen, _) in table().items():
        args = arguments(name, "cpu", torch.float32)
        call = getattr(torch.ops.pixeldiff, name).default
        with torch.no_grad():
            free = call(*args)
            with pixeldiff.backend(chosen):
                forced = call(*args)
        for a, b in zip(*([r] if torch.is_tensor(r) else r for r in (free, forced)), strict=True):
            assert torch.equal(a, b), name


def test_forced_backends_are_shown():
    for chosen, refused in table("reference").values():
        assert chosen == "reference"
        assert all(refused.values())
    chosen, _ = table("cuda")["swiglu"]
    assert chosen == "none"
    found = table(swiglu="cuda")
    assert found["swiglu"][0] == "none"
    assert found["swiglu"][1]["reference"] == "cuda is forced"
    assert found["rms_norm"][0] != "none"


def test_page_names_versions_devices_ops_and_reasons():
    page = text(width=400)
    for word in (pixeldiff.__version__, torch.__version__, "devices: cpu", "native extension:"):
        assert word in page
    for name, chosen, refused in rows():
        assert f" {name} " in page
        assert f" {chosen} " in page
        for backend, reason in refused:
            assert f"{backend}: {reason}" in page
    with pixeldiff.backend("reference"):
        assert "forced backend: reference" in text()
    assert "forced backend" not in page


@pytest.mark.parametrize("width", [40, 80])
def test_nothing_is_cut_off_on_a_narrow_terminal(width):
    page = text(width)
    assert "…" not in page
    assert max(map(len, page.splitlines()[3:])) <= width


def test_what_was_measured_is_shown(measured):
    order = {"order": ["reference", "triton", "cpu"]}
    measured("swiglu", {"9.0": {"float32 D<=128": {"2": order}}})
    measured("rms_norm", {"8.0": {"float32 D<=128": {"2": order}}})
    chosen, refused = table()["swiglu"]
    assert chosen == "reference"
    assert refused["cpu"] == (native.why_not() or "was measured to be slower")
    assert table("reference")["swiglu"][1]["cpu"] == (native.why_not() or "reference is forced")
    assert info._measured(0) == "swiglu (for capability 9.0)"
    measured("swiglu", {})
    assert info._measured(0) == "no op (for capability 9.0)"


def test_absent_packages_are_named():
    assert info._version("pixeldiff-no-such-package") == "absent"
