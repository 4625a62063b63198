"""The published archives: what is missing, fetching it, and reading what is there without trusting a path in it."""

import contextlib
import http.client
import os
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cbl import disk
from cbl.errors import UserError

_CHUNK = 4 << 20  # bytes
_TIMEOUT = 60  # seconds without an answer or a byte
_ATTEMPTS = 5  # in a row without a new byte


@dataclass(frozen=True)
class Archive:
    """One file as it was published."""

    url: str
    gigabytes: float  # about
    md5: str | None  # None: not published
    account: bool = False  # only for people who are registered there
    optional: bool = False

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]


def ensure(title: str, archives: Sequence[Archive], folder: Path, download: bool, terms: str) -> None:
    """All of `archives` are in `folder` and have their md5; fetches them with `download`. Optional ones may be missing.

    Otherwise lists what is missing, how big it is and where it is to be had, and raises `UserError`.
    """
    missing = [archive for archive in archives if not (folder / archive.name).is_file()]
    if download and not any(archive.account for archive in missing):
        if missing:
            _tell(f"{title} is {terms}.")
        missing = [archive for archive in missing if not _fetched(archive, folder)]
    needed = [archive for archive in missing if not archive.optional]
    if needed:
        _tell(f"{title} ({terms}) is to be downloaded into {folder}:")
        for archive in missing:
            note = "  (optional: class names)" if archive.optional else ""
            _tell(f"  {archive.gigabytes:>8g} GB  {archive.url}{note}")
        if any(archive.account for archive in needed):
            how = "register at https://image-net.org/download-images and download them in a browser"
        else:
            how = "download them, or run this again with --download (DOWNLOAD=1 with make)"
        names = ", ".join(archive.name for archive in needed)
        raise UserError(f"{title} cannot be prepared without {names} in {folder}: {how}.")
    for archive in archives:
        if archive not in missing:
            _verify(archive, folder / archive.name)


def open_tar(path: Path) -> tarfile.TarFile:
    """For one pass from front to back over a tar or tar.gz; within `reading`."""
    if path.suffix == ".gz":
        return tarfile.open(path, mode="r|gz", bufsize=1 << 17)  # bytes; more is slower, tarfile copies what is left
    return tarfile.open(path, mode="r:")


def files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Its regular files, in order; links and everything else are passed over."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # or it keeps a million of them
        if member.isreg():
            yield member


def content(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The bytes of one regular file of the archive `path`."""
    with reading(path):
        handle = tar.extractfile(member)
        assert handle is not None  # None is for folders
        found = handle.read()
        if len(found) != member.size:
            raise EOFError(f"{member.name} is cut off")
        return found


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """`UserError` for an archive that is cut off or damaged."""
    try:
        yield
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{path} cannot be read to its end ({error}): remove it and download it again.") from None


def safe(name: str, source: Path) -> str:
    """`name` as a relative path that stays inside the folder it is written under; else `UserError`.

    Refused are absolute names, "..", backslashes, drive letters and control characters.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or any(c in "\\:" or ord(c) < 32 for c in name):
        raise UserError(
            f"{source} names a file {name!r}, which could lie outside its folder: it is not the published one."
        )
    return str(path)


def ticker(what: str, total: float, unit: str) -> Callable[[float], None]:
    """A function to call with how much is done; says so on stderr every ten seconds."""
    began = last = time.monotonic()

    def tick(done: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 10:
            last = now
            share = f" of {total:,.0f} ({100 * done / total:.0f} %)" if total else ""
            _tell(f"{what}: {done:,.0f}{share} {unit}, {done / (now - began):,.0f} a second")

    return tick


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _verify(archive: Archive, path: Path) -> None:
    """The md5 of a file of a hundred gigabytes takes minutes: once it is right, a stamp beside the file says so."""
    if archive.md5 is None:
        return
    stamp = path.with_name(f".{path.name}.verified")
    status = path.stat()
    seen = f"{archive.md5} {status.st_size} {status.st_mtime_ns}\n"
    if stamp.exists() and stamp.read_text() == seen:
        return
    tick, md5, done = ticker(f"Checking {path.name}", status.st_size / 1e6, "MB"), disk.md5(), 0
    with reading(path), open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK):
            md5.update(chunk)
            done += len(chunk)
            tick(done / 1e6)
    if md5.hexdigest() != archive.md5:
        raise UserError(
            f"{path} is not the published file: its md5 is {md5.hexdigest()}, not {archive.md5}; remove it and "
            "download it again."
        )
    with contextlib.suppress(OSError):  # archives may lie where nothing can be written
        stamp.write_text(seen)


def _fetched(archive: Archive, folder: Path) -> bool:
    """Downloads the archive unless another process does so meanwhile; False for an optional one that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with disk.locked(folder / f".{archive.name}.lock"):  # preparations under other roots write the same file
            if not (folder / archive.name).is_file():
                _download(archive, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}): choose another folder.") from None
    except UserError as error:
        if not archive.optional:
            raise
        _tell(f"{error} {archive.name} is optional: going on without it.")
        return False
    return True


def _download(archive: Archive, folder: Path) -> None:
    """Fetches into `<name>.part`, going on where an earlier attempt, or process, stopped; renamed when it is whole."""
    part = folder / f"{archive.name}.part"
    failed = 0
    while True:
        before = _size(part)
        try:
            if _fetch(archive, part):
                break
            reason = "the connection was closed early"
        except urllib.error.HTTPError as error:
            if error.code != 429 and error.code < 500:  # 429 and 5xx pass with time
                raise UserError(
                    f"{archive.url} answered {error.code} {error.reason}: download it by other means into {folder}."
                ) from None
            reason = f"it answered {error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        failed = 1 if _size(part) > before else failed + 1
        if failed >= _ATTEMPTS:
            raise UserError(
                f"{archive.url} could not be downloaded ({reason}): check network and disk and run the same command "
                f"again, it goes on after the {before / 1e9:.1f} GB that are there."
            )
        _tell(f"{archive.name}: {reason}; trying again.")
        time.sleep(2**failed)
    os.replace(part, folder / archive.name)


def _fetch(archive: Archive, part: Path) -> bool:
    """One attempt; True when `part` is whole."""
    done = _size(part)
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing from there on
            raise
        if (error.headers.get("Content-Range") or "").endswith(f"/{done}"):
            return True
        part.unlink()  # longer than the file: from another one
        return False
    with response, open(part, "ab" if response.status == 206 else "wb") as out:
        done = out.tell()  # 0 where the server does not know ranges
        total = done + int(response.headers.get("Content-Length") or 0)
        free = shutil.disk_usage(part.parent).free
        if total - done > free:
            raise UserError(
                f"{archive.name} needs {(total - done) / 1e9:.1f} GB more, but {part.parent} has {free / 1e9:.1f} GB "
                "left: make room or choose another folder."
            )
        tick = ticker(f"Downloading {archive.name}", total / 1e6, "MB")
        while chunk := response.read(_CHUNK):
            out.write(chunk)
            done += len(chunk)
            tick(done / 1e6)
    return done >= total


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
