"""CIFAR-10, CIFAR-20 (CIFAR-100 with its 20 coarse labels) and CIFAR-100 from the official python files.

The files are fetched when they are absent, checked against the published md5 and read by an unpickler that can build
numpy arrays and nothing else.
"""

import functools
import hashlib
import http.client
import os
import pickle
import shutil
import sys
import tarfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cbl import disk
from cbl.data import Source
from cbl.errors import UserError


@dataclass(frozen=True)
class Archive:
    """One published tar.gz and the files in it."""

    title: str
    url: str
    md5: str
    folder: str  # in the archive, and under root
    files: dict[str, str]  # name → md5
    train: tuple[str, ...]
    test: str
    meta: str


ARCHIVES = {
    "cifar10": Archive(
        title="CIFAR-10",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        files={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
        train=("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"),
        test="test_batch",
        meta="batches.meta",
    ),
    "cifar100": Archive(
        title="CIFAR-100",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        files={
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
        train=("train",),
        test="test",
        meta="meta",
    ),
}

# Data set → archive, and the keys of its labels and of their names in the files.
KEYS = {
    "cifar10_lt": ("cifar10", b"labels", b"label_names"),
    "cifar20_lt": ("cifar100", b"coarse_labels", b"coarse_label_names"),
    "cifar100_lt": ("cifar100", b"fine_labels", b"fine_label_names"),
}

_TIMEOUT = 15  # seconds without an answer or a byte
_in_vain: dict[tuple[str, Path], tuple[float, str]] = {}  # address, folder -> when to try again, why it failed
_CHUNK = 1 << 20  # bytes


def read(name: str, root: str, download: bool) -> Source:
    """The whole data set `name` (a key of `KEYS`) from `root`; images (32, 32, 3), training files in official order.

    Read once per process for each root; CIFAR-20 and CIFAR-100 share their images. Raises `UserError` when files are
    missing and `download` is off or fails, and when one is damaged.
    """
    key, label_key, name_key = KEYS[name]
    where = Path(root).resolve()
    _ensure(ARCHIVES[key], where, download)
    train, test, meta = _batches(key, where)
    return Source(
        train_images=train.images,
        train_labels=torch.tensor(train.labels[label_key]),
        test_images=test.images,
        test_labels=torch.tensor(test.labels[label_key]),
        class_names=tuple(label.decode() for label in meta[name_key]),
        train_file=train.file,
    )


@dataclass(frozen=True, eq=False)
class _Batch:
    """The images of one or several files, in order."""

    images: torch.Tensor  # (M, 32, 32, 3) uint8
    labels: dict[bytes, list[int]]  # of every kind that the files hold
    file: np.ndarray  # (M,) int64, which of the files


@functools.cache
def _batches(key: str, root: Path) -> tuple[_Batch, _Batch, dict[bytes, Any]]:
    """Training batch, test batch and meta."""
    archive = ARCHIVES[key]
    return (
        _read_batch(archive, root, archive.train),
        _read_batch(archive, root, (archive.test,)),
        _read_file(archive, root, archive.meta),
    )


def _ensure(archive: Archive, root: Path, download: bool) -> None:
    """Every file of the archive is there, or `UserError`."""
    if download and _missing(archive, root):
        _fetch_unless_in_vain(archive, root)
    if missing := _missing(archive, root):
        raise UserError(
            f"{archive.title} is not complete under {root}: looked for {missing[0]}"
            f"{f' and {len(missing) - 1} more files' if missing[1:] else ''}; set dataset.download=true, or download "
            f"{archive.url} and unpack it there."
        )


def _missing(archive: Archive, root: Path) -> list[Path]:
    paths = (root / archive.folder / name for name in archive.files)
    return [path for path in paths if not path.is_file()]


def _read_batch(archive: Archive, root: Path, names: tuple[str, ...]) -> _Batch:
    parts = [_read_file(archive, root, name) for name in names]
    sizes = [len(part[b"data"]) for part in parts]
    images = np.empty((sum(sizes), 32, 32, 3), dtype=np.uint8)
    planes = [part[b"data"].reshape(-1, 3, 32, 32) for part in parts]  # as stored: all red, all green, all blue
    np.concatenate([plane.transpose(0, 2, 3, 1) for plane in planes], out=images)
    kinds = [k for k in parts[0] if k.endswith(b"labels")]
    labels = {k: [label for part in parts for label in part[k]] for k in kinds}
    return _Batch(torch.from_numpy(images), labels, np.repeat(np.arange(len(parts)), sizes))


def _read_file(archive: Archive, root: Path, name: str) -> dict[bytes, Any]:
    path = root / archive.folder / name
    try:
        with open(path, "rb") as handle:
            md5 = hashlib.file_digest(handle, disk.md5).hexdigest()
            if md5 != archive.files[name]:
                raise UserError(
                    f"{path} is damaged: its md5 is {md5}, the published one {archive.files[name]}; delete it and run "
                    "again with dataset.download=true."
                )
            handle.seek(0)
            return _Unpickler(handle, encoding="bytes").load()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None


class _Unpickler(pickle.Unpickler):
    """Builds plain data and numpy arrays only: a pickle may otherwise run any code."""

    _ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # the module moved in numpy 2
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"a CIFAR file has no business with {module}.{name}")
        return self._ALLOWED[module, name]


def _fetch_unless_in_vain(archive: Archive, root: Path) -> None:
    """A download that failed is not tried again before ten times the seconds that it took, a minute at most.

    Of a sweep without network the runs would else wait one after the other, and those beside them with each.
    """
    now = time.monotonic()
    until, why = _in_vain.get((archive.url, root), (0.0, ""))
    if now < until:
        raise UserError(why)
    try:
        _fetch(archive, root)
    except UserError as error:
        ended = time.monotonic()
        _in_vain[archive.url, root] = ended + min(60, 10 * (ended - now)), str(error)
        raise


def _fetch(archive: Archive, root: Path) -> None:
    """Downloads the archive and puts the files that are missing under `root`, each whole or not at all.

    Everything happens in a folder beside, under a lock: what a killed process left there is thrown away by the next
    one, and of two processes the second waits and finds the files.
    """
    beside = root / f".{archive.folder}.download"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with disk.locked(root / f".{archive.folder}.lock"):
            if not (missing := _missing(archive, root)):
                return
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()
            try:
                _download(archive, beside / "archive.tar.gz")
                _unpack(archive, beside / "archive.tar.gz", beside, [path.name for path in missing])
                (root / archive.folder).mkdir(exist_ok=True)
                for path in missing:
                    os.replace(beside / path.name, path)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    except (OSError, http.client.HTTPException, tarfile.TarError) as error:
        raise UserError(
            f"{archive.title} could not be downloaded from {archive.url} to {root} ({error}): check network and disk, "
            f"or fetch that file elsewhere and unpack it so that {root / archive.folder} exists."
        ) from None


def _download(archive: Archive, path: Path) -> None:
    """The archive as `path`, its md5 checked; progress goes to stderr, a number every 10 %."""

    def tell(text: str, end: str = "") -> None:
        print(text, end=end, file=sys.stderr, flush=True)

    md5, done, told = disk.md5(), 0, 0
    with urllib.request.urlopen(archive.url, timeout=_TIMEOUT) as response, open(path, "wb") as out:
        size = int(response.headers.get("Content-Length") or 0)  # bytes
        tell(f"Downloading {archive.url}" + (f" ({size / 1e6:.0f} MB):" if size else ""))
        try:
            while chunk := response.read(_CHUNK):
                out.write(chunk)
                md5.update(chunk)
                done += len(chunk)
                if size and 10 * done // size > told:
                    told = 10 * done // size
                    tell(f" {10 * told}%")
        finally:
            tell("", end="\n")
    if md5.hexdigest() != archive.md5:
        raise UserError(
            f"What came from {archive.url} is not the published file: {done} bytes with md5 {md5.hexdigest()} instead "
            f"of {archive.md5}; run again, or fetch it elsewhere."
        )


def _unpack(archive: Archive, path: Path, to: Path, names: list[str]) -> None:
    """The files `names` of the archive's folder, straight into `to`; nothing else of the archive is touched."""
    with tarfile.open(path, "r:gz") as tar:
        for name in names:
            # Read as bytes instead of extracted, so that no path, link or mode of the archive is taken at its word.
            content = tar.extractfile(f"{archive.folder}/{name}")
            assert content is not None  # None for a folder, and the md5 has told that this is no such archive
            with content, open(to / name, "wb") as out:
                shutil.copyfileobj(content, out)
