"""Builds pixeldiff._C with CMake; everything else about the package is in pyproject.toml.

Environment:
    PIXELDIFF_BUILD         auto (default) | 0: do not try to build the extension.
    PIXELDIFF_REQUIRE_EXT   0 (default) | 1: a failed build is an error, not a pure-Python install.
    PIXELDIFF_BUILD_CUDA    auto (default): with CUDA when nvcc is found | 0: never | 1: or fail.
    PIXELDIFF_CUDA_ARCHS    for example 80;90a;120. Default: what this nvcc knows of 80;89;90a;
                            100;120.
    PIXELDIFF_SANITIZE      address, undefined or both with a comma between: a debugging build.

Nothing here looks for a GPU or downloads anything. What was done is in `pixeldiff._C.build_info()`,
and why nothing was done in `pixeldiff/_native_status.json`, which `pixeldiff.native` reads.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
STATUS_FILE = "_native_status.json"


class BuildFailed(Exception):
    """The extension could not be built; the message is a one-line reason."""


def choice(name: str, default: str, *allowed: str) -> str:
    value = os.environ.get(name, "").strip() or default
    if value not in allowed:
        sys.exit(f"pixeldiff: {name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def sanitizers() -> str:
    names = [n.strip() for n in os.environ.get("PIXELDIFF_SANITIZE", "").split(",") if n.strip()]
    for name in names:
        if name not in ("address", "undefined"):
            sys.exit(
                "pixeldiff: PIXELDIFF_SANITIZE must be address, undefined or address,undefined, "
                f"got {name!r}"
            )
    return ",".join(names)


def cuda_archs() -> list[str]:
    """Architectures asked for, empty when that is left to the version of nvcc."""
    archs = re.split(r"[;,\s]+", os.environ.get("PIXELDIFF_CUDA_ARCHS", "").strip())
    archs = [a for a in archs if a]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch) or int(arch.rstrip("af")) < 80:
            sys.exit(
                "pixeldiff: PIXELDIFF_CUDA_ARCHS must be a list such as 80;90a;120 of "
                f"architectures from 80 on, written without a dot, got {arch!r}"
            )
    return archs


def find_nvcc() -> str | None:
    given = os.environ.get("CUDACXX")
    if given:
        return shutil.which(given)
    found = shutil.which("nvcc")
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if found is None and root:
            found = shutil.which("nvcc", path=str(Path(root) / "bin"))
    return found


def default_archs(nvcc: str) -> list[str]:
    """Blackwell came with CUDA 12.8. The last entry is also kept as PTX for newer devices."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError as e:
        raise BuildFailed(f"{nvcc} cannot be run: {e}") from None
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None:
        raise BuildFailed(f"{nvcc} --version does not name a release")
    recent = (int(release[1]), int(release[2])) >= (12, 8)
    return ["80", "89", "90a", "100", "120"] if recent else ["80", "90a", "89"]


@dataclass(frozen=True)
class Settings:
    """What decides the build: another value of any of these needs a fresh configuration."""

    python: str
    pybind11: str
    cmake: str
    ninja: str | None
    cxx: str | None
    cxxflags: str | None
    version: str
    sanitize: str
    nvcc: str | None
    archs: tuple[str, ...]
    cuda_note: str

    def arguments(self) -> list[str]:
        args = [
            f"-DPython_EXECUTABLE={self.python}",
            f"-Dpybind11_DIR={self.pybind11}",
            f"-DPIXELDIFF_VERSION={self.version}",
            f"-DPIXELDIFF_SANITIZE={self.sanitize}",
            f"-DPIXELDIFF_BUILD_CUDA={'ON' if self.nvcc else 'OFF'}",
            f"-DPIXELDIFF_CUDA_NOTE={self.cuda_note}",
        ]
        if self.nvcc:
            args += [f"-DCMAKE_CUDA_COMPILER={self.nvcc}"]
            args += [f"-DPIXELDIFF_CUDA_ARCHS={';'.join(self.archs)}"]
        if self.ninja:
            args += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={self.ninja}"]
        return args


def settings(version: str, *, with_cuda: bool, cuda_note: str) -> Settings:
    try:
        import pybind11
    except ImportError:
        raise BuildFailed("pybind11 is not installed in the build environment") from None
    cmake = shutil.which("cmake")
    if cmake is None:
        raise BuildFailed("cmake was not found")
    nvcc = find_nvcc() if with_cuda else None
    if with_cuda and nvcc is None:
        cuda_note = "nvcc was not found"
    return Settings(
        python=sys.executable,
        pybind11=pybind11.get_cmake_dir(),
        cmake=cmake,
        ninja=shutil.which("ninja"),
        cxx=os.environ.get("CXX"),
        cxxflags=os.environ.get("CXXFLAGS"),
        version=version,
        sanitize=sanitizers(),
        nvcc=nvcc,
        archs=tuple(cuda_archs() or default_archs(nvcc)) if nvcc else (),
        cuda_note=cuda_note,
    )


def run(command: list[str], step: str) -> None:
    """Run, passing the output on; on failure raise BuildFailed with the line that says why."""
    print("+", " ".join(command), file=sys.stderr, flush=True)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        sys.stderr.write(line)
    if process.wait() == 0:
        return
    if any("CMAKE_CXX_COMPILER not set, after EnableLanguage" in line for line in lines):
        raise BuildFailed("no C++ compiler was found")
    raise BuildFailed(f"{step} failed: {first_error(lines)}")


