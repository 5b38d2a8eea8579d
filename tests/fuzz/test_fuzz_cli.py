"""Whatever is typed: exit code 0, 1 or 2, one line that says why, and no traceback.

PIXELDIFF_CLI_EXAMPLES is how many command lines each test tries; HYPOTHESIS_PROFILE=default, others
in every run.
"""

from __future__ import annotations

import json
import os

import pytest
import tiny_l2p
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from tiny_pid import save_net, tiny_caption, tiny_latent, tiny_net

from pixeldiff import cli
from pixeldiff.text import save_captions

EXAMPLES = settings(
    max_examples=int(os.environ.get("PIXELDIFF_CLI_EXAMPLES", "25")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
ODD = [
    "nan",
    "-nan",
    "inf",
    "-inf",
    "-0",
    "-0.0",
    "1e400",
    "-1e400",
    "1e-400",
    "٣",
    "²",
    "1_0",
    "0x2",
]
ODD += [
    "",
    " ",
    "1 ",
    "+2",
    "1,5",
    "1/2",
    "None",
    "true",
    "é",
    "🦊",
    "\u202e1",
    "9" * 400,
    "-" * 50,
]
NUMBER = st.sampled_from([*ODD, "0", "1", "2", "3", "4", "5", "-1", "0.5", "1.0", "999", "1e3"])
SIDE = st.sampled_from(["0", "1", "16", "31", "32", "64", "-32", "1e2", "64.0", "٣٢", str(1 << 31)])
SIZE = (
    st.builds("{}{}{}".format, SIDE, st.sampled_from(["x", "X", "\u00d7", ",", ""]), SIDE) | NUMBER
)
TILE = st.sampled_from(["auto", "AUTO", "1x1", "2x2", "2x3", "0x0", "-1x2", "99x99", "2"]) | NUMBER
TEXT = st.sampled_from(
    ["", "a", "\x00", "é" * 300, "[red]", "{x}", "%s", "-", "--", "\ud800", "\n"]
)


def one_of_each(options: dict[str, st.SearchStrategy]) -> st.SearchStrategy[list[str]]:
    """Up to four options with their values."""
    each = st.sampled_from(sorted(options)).flatmap(
        lambda name: options[name].map(lambda value: [name] if value is None else [name, value])
    )
    return st.lists(each, max_size=4).map(lambda pairs: [word for pair in pairs for word in pair])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    save_net(folder / "pid.safetensors", tiny_net())
    save_file({"latent": tiny_latent(1, 2, 3)}, folder / "z.safetensors")
    save_captions(folder / "y.safetensors", tiny_caption(), "a", family="Gemma-2")
    config = tiny_l2p.config(n_layers=1)
    net = tiny_l2p.network(config)
    state = {k: v.contiguous() for k, v in net.state_dict().items()}
    save_file(state, folder / "l2p.safetensors", {"config": json.dumps(config.to_dict())})
    y = tiny_l2p.captions(5)[0][None]
    save_captions(folder / "p.safetensors", y, "a", family="Qwen3", negative=(y, "b"))
    Image.new("RGB", (32, 32), "red").save(folder / "a.png")
    (folder / "text.png").write_text("no picture")
    (folder / "empty.safetensors").touch()
    (folder / "folder").mkdir()
    return folder


@pytest.fixture(autouse=True)
def _in_their_folder(files, monkeypatch):
    """Relative paths are written there."""
    monkeypatch.chdir(files)


def ends_well(files, args: list[str]) -> None:
    before = sorted(files.rglob("*"))
    result = CliRunner().invoke(cli.main, args)
    known = result.exception is None or isinstance(result.exception, SystemExit)
    assert known, f"{args}: {result.exception!r}"
    assert result.exit_code in (0, 1, 2), args
    event(f"exit code {result.exit_code}")  # --hypothesis-show-statistics
    assert "Traceback" not in result.output
    if result.exit_code == 1:
        told = [line for line in result.output.splitlines() if not line.startswith("note: ")]
        assert len(told) == 1, (args, result.output)
        assert told[0].startswith("error: "), (args, told)
        assert len(told[0]) > len("error: "), args
    if result.exit_code:
        assert sorted(files.rglob("*")) == before, args
    for path in files.rglob("out*"):
        path.unlink()


def paths(*names: str) -> st.SearchStrategy[str]:
    odd = ["/dev/null", "", ".", "..", "/nowhere/a.png", "a" * 300, "~", "*", "🦊.png"]
    return st.sampled_from([*names, *names, *odd])


@EXAMPLES
@given(data=st.data())
def test_decode(files, data):
    here = [str(files / name) for name in ("z.safetensors", "empty.safetensors", "folder", "a.png")]
    models = [str(files / name) for name in ("pid.safetensors", "l2p.safetensors", "text.png")]
    outputs = [str(files / name) for name in ("out.png", "out.jpg", "out.bmp", "folder", "out")]
    options = one_of_each({
        "--sigma": NUMBER, "--steps": NUMBER, "--seed": NUMBER, "--size": SIZE, "--tile": TILE,
        "--overlap": NUMBER, "--cfg-scale": NUMBER, "--precision": TEXT, "--device": TEXT,
        "--backbone": TEXT, "--tile-mode": TEXT, "--low-memory": st.none(), "--debug": st.none(),
        "--caption-file": paths(str(files / "y.safetensors"), str(files / "p.safetensors")),
    })  # fmt: skip
    args = [
        "decode",
        data.draw(paths(*here[:1] * 6, *here)),
        "-o",
        data.draw(paths(*outputs[:1] * 9, *outputs)),
    ]
    args += ["--model", data.draw(st.sampled_from([models[0]] * 6 + models)), "--device", "cpu"]
    given_caption = ["--caption-file", str(files / "y.safetensors")]
    ends_well(files, [*args, *given_caption, *data.draw(options)])


@EXAMPLES
@given(data=st.data())
def test_generate(files, data):
    models = [str(files / name) for name in ("l2p.safetensors", "pid.safetensors", "text.png")]
    outputs = [str(files / name) for name in ("out.png", "out.tif", "out.gif", "folder")]
    pictures = paths(
        *(str(files / name) for name in ("a.png", "text.png", "folder", "z.safetensors"))
    )
    options = one_of_each({
        "--steps": NUMBER, "--seed": NUMBER, "--size": SIZE, "--height": SIDE, "--width": SIDE,
        "--guidance": NUMBER, "--shift": NUMBER, "--strength": NUMBER, "--overlap": NUMBER,
        "--tile": SIZE, "--image": pictures, "--precision": TEXT, "--debug": st.none(),
        "--negative-prompt-embeds": paths(str(files / "p.safetensors")),
    })  # fmt: skip
    args = ["generate", "-o", data.draw(paths(*outputs[:1] * 9, *outputs)), "--device", "cpu"]
    args += ["--model", data.draw(st.sampled_from([models[0]] * 6 + models)), "--steps", "1"]
    args += ["--prompt-embeds", str(files / "p.safetensors"), "--size", "32x32"]
    ends_well(files, [*args, *data.draw(options)])


@EXAMPLES
@given(
    args=st.lists(
        TEXT
        | NUMBER
        | st.sampled_from(["decode", "generate", "info", "verify", "bake-caption", "l2p", "merge"])
        | st.sampled_from(
            ["convert", "train", "-o", "--model", "demo", "--help", "--version", "-h"]
        ),
        max_size=6,
    ).filter(lambda args: args[:1] != ["info"])
)
def test_anything(files, args):
    torch.manual_seed(0)
    result = CliRunner().invoke(cli.main, args)
    assert result.exception is None or isinstance(result.exception, SystemExit), args
    assert result.exit_code in (0, 1, 2), args
    assert "Traceback" not in result.output
