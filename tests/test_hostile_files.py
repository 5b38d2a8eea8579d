"""Files made to do harm: nothing of them runs, nothing waits, little memory is taken."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import pickle
import re
import resource
import struct
import threading
import time
import zipfile
import zlib

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save, save_file
from tiny_pid import CONFIG, tiny_caption, tiny_latent, tiny_net

from pixeldiff import cli
from pixeldiff.errors import (
    CheckpointError,
    CheckpointFormatError,
    ForeignCheckpointError,
    UnsafeCheckpointError,
)
from pixeldiff.models.autoencoder import ConvAutoencoder
from pixeldiff.models.l2p import read_checkpoint as read_l2p
from pixeldiff.models.pid import read_checkpoint as read_pid
from pixeldiff.picture_files import read_picture_metadata
from pixeldiff.sources import latent_from, read_picture
from pixeldiff.text import load_caption

READERS = {
    "pid": (read_pid, (".safetensors", ".pth", ".pt")),
    "l2p": (read_l2p, (".safetensors", ".pth")),
    "caption": (load_caption, (".safetensors", ".pt", ".bin")),
    "latent": (lambda path: latent_from(path, encoder=None), (".safetensors", ".png")),
    "picture": (read_picture, (".png", ".jpg", ".tif")),
    "metadata": (read_picture_metadata, (".png", ".jpg", ".tif")),
    "autoencoder": (ConvAutoencoder.load, (".safetensors",)),
}
CASES = [(name, suffix) for name, (_, suffixes) in READERS.items() for suffix in suffixes]


def in_time(work, seconds: float = 60):
    """What it gives; fails if it waits."""
    result = []

    def run():
        try:
            result.append((work(), None))
        except BaseException as error:
            result.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert result, "it waits"
    value, error = result[0]
    if error is not None:
        raise error
    return value


def memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10  # MiB


# --- what is no file


@pytest.mark.parametrize(("name", "suffix"), CASES)
@pytest.mark.parametrize(
    "kind", ["directory", "fifo", "loop", "dangling", "device", "long", "empty"]
)
def test_what_is_no_file(tmp_path, name, suffix, kind):
    path = tmp_path / f"a{suffix}"
    match kind:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path)
        case "dangling":
            path.symlink_to(tmp_path / "nowhere")
        case "device":
            path.symlink_to("/dev/zero")
        case "long":
            path = tmp_path / ("a" * 300 + suffix)
        case "empty":
            path.touch()
    with pytest.raises((ValueError, OSError)) as caught:
        in_time(lambda: READERS[name][0](path))
    assert str(caught.value)


def test_what_is_no_file_on_the_command_line(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    os.mkfifo(tmp_path / "a.png")
    out = ["-o", tmp_path / "b.png"]
    for args in (
        ["decode", tmp_path / "a.safetensors", *out],
        ["decode", tmp_path / "a.png", *out],
        ["generate", "x", "--model", tmp_path / "a.safetensors", *out],
        ["generate", "x", "--model", "demo", "--image", tmp_path / "a.png", *out],
        ["l2p", "merge", tmp_path / "a.safetensors", tmp_path / "a.safetensors", "-o",
         tmp_path / "c.safetensors"],
        ["verify", tmp_path / "a.safetensors"],
    ):  # fmt: skip
        result = in_time(lambda a=args: CliRunner().invoke(cli.main, [*map(str, a)]))
        assert isinstance(result.exception, SystemExit), args
        assert result.exit_code in (1, 2), args


# --- pickles


class Runs:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


class Bytes:
    def __init__(self, count) -> None:
        self.count = count

    def __reduce__(self):
        return bytearray, (self.count,)


def torch_file(value, **options) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
@pytest.mark.parametrize("form", ["zip", "old", "bare"])
@pytest.mark.parametrize("nested", [False, True])
def test_no_pickle_runs(tmp_path, suffix, form, nested):
    mark, path = tmp_path / "ran", tmp_path / f"a{suffix}"
    value = {"model": {"x": torch.ones(2)}, "y": [Runs(mark)]} if nested else Runs(mark)
    if form == "bare":
        path.write_bytes(pickle.dumps(value, protocol=2))
    else:
        path.write_bytes(torch_file(value, _use_new_zipfile_serialization=form == "zip"))
    for read in (read_pid, read_l2p):
        with pytest.raises(UnsafeCheckpointError, match=r"holds a Python object \(") as caught:
            read(path)
        assert "weights_only" not in str(caught.value)
    path = path.rename(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a.pt is not a PyTorch file of plain tensors"):
        load_caption(path)
    assert not mark.exists()


def test_compressed_entries_are_not_unpacked(tmp_path):
    """A gigabyte of zeros in a megabyte."""
    path, before = tmp_path / "a.pt", memory()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("a/data.pkl", "w", force_zip64=True) as entry:
            for _ in range(64):
                entry.write(bytes(4 << 20))
        archive.writestr("a/version", "3")
    for read in (read_pid, read_l2p, load_caption):
        with pytest.raises(ValueError, match=r"a/data.pkl is compressed, which PyT"):
            read(path)
    assert memory() - before < 64


def test_tensors_that_claim_more_than_they_hold(tmp_path):
    """Of strides 0: 2^50 values in a file of a kilobyte."""
    path, before = tmp_path / "a.pt", memory()
    for shape in ((1 << 20, 1 << 20, 1 << 10), (1, 1 << 30, CONFIG.txt_embed_dim)):
        path.write_bytes(torch_file({"x": torch.zeros(1, 1, 1).expand(shape)}))
        with pytest.raises(ValueError, match=r"claims a shape of .*, but holds fewer values"):
            load_caption(path)
        with pytest.raises(CheckpointFormatError, match=r"x of .* claims a shape"):
            read_pid(path)
    assert memory() - before < 64


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.ones(3, 3).to_sparse(), "is sparse_coo, not dense"),
        (torch.empty(1 << 40, device="meta"), "holds no values, it lies on meta"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_plain(tmp_path, tensor, words):
    path = tmp_path / "a.pt"
    path.write_bytes(torch_file({"x": tensor}))
    with pytest.raises(ValueError, match=words):
        load_caption(path)
    with pytest.raises(CheckpointFormatError, match=words):
        read_pid(path)


def test_pickles_of_other_things(tmp_path):
    path = tmp_path / "a.pt"
    deep: list = []
    for _ in range(300):
        deep = [deep, deep]
    for value in (
        deep,
        {"x" * 100_000: 1},
        {tuple(range(10_000)): torch.zeros(1)},
        collections.OrderedDict(),
        3,
        None,
        "é" * 100_000,
        [{}],
    ):
        path.write_bytes(torch_file(value))
        with pytest.raises(ForeignCheckpointError) as caught:
            read_pid(path)
        assert len(str(caught.value)) < 1000
        with pytest.raises(ValueError, match=r"must (hold|be)"):
            load_caption(path)
    path.write_bytes(torch_file(Bytes(1 << 60)))
    for read in (read_pid, load_caption):
        with pytest.raises((ValueError, MemoryError)):
            read(path)


@pytest.mark.parametrize("letter", [b"[", "é".encode()])
@pytest.mark.parametrize("form", ["zip", "bare"])
def test_names_without_end_are_not_searched(tmp_path, letter, form):
    """PyTorch takes 15 s to refuse one of 20,000 characters, and four times that for twice."""
    text = b"\x80\x02ccollections\nOrdere" + letter * 50_000 + b"\n)R."
    path = tmp_path / "a.pt"
    path.write_bytes(text)
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", text)
            archive.writestr("a/version", "3")
    began = time.process_time()
    for read in (read_pid, load_caption):
        with pytest.raises(ValueError, match=r"an object in 50018 characters|text that is none"):
            read(path)
    assert time.process_time() - began < 5


# --- safetensors


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


ENTRY = b'{"dtype":"F32","shape":[1,6,16],"data_offsets":[0,384]}'
HEADERS = {
    "huge-length": (1 << 62).to_bytes(8, "little") + b"{}",
    "no-json": safetensors(b"abc"),
    "list": safetensors(b"[]"),
    "nested": safetensors(b"[" * 100_000),
    "twice": safetensors(b'{"a":%b,"a":%b}' % (ENTRY, ENTRY), bytes(384)),
    "overlap": safetensors(b'{"a":%b,"b":%b}' % (ENTRY, ENTRY), bytes(384)),
    "beyond": safetensors(b'{"a":%b}' % ENTRY, bytes(100)),
    "dtype": safetensors(b'{"a":%b}' % ENTRY.replace(b"F32", b"Z9"), bytes(384)),
    "negative": safetensors(b'{"a":%b}' % ENTRY.replace(b"[1,", b"[-1,"), bytes(384)),
    "overflow": safetensors(b'{"a":%b}' % ENTRY.replace(b"[1,6,", b"[4611686018427387904,6,")),
    "reversed": safetensors(b'{"a":%b}' % ENTRY.replace(b"[0,384]", b"[384,0]"), bytes(384)),
    "no-utf-8": safetensors(b'{"\xff":%b}' % ENTRY, bytes(384)),
}


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("name", [n for n, s in CASES if s == ".safetensors"])
def test_headers(tmp_path, name, header):
    if (name, header) == ("latent", "twice"):
        pytest.skip("the last of both counts, and is all there is")
    path = tmp_path / "a.safetensors"
    path.write_bytes(HEADERS[header])
    with pytest.raises((ValueError, TypeError)) as caught:
        READERS[name][0](path)
    assert 0 < len(str(caught.value)) < 2000
    if name in ("pid", "l2p"):
        assert isinstance(caught.value, CheckpointError)


def test_a_checkpoint_that_lists_a_name_twice(tmp_path):
    """All that the network needs is there, and of one tensor two versions."""
    state = {k: v.contiguous() for k, v in tiny_net().state_dict().items()}
    good = save(state, {"config": json.dumps(CONFIG.to_dict()), "backbone": "demo"})
    length = int.from_bytes(good[:8], "little")
    header, data = good[8 : 8 + length].rstrip(), good[8 + length :]
    entry = json.loads(header)["final_layer.linear.bias"]
    path = tmp_path / "a.safetensors"
    path.write_bytes(good)
    read_pid(path)
    twice = header[:-1] + b',"final_layer.linear.bias":' + json.dumps(entry).encode() + b"}"
    path.write_bytes(safetensors(twice, data))
    with pytest.raises(CheckpointFormatError, match="lists a name twice"):
        read_pid(path)


def test_metadata_nested_deeply(tmp_path):
    path = tmp_path / "a.safetensors"
    deep = "[" * 100_000
    save_file({"embedding": tiny_caption()}, path, {"format": "pixeldiff.caption",
              "format_version": "1", "captions": deep, "caption_sha256": deep})  # fmt: skip
    with pytest.raises(ValueError, match="must be a list of texts in JSON"):
        load_caption(path)
    state = {k: v.contiguous() for k, v in tiny_net().state_dict().items()}
    save_file(state, path, {"config": deep})
    with pytest.raises(CheckpointFormatError, match="nested too deeply"):
        read_pid(path)
    for config in (deep, "3", "[]", '{"channels": "x"}', '{"unheard_of": 1}'):
        save_file(
            {"x": torch.ones(1)}, path, {"format": "pixeldiff.autoencoder.v1", "config": config}
        )
        with pytest.raises(ValueError, match=r"is not an AutoencoderConfig|does not fit"):
            ConvAutoencoder.load(path)


# --- pictures


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(64))
    middle = b"".join(chunks)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle + chunk(b"IDAT", body)
            + chunk(b"IEND", b""))  # fmt: skip


@pytest.mark.parametrize("side", [12_289, 13_000, 50_000, (1 << 31) - 1])
def test_pictures_too_large_are_not_unpacked(tmp_path, side):
    path, before = tmp_path / "a.png", memory()
    path.write_bytes(png(side, side))
    with pytest.raises(ValueError, match=r"pixels|limit|large"):
        read_picture(path)
    with pytest.raises(ValueError, match=r"pixels|limit|large"):
        latent_from(path, encoder="demo")
    assert memory() - before < 64


def test_a_picture_to_encode_is_refused_by_its_header(tmp_path):
    path, before = tmp_path / "a.png", memory()
    path.write_bytes(png(9000, 9000))
    with pytest.raises(ValueError, match=r"a.png has 9000 x 9000 pixels, 1048576 are read at most"):
        latent_from(path, encoder="demo")
    assert memory() - before < 64


def test_text_that_unpacks_to_a_gigabyte(tmp_path):
    path, before = tmp_path / "a.png", memory()
    packed = zlib.compress(bytes(1 << 28), 1)
    path.write_bytes(png(4, 4, chunk(b"zTXt", b"pixeldiff\0\0" + packed)))
    with pytest.raises((ValueError, OSError)):
        read_picture_metadata(path)
    assert memory() - before < 300 + 64  # ours, above


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 50_000, "nested too deeply"),
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("9" * 10_000, "is not JSON"),
        ("[1]", "must be a JSON object, got list"),
        ("null", "must be a JSON object, got NoneType"),
        ('"a"', "must be a JSON object, got str"),
    ],
)
def test_metadata_that_is_none(tmp_path, text, words):
    image, path = Image.new("RGB", (4, 4)), tmp_path / "a.png"
    info = PngInfo()
    info.add_text("pixeldiff", text)
    image.save(path, pnginfo=info)
    with pytest.raises(ValueError, match=words):
        read_picture_metadata(path)
    exif = Image.Exif()
    exif[0x010E] = '{"pixeldiff": ' + text + "}"
    image.save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(ValueError, match=words):
        read_picture_metadata(tmp_path / "a.jpg")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "webp", "bmp"])
def test_pictures_cut_anywhere(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for cut in (*range(0, 64), *range(64, len(whole), max(1, len(whole) // 60))):
        path.write_bytes(whole[:cut])
        for read in (read_picture, read_picture_metadata):
            with contextlib.suppress(ValueError, OSError):
                read(path)


def test_animations_and_modes_of_a_picture_to_start_from(tmp_path):
    frames = [Image.new("RGB", (32, 32), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_picture(tmp_path / "a.gif").getpixel((3, 3)) == (255, 0, 0)
    for mode in ("P", "LA", "L", "1", "I;16", "RGBA"):
        Image.new("L", (32, 48)).convert(mode).save(tmp_path / "a.png")
        assert (read_picture(tmp_path / "a.png").mode, read_picture(tmp_path / "a.png").size) == (
            "RGB",
            (32, 48),
        )
    Image.new("CMYK", (32, 48)).save(tmp_path / "a.jpg")
    assert read_picture(tmp_path / "a.jpg").mode == "RGB"


def test_damaged_pictures_to_start_from_are_one_message(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (64, 64), "red").save(path)
    whole = path.read_bytes()
    for data in (whole[:60], b"", png(1 << 20, 1 << 20), whole.replace(b"IDAT", b"IDAX")):
        path.write_bytes(data)
        args = ["generate", "x", "--model", "demo", "--image", path, "-o", tmp_path / "b.png"]
        result = CliRunner().invoke(cli.main, [*map(str, args)])
        assert isinstance(result.exception, SystemExit)
        assert result.exit_code == 1
        assert result.output.startswith("error: ")
        assert result.output.count("\n") == 1


def test_latents_of_hostile_shapes(tmp_path):
    path = tmp_path / "a.safetensors"
    for latent, words in (
        (torch.zeros(1, 16, 0, 4), r"\(1, 16, 0, 4\)"),
        (torch.zeros(1), r"\(1,\)"),
        (torch.zeros(2, 1, 16, 2, 2), r"\(2, 1, 16, 2, 2\)"),
        (tiny_latent().int(), "floating-point"),
    ):
        save_file({"latent": latent}, path)
        args = ["decode", path, "-o", tmp_path / "b.png", "--device", "cpu"]
        result = CliRunner().invoke(cli.main, [*map(str, args)])
        assert result.exit_code == 1
        assert re.search(words, result.output)
