"""`digits_lt`: the 1,797 handwritten digits of 8 x 8 pixels that come inside scikit-learn. No download.

They lie person after person, and a person's digits resemble each other. So the test set is the last 50 images of each
class: some four people who, but for the 17 images around the cut, are not trained on. On a random split the nearest
neighbour of a test image is often from the same hand, and a classifier looks better than it is (error of 1-nearest
neighbour, trained on all the rest: 4.2 % here, 1.7 % there).
"""

import functools

import numpy as np
import torch

from cbl.data import Source

TEST_PER_CLASS = 50


@functools.cache
def read() -> Source:
    """1,297 training and 500 test images (8, 8, 1); the stored 0 to 16 become 0 to 255."""
    from sklearn.datasets import load_digits  # imported here: it takes a second that other data sets need not spend

    images, labels = load_digits(return_X_y=True)
    images = np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    test = np.sort(np.concatenate([np.flatnonzero(labels == c)[-TEST_PER_CLASS:] for c in range(10)]))
    train = np.setdiff1d(np.arange(len(labels)), test)
    labels = torch.from_numpy(labels.astype(np.int64))
    return Source(
        train_images=torch.from_numpy(images[train]),
        train_labels=labels[train],
        test_images=torch.from_numpy(images[test]),
        test_labels=labels[test],
        class_names=tuple("0123456789"),
        train_file=np.zeros(len(train), dtype=np.int64),
    )
