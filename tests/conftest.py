"""Where the golden files are, and how tests ask for them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from safetensors import safe_open

COMMITTED = Path(__file__).parent / "golden"

# The same examples in every run: a bound that one draw in ten thousand misses is found by looking
# for it (HYPOTHESIS_PROFILE=default), not by somebody else's change turning red.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def _kept_memory():
    """What a command did to its own process is not what the next test's estimates are of."""
    yield
    heap = sys.modules.get("pixeldiff.memory.heap")
    if heap is not None:
        heap._fixed = heap._allowed = False


def golden_root() -> Path:
    """PIXELDIFF_GOLDEN_DIR, a full set with the folders pid/ and l2p/, else the committed choice.

    Raises:
        pytest.UsageError: the variable names a folder without golden files.
    """
    given = os.environ.get("PIXELDIFF_GOLDEN_DIR")
    if not given:
        return COMMITTED
    root = Path(given)
    if not any(root.glob("*/*.safetensors")):
        raise pytest.UsageError(
            f"PIXELDIFF_GOLDEN_DIR must hold the folders pid/ and l2p/ with .safetensors files; "
            f"{root} does not"
        )
    return root


def golden_files(folder: str) -> dict[Path, str]:
    """Golden files of one system and their kind, in order of name."""
    return {p: _kind(p) for p in sorted((golden_root() / folder).glob("*.safetensors"))}


def _kind(path: Path) -> str:
    with safe_open(path, "pt") as f:
        return (f.metadata() or {}).get("kind", "")


def _is_training(kind: str) -> bool:
    return kind.startswith("training")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`pid_golden`, `pid_training_golden`, `l2p_golden` run a test once for every such file."""
    for name, training in (("pid_golden", False), ("pid_training_golden", True)):
        if name in metafunc.fixturenames:
            files = [p for p, kind in golden_files("pid").items() if _is_training(kind) == training]
            metafunc.parametrize(name, files, ids=[p.stem for p in files])
    if "l2p_golden" in metafunc.fixturenames:
        files = list(golden_files("l2p"))
        metafunc.parametrize("l2p_golden", files, ids=[p.stem for p in files])


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder with the subfolders pid/ and l2p/."""
    return golden_root()


@pytest.fixture
def rewritten(tmp_path):
    """rewritten(path, tensors=f, metadata=g) -> a copy of a safetensors file with changes in it.

    f and g take the dict of tensors (of metadata strings) and change it in place.
    """
    from safetensors.torch import save_file

    def rewrite(path: Path, *, tensors=None, metadata=None) -> Path:
        with safe_open(path, "pt") as f:
            meta = dict(f.metadata() or {})
            data = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        if tensors is not None:
            tensors(data)
        if metadata is not None:
            metadata(meta)
        meta = {k: v if isinstance(v, str) else json.dumps(v) for k, v in meta.items()}
        target = tmp_path / path.name
        save_file({k: v.contiguous() for k, v in data.items()}, target, metadata=meta)
        return target

    return rewrite


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """measured(op, table) -> the file. Calls then choose as on a GPU of capability 9.0 by these
    tables alone, wherever their tensors are."""
    import functools

    from pixeldiff.ops import choice

    choice.forget()
    monkeypatch.setattr(choice, "FOLDER", tmp_path)
    monkeypatch.setattr(choice, "device_index", lambda x: 0)
    monkeypatch.setattr(choice, "capability", functools.cache(lambda index: "9.0"))

    def put(op: str, table) -> Path:
        path = tmp_path / f"{op}.json"
        path.write_text(table if isinstance(table, str) else json.dumps(table))
        choice.forget()
        return path

    yield put
    monkeypatch.undo()
    choice.forget()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A kernel that reads or writes out of bounds takes its process's device away: every later test
    would fail there. With pytest-xdist the process ends with the one that did it, which is reported
    as the crash of a worker, and a new one does the rest."""
    report = yield
    if call.excinfo is not None and "PYTEST_XDIST_WORKER" in os.environ and _device_is_lost():
        with item.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"{item.nodeid} lost the device:\n{report.longreprtext}", file=sys.stderr)
            sys.stderr.flush()
        os._exit(1)
    return report


def _device_is_lost() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
