"""Races into tables. Every row here is invented: nothing in this file was measured anywhere."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rows import MACHINE, kernel_row

from bench import choose, schema
from bench.choose import MARGIN, decide, ranked, read, selectable, write
from bench.choose_command import choose as command
from bench.kernels import shape_of
from bench.machine import machine
from bench.schema import Accuracy
from bench.shapes import cases
from bench.timing import summarise
from pixeldiff.ops import choice
from pixeldiff.ops.registry import OPS

GPU = dataclasses.replace(
    MACHINE,
    device="cuda",
    device_name="an invented GPU",
    capability="9.0",
    triton="3.6.0",
    cuda="12.8",
    driver="1.2",
)
ATTENTION = "joint_attention"
KIND = "bfloat16 d64"
TODAY = ("reference", "triton", "cuda", "flash", "cudnn", "efficient")


@pytest.fixture
def tables(tmp_path, monkeypatch) -> Path:
    """An empty folder, also in the place of the package's own."""
    folder = tmp_path / "tables"
    monkeypatch.setattr(choice, "FOLDER", folder)
    return folder


def row(backend: str, ms: float | None, *, site="pid/mmdit", size=2048, **changes):
    """Of attention; None refuses, infinity fails."""
    op = changes.pop("op", ATTENTION)
    system, place = site.split("/")
    (case,) = (c for c in cases(op, (size,)) if (c.system, c.site) == (system, place))
    changes = {"machine": GPU, "dtype": "bf16", **changes}
    if ms is None or math.isinf(ms):
        status = "refused" if ms is None else "failed"
        nothing = dict.fromkeys(("timing", "rates", "accuracy"))
        changes = {**changes, **nothing, "status": status, "reason": "invented"}
        ms = 1.0
    elif "accuracy" not in changes:
        changes["accuracy"] = Accuracy("twice eager", 1e-3, 1e-3, 0.5)
    return kernel_row(backend, ms, name=op, site=site, shape=shape_of(case), **changes)


def race(path: Path, *, also=(), at=None, **ms: float | None) -> Path:
    """A result file of one race; `also` are rows of others."""
    rows = [row(backend, t, **(at or {})) for backend, t in ms.items()]
    schema.save(path, [*rows, *also], "invented")
    return path


def decided(tables: Path, *paths: Path, **options):
    machine, races = read(paths)
    return decide(machine, races, tables, **options)


def chosen(tables: Path, *paths: Path, **options):
    (decision,) = decided(tables, *paths, **options)
    return decision


def put(tables: Path, op: str = ATTENTION, kind: str = KIND, device=GPU.device_name, **sizes):
    """A table of another day: size_14=("cuda", "reference")."""
    tables.mkdir(exist_ok=True)
    entries = {
        name.removeprefix("size_"): {"order": list(order), "device": device}
        for name, order in sizes.items()
    }
    path = tables / f"{op}.json"
    path.write_text(json.dumps({"9.0": {kind: entries}}))
    return path


def test_a_row_says_its_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an invented GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 1))
    assert machine(torch.device("cuda")).capability == "12.1"
    assert machine(torch.device("cpu")).capability is None


def test_what_can_be_chosen():
    assert selectable(ATTENTION) == TODAY
    assert selectable("swiglu") == ("triton", "reference")
    assert selectable("gated_residual_norm") == ("triton", "reference", "cuda")
    for op in OPS:
        assert len(set(selectable(op))) == len(selectable(op))


def test_the_fastest_is_first(tables, tmp_path):
    path = race(tmp_path / "r.json", eager=3.0, triton=4.0, cuda=2.0, flash=2.5, compiled=2.9)
    found = chosen(tables, path)
    assert (found.op, found.kind, found.size) == (ATTENTION, KIND, 14)
    assert found.before == ("reference", "triton", "cuda", "flash")
    assert found.after == ("cuda", "flash", "reference", "triton")
    assert found.gain == pytest.approx(1.5)
    assert found.notes == ()
    assert not found.stands


