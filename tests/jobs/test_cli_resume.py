"""`--resume` and `--prompts`: what is kept, what is said, what is refused."""

from __future__ import annotations

import os
import signal

import pytest
from click.testing import CliRunner
from safetensors.torch import save_file
from samplings import Calls
from tiny_pid import save_net, tiny_latent, tiny_net

from pixeldiff import cli
from pixeldiff.jobs import JobStore
from pixeldiff.models.l2p import L2PNet
from pixeldiff.models.pid import PiDNet
from pixeldiff.picture_files import read_picture_metadata
from pixeldiff.prompt_file import Request, read_prompts


def run(*args, code=0):
    result = CliRunner().invoke(cli.main, [str(a) for a in args])
    known = result.exception is None or isinstance(result.exception, SystemExit)
    assert known, f"traceback: {result.exception!r}"
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_net(folder / "pid.safetensors", tiny_net())
    save_file({"latent": tiny_latent(1, 7, 9)}, folder / "one.safetensors")
    save_file({"latent": tiny_latent(2)}, folder / "two.safetensors")
    return folder


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "Ausgänge 🦊"
    folder.mkdir()
    return folder


def decode(files, out, *args, source="one.safetensors", code=0):
    tiles = ("--tile", "4x6", "--overlap", 1) if source == "one.safetensors" else ()
    common = ("--model", files / "pid.safetensors", *tiles, "--device", "cpu", "--quiet")
    return run("decode", files / source, "-o", out / "a.png", *common, *args, code=code)


def at_call(number, action, monkeypatch, kind=PiDNet, name="step"):
    """`action` happens in the network call of that number."""
    method, calls = getattr(kind, name), []

    def limited(self, *args, **options):
        calls.append(1)
        if len(calls) == number:
            action()
        return method(self, *args, **options)

    monkeypatch.setattr(kind, name, limited)


def interrupt():
    raise KeyboardInterrupt


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("action", "code"), [(interrupt, 130), (terminate, 143)])
@pytest.mark.parametrize("mode", ["sync", "independent"])
def test_decode_is_interrupted_and_goes_on(files, out, monkeypatch, action, code, mode):
    how, call = ("--tile-mode", mode), 7
    decode(files, out, *how)
    expected = (out / "a.png").read_bytes()
    (out / "a.png").write_bytes(b"old")
    before = signal.getsignal(signal.SIGTERM)
    name = "step" if mode == "sync" else "student_step"
    with monkeypatch.context() as patch:
        at_call(call, action, patch, name=name)
        stderr = decode(files, out, *how, "--resume", code=code).stderr
    assert stderr == (
        f"interrupted; finished work is kept in {out / 'a.png.job'}; the same command with "
        f"--resume goes on\n"
    )
    assert signal.getsignal(signal.SIGTERM) == before
    assert sorted(os.listdir(out)) == ["a.png", "a.png.job"]
    assert (out / "a.png").read_bytes() == b"old"
    stderr = decode(files, out, *how, code=1).stderr
    assert "a.png.job holds unfinished work of an earlier run; pass --resume to go on" in stderr
    stderr = decode(files, out, *how, "--resume", "--seed", 4, code=1).stderr
    assert "differs in noise (" in stderr
    assert "seed (0 there, 4 here)" in stderr
    assert (out / "a.png").read_bytes() == b"old"
    with Calls() as calls:
        decode(files, out, *how, "--resume")
    assert calls.count == (16 - (call - 1) if mode == "sync" else 16 - 4)
    assert (out / "a.png").read_bytes() == expected
    assert os.listdir(out) == ["a.png"]


def test_nothing_is_kept_without_resume(files, out, monkeypatch):
    at_call(7, interrupt, monkeypatch)
    assert decode(files, out, code=130).stderr == "interrupted; nothing was written\n"
    assert os.listdir(out) == []


def test_nothing_is_kept_where_nothing_is_finished(files, out, monkeypatch):
    at_call(1, interrupt, monkeypatch)
    said = decode(files, out, "--resume", code=130).stderr
    assert said == "interrupted; nothing was written\n"
    assert os.listdir(out) == []


