"""The loader of the extension: it takes only one that was built from these sources."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import pixeldiff
from pixeldiff import native
from pixeldiff.ops import swiglu
from pixeldiff.ops.registry import explain

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
# Arguments of every function of the CPU. With a change here goes a higher number in
# csrc/interface.h and native.py.
FUNCTIONS = {
    "rms_norm_modulate_cpu": 10,
    "gated_residual_norm_cpu": 13,
    "gated_norm_residual_cpu": 10,
    "joint_attention_cpu": 11,
    "local_decoder_down_cpu": 10,
    "local_decoder_up_cpu": 12,
    "qk_norm_rope_cpu": 8,
    "sigma_gate_per_token_cpu": 10,
    "sigma_gate_per_channel_cpu": 10,
    "swiglu_cpu": 7,
    "pixel_embed_cpu": 14,
    "pixel_adaln_compress_cpu": 9,
    "pixel_adaln_mlp_cpu": 15,
    "pixel_head_cpu": 12,
    "pixel_head_step_cpu": 20,
}


@pytest.fixture
def built(monkeypatch):
    """The extension as another one: built(INTERFACE=1)."""

    def replace(**attributes):
        module = ModuleType("pixeldiff._C")
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, "pixeldiff._C", module)
        native._import.cache_clear()

    yield replace
    monkeypatch.undo()
    native._import.cache_clear()


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({}, r"from older sources than this package \(interface 0, not \d+\)"),
        ({"INTERFACE": native.INTERFACE - 1}, "from older sources"),
        ({"INTERFACE": native.INTERFACE + 1}, "from newer sources"),
    ],
)
def test_of_other_sources(built, attributes, text):
    """The reason names the way out, and ops run without the extension."""
    built(**attributes, build_info=dict, best_isa=lambda: 0)
    reason = native.why_not()
    assert re.match(rf"pixeldiff\._C was built {text}.* rebuild it with .*`make ext`", reason)
    with pytest.raises(ImportError, match=text):
        native.load()
    assert native.build_info() is None
    a = torch.ones(2, 3, 8)
    assert dict(explain("swiglu", a, a))["cpu"] == reason
    with pixeldiff.backend("reference"):
        want = swiglu(a, a)
    assert torch.equal(swiglu(a, a), want)


def test_of_these_sources(built):
    built(INTERFACE=native.INTERFACE)
    assert native.why_not() is None


def test_both_sides_have_one_number():
    (number,) = re.findall(r"kInterface = (\d+);", (SOURCES / "interface.h").read_text())
    assert int(number) == native.INTERFACE


@pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")
def test_functions_of_this_interface():
    module = native.load()
    found = {
        name: len(re.findall(r"arg\d+:", getattr(module, name).__doc__))
        for name in dir(module)
        if name.endswith("_cpu")
    }
    assert found == FUNCTIONS


def test_a_build_without_sm_90a_has_all_that_it_binds():
    """What a build for other architectures compiles of csrc/cuda defines what its bindings call.
    The linker of a module does not tell: it could not be loaded."""
    cmake = (SOURCES.parent / "CMakeLists.txt").read_text()
    only_90a = set(re.findall(r"add_cuda_kernel\(\w+ 90a \S+\s+(\S+\.cu)\)", cmake))
    assert "csrc/cuda/joint_attention_fp8_sm90.cu" in only_90a
    compiled = [p for p in (SOURCES / "cuda").glob("*.cu") if f"csrc/cuda/{p.name}" not in only_90a]
    defined = re.findall(r"^\w+ (\w+)\(", "".join(map(_without_90a, compiled)), re.MULTILINE)
    bindings = [SOURCES / "module.cpp", *(SOURCES / "bindings").glob("*.cpp")]
    called = re.findall(r"\bcuda::(\w+)\(", "".join(map(_without_90a, bindings)))
    assert {"joint_attention", "local_decoder_up"} <= set(called)
    assert set(called) <= set(defined)


def _without_90a(path):
    """A source as the compiler has it without PIXELDIFF_SM90."""
    kept, within = [], []
    for line in path.read_text().splitlines(keepends=True):
        if line.startswith("#if"):
            within.append("PIXELDIFF_SM90" in line)
        elif line.startswith("#endif"):
            within.pop()
        elif line.startswith("#else"):
            within[-1] = False
        elif not any(within):
            kept.append(line)
    return "".join(kept)
