"""The index of a prepared large set: which image file carries which label.

`scripts/prepare_data.py` writes it and the loader (cbl/data/streaming.py) reads it. A prepared set is a folder

    <root>/inaturalist2018/
        images/...          under the names they have in the archive
        train.csv.gz        `path,label`, a row per image; paths are relative to images/
        val.csv.gz
        train_counts.txt    training images per class, one integer per line by label, as the official code reads them
        class_names.txt     one name per line by label
        prepared.json       written last: only then is the set whole. How the images were resized, and a hash per index
"""

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cbl import disk
from cbl.errors import UserError

SPLITS = ("train", "val")


@dataclass(frozen=True, eq=False)
class Index:
    """One split of a prepared set, N images of C classes."""

    dataset: str
    split: str
    folder: Path  # the images are under folder / "images"
    paths: tuple[str, ...]  # (N,) relative, with "/"
    labels: np.ndarray  # (N,) int64
    class_names: tuple[str, ...]  # (C,) by label
    counts: np.ndarray  # (C,) int64, images of this split per class
    hash: str  # first 16 hex digits of the SHA-256 of the rows: equal only for the same images and labels

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def imbalance_factor(self) -> float:
        """Largest class / smallest (paper, Table 1); infinite when a class has no image."""
        smallest = int(self.counts.min())
        return int(self.counts.max()) / smallest if smallest else float("inf")


def read(root: str | Path, dataset: str, split: str) -> Index:
    """The index of `split` ("train" or "val") of the set prepared under `root / dataset`.

    Raises `UserError` when the set is not prepared, not to its end, or when its index is damaged.
    """
    folder = Path(root) / dataset
    facts = prepared(folder)
    if facts is None:
        raise UserError(
            f"{dataset} is not prepared under {Path(root)}: run `make data DATASET={dataset} ROOT={Path(root)}` first."
        )
    try:
        text = gzip.decompress((folder / f"{split}.csv.gz").read_bytes())
        names = (folder / "class_names.txt").read_text(encoding="utf-8").split("\n")[:-1]
        found = _index(folder, split, _rows(text.decode()), names, text)
        damaged = found.hash != facts["hash"][split]
    except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, zlib.error, csv.Error) as error:
        raise UserError(
            f"The index {folder / f'{split}.csv.gz'} cannot be read ({error}): remove {folder / 'prepared.json'} and "
            "prepare the set again."
        ) from None
    if damaged:
        raise UserError(
            f"The index {folder / f'{split}.csv.gz'} has changed since it was prepared (its hash is {found.hash}, not "
            f"{facts['hash'][split]}): remove {folder / 'prepared.json'} and prepare the set again."
        )
    return found


def write(
    folder: Path, split: str, paths: Sequence[str], labels: Sequence[int] | np.ndarray, class_names: Sequence[str]
) -> Index:
    """Writes the index of `split` and what belongs to it; the set counts as prepared only after `complete`.

    The same rows give the same bytes. Raises ValueError for labels outside 0..C-1 and for lengths that differ.
    """
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(("path", "label"))
    writer.writerows(zip(paths, (int(label) for label in labels), strict=True))
    text = rows.getvalue().encode()
    made = _index(folder, split, (list(paths), np.asarray(labels, dtype=np.int64)), class_names, text)
    folder.mkdir(parents=True, exist_ok=True)
    disk.write(folder / f"{split}.csv.gz", gzip.compress(text, compresslevel=6, mtime=0))
    disk.write(folder / "class_names.txt", "".join(f"{name}\n" for name in class_names))
    if split == "train":
        disk.write(folder / "train_counts.txt", "".join(f"{count}\n" for count in made.counts))
    return made


def complete(folder: Path, indices: Sequence[Index], **facts: Any) -> None:
    """`prepared.json`: from now on the set is whole. `facts` are kept beside the hashes, for people to read."""
    content = {
        "dataset": folder.name,
        "images": {index.split: len(index) for index in indices},
        "classes": len(indices[0].class_names),
        "hash": {index.split: index.hash for index in indices},
        **facts,
    }
    disk.write(folder / "prepared.json", json.dumps(content, indent=1) + "\n")


def prepared(folder: Path) -> dict[str, Any] | None:
    """What `complete` wrote, or None."""
    try:
        return json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / 'prepared.json'} cannot be read ({error}): remove it and prepare the set again."
        ) from None


def _rows(text: str) -> tuple[list[str], np.ndarray]:
    reader = csv.reader(io.StringIO(text, newline=""))
    next(reader)
    rows = list(reader)
    return [row[0] for row in rows], np.array([int(row[1]) for row in rows], dtype=np.int64)


def _index(
    folder: Path, split: str, rows: tuple[list[str], np.ndarray], class_names: Sequence[str], text: bytes
) -> Index:
    paths, labels = rows
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
        raise ValueError(f"labels from {labels.min()} to {labels.max()}, but {len(class_names)} class names")
    return Index(
        dataset=folder.name,
        split=split,
        folder=folder,
        paths=tuple(paths),
        labels=labels,
        class_names=tuple(class_names),
        counts=np.bincount(labels, minlength=len(class_names)),
        hash=hashlib.sha256(text).hexdigest()[:16],
    )
