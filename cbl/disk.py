"""Files that are whole or not there, and locks: for whatever writes to a disk."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

from cbl.errors import UserError


@contextlib.contextmanager
def writing(folder: Path, remedy: str = "make room or mend it, and the same command goes on") -> Iterator[None]:
    """`UserError` for a disk that is full or otherwise takes nothing more."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror or error}): {remedy}.") from None


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A handle to write to: beside `path`, and renamed at the end, so that no reader and no kill sees half a file.

    Raises `UserError` when it cannot be written; what was at `path` is there still.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path.parent):
            with open(beside, "wb") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())  # or a power failure after the rename leaves an empty file
            os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def write(path: Path, content: str | bytes) -> None:
    """`content`, a text as UTF-8, by `whole`."""
    with whole(path) as handle:
        handle.write(content.encode() if isinstance(content, str) else content)


def md5() -> "hashlib._Hash":
    """Of nothing yet: the published sums of data sets are md5, which hardened systems allow only like this."""
    return hashlib.md5(usedforsecurity=False)


_locks: set[IO] = set()  # of `alone`, held or asked for
if hasattr(os, "register_at_fork"):  # the workers of a loader would hold them for seconds after a kill
    os.register_at_fork(after_in_child=lambda: [handle.close() for handle in _locks])


def _lock(handle: IO, folder: Path, setting: str) -> bool:
    """Whether the lock on `handle`, a file in `folder`, is ours now and not another process's.

    Raises `UserError` where there are no locks; `setting` is what says where the folder is.
    """
    import fcntl  # here, as Hydra imports our launcher in other people's applications too, on Windows as well

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"The file system of {folder} has no locks ({error.strerror}): choose another {setting}."
        ) from None
    return True


@contextlib.contextmanager
def alone(folder: Path, setting: str = "output_dir") -> Iterator[bool]:
    """True when this process alone may write to `folder`; the lock goes with the process, however it ends.

    Makes the folder, and removes what a killed process left half written; raises `UserError` when that cannot be done.
    `setting` is what says where the folder is.
    """
    remedy = f"choose another {setting}"
    with writing(folder, remedy):
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "w")  # noqa: SIM115 - closed below
    _locks.add(handle)
    try:
        with handle:
            mine = _lock(handle, folder, setting)
            if mine:
                with writing(folder, remedy):
                    for half_written in folder.glob("*.tmp"):
                        half_written.unlink(missing_ok=True)
            yield mine
    finally:
        _locks.discard(handle)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone in this block among all that download to the same place; the lock goes with the process, however it ends.

    Who comes second says so and waits.
    """
    import fcntl

    with open(path, "w") as handle:
        if not _lock(handle, path.parent, "folder"):
            print("Waiting for another process that is downloading the same files.", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
