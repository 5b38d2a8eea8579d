"""Result files: what is accepted, what is refused and how it is said, and how they are written."""

from __future__ import annotations

import copy
import json

import pytest
from rows import decode_row, kernel_row, refused_row

from bench import schema
from bench.schema import SchemaError, load, save, to_dict, validate

ROWS = [kernel_row(), decode_row(), refused_row()]


def changed(*path, to) -> dict:
    """A valid result with the value at `path` of its first row replaced; `...` deletes it."""
    data = copy.deepcopy(to_dict(ROWS, "command"))
    place = data["rows"][0]
    for key in path[:-1]:
        place = place[key]
    if to is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return data


def test_rows_survive_the_file(tmp_path):
    path = tmp_path / "r.json"
    save(path, ROWS, "python -m bench kernels")
    assert load(path) == ROWS
    assert json.loads(path.read_text())["command"] == "python -m bench kernels"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "a result must be an object, got list"),
        ({}, "schema must be 1, got None"),
        ({"schema": 2, "command": "", "rows": []}, "schema must be 1, got 2"),
        ({"schema": 1, "command": "", "rows": {}}, "rows must be a list"),
        ({"schema": 1, "command": "", "rows": [], "x": 1}, "unknown field 'x'"),
        ({"schema": 1, "command": "", "rows": [1]}, r"rows\[0\] must be an object, got 1"),
        (changed("name", to=3), r"rows\[0\]\.name must be str, got 3"),
        (changed("name", to=...), r"rows\[0\] lacks the field 'name'"),
        (changed("color", to="red"), r"rows\[0\] has an unknown field 'color'"),
        (
            changed("kind", to="kernels"),
            r"rows\[0\]\.kind must be one of ceiling, kernel, dec",
        ),
        (changed("dtype", to="float32"), r"rows\[0\]\.dtype must be one of fp32, bf16, fp16"),
        (changed("shape", "tokens", to=1.5), r"rows\[0\]\.shape\.tokens must be int, got 1\.5"),
        (changed("shape", "tokens", to=True), r"rows\[0\]\.shape\.tokens must be int, got True"),
        (changed("timing", to=None), r"rows\[0\]\.timing must not be null where the status is m"),
        (changed("timing", "median_ms", to="2"), r"timing\.median_ms must be float, got '2'"),
        (changed("timing", "median_ms", to=float("nan")), r"median_ms must be finite, got nan"),
        (changed("timing", "median_ms", to=9.0), r"0 < min <= median <= max, got 2\.0, 9\.0, 4\.0"),
        (changed("timing", "min_ms", to=0.0), "0 < min <= median <= max"),
        (changed("timing", "max_ms", to=5.0), "max_ms must be those of samples_ms"),
        (changed("timing", "samples_ms", to=[]), "samples_ms must not be empty"),
        (changed("timing", "samples_ms", to=[2, "x"]), r"samples_ms\[1\] must be float, got 'x'"),
        (changed("rates", to=None), r"rates must not be null for a measured kernel"),
        (changed("rates", "bound", to="disk"), r"rates\.bound must be one of memory, compute"),
        (changed("accuracy", "rule", to="none"), r"accuracy\.rule must be one of"),
        (changed("machine", "utc", to=...), r"rows\[0\]\.machine lacks the field 'utc'"),
        (changed("status", to="refused"), r"reason must say why the status is refused"),
    ],
)
def test_wrong_results_are_refused_by_field(data, message):
    with pytest.raises(SchemaError, match=message):
        validate(data)


def test_a_row_that_was_not_measured_has_no_timing():
    data = changed("status", to="failed")
    data["rows"][0]["reason"] = "it broke"
    with pytest.raises(SchemaError, match="timing must be null where the status is failed"):
        validate(data)


def test_an_invalid_row_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "r.json"
    save(path, ROWS, "first")
    with pytest.raises(SchemaError):
        save(path, [kernel_row(dtype="int8")], "second")
    assert json.loads(path.read_text())["command"] == "first"


def test_the_error_names_the_file(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(SchemaError, match=r"broken\.json: Expecting"):
        load(path)


def test_every_field_is_described():
    """bench/README.md names every field of every class of the schema."""
    text = (schema.Path(schema.__file__).parent / "README.md").read_text()
    classes = (schema.Row, schema.Timing, schema.Rates, schema.Accuracy, schema.Memory)
    for cls in (*classes, schema.Decode, schema.Machine):
        for name in cls.__dataclass_fields__:
            assert f"`{name}`" in text, f"bench/README.md does not describe {cls.__name__}.{name}"
