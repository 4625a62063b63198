"""Files that are written whole or not at all."""

import errno
import fcntl
import itertools
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from cbl import disk, records
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


def test_a_file_system_without_locks_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", fail)
    for block, folder, setting in (
        (lambda: records.lock(tmp_path / "run"), tmp_path / "run", "output_dir"),
        (lambda: disk.locked(tmp_path / ".lock"), tmp_path, "folder"),
    ):
        with pytest.raises(UserError) as caught, block():
            pass
        assert str(caught.value) == (
            f"The file system of {folder} has no locks (Function not implemented): choose another {setting}."
        )
    with pytest.raises(UserError, match=r"inaturalist2018 has no locks \(Function not implemented\): .* another root"):
        prepare.prepare("inaturalist2018", tmp_path)