def test_an_error_says_that_work_is_kept(files, out, monkeypatch):
    put, puts = JobStore.put, []

    def full(self, *args):
        puts.append(1)
        if len(puts) == 3:
            raise OSError(28, "No space left on device")
        put(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(JobStore, "put", full)
        stderr = decode(files, out, "--resume", code=1).stderr
    assert "note: finished work is kept in" in stderr
    assert "error: [Errno 28] No space left on device" in stderr
    with Calls() as calls:
        decode(files, out, "--resume")
    assert calls.count == 16 - 2
    assert os.listdir(out) == ["a.png"]


def test_several_latents(files, out, monkeypatch):
    decode(files, out, source="two.safetensors")
    expected = [(out / f"a-{i}.png").read_bytes() for i in range(2)]
    with monkeypatch.context() as patch:
        at_call(3, interrupt, patch, name="student_step")
        decode(files, out, "--resume", source="two.safetensors", code=130)
    with Calls() as calls:
        decode(files, out, "--resume", source="two.safetensors")
    assert calls.count == 2
    assert [(out / f"a-{i}.png").read_bytes() for i in range(2)] == expected
    assert sorted(os.listdir(out)) == ["a-0.png", "a-1.png"]


# --- several prompts

LINES = ["a red circle", "", "a blue star on a white background", "a small green ring"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


def generate(out, *args, code=0):
    options = ("--model", "demo", "--size", "64x64", "--steps", 2, "--device", "cpu", "--quiet")
    return run("generate", "-o", out / "a.png", *options, *args, code=code)


def contents(out):
    return {p.name: p.read_bytes() for p in out.iterdir()}


def test_every_prompt_is_a_picture(out, prompts):
    result = generate(out, "--prompts", prompts, "--seed", 5)
    assert result.stdout.splitlines() == [str(out / f"a-{i}.png") for i in range(3)]
    pictures = contents(out)
    assert sorted(pictures) == ["a-0.png", "a-1.png", "a-2.png"]
    for i, line in enumerate(filter(None, LINES)):
        generate(out, line, "--seed", 5 + i)
        assert (out / "a.png").read_bytes() == pictures[f"a-{i}.png"]


@pytest.mark.parametrize("call", [1, 3, 4, 6])
@pytest.mark.parametrize("first", [("--resume",), ()])
def test_prompts_go_on(out, prompts, monkeypatch, call, first):
    generate(out, "--prompts", prompts)
    expected = contents(out)
    for path in out.iterdir():
        path.unlink()
    with monkeypatch.context() as patch:
        at_call(call, interrupt, patch, kind=L2PNet)
        stderr = generate(out, "--prompts", prompts, *first, code=130).stderr
    finished = (call - 1) // 2
    assert sorted(p for p in os.listdir(out) if p != "a.png.job") == sorted(expected)[:finished]
    if finished:
        assert "a.png.job; the same command with --resume goes on" in stderr
        assert "holds unfinished work" in generate(out, "--prompts", prompts, code=1).stderr
    with Calls() as calls:
        result = generate(out, "--prompts", prompts, "--resume")
    assert calls.count == 6 - (call - 1 if first else 2 * finished)
    assert len(result.stdout.splitlines()) == 3
    assert contents(out) == expected


def test_finished_pictures_that_changed_are_made_again(out, prompts, monkeypatch):
    generate(out, "--prompts", prompts)
    expected = contents(out)
    with monkeypatch.context() as patch:
        at_call(6, interrupt, patch, kind=L2PNet)
        generate(out, "--prompts", prompts, code=130)
    (out / "a-0.png").unlink()
    (out / "a-1.png").write_bytes(b"other")
    generate(out, "--prompts", prompts, "--resume")
    assert contents(out) == expected


def test_other_prompts_are_refused(out, prompts, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(5, interrupt, patch, kind=L2PNet)
        generate(out, "--prompts", prompts, code=130)
    changed = ("--prompts", prompts, "--resume", "--guidance", 2.0)
    assert "differs in guidance (none there, 2.0 here);" in generate(out, *changed, code=1).stderr
    prompts.write_text("a red circle\n")
    same = ("--prompts", prompts, "--resume")
    assert "differs in prompts (" in generate(out, *same, code=1).stderr


def test_a_budget_is_part_of_a_job_of_prompts(out, prompts, monkeypatch):
    """It may choose tiles, and with them other pixels."""
    begun = ("--prompts", prompts, "--memory", "4GB")
    with monkeypatch.context() as patch:
        at_call(5, interrupt, patch, kind=L2PNet)
        generate(out, *begun, code=130)
    for changed, words in (
        (("--memory", "8GB"), "differs in memory (4GB there, 8GB here);"),
        ((), "differs in memory (4GB there, none here);"),
    ):
        again = ("--prompts", prompts, "--resume", *changed)
        assert words in generate(out, *again, code=1).stderr
    assert len(generate(out, *begun, "--resume").stdout.splitlines()) == 3


def test_json_lines(out, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "a red circle", "seed": 9, "size": "32x64"}\n\n'
        '{"prompt": "a blue star", "size": [64, 32]}\n{"prompt": "a green ring"}\n'
    )
    assert read_prompts(path) == [
        Request("a red circle", 9, (32, 64)),
        Request("a blue star", None, (64, 32)),
        Request("a green ring"),
    ]
    generate(out, "--prompts", path, "--seed", 1)
    found = [read_picture_metadata(out / f"a-{i}.png") for i in range(3)]
    assert [(m["seed"], m["size"]) for m in found] == [(9, [32, 64]), (2, [64, 32]), (3, [64, 64])]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b" \n\n", "must hold a prompt a line, it has none"),
        ("a.txt", b"\xff\xfe\x00", "must be UTF-8 text with a prompt a line"),
        ("a.jsonl", b"{}\n", 'line 1: must be a JSON object with "prompt", a text, got {}'),
        ("a.jsonl", b'{"prompt": "a"}\nx\n', "line 2: must be a JSON object: "),
        ("a.jsonl", b'{"prompt": "a", "sed": 1}', "line 1: knows prompt, seed, size, got sed"),
        ("a.jsonl", b'{"prompt": "a", "seed": 1.5}', "line 1: seed must be an integer, got 1.5"),
        ("a.jsonl", b'{"prompt": "a", "size": "3"}', "line 1: size must be"),
        ("a.jsonl", b'{"prompt": "a", "size": 3}', "line 1: size must be"),
    ],
)
def test_prompt_files_that_are_none(out, tmp_path, name, data, words):
    path = tmp_path / name
    path.write_bytes(data)
    assert words in generate(out, "--prompts", path, code=1).stderr
    assert os.listdir(out) == []


def test_prompts_exclude_a_prompt(out, prompts):
    result = generate(out, "a red circle", "--prompts", prompts, code=2)
    assert "give one of PROMPT, --prompts and --prompt-embeds" in result.stderr
    assert "No such file" in generate(out, "--prompts", out / "none.txt", code=1).stderr
