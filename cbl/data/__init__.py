"""The images of a run: `load` brings every source into one common form and draws the long-tailed subset.

A source is read once per process; all runs of a sweep share its images in memory, so nobody may write to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cbl import longtail
from cbl.errors import UserError

if TYPE_CHECKING:
    from cbl import config


@dataclass(frozen=True, eq=False)
class Source:
    """Everything that one source offers, before a subset is drawn."""

    train_images: torch.Tensor  # (M, H, W, C) uint8
    train_labels: torch.Tensor  # (M,) int64
    test_images: torch.Tensor  # (T, H, W, C) uint8
    test_labels: torch.Tensor  # (T,) int64
    class_names: tuple[str, ...]  # by label
    train_file: np.ndarray  # (M,) int64, number of the source file that an image came from: 0 to 4 on CIFAR-10, else 0
    content: str = ""  # hash of images and labels, where they are not those of published files


@dataclass(frozen=True, eq=False)
class Data:
    """What a run trains and tests on: the source's images, and which of them are kept."""

    train_images: torch.Tensor  # (M, H, W, C) uint8, all of the source's, shared by every subset
    train_labels: torch.Tensor  # (M,) int64, likewise
    subset: np.ndarray  # (N,) int64, ascending: the training images that are kept
    test_images: torch.Tensor  # (T, H, W, C) uint8
    test_labels: torch.Tensor  # (T,) int64
    class_names: tuple[str, ...]
    counts: np.ndarray  # (C,) int64, kept training images per class
    subset_hash: str
    content: str  # as of the source
    record_order: np.ndarray  # (N,) int64, positions in `subset` in the order of the official record file


def load(dataset: config.Dataset) -> Data:
    """The data set that `dataset` describes, with its training subset drawn from `dataset.subset_seed`.

    The largest class of a long-tailed subset is as large as the smallest class of the source (5000, 2500 and 500 on
    CIFAR-10, -20 and -100), and label 0 is the head. An imbalance factor of None keeps every image.
    Raises `UserError` for files that are missing, damaged or not to be read, and for a factor that would leave a class
    empty.
    """
    try:
        source = _source(dataset)
    except PermissionError as error:
        raise UserError(
            f"{error.filename} may not be read ({error.strerror}): change its permissions or dataset.root."
        ) from None
    labels = source.train_labels.numpy()
    num_classes = len(source.class_names)
    available = np.bincount(labels, minlength=num_classes)
    factor = dataset.imbalance_factor
    if factor is None:
        subset, counts = np.arange(len(labels)), available
    else:
        try:
            counts = longtail.class_counts(num_classes, factor, int(available.min()))
        except ValueError as error:
            why = f"dataset.imbalance_factor={factor:g} does not suit {dataset.name}: {error}"
            if dataset.name == "folder":
                smallest = source.class_names[int(available.argmin())]
                why += f" The tail starts at the size of the smallest class, '{smallest}'; null takes all as they are."
            raise UserError(why) from None
        subset = longtail.draw_subset(labels, counts, dataset.subset_seed)
    return Data(
        train_images=source.train_images,
        train_labels=source.train_labels,
        subset=subset,
        test_images=source.test_images,
        test_labels=source.test_labels,
        class_names=source.class_names,
        counts=counts,
        subset_hash=longtail.subset_hash(subset),
        content=source.content,
        record_order=_record_order(labels[subset], source.train_file[subset], balanced=factor == 1),
    )


def _source(dataset: config.Dataset) -> Source:
    # Imported when asked for: only digits need scikit-learn, only folders Pillow.
    if dataset.name == "digits_lt":
        from cbl.data import digits

        return digits.read()
    if dataset.name == "folder":
        from cbl.data import folder

        return folder.read(dataset.root, dataset.image_size)
    from cbl.data import cifar

    return cifar.read(dataset.name, dataset.root, dataset.download)


def _record_order(labels: np.ndarray, file: np.ndarray, balanced: bool) -> np.ndarray:
    """The order in which the official generators write records: file by file, in each class by class.

    The balanced sets have a generator of their own, which keeps the order of the files. Within a class the official
    order is an unseeded shuffle that nobody can repeat; here it is that of the files.
    """
    return np.arange(len(labels)) if balanced else np.lexsort((labels, file))  # lexsort: last key first, and stable
