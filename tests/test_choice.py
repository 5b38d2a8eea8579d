"""The tables of measured backends: what a call is, which entry it takes, what a damaged one says.

Every order here is invented.
"""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pixeldiff.ops import choice, explain
from pixeldiff.ops.examples import Geometry, arguments
from pixeldiff.ops.problems import classes_of, power, problem
from pixeldiff.ops.registry import OPS

BF16 = torch.bfloat16


@given(st.integers(1, 2**40))
def test_the_nearest_power_of_two(n):
    p = power(n)
    assert 2 ** (2 * p - 1) <= n * n <= 2 ** (2 * p + 1)


def test_powers():
    assert [power(n) for n in (1, 2, 3, 4096, 4396, 16384, 16684, 300)] == [
        *(0, 1, 2, 12, 12, 14, 14, 8)
    ]
    assert power(0) == -1


@given(
    st.dictionaries(st.integers(-1, 40), st.sampled_from([("a",), ("b",)]), min_size=1),
    st.integers(-1, 40),
)
def test_the_nearest_size_and_of_two_the_larger(sizes, size):
    far = min(abs(s - size) for s in sizes)
    larger = max(s for s in sizes if abs(s - size) == far)
    assert choice.nearest(sizes, size) == sizes[larger]
    assert choice.nearest({}, size) == ()


@pytest.mark.parametrize("op", sorted(OPS))
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_every_op_has_classes(op, dtype):
    """Size grows with the image and kind does not; both are the same on every device."""
    small = problem(op, arguments(op, "cpu", dtype))
    assert small == problem(op, arguments(op, "meta", dtype))
    assert str(dtype).removeprefix("torch.") in small[0]
    grown = problem(op, arguments(op, "meta", dtype, Geometry(grid=(64, 64))))
    assert grown[0] == small[0]
    assert grown[1] > small[1]
    near = problem(op, arguments(op, "meta", dtype, Geometry(grid=(65, 64))))
    assert near == grown


@pytest.mark.parametrize(
    ("op", "changes", "kind"),
    [
        ("joint_attention", {"head_dim": 72}, "bfloat16 d72"),
        ("joint_attention_fp8", {}, "bfloat16 d64"),
        ("qk_norm_rope", {"head_dim": 128}, "bfloat16 d128"),
        ("qkv_norm_rope", {}, "bfloat16 d64"),
        ("swiglu", {"hidden": 3000}, "bfloat16 D<=4096"),
        ("sigma_gate", {}, "bfloat16 D<=128"),
        ("sigma_gate_norm", {"gates": 1}, "bfloat16 D<=128 one a token"),
        ("fp8_linear", {"width": 1536}, "to bfloat16 K<=2048 N<=512"),
        ("local_decoder_down", {}, "bfloat16 from c3 to c16"),
        ("local_decoder_down", {"level": 1}, "bfloat16 from c16 to c32"),
        ("local_decoder_up", {"level": 1}, "bfloat16 from c64 to c16"),
        ("local_decoder_pixels", {"guided": True}, "bfloat16 p16 guided"),
        ("pixel_embed", {}, "bfloat16 p16"),
        ("pixel_adaln_mlp", {"pixel": 8}, "bfloat16 p8"),
    ],
)
def test_kinds(op, changes, kind):
    assert problem(op, arguments(op, "meta", BF16, Geometry(**changes)))[0] == kind


def test_a_mask_and_the_log_sum_exp_are_kinds_of_their_own():
    q, k, v, scale, *_ = arguments("joint_attention", "meta", BF16)
    mask = torch.empty(k.shape[:2], dtype=torch.bool, device="meta")
    assert problem("joint_attention", (q, k, v, scale, mask, False))[0] == "bfloat16 d64 mask"
    assert problem("joint_attention", (q, k, v, scale, mask, True))[0] == "bfloat16 d64 mask lse"


def test_sizes_that_count():
    def size(op, **changes):
        return problem(op, arguments(op, "meta", BF16, Geometry(**changes)))[1]

    assert size("joint_attention", grid=(128, 128), text=300) == 14
    assert size("rms_norm_modulate", grid=(128, 128)) == 14
    assert size("pixel_embed", grid=(128, 128)) == 22
    assert size("pixel_adaln_compress", grid=(128, 128)) == 22
    assert size("local_decoder_up", grid=(64, 64), patch=64, level=0) == 24
    assert size("local_decoder_down", grid=(64, 64), patch=64, level=0) == 24


