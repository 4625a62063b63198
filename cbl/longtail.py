"""Long-tailed data sets as index arithmetic: images per class, which images, and groups of classes to report on.

Imports numpy alone and reads no images: the same functions serve every data set.
"""

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

Indices = NDArray[np.int64]


def class_counts(num_classes: int, imbalance_factor: float, n_max: int) -> Indices:
    """Training images per class, (C,) int64: n_i = int(n_max · (1/IF)^(i/(C-1))), label 0 the largest (section 5.1).

    imbalance_factor is largest over smallest class, >= 1. Counts are truncated, in float64 and in this very form, as in
    the authors' code, so the factor reached can exceed the one asked for (CIFAR-100 at 200: 500 / 2 = 250).
    For a source whose classes differ in size pass the smallest one as n_max, so that every class has enough images.
    Raises ValueError for fewer than 2 classes, n_max below 1, a factor below 1 or one that leaves a class empty.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2 to be long-tailed, got {num_classes}.")
    if n_max < 1:
        raise ValueError(f"n_max must be at least 1 image, got {n_max}.")
    if not imbalance_factor >= 1:
        hint = f"; did you mean {1 / imbalance_factor:g}?" if imbalance_factor > 0 else "."
        raise ValueError(
            f"imbalance_factor is the largest class over the smallest and must be >= 1, got {imbalance_factor}{hint}"
        )
    ratio = 1 / imbalance_factor
    # Python's pow, not numpy's: a vectorised one may differ in the last bit, and truncation makes that a whole image.
    counts = [int(n_max * ratio ** (i / (num_classes - 1))) for i in range(num_classes)]
    if counts[-1] < 1:
        raise ValueError(
            f"imbalance_factor {imbalance_factor} leaves class {counts.index(0)} without images "
            f"({n_max} in the largest class); choose {f'one below {n_max}' if n_max > 1 else '1, which keeps it'}."
        )
    return np.array(counts, dtype=np.int64)


def draw_subset(labels: ArrayLike, counts: ArrayLike, seed: int) -> Indices:
    """A random subset of `labels` (N,) with counts[c] images of every class c: sorted int64 indices (sum of counts,).

    counts: (C,) whole numbers >= 1, such as `class_counts` gives.
    One RandomState(seed) shuffles the indices of each class in label order, and the first counts[c] are kept. At seed 0
    on CIFAR, in the order of the official files, this is the subset most later long-tailed papers use. Under the
    same seed, the images that a smaller count keeps of a class are among those that a larger count keeps.
    Raises ValueError when counts is empty, when a count is no whole number, is below 1 or exceeds the images of its
    class, when a label has no count, and when counts is a pandas Series, which has an order of its own.
    """
    if hasattr(counts, "iloc"):
        raise ValueError("counts are a pandas object, which need not be in class order: .sort_index().to_numpy() is.")
    labels, given = np.asarray(labels), np.asarray(counts)
    if labels.dtype.kind not in "biuf":
        raise ValueError(
            f"labels must be class numbers, got {labels.dtype}; np.unique(…, return_inverse=True) gives them."
        )
    counts = given.astype(np.int64)
    if counts.ndim != 1 or not counts.size or (counts != given).any():
        raise ValueError(f"counts must be a list of whole numbers, one per class, got {given.tolist()}.")
    outside = labels[(labels < 0) | (labels >= len(counts))]
    if outside.size:
        raise ValueError(f"labels must lie in 0..{len(counts) - 1}, one per count, got {outside[0]}.")
    rng = np.random.RandomState(seed)
    kept = []
    for label, count in enumerate(counts):
        indices = np.flatnonzero(labels == label)
        if not 1 <= count <= len(indices):
            raise ValueError(f"class {label} has {len(indices)} images; draw 1 to {len(indices)} of them, not {count}.")
        rng.shuffle(indices)
        kept.append(indices[:count])
    return np.sort(np.concatenate(kept))


def subset_hash(indices: ArrayLike) -> str:
    """First 16 hex digits of the SHA-256 of the indices (n,) as little-endian int64: equal only for the same subset."""
    return hashlib.sha256(np.asarray(indices, dtype="<i8").tobytes()).hexdigest()[:16]


def shot_groups(counts: ArrayLike) -> dict[str, Indices]:
    """Class indices by training images, counts (C,): many > 100, medium 20 to 100, few < 20. A group may be empty."""
    counts = np.asarray(counts)
    return {
        "many": np.flatnonzero(counts > 100),
        "medium": np.flatnonzero((counts >= 20) & (counts <= 100)),
        "few": np.flatnonzero(counts < 20),
    }


def tercile_groups(counts: ArrayLike) -> dict[str, Indices]:
    """Class indices in thirds by training images, counts (C,); ties by label, those left over to the first groups."""
    largest_first = np.argsort(-np.asarray(counts), kind="stable")
    many, medium, few = (np.sort(group) for group in np.array_split(largest_first, 3))
    return {"many": many, "medium": medium, "few": few}


def class_groups(counts: ArrayLike) -> tuple[str, dict[str, Indices]]:
    """The groups to report for these counts (C,), after the name of their rule.

    "terciles" up to ten classes, where thresholds would leave groups empty (CIFAR-10 has no few); "shots" above.
    """
    if len(np.asarray(counts)) <= 10:
        return "terciles", tercile_groups(counts)
    return "shots", shot_groups(counts)
