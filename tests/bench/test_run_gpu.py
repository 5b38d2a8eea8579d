"""bench/run_gpu.sh on a CPU: every stage of its rehearsal runs, within its limit, and is kept."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench import schema
from bench.forward import NETWORKS
from pixeldiff.ops.registry import OPS

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "run_gpu.sh"


def start(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OUT": str(out), "PYTHON": sys.executable, **environment}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dry_run(tmp_path):
    done = start(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr
    for stage in ("environment", "tests", "kernels-short", "kernels-full", "decode-short"):
        assert (tmp_path / f"{stage}.log").exists()
    for name in (
        *("kernels-short", "kernels-full", "kernels-cuda-rehearsal"),
        *("decode-short", "decode-full", "forward-tiny"),
    ):
        rows = schema.load(tmp_path / f"{name}.json")
        assert any(r.status == "measured" for r in rows), name
    assert "summary" in done.stdout
    assert done.stdout.rstrip().splitlines()[-1].strip().startswith(("report", "forward-tiny"))
    assert "failed" not in done.stdout.split("stages,")[1], done.stdout


def test_a_stage_that_hangs_costs_only_itself(tmp_path):
    """Stages under an interpreter that never answers: all are stopped, and the table says so."""
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nsleep 60\n")
    slow.chmod(0o755)
    done = start(tmp_path / "out", "--dry-run", PYTHON=str(slow), TOTAL="14")
    assert done.returncode == 0, done.stderr
    table = done.stdout.split("stages,")[1]
    assert "environment" in table
    assert "stopped at 14 s" in table
    assert "skipped: the whole limit of 14 s is used up" in table
    assert "no stage measured anything" in done.stdout


def test_every_part_asks_for_commands_that_exist():
    """What only a GPU runs: its options are parsed here, and rejected if they are misspelt."""
    from bench.__main__ import main

    lines = SCRIPT.read_text().replace("\\\n", " ").splitlines()
    calls = [shlex.split(line) for line in lines if line.startswith("  forward ")]
    assert len(calls) == 8
    command = main.commands["forward"]
    for _, name, seconds, *options in calls:
        assert 0 < int(seconds) <= 240, name
        context = command.make_context("forward", options)
        assert context.params["config"] in NETWORKS
    calls = [shlex.split(line) for line in lines if line.startswith("  kernels ")]
    assert len(calls) == 11
    for _, name, seconds, *options in calls:
        params = main.commands["kernels"].make_context("kernels", options).params
        assert set(params["ops"]) <= OPS.keys(), name
        # What was measured is kept where a stage ends by itself.
        assert params["limit"] is None or params["limit"] < int(seconds), name
    words = [word for line in lines for word in line.split() if word.startswith("tests/")]
    assert words
    assert all((SCRIPT.parents[1] / word).exists() for word in words)


def test_every_cuda_kernel_has_a_race():
    """Of the part for them; and what it takes together ends within nine minutes."""
    lines = SCRIPT.read_text().replace("\\\n", " ").split('elif [ "$CUDA"')[1].split("elif")[0]
    having = {o.name for o in OPS.values() if any(b.name == "cuda" for b in o.backends)}
    raced = set(re.findall(r"--op (\w+)", lines))
    # PyTorch's own, and two without products, which the first part races with everything else.
    assert having - raced == {"fp8_linear", "rms_norm_modulate", "gated_residual_norm"}
    assert raced <= having
    stages = re.findall(r"^ +(?:stage|kernels) \S+ (\d+)", lines, re.M)
    tools = len(re.search(r"for tool in (.*);", lines)[1].split())
    assert sum(map(int, stages)) + (tools - 1) * int(stages[-1]) < 530


def test_cuda_part(tmp_path):
    """Its stages one after the other, with programs that only say how they were called."""
    for name in ("python", "compute-sanitizer"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@"\n')
        program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = start(tmp_path / "out", "--cuda", PYTHON=str(tmp_path / "python"), PATH=path)
    assert done.returncode == 0, done.stderr
    table = done.stdout.split("stages,")[1].strip().splitlines()[1:]
    assert all(row.endswith("ok") for row in table), table
    logs = {f.stem: f.read_text() for f in (tmp_path / "out").glob("*.log")}
    for name in ("attention", "attention-fp8", "qkv", "mlp", "compress", "up"):
        assert f"kernels-cuda-{name}.json" in logs[f"kernels-cuda-{name}"]
    for tool in ("memcheck", "racecheck", "synccheck"):
        said = logs[f"sanitize-{tool}"]
        assert said.startswith(f"compute-sanitizer --tool {tool} --error-exitcode 9 --kernel-name")
        assert "-m pytest" in said
        assert "tests/kernels/test_local_decoder_up_cuda.py" in said


def test_races_of_this_run_choose_the_backends(tmp_path):
    """With a program that only leaves a file behind, beside one of an earlier run."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "kernels-earlier.json").write_text("{}")
    os.utime(out / "kernels-earlier.json", (1, 1))
    program = tmp_path / "python"
    program.write_text(
        '#!/bin/sh\necho "$@"\n'
        'case "$*" in *"bench kernels --json"*) sleep 0.01; echo "{}" >"$5" ;; esac\n'
    )
    program.chmod(0o755)
    done = start(out, PYTHON=str(program))
    assert done.returncode == 0, done.stderr
    said = (out / "choose.log").read_text().split()
    assert said == [
        *("-m", "bench", "choose", str(out / "kernels-short.json")),
        *("--tables", str(out / "tables" / "measured")),
    ]


def test_wrong_usage(tmp_path):
    done = start(tmp_path, "--fast")
    assert done.returncode == 2
    assert "usage" in done.stderr
