"""Files that a killed writer goes on with: every line it can die at, full disks, what is synced."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from pixeldiff.errors import CheckpointError
from pixeldiff.models.l2p import resumable_file
from pixeldiff.models.l2p.resumable_file import Piece, in_file_order, write
from pixeldiff.models.l2p.stored_tensors import ITEM_SIZES

SIZES = {"c": ("BF16", 37), "a": ("F32", 50), "e": ("BF16", 0), "b": ("BF16", 64), "d": ("F64", 9)}
METADATA = {"format": "pt", "odd": "abc"}


def pieces(told=lambda name: None, half: int = 31) -> list[Piece]:
    """Five tensors, each given in chunks of `half` bytes; `told` of each that is begun."""

    def piece(name: str, dtype: str, count: int) -> Piece:
        data = bytes((7 * i + ord(name)) % 256 for i in range(count * ITEM_SIZES[dtype]))

        def chunks():
            told(name)
            for start in range(0, len(data), half):
                yield data[start : start + half]

        return Piece(name, dtype, (count,), chunks)

    return [piece(name, *what) for name, what in SIZES.items()]


def written(path: Path, given=None, **changes) -> int:
    options = {"identity": "here", "check": lambda part: None, **changes}
    return write(path, pieces() if given is None else given, METADATA, **options)


def files(path: Path) -> set[str]:
    return {p.name for p in path.parent.iterdir()}


@pytest.fixture
def whole(tmp_path) -> bytes:
    folder = tmp_path / "whole"
    folder.mkdir()
    written(folder / "a.safetensors")
    return (folder / "a.safetensors").read_bytes()


@pytest.fixture
def out(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "a.safetensors"


def stopped(out: Path, at: int, **changes) -> None:
    """Interrupted in the chunk after the `at`-th."""
    calls = 0

    def progress(phase, done, total):
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(out, progress=progress, **changes)


def test_the_file_is_what_safetensors_reads(whole, tmp_path):
    path = tmp_path / "whole" / "a.safetensors"
    length = int.from_bytes(whole[:8], "little")
    assert length % 8 == 0
    assert len(json.dumps(json.loads(whole[8 : 8 + length]), separators=(",", ":"))) % 8 != 0
    with safe_open(path, "pt") as file:
        assert file.metadata() == METADATA
        for name, (_, count) in SIZES.items():
            assert file.get_tensor(name).shape == (count,)
    # Wide types first: with the header's length a multiple of 8, all values are aligned.
    assert [p.name for p in in_file_order(pieces())] == ["d", "a", "b", "c", "e"]
    data = b"".join(b"".join(p.chunks()) for p in in_file_order(pieces()))
    assert whole[8 + length :] == data
    assert files(path) == {"a.safetensors"}


def test_progress_counts_every_byte_of_both_phases(out):
    told = []
    written(out, progress=lambda *now: told.append(now))
    total = sum(p.nbytes for p in pieces())
    for phase in ("writing", "checking"):
        done = [d for p, d, t in told if p == phase and t == total]
        assert done == sorted(done)
        assert done[-1] == total
    assert len([t for t in told if t[0] == "writing"]) > len(SIZES)


# ---- Killed ------------------------------------------------------------------------------------

KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from pixeldiff.models.l2p import resumable_file
from test_resumable_file import in_file_order, pieces, written
resumable_file.CHUNK = 100
folder = Path(sys.argv[2])
order = [p.name for p in in_file_order(pieces())]
sizes = {p.name: p.nbytes for p in pieces()}
lines = 0
whole = folder / "whole.safetensors"
written(whole)
killed = 0
while killed < 1000:
    out = folder / f"{killed}.safetensors"
    read, write = os.pipe()
    child = os.fork()
    if not child:  # dies at a line, and nothing that it buffered is written
        left = 1 + killed
        def trace(frame, event, _):
            global left
            if frame.f_code.co_filename != resumable_file.__file__:
                return None
            left -= event == "line"
            if not left:
                os._exit(9)
            return trace
        sys.settrace(trace)
        written(out, pieces(lambda name: os.write(write, name.encode()), half=100))
        os._exit(0)
    os.close(write)
    begun = os.read(read, 100).decode()
    os.close(read)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        break
    if out.exists():  # died between its name and the end: it is replaced
        begun = ""
    assert "".join(order).startswith(begun)
    kept = written(out)
    finished = sum(sizes[name] for name in begun[:-1])
    assert kept >= finished, (killed, begun, kept)
    assert out.read_bytes() == whole.read_bytes(), killed
    assert {p.name for p in folder.iterdir()} == {whole.name, out.name}, killed
    out.unlink()
    killed += 1
print(killed)
"""


def test_killed_at_every_line_it_goes_on_and_has_lost_one_tensor_at_most(tmp_path):
    """Each line of the writer in turn is the last that a process runs."""
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert 100 < int(run.stdout) < 1000


