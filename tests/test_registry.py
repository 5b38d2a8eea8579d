"""The choice of a backend: order, forcing, threads, the environment, autograd and compile."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import types

import pytest
import torch
from torch import Tensor

import pixeldiff
from pixeldiff.ops import explain, registry, rms_norm, swiglu
from pixeldiff.ops.registry import Backend, define, forced_backend

CALLS: list[str] = []


def _module(name: str, answer: float, limit: int) -> str:
    """A backend module that returns `answer` and takes at most `limit` elements."""
    module = types.ModuleType(f"pixeldiff_test_{name}")

    def why_not(x: Tensor) -> str | None:
        return None if x.numel() <= limit else f"takes at most {limit} elements, got {x.numel()}"

    def launch(x: Tensor) -> Tensor:
        CALLS.append(name)
        return torch.full_like(x, answer).transpose(0, 1).contiguous().transpose(0, 1)

    module.why_not, module.launch = why_not, launch
    sys.modules[module.__name__] = module
    return module.__name__


def _reference(x: Tensor) -> Tensor:
    CALLS.append("reference")
    return (x * 2).transpose(0, 1).contiguous().transpose(0, 1)


probe = define(
    "test_probe",
    "(Tensor x) -> Tensor",
    reference=_reference,
    fake=lambda x: torch.empty_like(x, memory_format=torch.contiguous_format),
    backends=(
        Backend("cuda", _module("cuda", -1.0, 10**6), automatic=False),
        Backend("triton", "pixeldiff_test_absent"),
        Backend("cpu", _module("cpu", -3.0, 6)),
    ),
)
PROBE = registry.OPS.pop("test_probe")  # in the table only while these tests run
SMALL, LARGE = torch.ones(2, 3), torch.ones(3, 4)


@pytest.fixture(autouse=True)
def _no_calls_yet(monkeypatch):
    monkeypatch.delenv("PIXELDIFF_BACKEND", raising=False)
    monkeypatch.setitem(registry.OPS, "test_probe", PROBE)
    registry._environment.cache_clear()
    CALLS.clear()
    yield
    registry._environment.cache_clear()


def ran(x: Tensor = SMALL) -> str:
    CALLS.clear()
    y = probe(x)
    assert y.is_contiguous()
    (name,) = CALLS
    assert torch.equal(y, {"cuda": -x, "cpu": -3 * x, "reference": 2 * x}[name])
    return name


def test_free_choice_takes_the_first_that_can():
    """cuda is on request only, triton is not installed, cpu takes small ones."""
    assert ran(SMALL) == "cpu"
    assert ran(LARGE) == "reference"


def test_a_backend_may_offer_itself_for_some_calls_only(monkeypatch):
    """Unasked it takes what it offers to take and can; forced, all that it can."""
    several = Backend("cuda", _module("tall", -1.0, 10), automatic=lambda x: x.shape[0] > 2)
    op = registry.Op("test_probe", _reference, (several, PROBE.backends[2]))
    monkeypatch.setitem(registry.OPS, "test_probe", op)
    tall = torch.ones(3, 2)
    for x, unasked in ((SMALL, "cpu"), (tall, "tall"), (LARGE, "reference")):
        CALLS.clear()
        registry._run(op, (x,))
        assert [unasked] == CALLS
    with pixeldiff.backend(test_probe="cuda"):
        CALLS.clear()
        registry._run(op, (SMALL,))
        assert CALLS == ["tall"]
    assert registry.on_request("test_probe", SMALL) == {
        "cuda": "runs on request only for such a call"
    }
    assert registry.on_request("test_probe", tall) == {}
    assert explain("test_probe", LARGE)[0] == ("cuda", "takes at most 10 elements, got 12")


def test_on_request_names_those_that_never_offer_themselves():
    assert registry.on_request("test_probe", SMALL) == {"cuda": "runs on request only"}


def test_explain_gives_the_reason_of_each():
    assert explain("test_probe", LARGE) == [
        ("cuda", None),
        (
            "triton",
            "pixeldiff_test_absent cannot be imported: No module named 'pixeldiff_test_absent'",
        ),
        ("cpu", "takes at most 6 elements, got 12"),
        ("reference", None),
    ]


def test_what_cannot_be_imported_is_tried_once(monkeypatch):
    tried, really = [], registry.importlib.import_module

    def counted(name: str):
        tried.append(name)
        return really(name)

    monkeypatch.setattr(registry.importlib, "import_module", counted)
    registry._import.cache_clear()
    for _ in range(3):
        assert ran() == "cpu"
    assert tried == ["pixeldiff_test_absent", "pixeldiff_test_cpu"]


def listed(*order: str, size: str = "1", kind: str = "float32 D<=4", capability: str = "9.0"):
    """An invented table; the default kind is that of SMALL and LARGE, the size near both."""
    return {capability: {kind: {size: {"order": list(order)}}}}


@pytest.mark.parametrize(
    ("order", "small", "large"),
    [
        (("cuda", "cpu"), "cuda", "cuda"),  # one that runs on request only otherwise
        (("reference", "cuda"), "reference", "reference"),
        (("cpu", "reference"), "cpu", "reference"),  # refused: the next of the list
        (("triton", "cpu"), "cpu", "reference"),  # all refused: today's order
    ],
)
def test_what_was_measured_comes_first(measured, order, small, large):
    measured("test_probe", listed(*order))
    assert (ran(SMALL), ran(LARGE)) == (small, large)


@pytest.mark.parametrize(
    "table",
    [
        {},
        listed("cuda", capability="8.0"),
        listed("cuda", kind="bfloat16 D<=4"),
        listed("cuda", kind="float32 D<=8"),
        {"9.0": {}},
        {"9.0": {"float32 D<=4": {}}},
    ],
)
def test_what_was_not_measured_changes_nothing(measured, table):
    measured("test_probe", table)
    measured("rms_norm", listed("reference"))
    assert (ran(SMALL), ran(LARGE)) == ("cpu", "reference")
    assert registry.on_request("test_probe", SMALL) == {"cuda": "runs on request only"}


def test_a_cpu_never_looks(monkeypatch, tmp_path):
    monkeypatch.setattr(registry.choice, "FOLDER", tmp_path)
    (tmp_path / "test_probe.json").write_text("damaged")
    registry.choice.forget()
    assert ran(SMALL) == "cpu"
    assert explain("test_probe", SMALL)[0] == ("cuda", None)
    assert registry.choice.table.cache_info().currsize == 0


def test_a_forced_backend_is_not_what_was_measured(measured):
    measured("test_probe", "damaged")
    for name in ("cpu", "cuda", "reference"):
        with pixeldiff.backend(test_probe=name):
            assert ran(SMALL) == name


def test_what_was_measured_is_explained(measured):
    measured("test_probe", listed("cpu", "reference", "cuda"))
    rows = explain("test_probe", LARGE)
    assert [name for name, _ in rows] == ["cpu", "reference", "cuda", "triton"]
    assert rows[:3] == [
        ("cpu", "takes at most 6 elements, got 12"),
        ("reference", None),
        ("cuda", None),
    ]
    assert registry.on_request("test_probe", LARGE) == {}
    measured("test_probe", listed("cuda"))
    assert [name for name, _ in explain("test_probe", SMALL)] == [
        *("cuda", "triton", "cpu", "reference")
    ]


def test_a_damaged_table_is_named_at_the_call(measured):
    path = measured("test_probe", "{")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"test_probe\.json is not a table .* it is no JSON"):
            probe(SMALL)
    path = measured("test_probe", listed("cuda", "gone"))
    with pytest.raises(ValueError, match=f"^{path} lists 'gone', which test_probe does not have; "):
        probe(SMALL)
    path.unlink()
    registry.choice.forget()
    assert ran(SMALL) == "cpu"


def test_measured_ones_under_compile_and_gradients(measured):
    """The graph holds the opaque op, which asks the table; gradients go through the reference."""
    measured("test_probe", listed("cuda"))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: probe(x) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(SMALL), 1 - SMALL)
    CALLS.clear()
    probe(SMALL.clone().requires_grad_())
    assert CALLS == ["reference"]


def test_what_a_table_costs_a_call(measured):
    """Microseconds, not a file: 1000 calls read it once."""
    reads = []
    read = registry.choice.read
    measured("test_probe", listed("cuda"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry.choice, "read", lambda path: reads.append(path) or read(path))
        for rows in range(1, 1001):
            assert registry.choice.order("test_probe", (torch.empty(rows, 3),)) == ("cuda",)
    assert len(reads) == 1


def test_a_backend_that_one_op_has(monkeypatch):
    """By name for that op; not a word for all of them."""
    own = Backend("vendor", _module("vendor", -1.0, 10**6) + ":INSIDE", automatic=False)
    sys.modules["pixeldiff_test_vendor"].INSIDE = sys.modules["pixeldiff_test_vendor"]
    op = registry.Op("test_probe", _reference, (*PROBE.backends, own))
    monkeypatch.setitem(registry.OPS, "test_probe", op)
    with pixeldiff.backend(test_probe="vendor"):
        registry._run(op, (SMALL,))
    assert CALLS == ["vendor"]
    message = r"'vendor' is not a backend; choose one of auto, cuda, triton, cpu, reference$"
    for wrong in ({"swiglu": "vendor"}, {"default": "vendor"}):
        default = wrong.pop("default", None)
        with pytest.raises(ValueError, match=message), pixeldiff.backend(default, **wrong):
            pass


def test_forcing_one_op_and_all():
    with pixeldiff.backend(test_probe="cuda"):
        assert ran() == "cuda"
        assert forced_backend("swiglu") is None
    with pixeldiff.backend("reference"):
        assert ran() == "reference"
        assert forced_backend("swiglu") == "reference"
    with pixeldiff.backend("reference", test_probe="cpu"):
        assert ran() == "cpu"
    assert ran() == "cpu"
    assert forced_backend("test_probe") is None


def test_nesting_replaces_and_restores():
    with pixeldiff.backend("reference"):
        with pixeldiff.backend(test_probe="cuda"):
            assert ran() == "cuda"
            assert forced_backend("swiglu") is None
            with pixeldiff.backend("auto"):
                assert ran() == "cpu"
        assert ran() == "reference"
    with pytest.raises(KeyError), pixeldiff.backend("reference"):
        raise KeyError
    assert ran() == "cpu"


def test_a_thread_has_its_own_choice():
    inside, release, seen = threading.Event(), threading.Event(), {}

    def other() -> None:
        with pixeldiff.backend(test_probe="cuda"):
            inside.set()
            release.wait(30)
            seen["other"] = forced_backend("test_probe")

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(30)
    seen["main"] = forced_backend("test_probe")
    with pixeldiff.backend("reference"):
        release.set()
        thread.join(30)
        assert forced_backend("test_probe") == "reference"
    assert seen == {"main": None, "other": "cuda"}


def test_a_forced_backend_never_falls_through():
    with (
        pixeldiff.backend(test_probe="cpu"),
        pytest.raises(
            NotImplementedError,
            match=r'^test_probe\(backend="cpu"\): takes at most 6 elements, got 12$',
        ),
    ):
        probe(LARGE)
    with (
        pixeldiff.backend("triton"),
        pytest.raises(
            NotImplementedError,
            match=r'^test_probe\(backend="triton"\): pixeldiff_test_absent cannot be imported',
        ),
    ):
        probe(SMALL)
    with (
        pixeldiff.backend("cuda"),
        pytest.raises(
            NotImplementedError,
            match=r'^rms_norm\(backend="cuda"\): there is no such implementation; choose from ',
        ),
    ):
        rms_norm(SMALL, torch.ones(3))
    assert CALLS == []


def test_unknown_names():
    message = r"^backend: 'gpu' is not a backend; choose one of auto, cuda, triton, cpu, reference$"
    with pytest.raises(ValueError, match=message), pixeldiff.backend("gpu"):
        pass
    with (
        pytest.raises(ValueError, match=r"^backend: unknown op 'nope'; ops are .*rms_norm.*$"),
        pixeldiff.backend(nope="cpu"),
    ):
        pass


def test_gradients_go_through_the_reference():
    """Fused backends have no derivative: the public call must not use them, forced or free."""
    x = SMALL.clone().requires_grad_()
    for choice in (None, "cuda"):
        CALLS.clear()
        with pixeldiff.backend(test_probe=choice):
            y = probe(x)
        assert CALLS == ["reference"]
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient, torch.full_like(x, 2.0))
    with torch.no_grad():
        assert ran(x) == "cpu"
    with torch.inference_mode():
        assert ran(x) == "cpu"


@pytest.mark.parametrize("choice", [None, "reference"])
def test_compiles_without_graph_breaks(choice):
    """Free: the graph holds the opaque op. Reference: plain PyTorch, which a compiler can fuse."""
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    def gated(a: Tensor, b: Tensor) -> Tensor:
        return swiglu(a, b) + 1

    with pixeldiff.backend(choice):
        compiled = torch.compile(gated, fullgraph=True, backend=keep)
        for rows in (2, 5):
            a, b = torch.randn(2, rows, 8)
            assert torch.equal(compiled(a, b), gated(a, b))
    opaque = any("pixeldiff.swiglu" in str(n.target) for g in graphs for n in g.graph.nodes)
    assert opaque == (choice is None)


@pytest.mark.skipif(shutil.which("c++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("choice", [None, "reference"])
def test_inductor(choice):
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: swiglu(a, b) * 2, fullgraph=True)
    a, b = torch.randn(2, 3, 8)
    with pixeldiff.backend(choice):
        torch.testing.assert_close(compiled(a, b), swiglu(a, b) * 2)


def test_compiled_gradients():
    torch._dynamo.reset()
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    a, b = (t.requires_grad_() for t in torch.randn(2, 3, 8))
    got = torch.autograd.grad(compiled(a, b).square().sum(), (a, b))
    want = torch.autograd.grad(swiglu(a, b).square().sum(), (a, b))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_opcheck():
    torch.library.opcheck(torch.ops.pixeldiff.test_probe.default, (SMALL,))


def _fresh(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_environment_variable():
    code = (
        "import pixeldiff; from pixeldiff.ops.registry import forced_backend as f\n"
        "print(f('swiglu'))\n"
        "with pixeldiff.backend(): print(f('swiglu'))\n"
        "with pixeldiff.backend('cpu'): print(f('swiglu'))"
    )
    result = _fresh(code, PIXELDIFF_BACKEND="reference")
    assert result.stdout.split() == ["reference", "None", "cpu"], result.stderr


def test_wrong_environment_variable():
    result = _fresh(
        "import torch; from pixeldiff.ops import swiglu; swiglu(torch.ones(2), torch.ones(2))",
        PIXELDIFF_BACKEND="fast",
    )
    message = "PIXELDIFF_BACKEND must be one of auto, cuda, triton, cpu, reference, got 'fast'"
    assert message in result.stderr
