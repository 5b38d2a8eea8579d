"""bench/run_gpu.sh on a CPU: every part with programs that only say how they were called, each
command parsed as its own; a rehearsal; limits, resuming, and what is kept."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import click
import pytest

from bench import schema
from bench.__main__ import main
from bench.forward import NETWORKS
from bench.models import names
from bench.variants import VARIANTS
from pixeldiff.ops.registry import OPS

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "run_gpu.sh"
ROOT = SCRIPT.parents[1]
PARTS = ("", "--tests", "--sanitize", "--cuda", "--compare", "--compile", "--more", "--l2p")
PARTS += ("--tune",)
TOOLS = ("python", "compute-sanitizer")


def start(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OUT": str(out), "PYTHON": sys.executable, **environment}
    return subprocess.run(
        ["bash", str(SCRIPT), *filter(None, arguments)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def said(tmp_path):
    """said(*arguments): the script run with programs that print their arguments, one a line."""
    for name in TOOLS:
        program = tmp_path / name
        program.write_text(
            f'#!/bin/sh\necho "called {name}"\nfor a in "$@"; do echo "| $a"; done\n'
            '[ -z "$FAILS" ] || case "$*" in *"$FAILS"*) exit 1 ;; esac\n'
        )
        program.chmod(0o755)

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        found = {"PYTHON": str(tmp_path / "python"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return start(tmp_path / "out", *arguments, **{**found, **environment})

    run.out = tmp_path / "out"
    return run


def limits(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """Stage -> seconds; the programs take none, so that none is cut to what is left."""
    return {n: int(s) for n, s in re.findall(r"^== (\S+) \(at most (\d+) s\)", done.stdout, re.M)}


def table(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Stage -> what the last lines say of it."""
    lines = done.stdout.split("stages,")[1].strip().splitlines()[1:]
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines}


def command(log: Path) -> list[str]:
    """The arguments of the last program that a stage started."""
    last = log.read_text().split("called ")[-1].splitlines()[1:]
    return [line.removeprefix("| ") for line in last if line.startswith("| ")]


def parsed(words: list[str]) -> tuple[str, dict]:
    assert words[:2] == ["-m", "bench"]
    made = main.commands[words[2]].make_context(words[2], words[3:])
    return words[2], made.params


@pytest.mark.parametrize("part", PARTS)
def test_part(said, part):
    """Its stages one after the other, within nine minutes, each a command that exists."""
    done = said(part)
    assert done.returncode == 0, done.stderr
    stages = limits(done)
    own = {n: s for n, s in stages.items() if n not in ("environment", "report")}
    assert sum(own.values()) <= 530
    states = table(done)
    assert all(states[name].endswith("s ok") for name in stages), states
    for name in own:
        words = command(said.out / f"{name}.log")
        if "pytest" in words:
            assert "gpu" in words
            files = [w for w in words if w.startswith("tests")]
            assert files
            assert all((ROOT / f).exists() for f in files), files
        elif name != "build":
            kind, params = parsed(words)
            assert Path(params["path"]).name == f"{name}.json"
            # What was measured is kept where a stage ends by itself.
            for limit in ("limit", "timeout"):
                assert (params.get(limit) or 0) < own[name], name
            if kind in ("decode", "profile", "forward"):
                assert params["config"] in {*NETWORKS, *names()}
            assert set(params.get("ops", ())) <= OPS.keys(), name


@pytest.mark.parametrize("part", PARTS)
def test_rehearsal_of_a_part(said, part):
    """The same stages; every command on a CPU, and nothing compiled."""
    done = said("--dry-run", part)
    assert done.returncode == 0, done.stderr
    rehearsed = limits(done)
    assert "build" not in rehearsed
    assert all(state.endswith("s ok") for state in table(done).values())
    real = limits(said(part))
    assert rehearsed.keys() == real.keys() - {"build"}
    said("--dry-run", part)  # the logs of the rehearsal once more
    for name in rehearsed.keys() - {"environment", "report"}:
        words = command(said.out / f"{name}.log")
        if "pytest" in words:
            assert "--collect-only" in words
            continue
        kind, params = parsed(words)
        assert params["device"] == "cpu"
        assert not any("compile" in v for v in params.get("variants", ()))
        assert not params.get("compiled")
        if kind in ("decode", "forward", "profile"):
            assert params["config"] in ("demo", "tiny")
            assert (params["side"] or 0) <= 256


