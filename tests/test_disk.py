"""Files that are written whole or not at all."""

import itertools
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from cbl import disk

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
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        disk.write(path, "new")
    assert path.read_text(encoding="utf-8") == "old" and list(tmp_path.iterdir()) == [path]


def test_text_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    disk.write(tmp_path / "x", "β = 0.9\n")
    assert (tmp_path / "x").read_bytes() == b"\xce\xb2 = 0.9\n"


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("synced"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("renamed"), replace(*names)))
    disk.write(tmp_path / "x", b"content")
    assert done == ["synced", "renamed"] and (tmp_path / "x").read_bytes() == b"content"
