"""The build: what it leaves behind with a compiler, without one, and on bad settings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import util
from pathlib import Path

import pytest

import pixeldiff
from pixeldiff import native

ROOT = Path(__file__).resolve().parents[1]
BUILD_TOOLS = ("setuptools", "pybind11", "cmake", "ninja")

needs_build_tools = pytest.mark.skipif(
    not all(util.find_spec(m) for m in BUILD_TOOLS),
    reason="needs setuptools, pybind11, cmake and ninja, as `make` installs them",
)


@pytest.fixture
def sources(tmp_path) -> Path:
    """A copy of what a build reads, so that no test touches the tree it runs from."""
    copy = tmp_path / "sources"
    copy.mkdir()
    for name in ("csrc", "triton_kernels", "pixeldiff"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "_native_status.json")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    (copy / "README.md").write_text("# pixeldiff\n")
    return copy


def build_wheel(sources: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PIXELDIFF_")}
    clean["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), clean.get("PATH", "")])
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", "wheels"],
        cwd=sources,
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )


def only_wheel(sources: Path) -> zipfile.ZipFile:
    (wheel,) = (sources / "wheels").glob("*.whl")
    return zipfile.ZipFile(wheel)


@needs_build_tools
def test_tables_of_measurements_are_in_the_wheel(sources):
    tables = ("pixeldiff/ops/measured/swiglu.json", "triton_kernels/swiglu.json")
    for name in tables:
        (sources / name).parent.mkdir(exist_ok=True)
        (sources / name).write_text("{}")
    done = build_wheel(sources, PIXELDIFF_BUILD="0")
    assert done.returncode == 0, done.stderr
    names = only_wheel(sources).namelist()
    assert "pixeldiff/ops/measured/swiglu.json" in names
    assert "pixeldiff/triton_kernels/swiglu.json" in names


@needs_build_tools
def test_no_compiler_gives_a_pure_python_wheel_that_says_so(sources):
    done = build_wheel(sources, CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr
    assert "INSTALLING WITHOUT COMPILED KERNELS: no C++ compiler was found" in done.stderr
    wheel = only_wheel(sources)
    assert wheel.filename.endswith("-py3-none-any.whl")
    names = wheel.namelist()
    assert not [n for n in names if n.endswith((".so", ".pyd"))]
    status = json.loads(wheel.read("pixeldiff/_native_status.json"))
    assert status == {"built": False, "reason": "no C++ compiler was found"}
    assert "pixeldiff/triton_kernels/rms_norm_modulate.py" in names
    top = {n.split("/")[0] for n in names if ".dist-info/" not in n}
    assert top == {"pixeldiff"}


@needs_build_tools
def test_an_older_binary_is_not_shipped_by_a_build_that_falls_back(sources):
    suffix = f"_C.cpython-{sys.version_info[0]}{sys.version_info[1]}"
    done = build_wheel(sources, PIXELDIFF_BUILD="0")
    assert done.returncode == 0, done.stderr
    (library,) = (sources / "build").glob("lib*")
    from sysconfig import get_config_var

    stale = library / "pixeldiff" / f"_C{get_config_var('EXT_SUFFIX')}"
    stale.write_bytes(b"old")
    shutil.rmtree(sources / "wheels")
    done = build_wheel(sources, PIXELDIFF_BUILD="0")
    assert done.returncode == 0, done.stderr
    assert not [n for n in only_wheel(sources).namelist() if suffix in n]


@needs_build_tools
def test_a_missing_compiler_is_an_error_when_the_extension_is_required(sources):
    done = build_wheel(sources, CXX="/nonexistent/c++", PIXELDIFF_REQUIRE_EXT="1")
    assert done.returncode != 0
    assert "the extension was not built: no C++ compiler was found" in done.stderr
    assert not (sources / "wheels").exists()


@needs_build_tools
def test_a_broken_source_is_named(sources):
    with (sources / "csrc" / "cpu" / "isa.cpp").open("a") as f:
        f.write("\nint broken = undeclared_name;\n")
    done = build_wheel(sources, PIXELDIFF_REQUIRE_EXT="1", PIXELDIFF_BUILD_CUDA="0")
    if native.why_not() is not None:
        pytest.skip("needs a compiler")
    assert done.returncode != 0
    assert "compiling failed" in done.stderr
    assert "undeclared_name" in done.stderr.splitlines()[-1]


@needs_build_tools
@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("PIXELDIFF_BUILD", "yes", "PIXELDIFF_BUILD must be one of auto, 0, got 'yes'"),
        ("PIXELDIFF_REQUIRE_EXT", "on", "PIXELDIFF_REQUIRE_EXT must be one of 0, 1, got 'on'"),
        ("PIXELDIFF_BUILD_CUDA", "2", "PIXELDIFF_BUILD_CUDA must be one of auto, 0, 1, got '2'"),
        ("PIXELDIFF_CUDA_ARCHS", "80;9.0", "written without a dot, got '9.0'"),
        ("PIXELDIFF_CUDA_ARCHS", "70", "from 80 on, written without a dot, got '70'"),
        ("PIXELDIFF_SANITIZE", "thread", "must be address, undefined or address,undefined, got"),
    ],
)
def test_bad_settings(sources, name, value, text):
    done = build_wheel(sources, **{name: value})
    assert done.returncode != 0
    assert text in done.stderr


@needs_build_tools
def test_contradicting_settings(sources):
    done = build_wheel(sources, PIXELDIFF_BUILD="0", PIXELDIFF_REQUIRE_EXT="1")
    assert done.returncode != 0
    assert "PIXELDIFF_BUILD=0 contradicts PIXELDIFF_REQUIRE_EXT=1" in done.stderr


@pytest.mark.skipif(
    not any(shutil.which(c) for c in ("c++", "g++", "clang++")), reason="no C++ compiler here"
)
def test_extension_is_present_where_there_is_a_compiler():
    """Else every kernel test of the CPU backend would be skipped without anybody noticing."""
    if util.find_spec("pixeldiff.triton_kernels") is None:
        pytest.skip("runs from a source tree that was never installed")
    assert native.why_not() is None, native.why_not()
    info = native.build_info()
    assert info["version"] == pixeldiff.__version__
    assert info["cpu_isa"][0] == info["cpu_isa_usable"][0] == "portable"
    assert set(info["cpu_isa_usable"]) <= set(info["cpu_isa"])
    assert (info["cuda"] is None) == (info["cuda_archs"] == "")
