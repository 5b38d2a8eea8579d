"""Disks that fill up, and folders that cannot be written: nothing is left behind, nothing is lost.

Faults are planted at every call in turn, the size of files is limited by the system, and where this
user may mount one, a disk of 300 kB is filled.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from tiny_pid import save_net, tiny_latent, tiny_net

from pixeldiff import cli, picture_files, png_stream, tiff_stream
from pixeldiff.errors import ResumeError
from pixeldiff.images import to_picture
from pixeldiff.jobs import JobStore
from pixeldiff.models.autoencoder import ConvAutoencoder
from pixeldiff.out_files import check_out_path, written_whole
from pixeldiff.picture_files import save_picture, save_pictures
from pixeldiff.text import save_captions

METADATA = {"seed": 3}
NOISE = torch.rand(3, 120, 100, generator=torch.Generator().manual_seed(0)) * 2 - 1


def a_report(folder: Path) -> None:
    with written_whole([folder / "a.json"]) as (partial,):
        partial.write_text(json.dumps(list(range(8000))))


def two_pictures(folder: Path) -> None:
    save_pictures([(folder / f"a-{i}.png", NOISE, METADATA) for i in range(2)])


def a_png_in_bands(folder: Path) -> None:
    with mock.patch.object(picture_files, "_SMALL", 0):
        save_picture(folder / "a.png", NOISE, METADATA)


def a_job(folder: Path) -> None:
    with JobStore(folder / "job") as store:
        store.begin({"job": "test"})
        store.put("b", {"noise": NOISE})
        raise KeyboardInterrupt  # it stays


WRITERS: dict[str, Callable[[Path], object]] = {
    "png": lambda folder: save_picture(folder / "a.png", NOISE, METADATA),
    "png in bands": a_png_in_bands,
    "png of a picture": lambda folder: save_picture(folder / "a.png", to_picture(NOISE)),
    "jpeg": lambda folder: save_picture(folder / "a.jpg", NOISE, METADATA),
    "tiff": lambda folder: save_picture(folder / "a.tif", NOISE, METADATA),
    "two pictures": two_pictures,
    "json": a_report,
    "captions": lambda folder: save_captions(
        folder / "a.safetensors", torch.ones(1, 60, 500), "a fox"
    ),
    "autoencoder": lambda folder: ConvAutoencoder().save(folder / "a.safetensors"),
    "store": a_job,
}
every_writer = pytest.mark.parametrize("writer", WRITERS)


def needs_its_library(writer: str) -> None:
    stream = {"tiff": tiff_stream, "png in bands": png_stream}.get(writer)
    if stream is not None and stream.why_not() is not None:
        pytest.skip(stream.why_not())


class Fault:
    """The call of that number fails; `happened` says whether it came to it."""

    def __init__(self, number: int, error: int) -> None:
        self.left, self.error, self.happened = number, error, False

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.happened = True
            raise OSError(self.error, os.strerror(self.error))


class Filling:
    """A file that is written through `fault`."""

    def __init__(self, file, fault: Fault) -> None:
        self._file, self._fault = file, fault

    def __getattr__(self, name):
        if name == "fileno":  # Pillow would write past us
            raise AttributeError(name)
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def write(self, data):
        self._fault()
        return self._file.write(data)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_after_the_other(
    writer: str, folder: Path, plant: Callable[[int], object], most: int
) -> int:
    """Runs the writer with a fault in its first call, its second, ...; how many there are."""
    with contextlib.suppress(KeyboardInterrupt):
        WRITERS[writer](folder)
    before = contents(folder)  # of a store the job, to which a part is added
    for number in range(1, most):
        with plant(number) as fault:
            told = None
            try:
                WRITERS[writer](folder)
            except OSError as e:
                told = e.errno
            except KeyboardInterrupt:
                pass
        assert told == (fault.error if fault.happened else None), f"fault {number}"
        if not fault.happened:
            return number - 1
        assert contents(folder) == before, f"fault {number}"
    raise AssertionError(f"more than {most} calls")


@every_writer
def test_no_space_at_any_write(tmp_path, monkeypatch, writer):
    needs_its_library(writer)
    opened = pathlib.Path.open

    @contextlib.contextmanager
    def plant(number: int) -> Iterator[Fault]:
        fault = Fault(number, errno.ENOSPC)
        with monkeypatch.context() as patch:
            patch.setattr(
                pathlib.Path,
                "open",
                lambda self, mode="r", *args, **options: (
                    Filling(opened(self, mode, *args, **options), fault)
                    if "w" in mode
                    else opened(self, mode, *args, **options)
                ),
            )
            yield fault

    assert one_after_the_other(writer, tmp_path, plant, 200) >= 1


@every_writer
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_where_it_is_made_to_last(tmp_path, monkeypatch, writer, call):
    needs_its_library(writer)
    if writer == "two pictures" and call == "replace":
        pytest.skip("two names cannot change at once")

    @contextlib.contextmanager
    def plant(number: int) -> Iterator[Fault]:
        fault, made = Fault(number, errno.EIO), getattr(os, call)

        def failing(*args):
            # Of a folder it comes when the names are there: it is told, and changes nothing.
            if call == "replace" or os.path.isfile(f"/proc/self/fd/{args[0]}"):
                fault()
            return made(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            yield fault

    assert one_after_the_other(writer, tmp_path, plant, 20) >= 1


@every_writer
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.99])
def test_files_may_not_grow(tmp_path, writer, share):
    needs_its_library(writer)
    resource = pytest.importorskip("resource", reason="no limits on files here")
    with contextlib.suppress(KeyboardInterrupt):
        WRITERS[writer](tmp_path)
    before = contents(tmp_path)
    most = int(share * max(map(len, before.values())))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        with pytest.raises(OSError):
            WRITERS[writer](tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may mount no disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@every_writer
def test_a_disk_that_is_full(small_disk, writer):
    needs_its_library(writer)
    with contextlib.suppress(KeyboardInterrupt, OSError):
        WRITERS[writer](small_disk)
    before = contents(small_disk)
    for left in (30_000, 8_000, 0):
        filler = small_disk / "filler"
        free = shutil.disk_usage(small_disk).free
        filler.write_bytes(bytes(max(0, free - left)))
        with pytest.raises(OSError):
            WRITERS[writer](small_disk)
        filler.unlink()
        assert contents(small_disk) == before


def run(*args):
    result = CliRunner().invoke(cli.main, [str(a) for a in args])
    assert isinstance(result.exception, SystemExit | None), f"traceback: {result.exception!r}"
    return result


@pytest.fixture
def decode(tmp_path):
    save_net(tmp_path / "pid.safetensors", tiny_net())
    save_file({"latent": tiny_latent(1, 12, 12)}, tmp_path / "one.safetensors")
    common = ("decode", tmp_path / "one.safetensors", "--model", tmp_path / "pid.safetensors")
    common = (*common, "--tile", "6x6", "--overlap", 2, "--device", "cpu", "--quiet", "--seed", 2)
    return lambda output, *args: run(*common, "-o", output, *args)


def test_a_decode_goes_on_when_there_is_room_again(decode, small_disk, tmp_path, monkeypatch):
    """There was room when it began; then a neighbour took it."""
    assert decode(tmp_path / "a.png", "--tile-mode", "independent").exit_code == 0
    filler, how = small_disk / "filler", ("--tile-mode", "independent", "--resume")
    # Tiles are 442 kB in fp32.
    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    with monkeypatch.context() as m:
        m.setattr(JobStore, "check_space", lambda *_: None)
        result = decode(small_disk / "a.png", *how)
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr or "free" in result.stderr
    filler.write_bytes(b"")
    assert not list(small_disk.rglob(".*.part"))
    assert "a.png" not in os.listdir(small_disk)
    kept = len(list(small_disk.rglob("*.piece")))
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    assert decode(small_disk / "a.png", *how).exit_code == 0
    assert (small_disk / "a.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    assert sorted(os.listdir(small_disk)) == ["a.png", "filler"]
    assert kept > 0


@pytest.fixture
def somebody():
    """A folder that this process, no longer root where it was, may read and not write."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.skipif(os.name != "posix", reason="folders have other permissions")
