"""ILSVRC 2012: a tar of one tar per class for training, a flat tar for validation, and the devkit for labels.

Labels are the ranks of the WordNet ids (n01440764 is 0), as torchvision and almost everybody numbers them; the devkit
itself numbers the classes otherwise.
"""

import functools
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from cbl.data.prepare import archives
from cbl.data.prepare.images import Contents, Member
from cbl.errors import UserError

_META = "ILSVRC2012_devkit_t12/data/meta.mat"
_TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"


def read(folder: Path) -> Contents:
    """Class names and images of the archives in `folder`; how many images a class has is known only at their end.

    Names are the synset's words and its WordNet id, which tells the two cranes apart: "crane [n02012849]".
    Raises `UserError` for a devkit that is not the published one and for validation images that it does not label.
    """
    devkit = folder / "ILSVRC2012_devkit_t12.tar.gz"
    synsets, truth = _devkit(devkit)
    label = {wnid: rank for rank, wnid in enumerate(sorted(wnid for wnid, _ in synsets.values()))}
    by_id = {number: label[wnid] for number, (wnid, _) in synsets.items()}
    words = dict(synsets.values())
    if unknown := set(truth) - set(by_id):
        raise UserError(f"{devkit} labels validation images {min(unknown)}, which is none of its classes.")
    return Contents(
        class_names=[f"{words[wnid]} [{wnid}]" for wnid in label],
        images={},
        members=_members(folder, label, [by_id[number] for number in truth]),
    )


def _devkit(path: Path) -> tuple[dict[int, tuple[str, str]], list[int]]:
    """ILSVRC2012_ID → (WordNet id, words) of the classes, and the ILSVRC2012_ID of each validation image."""
    from scipy.io import loadmat  # comes with scikit-learn

    found = {}
    with archives.reading(path), archives.open_tar(path) as tar:
        for info in archives.files(tar):
            if info.name in (_META, _TRUTH):
                found[info.name] = archives.content(path, tar, info)
    if lacking := {_META, _TRUTH} - set(found):
        raise UserError(f"{path} holds no {min(lacking)}: it is not the published devkit.")
    synsets = loadmat(io.BytesIO(found[_META]), squeeze_me=True)["synsets"]
    # the file lists the inner nodes of the hierarchy too; classes are the leaves
    leaves = {
        int(synset["ILSVRC2012_ID"]): (str(synset["WNID"]), str(synset["words"]))
        for synset in synsets
        if int(synset["num_children"]) == 0
    }
    return leaves, [int(line) for line in found[_TRUTH].split()]


def _members(folder: Path, label: dict[str, int], truth: list[int]) -> Iterator[Member]:
    """Training images as train/<wnid>/<file>, validation images as val/<file>; names are taken only in this form."""
    train, val = folder / "ILSVRC2012_img_train.tar", folder / "ILSVRC2012_img_val.tar"
    with archives.reading(train), archives.open_tar(train) as outer:
        for info in archives.files(outer):
            wnid = info.name.removesuffix(".tar")
            if wnid not in label:
                continue
            with outer.extractfile(info) as handle, tarfile.open(fileobj=handle, mode="r:") as inner:  # type: ignore
                for member in archives.files(inner):
                    if re.fullmatch(rf"{wnid}_\d+\.JPEG", member.name):
                        name = archives.safe(f"train/{wnid}/{member.name}", train)
                        content = functools.partial(archives.content, train, inner, member)
                        yield Member("train", label[wnid], name, content)
    with archives.reading(val), archives.open_tar(val) as tar:
        for info in archives.files(tar):
            if found := re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", info.name):
                number = int(found[1])
                if not 1 <= number <= len(truth):
                    raise UserError(f"{val} holds {info.name}, but the devkit labels {len(truth):,} images.")
                content = functools.partial(archives.content, val, tar, info)
                yield Member("val", truth[number - 1], f"val/{info.name}", content)
