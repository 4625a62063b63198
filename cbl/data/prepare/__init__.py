"""From the published archives of a large set to a prepared one (cbl/data/index.py says what that is).

    archives.py      are they there and whole; downloads what may be downloaded; reads them without trusting a path
    inaturalist.py   iNaturalist 2017 and 2018: image names and labels from the competition's JSON files
    imagenet.py      ILSVRC 2012: labels from the devkit
    images.py        writes the images, resized or as they are

Everything may be killed at any instant and started again: each image is written whole or not at all, images that are
there are not written again, and `prepared.json` comes last.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from cbl import disk
from cbl.data import index
from cbl.data.index import Index
from cbl.data.prepare import archives, imagenet, images, inaturalist
from cbl.data.prepare.archives import Archive
from cbl.errors import UserError


@dataclass(frozen=True)
class Published:
    """What is known of a set before its first byte is here (paper, Table 1)."""

    title: str
    archives: tuple[Archive, ...]
    images: dict[str, int]  # by split
    classes: int
    imbalance_factor: float  # of the training split, to two decimals
    terms: str  # what somebody agrees to who downloads it


_BUCKET = "https://ml-inat-competition-datasets.s3.amazonaws.com"  # AWS Open Data, no account needed
_INATURALIST_TERMS = "for non-commercial research and education only; the images may not be passed on"
_IMAGE_NET = "https://image-net.org/data/ILSVRC/2012"

PUBLISHED = {
    "inaturalist2017": Published(
        title="iNaturalist 2017",
        archives=(
            Archive(f"{_BUCKET}/2017/train_val_images.tar.gz", 186, "7c784ea5e424efaec655bd392f87301f"),
            Archive(f"{_BUCKET}/2017/train_val2017.zip", 0.026, None),  # no md5 is published
        ),
        images={"train": 579_184, "val": 95_986},
        classes=5_089,
        imbalance_factor=435.44,
        terms=_INATURALIST_TERMS,
    ),
    "inaturalist2018": Published(
        title="iNaturalist 2018",
        archives=(
            Archive(f"{_BUCKET}/2018/train_val2018.tar.gz", 120, "b1c6952ce38f31868cc50ea72d066cc3"),
            Archive(f"{_BUCKET}/2018/train2018.json.tar.gz", 0.026, "bfa29d89d629cbf04d826a720c0a68b0"),
            Archive(f"{_BUCKET}/2018/val2018.json.tar.gz", 0.026, "f2ed8bfe3e9901cdefceb4e53cd3775d"),
            # The competition hid the species' names; this file, published later, tells them.
            Archive(f"{_BUCKET}/2018/categories.json.tar.gz", 0.001, None, optional=True),
        ),
        images={"train": 437_513, "val": 24_426},
        classes=8_142,
        imbalance_factor=500.00,
        terms=_INATURALIST_TERMS,
    ),
    "imagenet": Published(
        title="ILSVRC 2012",
        archives=(
            Archive(f"{_IMAGE_NET}/ILSVRC2012_img_train.tar", 138, "1d675b47d978889d74fa0da5fadfb00e", account=True),
            Archive(f"{_IMAGE_NET}/ILSVRC2012_img_val.tar", 6.3, "29b22e2961454d5413ddabcf34fc5622", account=True),
            Archive(
                f"{_IMAGE_NET}/ILSVRC2012_devkit_t12.tar.gz", 0.0025, "fa75699e90414af021442c21a62c3abf", account=True
            ),
        ),
        images={"train": 1_281_167, "val": 50_000},
        classes=1_000,
        imbalance_factor=1.78,
        terms="for non-commercial research and education only; image-net.org gives access after registration",
    ),
}


def prepare(
    name: str,
    root: str | Path,
    *,
    archive_folder: str | Path | None = None,  # None: root / "archives"
    short_side: int | None = None,  # pixels that larger images are resized to; None: kept byte for byte
    download: bool = False,
    workers: int | None = None,  # threads; None: one per core
    published: Published | None = None,  # None: what `PUBLISHED` says
) -> dict[str, Index]:
    """Prepares the set `name` (one of `config.LARGE`) under `root / name` and returns its indices by split.

    Raises `UserError` for archives that are missing or not the published ones, for counts and an imbalance factor
    that are not those of the paper's Table 1, for an image that cannot be read, and when `root / name` was prepared
    differently before.
    """
    published = published or PUBLISHED[name]
    folder = Path(root) / name
    where = Path(root) / "archives" if archive_folder is None else Path(archive_folder)
    settings = {"short_side": short_side, "jpeg_quality": images.QUALITY if short_side else None}
    with disk.alone(folder, "root") as mine:
        if not mine:
            raise UserError(f"Another process is preparing {folder}: wait for it.")
        _check_settings(folder, settings)
        if index.prepared(folder) is None:
            archives.ensure(published.title, published.archives, where, download, published.terms)
            _make(name, folder, where, published, short_side, workers, settings)
        return {split: index.read(root, name, split) for split in index.SPLITS}


def _make(
    name: str,
    folder: Path,
    where: Path,
    published: Published,
    short_side: int | None,
    workers: int | None,
    settings: dict[str, int | None],
) -> None:
    found = imagenet.read(where) if name == "imagenet" else inaturalist.read(name, where)
    # iNaturalist's JSON files tell these before the first of many images is written
    _check_counts(published, found.images, len(found.class_names))
    disk.write(folder / "settings.json", json.dumps(settings) + "\n")
    rows = images.store(found.members, folder / "images", sum(published.images.values()), short_side, workers)
    _check_counts(published, {split: len(rows[split]) for split in index.SPLITS}, len(found.class_names))
    written = []
    for split in index.SPLITS:
        paths, labels = zip(*sorted(rows[split].items()), strict=True)
        written.append(index.write(folder, split, paths, labels, found.class_names))
    factor = written[0].imbalance_factor
    if round(factor, 2) != published.imbalance_factor:
        raise UserError(
            f"The training images of {published.title} have an imbalance factor of {factor:.2f}, not the published "
            f"{published.imbalance_factor:.2f}: the archives under {where} are not those of the paper."
        )
    index.complete(folder, written, imbalance_factor=round(factor, 2), **settings)


def _check_counts(published: Published, found: dict[str, int], classes: int) -> None:
    for what, has, should in [
        *((f"{split} images", found[split], published.images[split]) for split in found),
        ("classes", classes, published.classes),
    ]:
        if has != should:
            raise UserError(
                f"{published.title} has {should:,} {what}, but {has:,} were found: the archives are not the published "
                "ones."
            )


def _check_settings(folder: Path, settings: dict[str, int | None]) -> None:
    """One folder holds images of one size: what an earlier call began is gone on with, or refused."""
    path = folder / "settings.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): remove it and prepare the set again with the same size as before, or "
            f"remove {folder} if that is not known."
        ) from None
    if before != settings:
        was, asked = (
            f"resized to a short side of {s['short_side']}" if s["short_side"] else "not resized"
            for s in (before, settings)
        )
        raise UserError(f"The images under {folder} were {was}, now they are to be {asked}: choose another root.")


def describe(found: dict[str, Index]) -> str:
    """A few lines for people: images, classes, imbalance factor, hashes."""
    train = found["train"]
    lines = [f"{train.dataset} under {train.folder}: {len(train.class_names):,} classes"]
    lines += [f"  {split:5s} {len(part):>9,} images  hash {part.hash}" for split, part in found.items()]
    lines.append(
        f"  imbalance factor {train.imbalance_factor:.2f} = {train.counts.max():,} / {train.counts.min():,} images"
    )
    return "\n".join(lines)