@given(
    st.dictionaries(st.sampled_from(TODAY), st.floats(0.01, 100), min_size=1),
    st.randoms(use_true_random=False),
)
def test_the_first_is_never_slower_than_the_margin(mean, random):
    current = list(mean)
    random.shuffle(current)
    order = ranked(current, mean)
    assert sorted(order) == sorted(current)
    for i, name in enumerate(order):
        assert mean[name] <= MARGIN * min(mean[later] for later in order[i:])
    # Neither noise within the margin nor asking again turns the order over.
    assert ranked(order, mean) == order
    same = {name: 1 + (t % 1) * (MARGIN - 1) * 0.99 for name, t in mean.items()}
    assert ranked(current, same) == tuple(current)


def test_noise_does_not_turn_a_table_over(tables, tmp_path):
    path = race(tmp_path / "r.json", eager=1.01, cuda=1.0)
    assert chosen(tables, path).after == ("reference", "cuda")
    put(tables, size_14=("cuda", "reference"))
    path = race(tmp_path / "r.json", eager=1.0, cuda=1.01)
    found = chosen(tables, path)
    assert found.after == found.before == ("cuda", "reference")
    assert found.stands
    path = race(tmp_path / "r.json", eager=1.0, cuda=1.03)
    assert chosen(tables, path).after == ("reference", "cuda")


def test_what_is_wrong_is_not_chosen(tables, tmp_path):
    wrong = row("cuda", 0.1, accuracy=Accuracy("twice eager", 1.0, 1e-3, 1.7))
    unknown = row("flash", 0.1, accuracy=None)
    path = race(tmp_path / "r.json", also=[wrong, unknown], eager=2.0, triton=1.0)
    found = chosen(tables, path)
    assert found.after == ("triton", "reference")
    assert found.notes == (
        "cuda: its error is 1.7 of what is allowed",
        "flash: its error was not measured",
    )
    assert found.entry["left_out"] == list(found.notes)


def test_what_failed_once_is_not_chosen_for_the_class(tables, tmp_path):
    """2048 and tiles of it are one class: fast at one and failing at the other is no choice."""
    at = {"op": "rms_norm_modulate", "site": "pid/image"}
    once = race(tmp_path / "a.json", eager=2.0, triton=1.0, cuda=0.5, at=at)
    again = race(tmp_path / "b.json", eager=2.0, triton=1.0, cuda=math.inf, at=at)
    found = chosen(tables, once, again)
    assert found.after == ("triton", "reference")
    assert found.notes == ("cuda: failed: invented",)


def test_one_that_refused_somewhere_keeps_its_place(tables, tmp_path):
    """A call that it refuses passes it over too."""
    a = race(tmp_path / "a.json", eager=2.0, cuda=1.0)
    b = race(tmp_path / "b.json", eager=2.0, cuda=None)
    found = chosen(tables, a, b)
    assert found.after == ("cuda", "reference")
    assert [r["file"] for r in found.entry["races"]] == ["a.json"]


def test_only_times_of_one_race_are_compared(tables, tmp_path):
    a = race(tmp_path / "a.json", eager=2.0, cuda=1.0)
    b = race(tmp_path / "b.json", eager=4.0, flash=1.5)
    found = chosen(tables, a, b)
    assert found.after == ()
    assert found.notes == ("no race has all of reference, cuda, flash; time them in one run",)
    machine, races = read([a, b])
    assert write(machine, decide(machine, races, tables), tables) == []
    assert not tables.exists()
    # One that has all decides.
    c = race(tmp_path / "c.json", eager=2.0, cuda=1.0, flash=0.5)
    assert chosen(tables, a, b, c).after == ("flash", "cuda", "reference")


def test_alone_is_no_race(tables, tmp_path):
    found = chosen(tables, race(tmp_path / "r.json", cuda=1.0, eager=None))
    assert found.after == ()
    assert found.notes == ("nothing to choose from: cuda alone was timed",)


