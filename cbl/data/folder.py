"""`folder`: anybody's own images, one folder per class, `root/train/<class>/*` and `root/test/<class>/*`.

Labels follow the sorted class names; a long tail that is made (an imbalance factor is given) has the first name as its
head. Files and folders whose name starts with a dot are ignored; every other file in a class folder must be an image.
"""

import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from cbl.data import Source
from cbl.errors import UserError


def read(root: str, image_size: int) -> Source:
    """All images as RGB (image_size, image_size, 3): short side resized (bicubic), centre cropped.

    Read once per process for each root and size. Raises `UserError` for a missing or empty folder, a class that train
    and test do not share, fewer than two classes, and a file that cannot be read as an image.
    """
    return _read(Path(root).resolve(), image_size)


@functools.cache
def _read(root: Path, image_size: int) -> Source:
    train_names, test_names = _classes(root / "train"), _classes(root / "test")
    if unshared := train_names ^ test_names:
        name = min(unshared)
        here, there = ("train", "test") if name in train_names else ("test", "train")
        raise UserError(
            f"Class '{name}' is in {root / here} but not in {root / there}: train and test need the same class folders."
        )
    names = sorted(train_names)
    if len(names) < 2:
        raise UserError(f"{root / 'train'} holds one class alone, '{names[0]}': at least two are needed.")
    train_images, train_labels = _images(root / "train", names, image_size)
    test_images, test_labels = _images(root / "test", names, image_size)
    content = hashlib.sha256()
    for tensor in (train_images, train_labels, test_images, test_labels):
        content.update(tensor.numpy().data)
    return Source(
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        class_names=tuple(names),
        train_file=np.zeros(len(train_labels), dtype=np.int64),
        content=content.hexdigest()[:16],
    )


def _classes(split: Path) -> set[str]:
    if not split.is_dir():
        raise UserError(
            f"There is no folder {split}: dataset=folder needs dataset.root to hold train/<class>/ and test/<class>/ "
            "with images in them."
        )
    names = {path.name for path in split.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if not names:
        raise UserError(f"{split} holds no class folders: put the images of each class into a folder of its own there.")
    return names


def _images(split: Path, names: list[str], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, size, size, 3) uint8 and (M,) int64, by class and file name."""
    paths, labels = [], []
    for label, name in enumerate(names):
        files = sorted(path for path in (split / name).iterdir() if not path.name.startswith("."))
        if not files:
            raise UserError(f"{split / name} holds no images: fill it, or remove the class from train and test.")
        paths += files
        labels += [label] * len(files)
    images = np.empty((len(paths), size, size, 3), dtype=np.uint8)

    def decode(position: int) -> None:
        images[position] = _decode(paths[position], size)

    with ThreadPoolExecutor() as pool:  # threads suffice: Pillow decodes and resizes outside the interpreter lock
        for _ in pool.map(decode, range(len(paths))):
            pass
    return torch.from_numpy(images), torch.tensor(labels)


def _decode(path: Path, size: int) -> np.ndarray:
    """(size, size, 3) uint8."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode}, more than 8 bits a channel")  # Pillow would clip it to white
            return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC))
    except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise UserError(f"{path} cannot be read as an image ({error}): replace or remove it.") from None
