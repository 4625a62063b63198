"""Preparation of the large sets, on miniature archives in exactly the published formats."""

import contextlib
import dataclasses
import errno
import fcntl
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import runpy
import signal
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cbl import config, disk
from cbl.data import index, prepare, streaming
from cbl.data.prepare import archives, images
from cbl.errors import UserError

WNIDS = ("n01440764", "n02012849", "n03126707")  # a tench, and the two cranes
SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_data.py"


def jpeg(seed: int, width: int = 24, height: int = 18, mode: str = "RGB", form: str = "JPEG") -> bytes:
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, len(Image.new(mode, (1, 1)).getbands())))
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8).squeeze(), mode).save(out, form)
    return out.getvalue()


def tar_of(files: dict[str, bytes | tuple[bytes, str]], compressed: bool) -> bytes:
    """Of regular files; a value (type, target) is a link."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz" if compressed else "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


# What nobody may write: members that lead out of the folder, or that are links.
HOSTILE = {
    "../../escaped.jpg": b"x",
    "/tmp/cbl-escaped.jpg": b"x",
    "train_val2018/link.jpg": (tarfile.SYMTYPE, "/etc/passwd"),
    "train_val2018/hard.jpg": (tarfile.LNKTYPE, "../../escaped.jpg"),
    "train_val2018/not-listed.jpg": b"x",
}


def coco(rows: list[tuple[int, str, int]], categories: dict[int, str]) -> dict:
    """The competition's JSON for rows (image id, file name, category id); annotations in another order than images."""
    return {
        "info": {"year": 2018},
        "images": [{"id": i, "file_name": name, "width": 24, "height": 18} for i, name, _ in rows],
        "annotations": [{"id": i, "image_id": i, "category_id": c} for i, _, c in reversed(rows)],
        "categories": [{"id": i, "name": name, "supercategory": "Aves"} for i, name in categories.items()],
        "licenses": [],
    }


@dataclasses.dataclass
class Miniature:
    """Archives in a folder, what is known of them, and what must come out."""

    name: str
    folder: Path
    published: prepare.Published
    content: dict[str, bytes]  # path → bytes of the image
    labels: dict[str, dict[str, int]]  # split → path → label

    def write(self, name: str, content: bytes) -> None:
        (self.folder / name).write_bytes(content)
        known = tuple(
            dataclasses.replace(a, md5=hashlib.md5(content).hexdigest() if a.md5 else None) if a.name == name else a
            for a in self.published.archives
        )
        self.published = dataclasses.replace(self.published, archives=known)

    def prepare(self, root: Path, **options) -> dict[str, index.Index]:
        return prepare.prepare(self.name, root, archive_folder=self.folder, published=self.published, **options)


def miniature(folder: Path, name: str, per_class: tuple[int, ...] = (4, 2, 1), size: tuple[int, int] = (24, 18)):
    folder.mkdir(parents=True, exist_ok=True)
    if name == "imagenet":
        return _imagenet(folder, per_class, size)
    year = name[-4:]
    top = "train_val2018" if year == "2018" else "train_val_images"
    # 2018: 0, 1, 2, ...; 2017: something else, in no order, to see that ranks are taken
    ids = [2, 0, 1] if year == "2018" else [30, 4, 17]
    categories = {i: f"species {i}" for i in ids}
    rank = {i: sorted(ids).index(i) for i in ids}
    content, labels, rows = {}, {"train": {}, "val": {}}, {"train": [], "val": []}
    number = 0
    for category, n in zip(ids, per_class, strict=True):
        for split in ["train"] * n + ["val"]:
            number += 1
            path = f"{top}/Aves/{category}/{hashlib.md5(str(number).encode()).hexdigest()}.jpg"
            content[path] = jpeg(number, *size)
            labels[split][path] = rank[category]
            rows[split].append(((number * 37) % 10007, path, category))
    made = Miniature(
        name,
        folder,
        dataclasses.replace(
            prepare.PUBLISHED[name],
            images={split: len(found) for split, found in labels.items()},
            classes=len(ids),
            imbalance_factor=round(max(per_class) / min(per_class), 2),
        ),
        content,
        labels,
    )
    shuffled = {path: content[path] for path in sorted(content)}
    if year == "2018":
        made.write("train_val2018.tar.gz", tar_of({**HOSTILE, **shuffled}, compressed=True))
        for split in rows:
            text = json.dumps(coco(rows[split], categories)).encode()
            made.write(f"{split}2018.json.tar.gz", tar_of({f"{split}2018.json": text}, compressed=True))
    else:
        made.write("train_val_images.tar.gz", tar_of({f"./{k}": v for k, v in shuffled.items()}, compressed=True))
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as zipped:
            for split in rows:
                zipped.writestr(f"train_val2017/{split}2017.json", json.dumps(coco(rows[split], categories)))
        made.write("train_val2017.zip", out.getvalue())
    return made


