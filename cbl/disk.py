"""Files that are whole or not there, and a lock to wait for: for whatever writes to a disk."""

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A handle to write to: beside `path`, and renamed at the end, so that no reader and no kill sees half a file."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())  # or a power failure after the rename leaves an empty file
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write(path: Path, content: str | bytes) -> None:
    """`content`, a text as UTF-8, by `whole`."""
    with whole(path) as handle:
        handle.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone in this block among all that download to the same place; the lock goes with the process, however it ends.

    Who comes second says so and waits.
    """
    with open(path, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another process that is downloading the same files.", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