def test_what_parts_measure(said):
    """Every variant of a decode, every network call of L2P, and a race for every CUDA kernel."""
    decodes, forwards, raced = set(), set(), set()
    other = {"CONFIG": "flux2-v1.5"}
    for part, given in [*((part, {}) for part in PARTS), ("--compare", other)]:
        for name in limits(said(part, **given)):
            words = command(said.out / f"{name}.log")
            if words[1:2] != ["bench"]:
                continue
            kind, params = parsed(words)
            if kind == "decode":
                sizes = {params["side"], params["new_side"] or params["side"]}
                decodes |= {(params["config"], s, v) for s in sizes for v in params["variants"]}
            elif kind == "forward":
                forwards |= {(params["config"], v) for v in params["variants"]}
            elif kind == "kernels" and part == "--cuda":
                raced |= set(params["ops"])
    for config in ("flux-2k", "flux2-v1.5"):
        for size in (1024, 2048, 4096):
            assert {(config, size, v) for v in ("reference", "upstream")} <= decodes
    assert {v for _, _, v in decodes} == VARIANTS.keys() - {
        *("pixeldiff", "pixeldiff+compile", "reference-fp32", "upstream+accelerate"),
        "pixeldiff+returned",  # a matter of CPUs
    }
    assert {("1k", "reference"), ("4k", "reference"), ("8k", "reference")} <= forwards
    assert ("4k", "source") in forwards
    # PyTorch's own, and two without products, which the first part races with everything else.
    having = {o.name for o in OPS.values() if any(b.name == "cuda" for b in o.backends)}
    assert having - raced == {"fp8_linear", "rms_norm_modulate", "gated_residual_norm"}
    assert raced <= having


def test_compute_sanitizer(said):
    said("--sanitize")
    said("--cuda")
    for name, tool, kernels in (
        ("memcheck-bf16", "memcheck", "_kernel"),
        ("racecheck-fp32", "racecheck", "_kernel"),
        ("synccheck-cuda", "synccheck", "pixeldiff"),
    ):
        log = (said.out / f"sanitize-{name}.log").read_text()
        assert "called compute-sanitizer" in log
        words = command(said.out / f"sanitize-{name}.log")
        assert words[:4] == ["--tool", tool, "--error-exitcode", "9"]
        assert f"kns={kernels}" in words


def test_what_came_to_its_end_is_left_out(said):
    only = "environment build kernels-short decode-short tests-models"
    done = said(ONLY=only, FAILS="bench decode")
    assert limits(done).keys() == {*only.split()}
    assert table(done)["decode-short"].endswith("failed, code 1")
    done = said("--resume", ONLY=only)
    assert limits(done).keys() == {"environment", "build", "decode-short"}  # on a new machine
    assert table(done)["kernels-short"] == "- done before"
    # Another command is another measurement.
    assert "decode-short" in limits(said("--resume", ONLY=only, BACKEND="triton"))
    assert "decode-short" in limits(said("--resume", ONLY=only))
    assert limits(said("--resume", ONLY=only)).keys() == {"environment", "build"}
    # So are other sources.
    assert "kernels-short" in limits(said("--resume", ONLY=only, PIXELDIFF_COMMIT="abc"))
    assert limits(said(ONLY=only)).keys() == {*only.split()}


def test_a_stage_that_asks_for_it_is_run_again(tmp_path):
    """76: at once, as long as there is time. 75: by the next --resume."""
    out, program = tmp_path / "out", tmp_path / "python"
    program.write_text(
        '#!/bin/sh\ncase "$*" in *"bench kernels"*) echo "$@" >>"$CALLS"; '
        'exit "$(sed -n "$(wc -l <"$CALLS")p" "$CODES")" ;; esac\n'
    )
    program.chmod(0o755)
    calls, codes = tmp_path / "calls", tmp_path / "codes"
    given = {"PYTHON": str(program), "CALLS": str(calls), "CODES": str(codes)}

    def state(text: str) -> tuple[str, int]:
        codes.write_text(text)
        calls.write_text("")
        done = start(out, "--resume", ONLY="kernels-short", **given)
        return table(done)["kernels-short"].split("s ", 1)[-1], len(calls.read_text().splitlines())

    assert state("76\n76\n75\n") == ("not finished: --resume goes on with it", 3)
    assert "--resume --json" in calls.read_text()
    assert state("76\n0\n") == ("ok", 2)
    assert state("0\n")[1] == 0  # done before
    # Without --resume nothing is gone on with.
    (out / "kernels-short.json").write_text("{}")
    codes.write_text("0\n")
    start(out, ONLY="kernels-short", **given)
    assert not (out / "kernels-short.json").exists()


