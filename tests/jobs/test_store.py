"""The folder of kept work: what may be in it, who may use it, what a full disk leaves."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys

import pytest
import torch

from pixeldiff.errors import ResumeError
from pixeldiff.jobs import JobStore
from pixeldiff.jobs.pieces import read_piece, write_piece

JOB = {"job": "test", "seed": 3}
TENSORS = {
    "a": torch.arange(10.0).reshape(2, 5),
    "b": torch.ones(3, dtype=torch.bfloat16),
    "c": torch.zeros(0, 4),
    "d": torch.tensor(5, dtype=torch.int64),
    "e": torch.arange(6, dtype=torch.uint8)[::2],
}


def test_tensors_come_back(tmp_path):
    write_piece(tmp_path / "a.piece", "job", "a", TENSORS)
    got = read_piece(tmp_path / "a.piece", "job", "a")
    assert got.keys() == TENSORS.keys()
    for key, t in TENSORS.items():
        assert got[key].dtype == t.dtype
        assert torch.equal(got[key], t)
    assert read_piece(tmp_path / "a.piece", "other", "a") is None
    assert read_piece(tmp_path / "a.piece", "job", "b") is None
    assert read_piece(tmp_path / "b.piece", "job", "b") is None
    assert os.listdir(tmp_path) == ["a.piece"]


def test_every_damaged_byte_is_noticed(tmp_path):
    path = tmp_path / "a.piece"
    write_piece(path, "job", "a", {"a": torch.arange(4.0)})
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1 :])
        assert read_piece(path, "job", "a") is None, i
        path.write_bytes(data[:i])
        assert read_piece(path, "job", "a") is None, i
    path.write_bytes(data + b"x")
    assert read_piece(path, "job", "a") is None
    path.write_bytes(data)
    assert read_piece(path, "job", "a") is not None


def test_a_header_that_claims_much_is_not_believed(tmp_path):
    path = tmp_path / "a.piece"
    write_piece(path, "job", "a", {"a": torch.zeros(1)})
    data = path.read_bytes().replace(b"[1]]", b"[1000000000000]]")
    length = len(data) - len(path.read_bytes()) + int.from_bytes(data[18:26], "little")
    path.write_bytes(data[:18] + length.to_bytes(8, "little") + data[26:])
    assert read_piece(path, "job", "a") is None


def test_it_goes_when_the_work_is_done(tmp_path):
    with JobStore(tmp_path / "job") as store:
        store.begin(JOB)
        store.put("a", TENSORS)
        with store.within("inner") as inner:
            inner.begin(JOB)
            inner.put("b", TENSORS)
    assert os.listdir(tmp_path) == []


def interrupted(folder, job, *parts):
    """A run that is interrupted when it has made these parts."""
    with contextlib.suppress(KeyboardInterrupt), JobStore(folder) as store:
        store.begin(job)
        for part in parts:
            store.put(part, TENSORS)
        raise KeyboardInterrupt


def test_it_stays_when_something_is_finished(tmp_path):
    interrupted(tmp_path / "job", JOB)
    assert os.listdir(tmp_path) == []
    interrupted(tmp_path / "job", JOB, "a")
    assert os.listdir(tmp_path) == ["job"]
    with JobStore(tmp_path / "job") as store:
        store.begin(JOB)
        assert store.get("a").keys() == TENSORS.keys()
        assert store.get("b") is None
        assert (store.found, store.made) == (1, 0)


def test_parts_before_the_job_is_known_are_a_mistake(tmp_path):
    with JobStore(tmp_path / "job") as store, pytest.raises(RuntimeError, match="begin"):
        store.put("a", TENSORS)


def test_the_differences_are_named(tmp_path):
    interrupted(tmp_path / "job", {**JOB, "same": (1, 2)}, "a")
    words = r"differs in caption \(none there, fox here\), seed \(3 there, 4 here\); go on with"
    with pytest.raises(ResumeError, match=words), JobStore(tmp_path / "job") as store:
        store.begin({"job": "test", "seed": 4, "caption": "fox", "same": [1, 2]})
    assert store.stated()["seed"] == 3


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / "job" / "inner").mkdir(parents=True)
    (tmp_path / "job" / ".0123.part").write_bytes(b"half")
    (tmp_path / "job" / "inner" / ".4567.part").write_bytes(b"half")
    with JobStore(tmp_path / "job") as store:
        assert os.listdir(store.path) == ["inner"]
        with store.within("inner") as inner:
            assert os.listdir(inner.path) == []


@pytest.mark.parametrize("name", ["notes.txt", "deep/notes.txt"])
def test_folders_of_others_are_refused(tmp_path, name):
    path = tmp_path / "job" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    words = "must be empty or hold an unfinished job, it holds"
    with pytest.raises(ResumeError, match=words), JobStore(tmp_path / "job"):
        pass
    assert path.read_text() == "mine"


def test_places_without_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResumeError, match="must be a folder, it is a file"):
        JobStore(tmp_path / "file").__enter__()
    with pytest.raises(FileNotFoundError, match="missing"):
        JobStore(tmp_path / "missing" / "job").__enter__()
    with pytest.raises(OSError, match="name too long"):
        JobStore(tmp_path / ("x" * 300)).__enter__()
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of folders")
def test_one_process_at_a_time(tmp_path):
    script = (
        "import sys; from pixeldiff.jobs import JobStore\n"
        "with JobStore(sys.argv[1]): print('in', flush=True); sys.stdin.read()"
    )
    held = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "job"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert held.stdout.readline() == b"in\n"
    with pytest.raises(ResumeError, match="another process works on"):
        JobStore(tmp_path / "job").__enter__()
    held.kill()
    held.communicate()
    with JobStore(tmp_path / "job"):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of folders")
@pytest.mark.parametrize("code", [errno.EBADF, errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks(tmp_path, monkeypatch, code):
    def refused(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refused)
    if code == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"):
            JobStore(tmp_path / "job").__enter__()
        return
    with JobStore(tmp_path / "job") as store:
        store.begin(JOB)
    assert os.listdir(tmp_path) == []


def test_a_job_within_in_which_nothing_is_finished_keeps_nothing(tmp_path):
    with contextlib.suppress(KeyboardInterrupt), JobStore(tmp_path / "job") as store:
        store.begin(JOB)
        with store.within("inner") as inner:
            inner.begin(JOB)
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