def devkit(truth: list[int]) -> bytes:
    """meta.mat as the published one: a struct array, inner nodes after the leaves, ids not in WordNet's order."""
    from scipy.io import savemat

    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    rows = [
        (1, "n03126707", "crane", "lifts", 0, [], 0),
        (2, "n01440764", "tench, Tinca tinca", "swims", 0, [], 0),
        (3, "n02012849", "crane", "flies", 0, [], 0),
        (4, "n00001740", "entity", "is", 3, [1, 2, 3], 1),
    ]
    synsets = np.empty((len(rows), 1), dtype=[(field, object) for field in fields])
    for i, row in enumerate(rows):
        for field, value in zip(fields, row, strict=True):
            synsets[field][i, 0] = np.array(value, dtype=float) if isinstance(value, list) else value
    mat = io.BytesIO()
    savemat(mat, {"synsets": synsets})
    data = "ILSVRC2012_devkit_t12/data"
    text = "".join(f"{number}\n" for number in truth).encode()
    files = {f"{data}/ILSVRC2012_validation_ground_truth.txt": text, f"{data}/meta.mat": mat.getvalue()}
    return tar_of({"ILSVRC2012_devkit_t12/readme.txt": b"-", **files}, compressed=True)


def _imagenet(folder: Path, per_class: tuple[int, ...], size: tuple[int, int]) -> Miniature:
    content, labels, inner = {}, {"train": {}, "val": {}}, {}
    for label, (wnid, n) in enumerate(zip(WNIDS, per_class, strict=True)):
        files = {f"{wnid}_{10 * i + 7}.JPEG": jpeg(100 * label + i, *size) for i in range(n)}
        if label == 0:  # as in the published set: one PNG and some CMYK among them
            files[f"{wnid}_7.JPEG"] = jpeg(900, *size, form="PNG")
            files[f"{wnid}_17.JPEG"] = jpeg(901, *size, mode="CMYK")
        inner[f"{wnid}.tar"] = tar_of({"../escaped.JPEG": b"x", **files}, compressed=False)
        content |= {f"train/{wnid}/{name}": value for name, value in files.items()}
        labels["train"] |= {f"train/{wnid}/{name}": label for name in files}
    truth = [3, 1, 2, 3]  # crane (bird), crane (machine), tench, crane (bird)
    validation = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(500 + i, *size) for i in range(1, 5)}
    for name, label in zip(validation, (1, 2, 0, 1), strict=True):
        content[f"val/{name}"], labels["val"][f"val/{name}"] = validation[name], label
    factor = round(max(per_class) / min(per_class), 2)
    known = dataclasses.replace(
        prepare.PUBLISHED["imagenet"],
        images={"train": sum(per_class), "val": 4},
        classes=3,
        imbalance_factor=factor,
    )
    made = Miniature("imagenet", folder, known, content, labels)
    made.write("ILSVRC2012_img_train.tar", tar_of({"n99999999.tar": b"", **inner}, compressed=False))
    made.write("ILSVRC2012_img_val.tar", tar_of({"readme": b"x", **validation}, compressed=False))
    made.write("ILSVRC2012_devkit_t12.tar.gz", devkit(truth))
    return made