def test_races_of_one_class_are_weighed_together(tables, tmp_path):
    """quantize_rows of both streams: 3 times as fast at one, 1.5 times as slow at the other."""
    rows = [
        row(backend, ms, op="quantize_rows", site=site)
        for site, times in (("pid/mmdit", (3.0, 1.0)), ("pid/pit", (1.0, 1.5)))
        for backend, ms in zip(("eager", "triton"), times, strict=True)
    ]
    schema.save(tmp_path / "r.json", rows, "invented")
    found = chosen(tables, tmp_path / "r.json")
    assert found.after == ("triton", "reference")
    assert len(found.entry["races"]) == 2
    put(tables, "quantize_rows", "bfloat16 D<=2048", size_14=("reference", "triton"))
    assert chosen(tables, tmp_path / "r.json").gain == pytest.approx(2**0.5)


def test_faster_ones_that_are_no_backend_are_told(tables, tmp_path):
    also = [row("cuda-mma", 1.0), row("compiled", 2.0)]
    found = chosen(tables, race(tmp_path / "r.json", also=also, eager=3.0, cuda=2.0))
    assert found.after == ("cuda", "reference")
    assert found.notes == ("cuda-mma is 2.00 x as fast, and no backend",)


def test_an_op_that_stands_for_others_is_raced_against_them(tables, tmp_path):
    at = {"op": "qkv_norm_rope"}
    path = race(tmp_path / "r.json", at=at, eager=5.0, cuda=2.0, also=[row("in-parts", 1.9, **at)])
    found = chosen(tables, path)
    assert found.before == found.after == ("reference", "cuda")
    assert found.entry["races"][0]["ms"] == pytest.approx({"reference": 2.85, "cuda": 3.0})


def test_one_in_the_table_that_did_not_race_is_not_forgotten(tables, tmp_path):
    put(tables, size_14=("flash", "reference"))
    found = chosen(tables, race(tmp_path / "r.json", eager=2.0, cuda=1.0))
    assert found.after == ()
    assert found.notes == ("flash, which the table lists, did not race",)
    # One that PyTorch no longer has is.
    found = chosen(tables, race(tmp_path / "r.json", eager=2.0, cuda=1.0, flash=None))
    assert found.after == ("cuda", "reference")


def test_what_is_tried_now_is_the_nearest_entry(tables, tmp_path):
    put(tables, size_12=("cuda", "reference"))
    found = chosen(tables, race(tmp_path / "r.json", eager=1.0, triton=1.0, cuda=1.0))
    assert found.before == found.after == ("cuda", "reference", "triton")
    assert not found.stands  # of a size of its own, which had no entry


def test_a_table_is_written_and_a_call_takes_it(measured, tmp_path):
    from pixeldiff.ops.examples import arguments

    folder = choice.FOLDER
    path = race(folder / "race.json", eager=3.0, cuda=2.0)
    machine, races = read([path])
    (written,) = write(machine, decide(machine, races, folder), folder)
    assert written == folder / "joint_attention.json"
    entry = json.loads(written.read_text())["9.0"][KIND]["14"]
    assert entry == {
        "order": ["cuda", "reference"],
        "device": "an invented GPU",
        "commit": GPU.commit,
        "torch": "2.9.0",
        "triton": "3.6.0",
        "races": [
            {
                "file": "race.json",
                "site": "pid/mmdit",
                "size": 2048,
                "utc": GPU.utc,
                "ms": {"reference": 4.5, "cuda": 3.0},  # the median of 3.0, 4.5 and 6.0
            }
        ],
        "left_out": [],
    }
    choice.forget()
    (case, *_) = cases(ATTENTION, (2048,))
    args = arguments(ATTENTION, "meta", choose.DTYPES["bf16"], case.geometry)
    assert choice.order(ATTENTION, args) == ("cuda", "reference")
    assert [p.name for p in folder.iterdir() if p.suffix == ".part"] == []
    # Again: nothing changes, but for what it was measured with.
    before = written.read_bytes()
    (again,) = decide(machine, races, folder)
    assert again.stands
    write(machine, [again], folder)
    assert written.read_bytes() == before


