"""Names of our own modules that tests and benchmarks use exist: also in what only a GPU runs."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
OWN = ("pixeldiff", "bench")
FILES = [*sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "bench").glob("*.py"))]


ABSENT = object()  # wants what is not installed here
MISSING = object()


def imported(name: str) -> object:
    """The module of this name, or which of the two it is."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        return MISSING if e.name == name and name != "pixeldiff._C" else ABSENT
    except ImportError:
        return ABSENT


def missing(source: str, package: str = "") -> list[str]:
    """`module.name` for every name that a module bound by an import does not have."""
    tree = ast.parse(source)
    bound: dict[str, ModuleType] = {}
    lost, assigned = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            name = importlib.util.resolve_name(name, package) if node.level else name
            if name.split(".")[0] not in OWN:
                continue
            module = imported(name)
            lost += [name] if module is MISSING else []
            for alias in node.names if isinstance(module, ModuleType) else ():
                found = getattr(module, alias.name, ABSENT)
                if found is ABSENT:
                    found = imported(f"{name}.{alias.name}")
                if found is MISSING:
                    lost.append(f"{name}.{alias.name}")
                if isinstance(found, ModuleType):
                    bound[alias.asname or alias.name] = found
        elif isinstance(node, (ast.FunctionDef, ast.Lambda)):
            assigned |= {a.arg for a in [*node.args.args, *node.args.kwonlyargs]}
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            assigned.add(node.id)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = node.value.id
            if name in bound and name not in assigned and not hasattr(bound[name], node.attr):
                lost.append(f"{bound[name].__name__}.{node.attr}")
    return sorted(set(lost))


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_names_exist(path):
    package = "bench" if path.parent.name == "bench" and path.parent.parent == ROOT else ""
    assert not missing(path.read_text(), package)


def test_what_is_noticed():
    start = "from pixeldiff.verify import l2p as golden\n"
    assert missing(start + "golden.kind_of(g)") == []
    assert missing(start + "def f(): golden._config({})") == ["pixeldiff.verify.l2p._config"]
    assert missing("from pixeldiff.verify import nosuch") == ["pixeldiff.verify.nosuch"]
    assert missing(start + "def f(golden): golden._config({})") == []
    assert missing("from . import trace\ntrace.nosuch", "bench") == ["bench.trace.nosuch"]