def test_what_is_on_the_disk_before_the_file_gets_its_name(out, monkeypatch):
    """A power cut leaves the old name or the whole file: its data first, then its name."""
    done = []
    sync, replace = os.fsync, os.replace

    def noted_sync(handle):
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    def noted_replace(source, target):
        done.append(f"{Path(source).name} -> {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    sizes = []
    written(out, check=lambda part: sizes.append((part.stat().st_size, list(done))))
    part, named = "a.safetensors.part", "a.safetensors.part -> a.safetensors"
    assert done[-3:] == [part, named, "out"]
    assert sizes == [(out.stat().st_size, done[:-2])]


# ---- Resuming ----------------------------------------------------------------------------------


def test_what_lies_behind_the_finished_tensors_goes(out, whole):
    stopped(out, 12)
    part = out.with_name(out.name + ".part")
    part.write_bytes(part.read_bytes() + b"x" * 2 * len(whole))
    assert written(out) > 0
    assert out.read_bytes() == whole


@pytest.mark.parametrize(
    "journal",
    [
        lambda lines: [*lines[:-2], lines[-2][:-1]],  # torn in the last line
        lambda lines: [*lines[:-2], lines[-2] + "\0"],
        lambda lines: [lines[0], *lines[2:]],  # of other tensors
        lambda lines: [lines[0], *reversed(lines[1:])],
        lambda lines: ["", *lines[1:]],
        lambda lines: [],
        lambda lines: [*lines, "", "0" * 64, "nothing"],
    ],
)
def test_a_damaged_journal_costs_work_and_nothing_else(out, whole, journal):
    stopped(out, 12)
    file = out.with_name(out.name + ".journal")
    file.write_text("\n".join(journal(file.read_text().split("\n"))))
    written(out)
    assert out.read_bytes() == whole
    assert files(out) == {out.name}


def test_pieces_of_another_identity_type_or_metadata_start_from_nothing(out):
    changed = [Piece("a", "F16", (100,), lambda: iter([bytes(200)])), *pieces()]
    del changed[2]
    for options in ({"identity": "there"}, {"given": changed}):
        stopped(out, 12)
        assert written(out, **options) == 0
        out.unlink()
    stopped(out, 12)
    assert write(out, pieces(), {}, identity="here", check=lambda part: None) == 0


def test_a_piece_that_gives_other_lengths_is_an_error(out):
    for given in (b"", b"1", bytes(8), bytes(11)):
        wrong = [Piece("a", "F32", (2,) if given else (1,), lambda given=given: iter([given]))]
        if len(given) == 8:
            assert written(out, wrong) == 0
            continue
        with pytest.raises(RuntimeError, match=r"^a gave \d+ bytes, not [48]$"):
            written(out, wrong)


def test_only_a_file_found_wrong_is_deleted(out):
    """Where the source cannot be read any more, what is written is still right."""

    def check(part):
        raise error

    error = OSError("the source went away")
    with pytest.raises(OSError, match="went away"):
        written(out, check=check)
    assert files(out) == {out.name + ".part", out.name + ".journal"}
    error = CheckpointError("wrong")
    with pytest.raises(CheckpointError, match="wrong"):
        written(out, check=check)
    assert files(out) == set()


# ---- Disks -------------------------------------------------------------------------------------


class Quota(io.FileIO):
    """A file on a disk with so many bytes left; writes what fits, as a disk does."""

    left = 0

    def write(self, data) -> int:
        fits = bytes(memoryview(data)[: Quota.left])
        if not fits and len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        Quota.left -= len(fits)
        return super().write(fits)


@pytest.fixture
def quota(monkeypatch):
    """quota(n): n more bytes can be written by pathlib's open; quota(None): any number."""
    plain = Path.open

    def opened(self, mode="r", buffering=-1, encoding=None, **rest):
        if mode == "r" or mode == "rb":
            return plain(self, mode, buffering, encoding, **rest)
        raw = io.BufferedWriter(Quota(self, mode.replace("b", "")), 64)
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding)

    def limited(left):
        Quota.left = left
        monkeypatch.setattr(Path, "open", plain if left is None else opened)

    return limited


def test_a_disk_that_fills_at_any_byte(out, whole, quota):
    """Says so, keeps what fits, and goes on when there is room."""
    kept, journal = [], 65 * (1 + len(SIZES))  # its key, and a checksum for each tensor
    for room in range(0, len(whole) + journal, 23):
        quota(room)
        with pytest.raises(OSError, match=f"the disk of {out.parent} is full; make room") as caught:
            written(out)
        assert caught.value.errno == errno.ENOSPC
        assert not out.exists()
        quota(None)
        kept.append(written(out))
        assert out.read_bytes() == whole
        assert files(out) == {out.name}
        out.unlink()
    assert kept == sorted(kept)
    assert kept[0] == 0
    assert len(set(kept)) >= 4


def test_other_errors_of_the_disk_are_not_called_full(out, whole):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) - 50, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            written(out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert written(out) > 0


def test_room_that_is_asked_for(out, whole, monkeypatch):
    """What an interrupted run wrote needs no room twice; what is of no use is given back first."""
    usage = resumable_file.shutil.disk_usage(out.parent)
    free = 0
    monkeypatch.setattr(
        resumable_file.shutil, "disk_usage", lambda where: usage._replace(free=free)
    )

    def just_fits(needed: int, **changes) -> None:
        nonlocal free
        free = needed - 1
        with pytest.raises(OSError, match=r"GB more and .* free; make room"):
            written(out, **changes)
        free = needed
        written(out, **changes)
        out.unlink()

    just_fits(len(whole))
    for identity in ("here", "there"):  # goes on; starts again
        free = len(whole)
        stopped(out, 12)
        part = out.with_name(out.name + ".part").stat().st_size
        assert part > 300
        just_fits(len(whole) - part, identity=identity)