def first_error(lines: list[str]) -> str:
    """The first error of a CMake or compiler log. CMake names a place and explains below it."""
    lines = [line for line in lines if line]
    for i, line in enumerate(lines):
        if line.startswith("CMake Error"):
            return " ".join(lines[i : i + 2])
        if re.search(r"\b(fatal )?error\b", line, re.IGNORECASE):
            return line
    return lines[-1] if lines else "no output"


def compile_extension(chosen: Settings, build: Path, output: Path) -> None:
    build.mkdir(parents=True, exist_ok=True)
    record = build / "pixeldiff_settings.json"
    state = json.dumps(asdict(chosen))
    same = record.exists() and record.read_text() == state
    record.unlink(missing_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    configure = [chosen.cmake, "-S", str(ROOT), "-B", str(build), *chosen.arguments()]
    configure += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}"]
    if not same:
        configure.append("--fresh")
    run(configure, "configuring with CMake")
    run([chosen.cmake, "--build", str(build)], "compiling")
    if not output.exists():
        raise BuildFailed(f"the build did not leave {output.name}")
    record.write_text(state)


class BuildExt(build_ext):
    """Builds with CMake, or leaves a pure-Python package that records why."""

    def run(self) -> None:
        mode = choice("PIXELDIFF_BUILD", "auto", "auto", "0")
        required = choice("PIXELDIFF_REQUIRE_EXT", "0", "0", "1") == "1"
        choice("PIXELDIFF_BUILD_CUDA", "auto", "auto", "0", "1")
        cuda_archs()
        sanitizers()
        if mode == "0" and required:
            sys.exit("pixeldiff: PIXELDIFF_BUILD=0 contradicts PIXELDIFF_REQUIRE_EXT=1; drop one")
        self.forget_previous()
        try:
            if mode == "0":
                raise BuildFailed("PIXELDIFF_BUILD=0 was set")
            super().run()
        except BuildFailed as e:
            if required:
                sys.exit(f"pixeldiff: the extension was not built: {e} (PIXELDIFF_REQUIRE_EXT=1)")
            self.fall_back(str(e))

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        version = self.distribution.get_version()
        cuda = choice("PIXELDIFF_BUILD_CUDA", "auto", "auto", "0", "1")
        note = "PIXELDIFF_BUILD_CUDA=0 was set" if cuda == "0" else ""
        try:
            chosen = settings(version, with_cuda=cuda != "0", cuda_note=note)
            if cuda == "1" and chosen.nvcc is None:
                raise BuildFailed(chosen.cuda_note)
            compile_extension(chosen, build, output)
        except BuildFailed as e:
            if cuda == "1":
                sys.exit(f"pixeldiff: no CUDA kernels: {e} (PIXELDIFF_BUILD_CUDA=1)")
            if cuda == "0" or find_nvcc() is None or "C++ compiler" in str(e):
                raise
            print(f"pixeldiff: building without CUDA: {e}", file=sys.stderr)
            note = re.sub(r'["\\;\n]', " ", str(e))
            compile_extension(settings(version, with_cuda=False, cuda_note=note), build, output)

    def places(self) -> list[Path]:
        """The package folders an earlier build may have left files in."""
        build_py = self.get_finalized_command("build_py")
        places = [Path(self.build_lib) / "pixeldiff"]
        if self.inplace or self.editable_mode:
            places.append(Path(build_py.get_package_dir("pixeldiff")))
        return places

    def forget_previous(self) -> None:
        # Else a build that falls back would ship, or leave importable, the binary of an older one.
        name = Path(self.get_ext_filename("pixeldiff._C")).name
        for place in self.places():
            (place / name).unlink(missing_ok=True)
            (place / STATUS_FILE).unlink(missing_ok=True)

    def fall_back(self, reason: str) -> None:
        self.distribution.ext_modules = []
        self.extensions = []
        for place in self.places():
            place.mkdir(parents=True, exist_ok=True)
            (place / STATUS_FILE).write_text(json.dumps({"built": False, "reason": reason}) + "\n")
        print(
            f"\npixeldiff: INSTALLING WITHOUT COMPILED KERNELS: {reason}.\n"
            "pixeldiff: every op works in PyTorch, more slowly. PIXELDIFF_REQUIRE_EXT=1 makes this "
            "an error.\n",
            file=sys.stderr,
        )


class BdistWheel(bdist_wheel):
    """Tags the wheel for this platform only if it holds the extension."""

    def run(self) -> None:
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


setup(
    packages=[
        *find_packages(include=["pixeldiff", "pixeldiff.*"]),
        "pixeldiff.triton_kernels",
    ],
    # At the top level of site-packages the name triton_kernels belongs to another project.
    package_dir={"pixeldiff.triton_kernels": "triton_kernels"},
    package_data={
        "pixeldiff": ["assets/**"],
        "pixeldiff.ops": ["measured/*.json"],
        "pixeldiff.triton_kernels": ["*.json"],
    },
    ext_modules=[Extension("pixeldiff._C", sources=[])],
    cmdclass={"build_ext": BuildExt, "bdist_wheel": BdistWheel},
)
