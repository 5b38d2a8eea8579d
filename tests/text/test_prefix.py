"""The fixed texts: where they come from, and that nothing else is taken for them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

from pixeldiff.text import instruction_prefix, negative_prompt
from pixeldiff.text import prefix as prefix_module

PREFIX_SHA256 = "62b9ab89eebb0ac5ee4d264bf96bf19d2b81f504bc3852500efeaf5a34d638b1"


@pytest.fixture
def released() -> str:
    pytest.importorskip("diffusers")
    return instruction_prefix()


@pytest.fixture
def fake_diffusers(tmp_path, monkeypatch):
    """A diffusers package of our own, first on the path, with the given pipeline source."""

    def make(pipeline: str, init: str = "") -> None:
        folder = tmp_path / "site" / "diffusers" / "pipelines" / "sana"
        folder.mkdir(parents=True)
        (tmp_path / "site" / "diffusers" / "__init__.py").write_text(init)
        (folder / "pipeline_sana.py").write_text(pipeline)
        for name in [n for n in sys.modules if n.split(".")[0] == "diffusers"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))

    yield make
    for name in [n for n in sys.modules if n.split(".")[0] == "diffusers"]:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def test_released_prefix(released):
    assert hashlib.sha256(released.encode("ascii")).hexdigest() == PREFIX_SHA256
    assert len(released) == 1057
    assert [len(line) for line in released.split("\n")] == [173, 154, 111, 56, 188, 227, 128, 13]
    assert released.endswith(": ")


def test_prefix_comes_without_importing_diffusers():
    pytest.importorskip("diffusers")
    code = (
        "import sys; from pixeldiff.text.prefix import instruction_prefix; instruction_prefix();"
        "print([m for m in ('diffusers', 'transformers', 'torchvision') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_import_gives_the_same_as_the_source(released):
    pytest.importorskip("transformers")
    assert prefix_module._from_import() == prefix_module._from_source()


def test_falls_back_to_import_where_the_source_has_no_literal(released, fake_diffusers, tmp_path):
    lines = released.replace('"', "'").split("\n")
    fake_diffusers(
        "class SanaPipeline:\n    def __call__(self, *, complex_human_instruction=LINES): ...\n",
        init=f"LINES = {lines!r}\n"
        "class SanaPipeline:\n    def __call__(self, *, complex_human_instruction=LINES): ...\n",
    )
    assert prefix_module._from_source() is None
    assert instruction_prefix() == released


def test_keyword_only_argument(released, fake_diffusers):
    lines = released.replace('"', "'").split("\n")
    fake_diffusers(
        "class SanaPipeline:\n"
        f"    def __call__(self, p='', *, x, complex_human_instruction={lines!r}): ...\n",
        init="raise AssertionError('imported')",
    )
    assert instruction_prefix() == released


def test_other_text_in_diffusers_is_refused(fake_diffusers):
    fake_diffusers(
        "class SanaPipeline:\n"
        "    def __call__(self, prompt='', complex_human_instruction=['a', 'b: ']): ...\n"
    )
    with pytest.raises(RuntimeError, match=r"has another text \(5 characters.*give a text file"):
        instruction_prefix()


def test_no_text_in_diffusers_is_refused(fake_diffusers):
    source = "class SanaPipeline:\n    def __call__(self, prompt=''): ...\n"
    fake_diffusers(source, init=source)
    with pytest.raises(RuntimeError, match="has none; give a text file"):
        instruction_prefix()


def test_unimportable_pipeline_is_refused(fake_diffusers):
    fake_diffusers("SanaPipeline = None\n", init="raise OSError('broken build')\n")
    with pytest.raises(RuntimeError, match=r"cannot be imported.*broken build.*give a text file"):
        instruction_prefix()


def test_without_diffusers_the_error_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    monkeypatch.setattr(
        prefix_module.importlib, "util", types.SimpleNamespace(find_spec=lambda name: None)
    )
    with pytest.raises(ImportError, match=r"install the extra pixeldiff\[text\] or give a text"):
        instruction_prefix()


@pytest.mark.parametrize(
    ("before", "after", "newline"),
    [("", "", "\n"), ("", "\n", "\n"), ("", "\n", "\r\n"), ("\ufeff", "", "\n")],
    ids=["bare", "trailing-newline", "crlf", "bom"],
)
def test_user_file(released, tmp_path, before, after, newline):
    file = tmp_path / "prefix.txt"
    file.write_bytes((before + released + after).replace("\n", newline).encode())
    assert instruction_prefix(file) == released
    assert instruction_prefix(str(file)) == released


def test_wrong_user_file(released, tmp_path):
    file = tmp_path / "prefix.txt"
    file.write_text("something else\n")
    with pytest.raises(ValueError, match=r"1057 characters.*got 14 characters.*verify=False"):
        instruction_prefix(file)
    assert instruction_prefix(file, verify=False) == "something else"

    file.write_text(released.rstrip())
    with pytest.raises(ValueError, match="the space at its end is missing"):
        instruction_prefix(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be UTF-8"):
        instruction_prefix(file)
    file.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        instruction_prefix(file, verify=False)
    with pytest.raises(FileNotFoundError):
        instruction_prefix(tmp_path / "none.txt")


def test_negative_prompt_is_checked(tmp_path, released):
    file = tmp_path / "negative.txt"
    file.write_text(released)
    with pytest.raises(ValueError, match=r"negative_prompt: .* 186 characters, SHA-256 3fbcee53"):
        negative_prompt(file)
    file.write_text("blurry, dark\n")
    assert negative_prompt(file, verify=False) == "blurry, dark"


def test_neither_text_is_in_the_package(released):
    """No line of the prefix, nor a long piece of it, may enter our own files."""
    pieces = [line[i : i + 40] for line in released.split("\n") for i in range(0, len(line), 40)]
    pieces = [piece for piece in pieces if len(piece) == 40]
    for file in Path(prefix_module.__file__).parents[1].rglob("*.py"):
        text = file.read_text()
        assert not any(piece in text for piece in pieces), file