def test_nothing_in_a_tensor_is_an_empty_class():
    kind, size = problem("swiglu", (torch.empty(0, 0), torch.empty(0, 0)))
    assert (kind, size) == ("float32 D<=2", -1)
    assert classes_of("no_such_op") is classes_of("swiglu")


def entry(*order: str) -> dict:
    return {"order": list(order)}


def test_a_call_takes_the_nearest_entry_of_its_kind(measured):
    measured(
        "swiglu",
        {
            "9.0": {
                "bfloat16 D<=4096": {"8": entry("triton"), "14": entry("reference", "triton")},
                "bfloat16 D<=16384": {"14": entry("triton", "reference")},
            },
            "8.0": {"float32 D<=4096": {"14": entry("reference")}},
        },
    )

    def order(rows: int, width: int, dtype=BF16):
        x = torch.empty(1, rows, width, dtype=dtype, device="meta")
        return choice.order("swiglu", (x, x))

    assert order(300, 4096) == ("triton",)
    assert order(16384, 4096) == order(2049, 4096) == order(10**6, 4096)
    assert order(16384, 4096) == ("reference", "triton")
    assert order(1, 10240) == ("triton", "reference")
    assert order(16384, 1024) == order(16384, 4096, torch.float32) == ()
    assert choice.order("rms_norm", (torch.empty(1, 3),)) == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "it is no JSON"),
        ("[" * 100000, "it is no JSON: nested too deeply"),
        ("\xff", "it is no JSON"),
        ("[]", r"it must be an object, got \[\]"),
        ('{"9.0": 1}', r"\['9.0'\] must be an object, got 1"),
        ('{"9.0": {"k": []}}', r"\['9.0'\]\['k'\] must be an object"),
        ('{"9.0": {"k": {"x": {}}}}', r"\['k'\]\['x'\] must be a size"),
        ('{"9.0": {"k": {"14": []}}}', r"\['14'\] must be an object, got \[\]"),
        ('{"9.0": {"k": {"14": {}}}}', r"\['14'\] must have an order .*, got None"),
        ('{"8.0": {"k": {"14": {"order": []}}}}', r"must have an order .*, got \[\]"),
        ('{"9.0": {"k": {"14": {"order": ["a", "a"]}}}}', "order of different backends"),
        ('{"9.0": {"k": {"14": {"order": [1]}}}}', r"got \[1\]"),
        ('{"9.0": {"k": {"14": {"order": "cuda"}}}}', "got 'cuda'"),
    ],
)
def test_a_damaged_table_says_where_and_what_to_do(measured, text, says):
    path = measured("swiglu", "")
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=says) as error:
        choice.order("swiglu", (torch.empty(2, 3),) * 2)
    assert str(error.value).startswith(f"{path} is not a table of measured backends: ")
    assert "delete it: swiglu then chooses as if nothing had been measured" in str(error.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
def test_a_gpu_goes_by_its_own_capability(tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "FOLDER", tmp_path)
    choice.forget()
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    table = {capability: {"bfloat16 D<=128": {"2": entry("reference", "triton")}}}
    (tmp_path / "swiglu.json").write_text(json.dumps(table))
    try:
        args = arguments("swiglu", "cuda", BF16)
        assert choice.order("swiglu", args) == ("reference", "triton")
        assert explain("swiglu", *args)[0] == ("reference", None)
        assert choice.order("swiglu", arguments("swiglu", "cpu", BF16)) == ()
        assert choice.order("rms_norm", arguments("rms_norm", "cuda", BF16)) == ()
    finally:
        monkeypatch.undo()
        choice.forget()


def test_the_tables_of_the_package_are_whole():
    for path in choice.FOLDER.glob("*.json"):
        names = {b.name for b in OPS[path.stem].backends} | {"reference"}
        for kinds in choice.orders(choice.read(path), path).values():
            for sizes in kinds.values():
                assert all(set(order) <= names for order in sizes.values()), path


def test_a_table_is_read_back_as_it_was_written(measured):
    table = {"9.0": {"float32 D<=4": {"1": entry("triton")}}}
    path = measured("swiglu", table)
    assert choice.read(path) == json.loads(path.read_text()) == table
    assert choice.table("swiglu") == {"9.0": {"float32 D<=4": {1: ("triton",)}}}