def test_a_folder_without_permission(somebody):
    with pytest.raises(PermissionError, match="not writable"):
        check_out_path(somebody / "a.png", ".png")
    with pytest.raises(PermissionError, match="not writable"):
        save_picture(somebody / "a.png", NOISE)
    with pytest.raises(PermissionError):
        JobStore(somebody / "job").__enter__()
    assert os.listdir(somebody) == []


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_the_output_is_a_folder(decode, tmp_path, resume):
    (tmp_path / "a.png").mkdir()
    assert "the output is a directory" in decode(tmp_path / "a.png", *resume).stderr
    assert not (tmp_path / "a.png.job").exists()


def test_the_store_is_a_file(decode, tmp_path):
    (tmp_path / "a.png.job").touch()
    assert "must be a folder, it is a file" in decode(tmp_path / "a.png", "--resume").stderr
    with pytest.raises(ResumeError):
        JobStore(tmp_path / "a.png.job").__enter__()


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_the_name_is_too_long(decode, tmp_path, resume):
    result = decode(tmp_path / ("x" * 260 + ".png"), *resume)
    assert result.exit_code == 1
    assert "name too long: at most 255 bytes, got 264" in result.stderr
    names = os.listdir(tmp_path)
    result = decode(tmp_path / ("x" * 250 + ".png"), *resume)
    if resume:
        assert "File name too long" in result.stderr
        assert os.listdir(tmp_path) == names
    else:
        assert result.exit_code == 0


def test_pictures_of_pillow_write_past_python_too(small_disk):
    """Pillow hands its encoder the descriptor where it can."""
    (small_disk / "filler").write_bytes(bytes(280_000))
    image = Image.effect_noise((400, 400), 90).convert("RGB")
    with pytest.raises(OSError):
        save_picture(small_disk / "a.png", image)
    assert os.listdir(small_disk) == ["filler"]
