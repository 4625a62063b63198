"""iNaturalist 2017 and 2018: which image belongs to which split and class, from the competition's JSON files.

The archive holds training and validation images together, by supercategory and category; only the JSON files say
which is which. They are in the form of COCO: `images` (id, file_name), `annotations` (image_id, category_id) and
`categories` (id, name). Labels are the ranks of the category ids, which are 0, 1, 2, ... in the published files.
"""

import functools
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from cbl.data.prepare import archives
from cbl.data.prepare.images import Contents, Member
from cbl.errors import UserError

# Set → archive of all images, and for each split the archive of its annotations and the file in it.
_FILES = {
    "inaturalist2017": (
        "train_val_images.tar.gz",
        {"train": ("train_val2017.zip", "train2017.json"), "val": ("train_val2017.zip", "val2017.json")},
    ),
    "inaturalist2018": (
        "train_val2018.tar.gz",
        {"train": ("train2018.json.tar.gz", "train2018.json"), "val": ("val2018.json.tar.gz", "val2018.json")},
    ),
}
_CATEGORIES = ("categories.json.tar.gz", "categories.json")  # 2018: the species' names, hidden in the competition


def read(name: str, folder: Path) -> Contents:
    """Class names and images of the archives in `folder`; the annotations are read at once, the images as they come.

    Raises `UserError` for annotations that do not fit each other, for names that lead out of the image folder and,
    at the end of the images, for some that the archive does not hold.
    """
    tar, annotated = folder / _FILES[name][0], _FILES[name][1]
    annotations = {split: _json(folder / archive, file) for split, (archive, file) in annotated.items()}
    names = {category["id"]: category["name"] for category in annotations["train"]["categories"]}
    if {category["id"] for category in annotations["val"]["categories"]} != set(names):
        raise UserError(f"The training and validation annotations in {folder} list different categories.")
    label = {category: rank for rank, category in enumerate(sorted(names))}
    wanted: dict[str, tuple[str, int]] = {}  # path → split, label
    for split, found in annotations.items():
        for path, category in _rows(found, split, tar):
            if path in wanted:
                raise UserError(f"The annotations in {folder} list {path} twice.")
            wanted[path] = split, label[category]
    if name == "inaturalist2018" and (folder / _CATEGORIES[0]).is_file():
        names |= {category["id"]: category["name"] for category in _json(folder / _CATEGORIES[0], _CATEGORIES[1])}
    return Contents(
        class_names=[str(names[category]) for category in sorted(label)],
        images={split: len(found["images"]) for split, found in annotations.items()},
        members=_members(tar, wanted),
    )


def _json(path: Path, name: str) -> Any:
    """The JSON file `name` of an archive, in whatever folder it lies there."""
    with archives.reading(path):
        if path.suffix == ".zip":
            try:
                with zipfile.ZipFile(path) as zipped:
                    for member in zipped.namelist():
                        if PurePosixPath(member).name == name:
                            return json.loads(zipped.read(member))
            except zipfile.BadZipFile as error:
                raise OSError(str(error)) from None
        else:
            with archives.open_tar(path) as tar:
                for info in archives.files(tar):
                    if PurePosixPath(info.name).name == name:
                        return json.loads(archives.content(path, tar, info))
    raise UserError(f"{path} holds no {name}: it is not the published file.")


def _rows(annotations: Any, split: str, tar: Path) -> Iterator[tuple[str, int]]:
    """(path, category id) of every image."""
    category: dict[int, int] = {}
    for annotation in annotations["annotations"]:
        if category.setdefault(annotation["image_id"], annotation["category_id"]) != annotation["category_id"]:
            raise UserError(f"The {split} annotations give image {annotation['image_id']} two categories.")
    if len(category) != len(annotations["images"]):
        raise UserError(
            f"The {split} annotations label {len(category):,} images but list {len(annotations['images']):,}."
        )
    for image in annotations["images"]:
        if image["id"] not in category:
            raise UserError(f"The {split} annotations give image {image['id']} ({image['file_name']}) no category.")
        yield archives.safe(image["file_name"], tar), category[image["id"]]


def _members(path: Path, wanted: dict[str, tuple[str, int]]) -> Iterator[Member]:
    """Only files that the annotations name, each once: nothing else of the archive is read."""
    left = dict(wanted)
    with archives.reading(path), archives.open_tar(path) as tar:
        for info in archives.files(tar):
            if (found := left.pop(info.name.removeprefix("./"), None)) is not None:
                name = info.name.removeprefix("./")
                yield Member(*found, name, functools.partial(archives.content, path, tar, info))
    if left:
        raise UserError(
            f"{path} lacks {len(left):,} images that the annotations name, the first {min(left)}: they do not belong "
            "together."
        )
