"""Files that are written whole or not at all, and folders that one process alone writes to."""

import errno
import fcntl
import itertools
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from cbl import disk
from cbl.data import prepare
from cbl.errors import UserError

FORK = multiprocessing.get_context("fork")  # other processes, and quickly there


def write_on_and_on(path: Path) -> None:
    for number in itertools.count():
        disk.write(path, f"{number}\n" * 20_000)


def test_a_kill_leaves_the_old_text_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    disk.write(path, "0\n" * 20_000)
    for wait in np.linspace(0.01, 0.05, 10):
        writer = FORK.Process(target=write_on_and_on, args=(path,))
        writer.start()
        time.sleep(wait)
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) == 20_000 and len(set(lines)) == 1


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failure_leaves_the_old_text_and_nothing_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "result.json"
    disk.write(path, "old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(UserError, match=rf"^{tmp_path} cannot be written to \(No space left on device\): make room"):
        disk.write(path, "new")
    assert path.read_text(encoding="utf-8") == "old" and list(tmp_path.iterdir()) == [path]


def test_text_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    disk.write(tmp_path / "x", "β = 0.9\n")
    assert (tmp_path / "x").read_bytes() == b"\xce\xb2 = 0.9\n"


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(f"{os.fstat(handle).st_size} B"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("renamed"), replace(*names)))
    disk.write(tmp_path / "x", b"content")
    assert done == ["7 B", "renamed"] and (tmp_path / "x").read_bytes() == b"content"


# -- one process at a time ---------------------------------------------------------------------------------------------


def hold(folder: Path, told: Connection) -> None:
    with disk.alone(folder) as mine:
        worker = FORK.Process(target=time.sleep, args=(60,))  # as of a loader, which outlives a kill for a while
        worker.start()
        told.send((mine, worker.pid))
        time.sleep(60)


def test_lock_between_processes_goes_with_a_kill(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    heard, told = FORK.Pipe(duplex=False)
    holder = FORK.Process(target=hold, args=(folder, told))
    holder.start()
    mine, worker = heard.recv()
    assert mine is True
    with disk.alone(folder) as mine:
        assert not mine
    with disk.alone(tmp_path / "runs" / "another") as mine:
        assert mine
    holder.kill()
    holder.join()
    with disk.alone(folder) as mine:
        assert mine
    os.kill(worker, signal.SIGKILL)


def test_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), disk.alone(tmp_path):
        raise RuntimeError
    with disk.alone(tmp_path) as mine, disk.alone(tmp_path) as again:
        assert mine and not again  # nor twice in one process


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt.123.tmp").touch()
    with disk.alone(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(
            UserError, match=r"^.*file/run cannot be written to \(Not a directory\): choose another output_dir"
        ),
        disk.alone(tmp_path / "file" / "run"),
    ):
        pass
    with (
        pytest.raises(UserError, match=r"\(Not a directory\): choose another --results\.$"),
        disk.alone(tmp_path / "file" / "results", "--results"),
    ):
        pass


def test_a_file_system_without_locks_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", fail)
    for block, folder, setting in (
        (lambda: disk.alone(tmp_path / "run"), tmp_path / "run", "output_dir"),
        (lambda: disk.locked(tmp_path / ".lock"), tmp_path, "folder"),
    ):
        with pytest.raises(UserError) as caught, block():
            pass
        assert str(caught.value) == (
            f"The file system of {folder} has no locks (Function not implemented): choose another {setting}."
        )
    with pytest.raises(UserError, match=r"inaturalist2018 has no locks \(Function not implemented\): .* another root"):
        prepare.prepare("inaturalist2018", tmp_path)