def test_a_process_that_lost_the_device_is_replaced(tmp_path):
    """By pytest-xdist: the test that lost it fails, those after it run in another process."""
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_kernels.py").write_text(
        "import pytest, torch\n"
        "lost = []\n"
        "def synchronize(*_):\n"
        "    if lost:\n"
        "        raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "torch.cuda.synchronize, torch.cuda.is_initialized = synchronize, lambda: True\n"
        "@pytest.mark.parametrize('i', range(9))\n"
        "def test_it(i):\n"
        "    if i == 2:\n"
        "        lost.append(i)\n"
        "    synchronize()\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "1", str(tmp_path)]
    done = subprocess.run(
        [*command, "--rootdir", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "1 failed, 8 passed" in done.stdout, done.stdout
    assert "crashed while running" in done.stdout
    assert "test_it[2] lost the device" in done.stderr
    assert "an illegal memory access" in done.stderr


@pytest.mark.parametrize(
    ("line", "state", "done"),
    [
        ("12 passed, 3 skipped in 4.20s", "ok, 12 passed, 3 skipped in 4.20s", True),
        ("858 skipped in 72.35s (0:01:12)", "nothing ran, 858 skipped in 72.35s", False),
    ],
)
def test_tests_that_are_all_skipped_prove_nothing(tmp_path, line, state, done):
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\ncase "$*" in *"-m pytest"*) echo "=== {line} ===" ;; esac\n')
    program.chmod(0o755)
    out = tmp_path / "out"
    found = table(start(out, PYTHON=str(program), ONLY="tests-once"))["tests-once"]
    assert found.split("s ", 1)[1] == state
    assert (out / "tests-once.done").exists() is done


def test_everything_in_one_file(said, tmp_path):
    archive = tmp_path / "results.tar.gz"
    only = {"ONLY": "kernels-short tests-once", "ARCHIVE": str(archive)}
    said(**only)
    with tarfile.open(archive) as f:
        kept = {Path(n).name for n in f.getnames()}
    assert {"kernels-short.log", "kernels-short.done", "tests-once.log"} <= kept
    assert not list(tmp_path.glob("*.part"))
    for file in said.out.iterdir():
        file.unlink()
    done = said("--resume", **only)
    assert limits(done) == {}
    assert (said.out / "kernels-short.log").exists()


def test_the_file_may_lie_in_the_folder(said, tmp_path):
    """tar then finds that the folder has changed as it read it, and says so by 1."""
    tar = tmp_path / "tar"
    tar.write_text('#!/bin/sh\nPATH="${PATH#*:}" tar "$@"\nexit 1\n')
    tar.chmod(0o755)
    archive = said.out / "results.tar.gz"
    said(ONLY="kernels-short", ARCHIVE=str(archive))
    with tarfile.open(archive) as f:
        kept = {Path(n).name for n in f.getnames()}
    assert "kernels-short.done" in kept
    assert not any(".tar.gz" in name for name in kept)


@pytest.mark.timeout(600)
def test_dry_run(tmp_path):
    """One stage of a rehearsal as it is, and what becomes of its result."""
    done = start(tmp_path, "--dry-run", ONLY="environment kernels-short", DRY_LIMIT="1")
    assert done.returncode == 0, done.stderr
    assert "torch present" in (tmp_path / "environment.log").read_text()
    rows = schema.load(tmp_path / "kernels-short.json")
    assert any(r.status == "measured" for r in rows)
    assert "summary" in done.stdout
    states = table(done)
    assert states.pop("kernels-short").endswith("s not finished: --resume goes on with it")
    assert all(state.endswith("s ok") for state in states.values()), done.stdout


def test_a_stage_that_hangs_costs_only_itself(tmp_path):
    """Stages under an interpreter that never answers: all are stopped, and the table says so."""
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nsleep 60\n")
    slow.chmod(0o755)
    done = start(tmp_path / "out", "--dry-run", PYTHON=str(slow), TOTAL="3", LEAST="1", ONLY=_FIRST)
    assert done.returncode == 0, done.stderr
    states = table(done)
    assert states["environment"] == "3 s stopped at 3 s (code 124)"
    assert states["tests-once"] == "- skipped: the whole limit of 3 s is used up"
    assert "no stage measured anything" in done.stdout


_FIRST = "environment tests-once kernels-short"


def test_races_of_this_run_choose_the_backends(tmp_path):
    """With a program that only leaves a file behind, beside one of an earlier run."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "kernels-earlier.json").write_text("{}")
    os.utime(out / "kernels-earlier.json", (1, 1))
    program = tmp_path / "python"
    program.write_text(
        '#!/bin/sh\necho "$@"\n'
        'case "$*" in *"bench kernels --resume --json"*) sleep 0.01; echo "{}" >"$6" ;; esac\n'
    )
    program.chmod(0o755)
    done = start(out, PYTHON=str(program))
    assert done.returncode == 0, done.stderr
    said = (out / "choose.log").read_text().split()
    assert said == [
        *("-m", "bench", "choose", str(out / "kernels-short.json")),
        *("--tables", str(out / "tables" / "measured")),
    ]
    # One that goes on takes those that it leaves out, too, if they are of the same sources.
    os.utime(out / "kernels-short.json", (1, 1))
    done = start(out, "--resume", PYTHON=str(program))
    assert "done before" in done.stdout
    assert (out / "choose.log").read_text().split() == said
    os.utime(out / "kernels-short.json", (1, 1))
    (out / "choose.log").unlink()
    start(out, "--resume", PYTHON=str(program), PIXELDIFF_COMMIT="abc", ONLY="environment choose")
    assert not (out / "choose.log").exists()


def test_wrong_usage(tmp_path):
    for arguments in (["--fast"], ["--l2p", "--tune"]):
        done = start(tmp_path, *arguments)
        assert done.returncode == 2
        assert "usage" in done.stderr or "one part at a time" in done.stderr


def test_page_names_every_part():
    page = (ROOT / "bench" / "README.md").read_text()
    for part in PARTS:
        assert not part or f"`{part}`" in page, part
    usage = shlex.split(start(ROOT / "unused", "--help").stderr)
    assert {w.strip("[]") for w in usage} >= {*PARTS[1:], "--resume", "--dry-run"}
    assert isinstance(main, click.Group)