def test_other_entries_stay(tables, tmp_path):
    path = put(tables, size_9=("triton", "reference"), size_16=("flash", "reference"))
    data = json.loads(path.read_text())
    data["12.0"] = {KIND: {"14": {"order": ["triton"], "device": "another"}}}
    data["9.0"]["bfloat16 d72"] = {"14": {"order": ["cuda"], "device": GPU.device_name}}
    path.write_text(json.dumps(data))
    machine, races = read([race(tmp_path / "r.json", eager=3.0, cuda=2.0)])
    write(machine, decide(machine, races, tables), tables)
    found = choice.orders(choice.read(path), path)
    assert found == {
        "9.0": {
            KIND: {
                9: ("triton", "reference"),
                14: ("cuda", "reference"),
                16: ("flash", "reference"),
            },
            "bfloat16 d72": {14: ("cuda",)},
        },
        "12.0": {KIND: {14: ("triton",)}},
    }
    assert list(found) == ["9.0", "12.0"]  # as numbers
    assert list(found["9.0"][KIND]) == [9, 14, 16]


def test_another_folder_begins_as_the_package(tables, tmp_path):
    old = put(tables, size_16=("flash", "reference"))
    text = old.read_text()
    out = tmp_path / "out" / "measured"
    machine, races = read([race(tmp_path / "r.json", eager=3.0, cuda=2.0)])
    (written,) = write(machine, decide(machine, races, out), out)
    assert written.parent == out
    assert choice.orders(choice.read(written), written)["9.0"][KIND].keys() == {14, 16}
    assert old.read_text() == text


def test_all_tables_are_written_or_none(tables, tmp_path, monkeypatch):
    also = [row(b, ms, op="swiglu", site="pid/image") for b, ms in (("eager", 2.0), ("triton", 1))]
    path = race(tmp_path / "r.json", also=also, eager=3.0, cuda=2.0)
    machine, races = read([path])
    decisions = decide(machine, races, tables)
    assert [d.op for d in decisions] == ["joint_attention", "swiglu"]
    old = put(tables, size_14=("flash", "reference"))
    text = old.read_text()
    really, calls = json.dumps, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("no space left on device")
        return really(*args, **kwargs)

    monkeypatch.setattr(choose.json, "dumps", failing)
    with pytest.raises(OSError, match="no space left"):
        write(machine, decisions, tables)
    assert [p.name for p in tables.iterdir()] == ["joint_attention.json"]
    assert old.read_text() == text


def test_a_damaged_table_is_named_and_left_alone(tables, tmp_path):
    path = put(tables, size_14=("flash",))
    path.write_text("{")
    races = race(tmp_path / "r.json", eager=3.0, cuda=2.0)
    with pytest.raises(ValueError, match=r"joint_attention\.json is not a table of measured"):
        decided(tables, races)
    assert path.read_text() == "{"


def test_another_device_of_the_same_capability(tables, tmp_path):
    path = put(tables, device="another GPU", size_14=("flash", "reference"), size_18=("triton",))
    races = race(tmp_path / "r.json", eager=3.0, cuda=3.03)
    with pytest.raises(ValueError, match=r"9\.0 was measured on another GPU, these files on"):
        decided(tables, races)
    found = chosen(tables, races, replace=True)
    assert found.after == ("reference", "cuda")
    write(GPU, [found], tables, replace=True)
    assert choice.orders(choice.read(path), path) == {"9.0": {KIND: {14: ("reference", "cuda")}}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"device": "cpu"}, "was measured on cpu .* by races on a GPU"),
        ({"capability": None}, "does not say its device's compute capability"),
        ({"device_name": "another"}, "with device_name another, .*a.json with an invented GPU"),
        ({"capability": "8.0"}, "with capability 8.0, .* with 9.0"),
        ({"commit": "fedcba"}, "with commit fedcba"),
        ({"torch": "2.10.0"}, "with torch 2.10.0"),
        ({"triton": None}, "with triton None, .* with 3.6.0; give files of one device and one b"),
    ],
)
def test_files_that_do_not_go_together(tmp_path, changes, says):
    a = race(tmp_path / "a.json", eager=3.0, cuda=2.0)
    other = dataclasses.replace(GPU, **changes)
    b = race(tmp_path / "b.json", eager=3.0, cuda=2.0, at={"machine": other})
    with pytest.raises(ValueError, match=f"^{b}.*{says}"):
        read([a, b])
    mixed = race(tmp_path / "c.json", eager=3.0, also=[row("cuda", 2.0, machine=other)])
    with pytest.raises(ValueError, match=says.replace("a.json", "c.json")):
        read([mixed])


