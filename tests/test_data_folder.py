"""Trees of image files as a data set: decoding, geometry, and what is said about trees that are not right."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cbl import config, data
from cbl.data import folder
from cbl.errors import UserError


def picture(seed: int, size: int = 8) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (size, size, 3)).astype(np.uint8)


def tree(root: Path, train: dict[str, int], test: dict[str, int]) -> Path:
    """PNG files of `picture(0)`, `picture(1)`, ... in the order of the dictionaries."""
    seed = 0
    for split, counts in (("train", train), ("test", test)):
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                Image.fromarray(picture(seed)).save(root / split / name / f"{k:03d}.png")
                seed += 1
    return root


def dataset(root: Path, factor: float | None = None) -> config.Dataset:
    return config.Dataset(name="folder", imbalance_factor=factor, root=str(root), image_size=8)


def test_images_that_may_not_be_read_are_one_sentence(tmp_path, monkeypatch):
    def refuse(root, size):
        raise PermissionError(13, "Permission denied", root)

    monkeypatch.setattr(folder, "read", refuse)  # permissions are nothing to root, as whom tests may run
    with pytest.raises(UserError, match=rf"^{tmp_path} may not be read \(Permission denied\): change"):
        data.load(dataset(tmp_path))


def test_images_come_by_sorted_class_and_file_name(tmp_path):
    root = tree(tmp_path, {"owl": 2, "ant": 3}, {"owl": 1, "ant": 1})
    source = folder.read(str(root), 8)
    assert source.class_names == ("ant", "owl")
    assert source.train_labels.tolist() == [0, 0, 0, 1, 1] and source.test_labels.tolist() == [0, 1]
    assert source.train_images.dtype == torch.uint8 and source.train_labels.dtype == torch.int64
    np.testing.assert_array_equal(source.train_images, [picture(k) for k in (2, 3, 4, 0, 1)])
    np.testing.assert_array_equal(source.test_images, [picture(k) for k in (6, 5)])


def test_hidden_files_and_files_beside_the_classes_are_ignored(tmp_path):
    root = tree(tmp_path, {"a": 1, "b": 1}, {"a": 1, "b": 1})
    (root / "train" / "a" / ".DS_Store").write_text("no image")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "README.txt").write_text("no class")
    source = folder.read(str(root), 8)
    assert source.class_names == ("a", "b") and len(source.train_images) == 2


@pytest.mark.parametrize("shape", [(30, 90), (90, 30), (31, 90), (64, 21), (8, 8)])
@pytest.mark.parametrize("size", [8, 30, 45])
def test_the_centre_square_is_scaled_to_size(tmp_path, shape, size):
    """Red grows with the column and green with the row: so a pixel tells where in the image it was taken."""
    row, column = np.indices(shape)
    Image.fromarray(np.stack([2 * column, 2 * row, 0 * row], axis=2).astype(np.uint8)).save(tmp_path / "x.png")
    got = folder._decode(tmp_path / "x.png", size).astype(float)
    short = min(shape)
    # centre of output pixel k on each axis, in pixels of the input
    rows, columns = ((n - short) / 2 + (np.arange(size) + 0.5) * short / size - 0.5 for n in shape)
    inner = slice(size // 4, -(size // 4))  # bicubic keeps straight lines, but not at the edge of the image
    assert got.shape == (size, size, 3)
    np.testing.assert_allclose(got[inner, inner, 0], np.broadcast_to(2 * columns, (size, size))[inner, inner], atol=1.1)
    np.testing.assert_allclose(got[inner, inner, 1].T, np.broadcast_to(2 * rows, (size, size))[inner, inner], atol=1.1)


MODES = [("L", "png"), ("P", "gif"), ("RGBA", "png"), ("CMYK", "jpg"), ("1", "png")]


@pytest.mark.parametrize(("mode", "suffix"), MODES)
def test_every_usual_kind_of_image_becomes_rgb(tmp_path, mode, suffix):
    Image.new("RGB", (12, 9), (255, 255, 255)).convert(mode).save(tmp_path / f"x.{suffix}")
    got = folder._decode(tmp_path / f"x.{suffix}", 6)
    assert got.shape == (6, 6, 3) and got.dtype == np.uint8 and got.min() >= 254


def test_a_damaged_file_is_named(tmp_path):
    root = tree(tmp_path, {"a": 9, "b": 9}, {"a": 1, "b": 1})
    path = root / "train" / "b" / "004.png"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UserError, match=f"^{re.escape(str(path))} cannot be read as an image .*replace or remove it"):
        folder.read(str(root), 8)


def test_files_that_are_no_images_are_named(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(deep)
    for path, why in ((text, "cannot identify"), (deep, "more than 8 bits"), (tmp_path, "directory")):
        with pytest.raises(UserError, match=f"^{re.escape(str(path))} cannot be read as an image .*{why}"):
            folder._decode(path, 8)


def test_trees_that_are_not_right_are_refused(tmp_path):
    def refuses(name: str, train: dict[str, int], test: dict[str, int], message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            folder.read(str(tree(tmp_path / name, train, test)), 8)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)

    refuses("1", {}, {"a": 1}, "There is no folder .*train: .*train/<class>/ and test/<class>/")
    refuses("2", {"a": 1}, {}, "There is no folder .*test: ")
    refuses("3", {"a": 1, "b": 1}, {"a": 1}, "Class 'b' is in .*train but not in .*test:")
    refuses("4", {"a": 1}, {"a": 1, "b": 1}, "Class 'b' is in .*test but not in .*train:")
    refuses("5", {"a": 1, "b": 0}, {"a": 1, "b": 1}, "train/b holds no images")
    refuses("6", {"a": 1, "b": 1}, {"a": 0, "b": 1}, "test/a holds no images")
    refuses("7", {"a": 1}, {"a": 1}, "one class alone, 'a'")
    (tmp_path / "8" / "train").mkdir(parents=True)
    refuses("8", {}, {"a": 1}, "train holds no class folders")


def test_as_it_is_keeps_every_image(tmp_path):
    d = data.load(dataset(tree(tmp_path, {"a": 2, "b": 7, "c": 1}, {"a": 1, "b": 1, "c": 1})))
    assert d.counts.tolist() == [2, 7, 1] and d.counts.dtype == np.int64
    assert d.subset.tolist() == d.record_order.tolist() == list(range(10))
    assert d.class_names == ("a", "b", "c") and d.train_images.shape[1:] == (8, 8, 3)


def test_other_images_of_the_same_names_are_told_apart(tmp_path):
    hashes = []
    for number, (train, test) in enumerate(((0, 0), (0, 0), (0, 9), (9, 0))):
        root = tree(tmp_path / f"{number}", {"a": 2, "b": 1}, {"a": 1, "b": 1})
        for split, seed in (("train", train), ("test", test)):
            if seed:
                Image.fromarray(picture(seed)).save(root / split / "a" / "000.png")
        hashes.append(data.load(dataset(root)).content)
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_an_imbalance_factor_that_does_not_suit_is_refused_with_the_smallest_class(tmp_path):
    root = tree(tmp_path, {"a": 9, "b": 2}, {"a": 1, "b": 1})
    with pytest.raises(UserError, match=r"factor=10 .*starts at the size of the smallest class, 'b'; null takes all"):
        data.load(dataset(root, 10.0))


def test_a_made_tail_starts_at_the_smallest_class_in_name_order(tmp_path):
    root = tree(tmp_path, {"c": 20, "a": 12, "b": 9}, {"a": 1, "b": 1, "c": 1})
    d = data.load(dataset(root, 9.0))
    assert d.class_names == ("a", "b", "c") and d.counts.tolist() == [9, 3, 1]
    assert d.train_labels[d.subset].tolist() == [0] * 9 + [1] * 3 + [2]
    as_is = data.load(dataset(root))
    assert as_is.train_images.data_ptr() == d.train_images.data_ptr()  # read once
    smaller = data.load(dataclasses.replace(dataset(root), image_size=4))
    assert smaller.train_images.shape[1:] == (4, 4, 3)
