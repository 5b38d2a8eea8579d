"""Files that are cut, garbled or made to do harm: a clear error, at once, and little is read."""

from __future__ import annotations

import copy
import json
import os
import resource
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from test_l2p_checkpoint import fused
from tiny_l2p import LATENT, config, network

from pixeldiff.errors import CheckpointError, CheckpointFormatError, IncompleteCheckpointError
from pixeldiff.models.l2p import read_checkpoint
from pixeldiff.models.l2p.conversion import convert
from pixeldiff.models.l2p.stored_tensors import StoredTensor, read_header, stored_files

TINY = config(n_layers=1)
FUZZ = settings(
    max_examples=40, deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def stored(shape=(4,), dtype="F32", offsets=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def safetensors(header: bytes | dict, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


GOOD = safetensors({"a": stored()}, bytes(16))
ENTRY = json.dumps(stored()).encode()
HOSTILE = {
    "empty": b"",
    "three-bytes": b"abc",
    "no-header": (50).to_bytes(8, "little"),
    "length-of-2^63": safetensors({"a": stored()}, bytes(16), 1 << 63),
    "length-of-2^64": safetensors({"a": stored()}, bytes(16), (1 << 64) - 1),
    "length-beyond-the-end": safetensors({"a": stored()}, bytes(16), len(GOOD)),
    "length-within-the-json": safetensors({"a": stored()}, bytes(16), 20),
    "a-name-twice": safetensors(b'{"a": %b, "a": %b}' % (ENTRY, ENTRY), bytes(16)),
    "a-field-twice": safetensors(b'{"a": {"dtype": "F32", %b}' % ENTRY[1:], bytes(16)),
    "a-name-twice-that-differ": safetensors(
        b'{"a": %b, "a": %b}' % (ENTRY, json.dumps(stored((8,), "F16")).encode()), bytes(16)
    ),
    "overlapping": safetensors({"a": stored(), "b": stored(offsets=(8, 24))}, bytes(24)),
    "one-range-twice": safetensors({"a": stored(), "b": stored()}, bytes(16)),
    "a-hole": safetensors({"a": stored(), "b": stored(offsets=(20, 36))}, bytes(36)),
    "beyond-the-end": safetensors({"a": stored(offsets=(16, 32))}, bytes(16)),
    "reversed-range": safetensors({"a": stored(offsets=(16, 0))}, bytes(16)),
    "negative-size": safetensors({"a": stored(shape=(-4,))}, bytes(16)),
    "negative-offset": safetensors({"a": stored(offsets=(-16, 0))}, bytes(16)),
    "size-of-2^64": safetensors({"a": stored(shape=(1 << 62, 4), offsets=(0, 0))}),
    "more-than-its-bytes": safetensors({"a": stored(shape=(1 << 40,))}, bytes(16)),
    "fractional-size": safetensors({"a": stored(shape=(4.0,))}, bytes(16)),
    "number-of-5000-digits": safetensors(
        b'{"a": {"x": %b, %b}' % (b"9" * 5000, ENTRY[1:]), bytes(16)
    ),
    "unknown-type": safetensors({"a": stored(dtype="Q4")}, bytes(16)),
    "no-entry": safetensors({"a": None}),
    "a-list": safetensors(b"[]"),
    "nested": safetensors(b"[" * 100_000),
    "nested-in-an-entry": safetensors(
        b'{"a": {"x": %b, %b}' % (b"[" * 99_999 + b"]" * 99_999, ENTRY[1:]), bytes(16)
    ),
    "no-utf-8": safetensors(b'{"\xff": %b}' % ENTRY, bytes(16)),
    "behind-the-json": safetensors(b'{"a": %b} x' % ENTRY, bytes(16)),
    "metadata-of-numbers": safetensors({"__metadata__": {"a": 1}, "a": stored()}, bytes(16)),
    "cut-by-a-byte": GOOD[:-1],
    "longer-by-a-byte": GOOD + b"\0",
}  # fmt: skip


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(file, case):
    file.write_bytes(HOSTILE[case])
    with pytest.raises(CheckpointFormatError, match="damaged or cut short") as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 1000
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(file, config=TINY)
    assert len(str(caught.value)) < 1000


def test_a_good_header(file):
    file.write_bytes(GOOD)
    assert read_header(file) == ({"a": StoredTensor(file, len(GOOD) - 16, "F32", (4,), 16)}, {})


@pytest.mark.parametrize("read", [read_header, read_checkpoint, stored_files])
def test_a_header_of_a_gigabyte_is_not_read(file, read):
    with file.open("wb") as stream:
        stream.write((99_000_000).to_bytes(8, "little") + b"{")
        stream.truncate(100_000_000)
    with pytest.raises(CheckpointFormatError, match="its header would take 99000000 bytes"):
        read(file)


@pytest.mark.parametrize("cut", [0, 1])
@pytest.mark.parametrize("gigabytes", [2, 64])
def test_values_are_not_read_to_know_a_file(file, gigabytes, cut):
    """Of a large file, whole or cut short, which takes no room on the disk: its header.

    A conversion's is larger than the memory of any machine that runs this.
    """
    nbytes = gigabytes << 30
    held = {"layers.0.attention_norm1.weight": stored((nbytes // 4,), "F32", (0, nbytes))}
    file.write_bytes(safetensors(held))
    try:
        os.truncate(file, file.stat().st_size + nbytes - cut)
    except OSError:
        pytest.skip("no sparse files here")
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    words = "damaged or cut short" if cut else "geometry"
    with pytest.raises(CheckpointError, match=words):
        convert(file, file.with_name("b.safetensors"))
    if gigabytes == 2:
        with pytest.raises(CheckpointError, match=words):
            read_checkpoint(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10  # KiB
    assert time.process_time() - began < 10


def test_a_file_cut_while_it_is_read(file):
    file.write_bytes(GOOD)
    tensor = read_header(file)[0]["a"]
    assert b"".join(tensor.chunks()) == bytes(16)
    file.write_bytes(GOOD[:-5])
    with pytest.raises(CheckpointFormatError, match="became shorter while it was read; 5 bytes"):
        list(tensor.chunks())


# ---- Indices and folders -----------------------------------------------------------------------


def index(folder: Path, table, name: str = "m") -> Path:
    path = folder / f"{name}.safetensors.index.json"
    text = table if isinstance(table, str) else json.dumps({"weight_map": table})
    path.write_text(text)
    return path


@pytest.mark.parametrize("read", [stored_files, lambda path: read_checkpoint(path, config=TINY)])
@pytest.mark.parametrize(
    "table",
    ["", "[]", "3", '{"weight_map": 3}', '{"weight_map": [[]]}', "{}", "[" * 50_000, {"a": 3},
     {"a": None}, {"a": ["a.safetensors"]}, {"a": {}}, {"a": ""}, {"a": "x" * 300},
     " " * (8 << 20) + "{}"],
    ids=lambda table: str(table)[:20].strip() or "blank",
)  # fmt: skip
def test_indices_that_are_none(tmp_path, table, read):
    with pytest.raises(CheckpointFormatError, match="is no safetensors index"):
        read(index(tmp_path, table))


@pytest.mark.parametrize("read", [stored_files, lambda path: read_checkpoint(path, config=TINY)])
@pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/passwd", "b/a.safetensors", "a/../b"])
def test_shards_outside_their_folder(tmp_path, shard, read):
    with pytest.raises(CheckpointFormatError, match="names a shard outside its directory"):
        read(index(tmp_path, {"a": shard}))


@pytest.mark.parametrize("shard", [".", "..", "a\0b", "no.safetensors"])
def test_shards_that_are_not_there(tmp_path, shard):
    for read in (stored_files, read_checkpoint):
        with pytest.raises((IncompleteCheckpointError, CheckpointFormatError)):
            read(index(tmp_path, {"a": shard}))


def test_shards_hold_what_their_index_says(tmp_path):
    for name, tensor in (("a", "a"), ("b", "b"), ("c", "a")):
        held = safetensors({tensor: stored()}, bytes(16))
        (tmp_path / f"{name}.safetensors").write_bytes(held)
    a, b, c = (f"{name}.safetensors" for name in "abc")
    assert set(stored_files(index(tmp_path, {"a": a, "b": b})).tensors) == {"a", "b"}
    for table, text in (({"a": a, "b": a}, f"{a} of .* lacks b"),
                        ({"a": b, "b": a}, "of .* lacks [ab]")):  # fmt: skip
        with pytest.raises(IncompleteCheckpointError, match=text):
            stored_files(index(tmp_path, table))
    with pytest.raises(CheckpointFormatError, match=f"^a is both in .*{a} and in .*{c}"):
        stored_files(index(tmp_path, {"a": a, "b": b, "x": c}))
    index(tmp_path, {"a": a}, "n")
    with pytest.raises(CheckpointFormatError, match="holds several indices, name one of them: m"):
        stored_files(tmp_path)


def test_shards_of_two_checkpoints_in_a_folder(tmp_path):
    for name in ("a-00001-of-00002", "b-00002-of-00002"):
        (tmp_path / f"{name}.safetensors").write_bytes(GOOD)
    with pytest.raises(CheckpointFormatError, match="not the numbered shards of one checkpoint"):
        stored_files(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "3", '{"_class_name": "ZImageTransformer2DModel"}', "[" * 50_000,
     '{"_class_name": "ZImageTransformer2DModel", "all_patch_size": [2], "dim": 1e999}',
     '{"_class_name": "ZImageTransformer2DModel", "all_patch_size": [2], "dim": 48, "n_heads": 0}'],
    ids=range(7),
)  # fmt: skip
def test_configurations_of_diffusers_that_are_none(tmp_path, text):
    state = {k: v.contiguous() for k, v in network(LATENT).state_dict().items()}
    (tmp_path / "a.safetensors").write_bytes(save(state))
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointFormatError, match="is not the configuration of a Z-Image tr"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    (tmp_path / "config.json").write_text('{"_class_name": "Another"}')
    with pytest.raises(CheckpointError, match="never released"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


# ---- Random damage -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole() -> bytes:
    """A small network whose file states its geometry, under fused names."""
    state = fused({k: v.bfloat16() for k, v in network(TINY).state_dict().items()})
    stated = {"config": json.dumps(TINY.to_dict())}
    return save({k: v.contiguous() for k, v in state.items()}, stated)


def refusal(read, file: Path) -> str | None:
    try:
        read(file)
    except CheckpointError as error:
        return str(error)
    return None


def read_both(file: Path, data: bytes) -> None:
    """Both readers take the file or refuse it as a checkpoint; they do nothing else."""
    file.write_bytes(data)
    for read in (read_checkpoint, lambda path: convert(path, path.with_name("out.safetensors"))):
        told = refusal(read, file)
        assert told is None or (file.name in told and len(told) < 20_000)
    file.with_name("out.safetensors").unlink(missing_ok=True)


def test_what_is_damaged_below_is_whole(whole, file):
    file.write_bytes(whole)
    assert read_checkpoint(file).config == TINY


@FUZZ
@given(data=st.data())
def test_cut_anywhere(whole, file, data):
    length = int.from_bytes(whole[:8], "little")
    near = st.integers(0, 16) | st.integers(length - 8, length + 24)
    cut = data.draw(near | st.integers(0, len(whole) - 1), label="cut")
    file.write_bytes(whole[:cut])
    with pytest.raises(CheckpointFormatError):
        read_checkpoint(file)
    with pytest.raises(CheckpointFormatError, match="cut short"):
        convert(file, file.with_name("out.safetensors"))


@FUZZ
@given(data=st.data())
def test_garbled_header_bytes(whole, file, data):
    length = 8 + int.from_bytes(whole[:8], "little")
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, 8) | st.integers(0, length - 1), label="place")
        damaged[place] = data.draw(st.integers(0, 255) | st.sampled_from(b'"0919{}[],:-e'))
    read_both(file, bytes(damaged))


NUMBERS = (
    st.sampled_from([0, 1, -1, 2, 3, 7, 31, 32, 1 << 31, 1 << 63, 1e3, 10**30]) | st.integers()
)
VALUES = st.none() | st.booleans() | NUMBERS | st.sampled_from(
    ["", "F16", "F8_E4M3", "I8", "F4", "BF16", [], [0], [1, 1], [1 << 40], [0, 1 << 62], {}, [[]]]
)  # fmt: skip
NINES = "9" * 5000
NAMES = st.sampled_from(
    ["", ".", "layers.0.attention_norm1.weight", "x.layers.0.attention_norm1.weight", "x_pad_token",
     "layers.0.attention.qkv.weight", f"layers.{NINES}.x", f"all_x_embedder.{NINES}-1.weight",
     "x_embedder.weight", "local_decoder.enc_10k_a.0.weight", "__metadata__"]
)  # fmt: skip


@FUZZ
@given(data=st.data())
def test_headers_of_other_tensors(whole, file, data):
    """Well-formed JSON that lists other names, types, shapes and places."""
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(header)), label="name")
        match data.draw(st.sampled_from(["rename", "drop", "field", "zero", "copy"]), label="how"):
            case "rename":
                header[data.draw(NAMES)] = header.pop(name)
            case "drop":
                del header[name]
            case "copy":
                header[data.draw(NAMES)] = copy.deepcopy(header[name])
            case "zero":  # takes no bytes, so that the rest stays in place
                start = data.draw(st.integers(0, 64))
                header[data.draw(NAMES)] = stored((0, 48), "BF16", (start, start))
            case "field":
                field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
                if isinstance(header[name], dict):
                    header[name][field] = data.draw(VALUES)
        if not header:
            break
    read_both(file, safetensors(header, whole[8 + length :]))


@FUZZ
@given(data=st.data())
def test_configs_of_other_networks(whole, file, data):
    """No claim of a size makes the reader build a network that the file does not hold."""
    length = int.from_bytes(whole[:8], "little")
    header, stated = json.loads(whole[8 : 8 + length]), TINY.to_dict()
    where = stated
    if data.draw(st.integers(0, 3), label="decoder") == 0:
        where = stated["local_decoder"]
        if data.draw(st.booleans(), label="level"):
            where = where["levels"][0]
    field = data.draw(st.sampled_from(sorted(where)), label="field")
    where[field] = data.draw(VALUES | st.just([8] * 5000), label="value")
    header["__metadata__"] = {"config": json.dumps(stated)}
    read_both(file, safetensors(header, whole[8 + length :]))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '"abc"', "[" * 50_000, f'{{"dim": {NINES}}}'], ids=range(7)
)
def test_configs_that_are_none(whole, file, text):
    length = int.from_bytes(whole[:8], "little")
    header = {**json.loads(whole[8 : 8 + length]), "__metadata__": {"config": text}}
    file.write_bytes(safetensors(header, whole[8 + length :]))
    for read in (read_checkpoint, lambda path: convert(path, path.with_name("out.safetensors"))):
        with pytest.raises(CheckpointFormatError, match=r"metadata 'config' of .* is not an L2P"):
            read(file)


@FUZZ
@given(data=st.data())
def test_garbled_values(whole, file, data):
    """Any finite value is a value; what is not is refused by name, or by conversion kept."""
    length = 8 + int.from_bytes(whole[:8], "little")
    place = data.draw(st.integers(length, len(whole) - 2), label="place")
    damaged = whole[:place] + data.draw(st.sampled_from([b"\xff\x7f", b"\x80\xff", b"ab"]))
    read_both(file, damaged + whole[len(damaged) :])