def test_files_without_a_race(tmp_path):
    schema.save(tmp_path / "none.json", [], "invented")
    with pytest.raises(ValueError, match=r"none\.json holds no races"):
        read([tmp_path / "none.json"])
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json: schema must be 1"):
        read([tmp_path / "bad.json"])
    with pytest.raises(ValueError, match="at least one result file"):
        read([])


def test_rows_that_are_of_no_race(tmp_path):
    path = race(tmp_path / "r.json", eager=3.0, cuda=2.0, also=[row("cuda", 2.0)])
    with pytest.raises(ValueError, match="cuda ran twice in one race: joint_attention pid/mmdit"):
        read([path])
    strange = row("cuda", 1.0)
    strange.shape = {**strange.shape, "tokens": 5}
    schema.save(path, [strange], "invented")
    with pytest.raises(ValueError, match="pid/mmdit at 2048 is no place of bench/shapes"):
        read([path])
    schema.save(path, [dataclasses.replace(strange, name="no_op")], "invented")
    with pytest.raises(ValueError, match="no op 'no_op'; ops are add_silu, "):
        read([path])


def test_skipped_rows_say_nothing(tables, tmp_path):
    """Cases beyond the time limit have one row, of no backend."""
    late = row("-", None, size=4096)
    late.status = "skipped"
    found = decided(tables, race(tmp_path / "r.json", eager=3.0, cuda=2.0, also=[late]))
    assert [d.after for d in found] == [("cuda", "reference"), ()]


def test_the_command(tables, tmp_path):
    path = race(tmp_path / "r.json", eager=3.0, cuda=2.0)
    run = CliRunner().invoke
    options = [str(path), "--tables", str(tables)]
    done = run(command, [*options, "--check"])
    assert done.exit_code == 1
    assert not tables.exists()
    done = run(command, options)
    assert done.exit_code == 0, done.output
    assert (tables / "joint_attention.json").exists()
    done = run(command, [*options, "--check"])
    assert done.exit_code == 0, done.output
    done = run(command, [str(tmp_path / "absent.json")])
    assert done.exit_code == 1


def test_the_page_of_changes(tables, tmp_path, capsys):
    from bench.choose_command import _show

    also = [row("cuda", 2.0, size=4096), row("eager", 1.0, size=4096), row("compiled", 0.5)]
    _show(decided(tables, race(tmp_path / "r.json", eager=3.0, cuda=2.0, also=also)))
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    (line,) = (w for w in words if "2^14" in w and "│" in w)
    assert " ".join(line) == (
        "│ joint_attention │ bfloat16 d64 │ 2^14 │ reference cuda │ cuda reference │ 1.50 │ 1 │"
    )
    (line,) = (w for w in words if "2^16" in w)
    assert " ".join(line).endswith("│ reference cuda │ as before │ 1.00 │ 1 │")
    assert ["joint_attention", "bfloat16", "d64", "2^14:", "compiled", "is", "4.00"] in [
        w[:7] for w in words
    ]


def test_every_row_of_a_run_finds_its_class(tmp_path):
    """All ops at all their places, as a run writes them."""
    rows = []
    for op in sorted(OPS):
        for case in cases(op):
            at = {"op": op, "site": f"{case.system}/{case.site}", "size": case.size}
            rows += [row("eager", 2.0, **at), row("triton", 1.0, **at)]
    assert summarise([1.0]).median_ms == 1.0
    schema.save(tmp_path / "all.json", rows, "invented")
    _, races = read([tmp_path / "all.json"])
    assert len(races) == len(rows) // 2
    assert {r.op for r in races} == OPS.keys()
