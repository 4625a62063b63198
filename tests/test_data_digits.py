"""The digits inside scikit-learn as a data set, and the drawing of a subset that all sources share."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from cbl import config, data, longtail
from cbl.data import digits
from cbl.errors import UserError


def load(factor: float = 100.0, subset_seed: int = 0) -> data.Data:
    return data.load(config.Dataset(name="digits_lt", imbalance_factor=factor, subset_seed=subset_seed))


def test_every_digit_is_there_once_as_bytes():
    source = digits.read()
    assert source.train_images.shape == (1297, 8, 8, 1) and source.test_images.shape == (500, 8, 8, 1)
    assert source.train_images.dtype == torch.uint8 and source.train_labels.dtype == torch.int64
    original, labels = load_digits(return_X_y=True)
    want = sorted((y, *(round(255 * v / 16) for v in row)) for row, y in zip(original, labels, strict=True))
    images = torch.cat([source.train_images, source.test_images]).reshape(-1, 64)
    got = torch.cat([torch.cat([source.train_labels, source.test_labels])[:, None], images], dim=1)
    assert sorted(map(tuple, got.tolist())) == want


def test_the_test_set_is_fifty_of_each_and_comes_last():
    source = digits.read()
    assert source.test_labels.bincount().tolist() == [50] * 10
    original, labels = load_digits(return_X_y=True)
    for c in range(10):
        mine = torch.from_numpy(np.rint(original[labels == c] * 255 / 16).astype(np.uint8)).reshape(-1, 8, 8, 1)
        assert torch.equal(source.train_images[source.train_labels == c], mine[:-50])
        assert torch.equal(source.test_images[source.test_labels == c], mine[-50:])


def test_a_long_tail_starts_at_the_smallest_class():
    d = load(100.0)
    assert d.counts.tolist() == [124, 74, 44, 26, 16, 9, 5, 3, 2, 1]  # 124 = 174 eights - 50
    assert d.train_images.shape[1:] == (8, 8, 1) and d.class_names == tuple("0123456789")
    kept = d.train_labels.numpy()[d.subset]
    np.testing.assert_array_equal(np.bincount(kept), d.counts)
    assert (np.diff(d.subset) > 0).all() and d.subset.dtype == np.int64
    assert d.subset_hash == longtail.subset_hash(d.subset)


def test_subsets_depend_on_their_seed_alone_and_share_the_images():
    a, b, c = load(), load(), load(subset_seed=1)
    np.testing.assert_array_equal(a.subset, b.subset)
    assert a.subset_hash == b.subset_hash != c.subset_hash
    assert a.train_images.data_ptr() == c.train_images.data_ptr()


def test_factors_that_are_no_factors_or_empty_a_class_are_refused():
    with pytest.raises(UserError, match=r"^dataset.imbalance_factor=125 .*digits_lt.*without images"):
        load(125.0)
    with pytest.raises(UserError, match=r"^dataset.imbalance_factor=0.01 .*>= 1"):
        load(0.01)


def test_records_go_class_by_class_unless_balanced():
    d = load(10.0)
    labels = d.train_labels.numpy()[d.subset]
    want = [position for c in range(10) for position in np.flatnonzero(labels == c)]
    assert d.record_order.tolist() == want
    balanced = load(1.0)
    assert balanced.counts.tolist() == [124] * 10
    assert balanced.record_order.tolist() == list(range(1240))