def tree(folder: Path) -> dict[str, bytes]:
    """Every file, without the lock."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("name", config.LARGE)
def test_images_labels_and_counts_are_those_of_the_archives(tmp_path, name):
    mini = miniature(tmp_path / "archives", name)
    found = mini.prepare(tmp_path / "data")
    folder = tmp_path / "data" / name
    for split in index.SPLITS:
        assert dict(zip(found[split].paths, found[split].labels.tolist(), strict=True)) == mini.labels[split]
    written = {str(p.relative_to(folder / "images")) for p in (folder / "images").rglob("*") if not p.is_dir()}
    assert written == set(mini.content)
    for path, content in mini.content.items():
        assert (folder / "images" / path).read_bytes() == content
    counts = np.bincount(list(mini.labels["train"].values()))
    assert [int(line) for line in (folder / "train_counts.txt").read_text().split()] == counts.tolist()
    assert found["train"].counts.tolist() == counts.tolist()
    facts = json.loads((folder / "prepared.json").read_text())
    assert facts["images"] == {split: len(rows) for split, rows in mini.labels.items()}
    assert facts["imbalance_factor"] == 4.0 and facts["short_side"] is None
    assert "imbalance factor 4.00 = 4 / 1 images" in prepare.describe(found)


def test_nothing_is_written_outside_and_no_link_is_made(tmp_path):
    mini = miniature(tmp_path / "deep" / "archives", "inaturalist2018")
    mini.prepare(tmp_path / "deep" / "data")
    assert not list(tmp_path.rglob("escaped*")) and not Path("/tmp/cbl-escaped.jpg").exists()
    assert not [p for p in tmp_path.rglob("*") if p.is_symlink() or p.name in ("link.jpg", "hard.jpg")]


def test_class_names(tmp_path):
    inat2017 = miniature(tmp_path / "a7", "inaturalist2017").prepare(tmp_path / "data")
    assert inat2017["train"].class_names == ("species 4", "species 17", "species 30")
    imagenet = miniature(tmp_path / "ai", "imagenet").prepare(tmp_path / "data")
    assert imagenet["val"].class_names == (
        "tench, Tinca tinca [n01440764]",
        "crane [n02012849]",
        "crane [n03126707]",
    )
    mini = miniature(tmp_path / "a8", "inaturalist2018")
    text = json.dumps(
        [{"id": 1, "name": "Grus grus"}, {"id": 0, "name": "Tinca tinca"}, {"id": 2, "name": "Felis, sp."}]
    )
    mini.write("categories.json.tar.gz", tar_of({"categories.json": text.encode()}, compressed=True))
    assert mini.prepare(tmp_path / "data")["train"].class_names == ("Tinca tinca", "Grus grus", "Felis, sp.")


@pytest.mark.parametrize("name", ["inaturalist2017", "imagenet"])
def test_resizing(tmp_path, name):
    mini = miniature(tmp_path / "archives", name, size=(48, 30))
    found = mini.prepare(tmp_path / "data", short_side=20)
    for split in found.values():
        for path in split.paths:
            with Image.open(split.images / path) as image:
                assert (image.size, image.mode, image.format) == ((32, 20), "RGB", "JPEG")
    same = mini.prepare(tmp_path / "smaller", short_side=30)  # none is larger
    assert all((same["val"].images / path).read_bytes() == mini.content[path] for path in same["val"].paths)
    assert same["train"].hash == found["train"].hash  # of the rows, not of the pixels


def test_a_resized_image_looks_like_the_original():
    y, x = np.mgrid[:300, :400]
    pixels = np.stack([x * 255 / 400, y * 255 / 300, 127 + 100 * np.sin(x / 9)], -1).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(
        out, "JPEG", quality=97, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    )
    with Image.open(io.BytesIO(out.getvalue())) as image:
        assert image.getexif()[0x0112] == 6  # "rotate me": nobody in this field does
        whole = np.asarray(image.resize((133, 100), Image.Resampling.BICUBIC)).astype(float)
    with Image.open(io.BytesIO(images.resized(out.getvalue(), 100))) as small:
        assert small.size == (133, 100)
        assert np.abs(np.asarray(small).astype(float) - whole).mean() < 2  # of 255


def test_a_run_killed_at_any_rename_goes_on_to_the_same_files(tmp_path):
    mini = miniature(tmp_path / "archives", "inaturalist2018", per_class=(2, 1, 1), size=(48, 30))
    mini.prepare(tmp_path / "whole", short_side=20, workers=1)
    whole = tree(tmp_path / "whole")
    for moment in range(100):
        root = tmp_path / str(moment)
        pid = os.fork()
        if pid == 0:
            try:
                _die_at(moment)
                mini.prepare(root, short_side=20, workers=1)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        if not (root / "inaturalist2018" / "prepared.json").exists():
            with pytest.raises(UserError, match="is not prepared"):
                index.read(root, "inaturalist2018", "train")
        mini.prepare(root, short_side=20, workers=1)
        assert tree(root) == whole
    # before and after each of: settings, 7 images, 2 indices, twice the names, counts, marker
    assert moment == 2 * (1 + 7 + 2 + 2 + 1 + 1)


def _die_at(moment: int) -> None:
    """Just before (0, 2, ...) or just after (1, 3, ...) a rename."""
    rename, seen = os.replace, []

    def replace(source, target):
        if len(seen) == moment // 2 and moment % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)
        if len(seen) == moment // 2:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(target)

    os.replace = replace


def test_images_that_are_there_are_not_written_again_but_empty_ones_are(tmp_path):
    mini = miniature(tmp_path / "archives", "imagenet")
    found = mini.prepare(tmp_path / "data")
    folder = tmp_path / "data" / "imagenet"
    (folder / "prepared.json").unlink()
    kept, empty = (found["train"].images / path for path in found["train"].paths[:2])
    kept.write_bytes(b"kept")
    empty.write_bytes(b"")
    mini.prepare(tmp_path / "data")
    assert kept.read_bytes() == b"kept"
    assert empty.read_bytes() == mini.content[found["train"].paths[1]]


def test_the_advice_for_a_damaged_image_brings_it_back(tmp_path):
    mini = miniature(tmp_path / "archives", "inaturalist2018", size=(48, 30))
    found = mini.prepare(tmp_path / "data", short_side=20)["train"]
    path = found.images / found.paths[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:99])
    loader = streaming.Loader(found, 16, workers=0, device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"or set dataset\.on_damaged=skip\.$") as caught:
        list(loader.evaluation(4))
    advice = re.search(r"remove it and (\S+) and prepare the set again", str(caught.value))
    path.unlink()
    Path(advice[1]).unlink()
    mini.prepare(tmp_path / "data", short_side=20)
    assert path.read_bytes() == whole
    assert sum(len(labels) for _, labels in loader.evaluation(4)) == len(found)


def test_a_prepared_set_needs_its_archives_no_more(tmp_path):
    mini = miniature(tmp_path / "archives", "inaturalist2017")
    first = mini.prepare(tmp_path / "data")
    for path in mini.folder.iterdir():
        path.unlink()
    again = mini.prepare(tmp_path / "data")
    assert {split: part.hash for split, part in again.items()} == {split: part.hash for split, part in first.items()}


def test_another_size_under_the_same_root_is_refused(tmp_path):
    mini = miniature(tmp_path / "archives", "inaturalist2018")
    mini.prepare(tmp_path / "data")
    with pytest.raises(
        UserError, match="were not resized, now they are to be resized to a short side of 12: choose an"
    ):
        mini.prepare(tmp_path / "data", short_side=12)


def test_a_size_is_settled_by_the_first_image_and_not_before(tmp_path):
    mini = miniature(tmp_path / "archives", "inaturalist2018")
    with pytest.raises(UserError, match="cannot be prepared without"):
        prepare.prepare(mini.name, tmp_path / "data", published=mini.published)
    mini.prepare(tmp_path / "data", short_side=12)


@pytest.mark.parametrize("content", [b"", b"\xff"])
def test_settings_that_cannot_be_read_are_one_sentence(tmp_path, content):
    mini = miniature(tmp_path / "archives", "inaturalist2018")
    mini.prepare(tmp_path / "data", short_side=12)
    path = tmp_path / "data" / "inaturalist2018" / "settings.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path} cannot be read .*: remove it and prepare the set again") as caught:
        mini.prepare(tmp_path / "data", short_side=12)
    assert "\n" not in str(caught.value)
    path.unlink()
    mini.prepare(tmp_path / "data", short_side=12)


@pytest.mark.parametrize("name", ["settings.json", "images/", "train.csv.gz", "prepared.json"])
def test_a_full_disk_is_one_sentence_and_the_same_call_goes_on(tmp_path, monkeypatch, name):
    mini = miniature(tmp_path / "archives", "inaturalist2018")
    folder, replace = tmp_path / "data" / "inaturalist2018", os.replace

    def full(source, target):
        if str(target).startswith(str(folder / name)):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(
            UserError, match=rf"^{folder}.* cannot be written to \(No space left on device\): make room"
        ):
            mini.prepare(tmp_path / "data")
    assert not list(folder.glob("*.tmp")) and not (folder / "prepared.json").exists()
    mini.prepare(tmp_path / "data")


def test_two_at_once_are_refused(tmp_path):
    mini = miniature(tmp_path / "archives", "inaturalist2018")
    (tmp_path / "data" / "inaturalist2018").mkdir(parents=True)
    with open(tmp_path / "data" / "inaturalist2018" / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another process is preparing"):
            mini.prepare(tmp_path / "data")
    mini.prepare(tmp_path / "data")


def test_an_archive_with_another_md5_is_refused_before_anything_is_written(tmp_path):
    mini = miniature(tmp_path / "archives", "inaturalist2018")
    path = mini.folder / "train_val2018.tar.gz"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(
        UserError, match=r"train_val2018.tar.gz is not the published file: its md5 is [0-9a-f]{32}, not"
    ):
        mini.prepare(tmp_path / "data")
    assert not (tmp_path / "data" / "inaturalist2018" / "images").exists()


def test_a_checksum_is_computed_once_for_an_unchanged_file(tmp_path, monkeypatch):
    mini = miniature(tmp_path / "archives", "inaturalist2018")
    mini.prepare(tmp_path / "data")

    def forbidden():
        raise AssertionError("computed again")

    monkeypatch.setattr(disk, "md5", forbidden)
    mini.prepare(tmp_path / "elsewhere")
    os.utime(mini.folder / "train_val2018.tar.gz", (1, 1))
    with pytest.raises(AssertionError, match="computed again"):
        mini.prepare(tmp_path / "third")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": {"train": 8, "val": 3}}, "iNaturalist 2018 has 8 train images, but 7 were found"),
        ({"images": {"train": 7, "val": 4}}, "has 4 val images, but 3 were found"),
        ({"classes": 8142}, "has 8,142 classes, but 3 were found"),
        ({"imbalance_factor": 500.0}, "an imbalance factor of 4.00, not the published 500.00"),
    ],
)
def test_other_counts_than_the_published_are_refused(tmp_path, change, message):
    mini = miniature(tmp_path / "archives", "inaturalist2018")
    mini.published = dataclasses.replace(mini.published, **change)
    with pytest.raises(UserError, match=message):
        mini.prepare(tmp_path / "data")
    assert index.prepared(tmp_path / "data" / "inaturalist2018") is None


def test_other_counts_than_the_published_are_refused_for_imagenet(tmp_path):
    mini = miniature(tmp_path / "archives", "imagenet")
    mini.published = dataclasses.replace(mini.published, images={"train": 8, "val": 4})
    with pytest.raises(UserError, match="ILSVRC 2012 has 8 train images, but 7 were found"):
        mini.prepare(tmp_path / "data")


def test_what_is_known_of_the_sets():
    """Table 1 of the paper, and the checksums that their publishers give."""
    known = prepare.PUBLISHED
    assert set(known) == set(config.LARGE)
    facts = {n: (p.images["train"], p.images["val"], p.classes, p.imbalance_factor) for n, p in known.items()}
    assert facts == {
        "inaturalist2017": (579_184, 95_986, 5_089, 435.44),
        "inaturalist2018": (437_513, 24_426, 8_142, 500.00),
        "imagenet": (1_281_167, 50_000, 1_000, 1.78),
    }
    assert {a.name: a.md5 for p in known.values() for a in p.archives if a.md5} == {
        "train_val_images.tar.gz": "7c784ea5e424efaec655bd392f87301f",
        "train_val2018.tar.gz": "b1c6952ce38f31868cc50ea72d066cc3",
        "train2018.json.tar.gz": "bfa29d89d629cbf04d826a720c0a68b0",
        "val2018.json.tar.gz": "f2ed8bfe3e9901cdefceb4e53cd3775d",
        "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
        "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
        "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
    }


def test_the_published_imbalance_factor_of_inaturalist_2018_passes(tmp_path):
    mini = miniature(tmp_path / "archives", "inaturalist2018", per_class=(1000, 30, 2), size=(2, 2))
    mini.published = dataclasses.replace(mini.published, imbalance_factor=prepare.PUBLISHED[mini.name].imbalance_factor)
    assert "imbalance factor 500.00 = 1,000 / 2 images" in prepare.describe(mini.prepare(tmp_path / "data"))


@pytest.mark.parametrize("counts, factor", [([3919, 700, 9], 435.44), ([2, 40, 1000], 500.0), ([1300, 732], 1.78)])
def test_imbalance_factors_of_table_1(tmp_path, counts, factor):
    labels = np.repeat(np.arange(len(counts)), counts)
    made = index.write(tmp_path, "train", [f"{i}.jpg" for i in range(len(labels))], labels, [str(c) for c in counts])
    assert round(made.imbalance_factor, 2) == factor


# What is missing


@pytest.mark.parametrize("name", config.LARGE)
def test_missing_archives_are_listed_with_size_and_address(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(archives, "_fetch", lambda *_: pytest.fail("downloads without being asked"))
    with pytest.raises(UserError, match="cannot be prepared without") as caught:
        prepare.prepare(name, tmp_path)
    assert str(tmp_path / "archives") in str(caught.value) and "\n" not in str(caught.value)
    listed = capsys.readouterr().err
    for archive in prepare.PUBLISHED[name].archives:
        assert f"{archive.gigabytes:g} GB  {archive.url}" in listed
        assert archive.optional or archive.name in str(caught.value)
    assert "non-commercial" in listed


def test_imagenet_is_never_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_fetch", lambda *_: pytest.fail("needs an account"))
    with pytest.raises(UserError, match=r"register at https://image-net.org"):
        prepare.prepare("imagenet", tmp_path, download=True)


@contextlib.contextmanager
def server(files: dict[str, bytes], cut: int = 0, ranges: bool = True, busy: tuple[int, ...] = (), delay: float = 0):
    """Serves `files`; closes each connection after `cut` bytes of content. Yields its address and what was asked.

    The first requests are answered with the errors `busy`, each file after `delay` seconds.
    """
    asked, errors = [], list(busy)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = files.get(self.path.lstrip("/"))
            asked.append((self.path, self.headers.get("Range")))
            if errors:
                self.send_error(errors.pop(0))
                return
            if content is None:
                self.send_error(404)
                return
            start = 0
            if ranges and (wanted := self.headers.get("Range")):
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            time.sleep(delay)
            self.wfile.write(content[start : start + cut] if cut else content[start:])

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", asked
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(archives.time, "sleep", lambda _: None)


def served(mini: Miniature, address: str) -> prepare.Published:
    known = tuple(dataclasses.replace(a, url=f"{address}/{a.name}") for a in mini.published.archives)
    return dataclasses.replace(mini.published, archives=known)


@pytest.mark.parametrize("ranges", [True, False])
def test_download_goes_on_after_every_cut(tmp_path, at_once, ranges):
    mini = miniature(tmp_path / "source", "inaturalist2017")
    files = {path.name: path.read_bytes() for path in mini.folder.iterdir()}
    size = len(files["train_val_images.tar.gz"])
    (tmp_path / "data" / "archives").mkdir(parents=True)
    begun = tmp_path / "data" / "archives" / "train_val_images.tar.gz.part"  # an earlier process got as far as this
    begun.write_bytes(files["train_val_images.tar.gz"][:100] if ranges else b"x" * 100)
    with server(files, cut=size // 3 if ranges else 0, ranges=ranges) as (address, asked):
        found = prepare.prepare("inaturalist2017", tmp_path / "data", download=True, published=served(mini, address))
    assert dict(zip(found["train"].paths, found["train"].labels.tolist(), strict=True)) == mini.labels["train"]
    assert ("/train_val_images.tar.gz", "bytes=100-") in asked
    assert not begun.exists()
    if ranges:  # no byte twice
        starts = [int(r[6:-1]) for path, r in asked if path == "/train_val_images.tar.gz"]
        assert starts == [100 + i * (size // 3) for i in range(len(starts))]


def test_a_whole_part_file_is_taken_and_a_longer_one_is_not(tmp_path, at_once):
    mini = miniature(tmp_path / "source", "inaturalist2017")
    files = {path.name: path.read_bytes() for path in mini.folder.iterdir()}
    (tmp_path / "data" / "archives").mkdir(parents=True)
    for name, more in (("train_val_images.tar.gz", b""), ("train_val2017.zip", b"more")):
        (tmp_path / "data" / "archives" / f"{name}.part").write_bytes(files[name] + more)
    with server(files) as (address, _):
        prepare.prepare("inaturalist2017", tmp_path / "data", download=True, published=served(mini, address))
    for name, content in files.items():
        assert (tmp_path / "data" / "archives" / name).read_bytes() == content


def test_download_that_fails_is_one_sentence(tmp_path, at_once):
    mini = miniature(tmp_path / "source", "inaturalist2017")
    with (
        server({}) as (address, _),
        pytest.raises(UserError, match="answered 404 Not Found: download it by other means"),
    ):
        prepare.prepare("inaturalist2017", tmp_path / "data", download=True, published=served(mini, address))
    nobody = served(mini, "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"could not be downloaded .*run the same command again, it goes on after"):
        prepare.prepare("inaturalist2017", tmp_path / "data", download=True, published=nobody)
    with server({}, busy=(503,) * 5) as (address, asked):
        with pytest.raises(UserError, match=r"could not be downloaded \(it answered 503 Service Unavailable\): check"):
            prepare.prepare("inaturalist2017", tmp_path / "data", download=True, published=served(mini, address))
        assert len(asked) == 5


def test_a_server_that_is_busy_for_a_while_is_asked_again(tmp_path, at_once, capsys):
    mini = miniature(tmp_path / "source", "inaturalist2017")
    files = {path.name: path.read_bytes() for path in mini.folder.iterdir()}
    with server(files, busy=(429, 500, 503)) as (address, _):
        prepare.prepare("inaturalist2017", tmp_path / "data", download=True, published=served(mini, address))
    assert "train_val_images.tar.gz: it answered 429 Too Many Requests; trying again." in capsys.readouterr().err


def test_an_optional_archive_that_cannot_be_had_is_done_without(tmp_path, at_once, capsys):
    mini = miniature(tmp_path / "source", "inaturalist2018")
    files = {path.name: path.read_bytes() for path in mini.folder.iterdir()}
    with server(files) as (address, asked):
        found = prepare.prepare("inaturalist2018", tmp_path / "data", download=True, published=served(mini, address))
    assert ("/categories.json.tar.gz", None) in asked
    assert found["train"].class_names == ("species 0", "species 1", "species 2")
    said = [line for line in capsys.readouterr().err.splitlines() if "categories.json.tar.gz" in line]
    assert len(said) == 1 and "404" in said[0] and said[0].endswith("is optional: going on without it.")


def test_two_roots_that_share_their_archives_download_them_once(tmp_path, capsys):
    mini = miniature(tmp_path / "source", "inaturalist2017")
    files = {path.name: path.read_bytes() for path in mini.folder.iterdir()}
    shared = tmp_path / "shared"
    shared.mkdir()
    for name, content in files.items():
        (shared / f"{name}.part").write_bytes(content[:100])
    errors = []

    def work(root: Path) -> None:
        try:
            prepare.prepare(mini.name, root, archive_folder=shared, download=True, published=published)
        except Exception as error:
            errors.append(error)

    with server(files, delay=0.3) as (address, asked):
        published = served(mini, address)
        # flock tells two openings of a file apart, so threads exclude each other as processes do
        threads = [threading.Thread(target=work, args=(tmp_path / name,)) for name in ("one", "two")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors and sorted(asked) == sorted((f"/{name}", "bytes=100-") for name in files)
    assert {name: (shared / name).read_bytes() for name in files} == files
    assert capsys.readouterr().err.count("Waiting for another process that is downloading the same files.\n") >= 1


def test_archives_that_cannot_be_put_anywhere_are_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file cannot be written to .*: choose another folder"):
        prepare.prepare("inaturalist2017", tmp_path / "data", archive_folder=tmp_path / "file", download=True)


# What is wrong with the archives


def replace_json(mini: Miniature, split: str, change) -> None:
    """Rewrites the annotations of `split` by the function `change`."""
    path = mini.folder / f"{split}2018.json.tar.gz"
    with tarfile.open(path) as tar:
        found = json.load(tar.extractfile(f"{split}2018.json"))
    change(found)
    mini.write(path.name, tar_of({f"{split}2018.json": json.dumps(found).encode()}, compressed=True))


def drop_annotation(found):
    found["annotations"].pop()


def other_image(found):
    found["annotations"][0]["image_id"] = 5000


def two_categories(found):
    found["annotations"].append(dict(found["annotations"][0], category_id=found["annotations"][0]["category_id"] ^ 1))


def listed_twice(found):
    found["images"][0]["file_name"] = found["images"][1]["file_name"]


def other_categories(found):
    found["categories"].pop()


def not_in_the_tar(found):
    found["images"][0]["file_name"] = "train_val2018/Aves/0/nowhere.jpg"


@pytest.mark.parametrize(
    "change, message",
    [
        (drop_annotation, "The train annotations label 6 images but list 7"),
        (other_image, "give image [0-9]+ .* no category"),
        (two_categories, "give image [0-9]+ two categories"),
        (listed_twice, "list train_val2018/Aves/2/[0-9a-f]+.jpg twice"),
        (other_categories, "list different categories"),
        (not_in_the_tar, "lacks 1 images that the annotations name, the first train_val2018/Aves/0/nowhere.jpg"),
    ],
)
def test_annotations_that_do_not_fit_are_refused(tmp_path, change, message):
    mini = miniature(tmp_path / "archives", "inaturalist2018")
    replace_json(mini, "train", change)
    with pytest.raises(UserError, match=message) as caught:
        mini.prepare(tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert index.prepared(tmp_path / "data" / "inaturalist2018") is None


@pytest.mark.parametrize("name", ["../x.jpg", "/x.jpg", "a/../../x.jpg", "a\\..\\x.jpg", "C:x.jpg", "", ".", "a\0b"])
def test_annotations_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    mini = miniature(tmp_path / "archives", "inaturalist2018")
    replace_json(mini, "val", lambda found: found["images"][0].update(file_name=name))
    with pytest.raises(UserError, match="which could lie outside its folder"):
        mini.prepare(tmp_path / "data")


@given(st.text(alphabet="ab./\\:\0\n~", max_size=12))
def test_a_safe_name_stays_inside(name):
    folder = Path("/some/folder")
    try:
        path = archives.safe(name, Path("x.tar"))
    except UserError:
        return
    inside = Path(os.path.normpath(folder / path))
    assert folder in inside.parents


def test_a_devkit_that_names_paths_is_refused(tmp_path):
    mini = miniature(tmp_path / "archives", "imagenet")
    hostile = {"../../n1.tar": tar_of({"../../n1_1.JPEG": jpeg(0)}, compressed=False)}
    mini.write("ILSVRC2012_img_train.tar", tar_of(hostile, compressed=False))
    contents = prepare.imagenet._members(mini.folder, {"../../n1": 0}, [])
    with pytest.raises(UserError, match="which could lie outside its folder"):
        next(contents)


def test_validation_images_without_a_label_are_refused(tmp_path):
    mini = miniature(tmp_path / "archives", "imagenet")
    mini.write("ILSVRC2012_devkit_t12.tar.gz", devkit([3, 1]))
    with pytest.raises(UserError, match=r"holds ILSVRC2012_val_00000003.JPEG, but the devkit labels 2 images"):
        mini.prepare(tmp_path / "data")
    mini.write("ILSVRC2012_devkit_t12.tar.gz", devkit([3, 1, 4, 2]))
    with pytest.raises(UserError, match="labels validation images 4, which is none of its classes"):
        mini.prepare(tmp_path / "data")


@pytest.mark.parametrize(
    "name, archive",
    [
        ("inaturalist2018", "train_val2018.tar.gz"),
        ("inaturalist2018", "val2018.json.tar.gz"),
        ("inaturalist2017", "train_val2017.zip"),
        ("imagenet", "ILSVRC2012_img_train.tar"),
        ("imagenet", "ILSVRC2012_img_val.tar"),
        ("imagenet", "ILSVRC2012_devkit_t12.tar.gz"),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_an_archive_that_is_cut_off_is_refused(tmp_path, name, archive, share):
    mini = miniature(tmp_path / "archives", name)
    content = (mini.folder / archive).read_bytes()
    mini.write(archive, content[: int(share * len(content))])  # with the md5 of what is there
    with pytest.raises(UserError, match=f"{archive} .*(cannot be read to its end|holds no)|but [0-9] were found"):
        mini.prepare(tmp_path / "data")
    assert index.prepared(tmp_path / "data" / name) is None


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    mini = miniature(tmp_path / "archives", "imagenet", size=(48, 30))
    broken = jpeg(1, 48, 30)[:-200]
    files = {f"ILSVRC2012_val_{i:08d}.JPEG": broken if i == 3 else jpeg(i, 48, 30) for i in range(1, 5)}
    mini.write("ILSVRC2012_img_val.tar", tar_of(files, compressed=False))
    with pytest.raises(UserError, match=r"ILSVRC2012_val_00000003.JPEG cannot be read as an image .*truncated"):
        mini.prepare(tmp_path / "data", short_side=20)


# The index


def test_index_comes_back_as_it_was_written(tmp_path):
    paths = ['a,b/"c".jpg', "ünïcode/2.jpg", "x/3 4.jpg"]
    folder = tmp_path / "imagenet"
    made = {split: index.write(folder, split, paths, [1, 0, 1], ["a, b", "c\u2028d", "e"]) for split in index.SPLITS}
    index.complete(folder, list(made.values()), short_side=None)
    for split in index.SPLITS:
        found = index.read(tmp_path, "imagenet", split)
        for field in dataclasses.fields(index.Index):
            assert np.array_equal(getattr(found, field.name), getattr(made[split], field.name)), field.name
    assert (len(found), found.counts.tolist(), found.imbalance_factor) == (3, [1, 2, 0], float("inf"))
    assert found.images == folder / "images"


def test_index_hash_tells_images_and_labels_apart(tmp_path):
    rows = (["a.jpg", "b.jpg"], [0, 1]), (["a.jpg", "b.jpg"], [1, 0]), (["a.jpg", "c.jpg"], [0, 1])
    hashes = [index.write(tmp_path, "train", *row, ["x", "y"]).hash for row in rows]
    assert len(set(hashes)) == 3 and all(len(h) == 16 for h in hashes)
    first = (tmp_path / "train.csv.gz").read_bytes()
    assert gzip.decompress(first) == b"path,label\na.jpg,0\nc.jpg,1\n"
    index.write(tmp_path, "train", *rows[2], ["x", "y"])
    assert (tmp_path / "train.csv.gz").read_bytes() == first
    with pytest.raises(ValueError, match="labels from 0 to 2, but 2 class names"):
        index.write(tmp_path, "train", ["a", "b"], [0, 2], ["x", "y"])


def test_index_that_is_not_there_or_damaged_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"inaturalist2018 is not prepared under .*make data DATASET=inaturalist2018"):
        index.read(tmp_path, "inaturalist2018", "train")
    mini = miniature(tmp_path / "archives", "inaturalist2018")
    mini.prepare(tmp_path)
    path = tmp_path / "inaturalist2018" / "train.csv.gz"
    good = path.read_bytes()
    path.write_bytes(good[:-20])
    with pytest.raises(UserError, match=r"cannot be read .*prepare the set again"):
        index.read(tmp_path, "inaturalist2018", "train")
    path.write_bytes(good[:14] + bytes(byte ^ 255 for byte in good[14:40]) + good[40:])  # which zlib refuses
    with pytest.raises(UserError, match=r"cannot be read .*prepare the set again"):
        index.read(tmp_path, "inaturalist2018", "train")
    path.write_bytes(gzip.compress(gzip.decompress(good).replace(b",0\n", b",1\n")))
    with pytest.raises(UserError, match="has changed since it was prepared"):
        index.read(tmp_path, "inaturalist2018", "train")
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        index.read(tmp_path, "inaturalist2018", "train")


# The script


def run_script(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as leave:
        return leave.code or 0
    return 0


def test_script_prepares(tmp_path, monkeypatch, capsys):
    mini = miniature(tmp_path / "data" / "archives", "inaturalist2018", size=(48, 30))
    monkeypatch.setitem(prepare.PUBLISHED, "inaturalist2018", mini.published)
    root = str(tmp_path / "data")
    assert run_script(monkeypatch, "inaturalist2018", "--root", root, "--resize", "20", "--workers", "2") == 0
    printed = capsys.readouterr().out
    found = index.read(root, "inaturalist2018", "train")
    assert f"train         7 images  hash {found.hash}" in printed and "imbalance factor 4.00" in printed
    with Image.open(found.images / found.paths[0]) as image:
        assert image.size == (32, 20)


def test_script_says_what_is_wrong_in_one_sentence(tmp_path, monkeypatch, capsys):
    assert run_script(monkeypatch, "imagenet", "--root", str(tmp_path)) == 2
    assert "cannot be prepared without ILSVRC2012_img_train.tar" in capsys.readouterr().err.splitlines()[-1]
    assert run_script(monkeypatch, "imagenet", "--resize", "0") == 2
    assert capsys.readouterr().err == "--resize is 0, but it must be 1 or more.\n"
    assert run_script(monkeypatch, "inaturalist") == 2
    assert "inaturalist2017" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run_script(monkeypatch, "imagenet", "--root", str(tmp_path / "file")) == 2
    assert "cannot be written to (Not a directory)" in capsys.readouterr().err
