"""The loader of the large sets: order, crops, pixels, batches over processes and workers, damaged images, speed."""

import math
import os
import pickle
import runpy
import signal
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from cbl import config
from cbl.data import augment, index, loader_speed, streaming
from cbl.errors import UserError

CPU = torch.device("cpu")
SIZE = 16  # pixels, of the network's input in most tests
N, CLASSES = 23, 5


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Smooth, so that two ways to resample it agree."""
    rng = np.random.RandomState(seed)
    coarse = Image.fromarray(rng.randint(0, 256, (6, 8, 3)).astype(np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def prepared(tmp_path) -> index.Index:
    """23 images of several sizes, form and mode varied, as the published sets have them."""
    folder = tmp_path / "imagenet"
    (folder / "images" / "a").mkdir(parents=True)
    paths = [f"a/{i}.JPEG" for i in range(N)]
    for i, path in enumerate(paths):
        image = picture(i, 40 + 3 * i, 60 - i)
        image = image.convert({3: "L", 4: "CMYK"}.get(i, "RGB"))
        image.save(folder / "images" / path, "PNG" if i == 5 else "JPEG")
    return index.write(folder, "train", paths, [i % CLASSES for i in range(N)], list("abcde"))


def loader(found: index.Index, workers: int = 0, **options) -> streaming.Loader:
    return streaming.Loader(found, options.pop("image_size", SIZE), workers=workers, device=CPU, **options)


def collect(batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


# Order and crops


def test_order_is_a_function_of_seed_and_epoch():
    assert streaming.order(8, 0, 0).tolist() == streaming.order(8, 0, 0).tolist()
    orders = {tuple(streaming.order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16 and all(sorted(found) == list(range(50)) for found in orders)
    # for ever: a published run must be repeatable
    assert streaming.order(8, 0, 0).tolist() == ORDER
    assert np.allclose(streaming.draw(1, 2, 3)[:3], DRAWN)


ORDER = [6, 3, 5, 0, 7, 2, 1, 4]
DRAWN = [0.041726847, 0.899998098, 0.188948667]


@pytest.mark.parametrize("n, official, fewer", [(579184, 50905, 55), (437513, 38454, 24), (1281167, 112603, 13)])
def test_steps_of_the_large_sets_are_as_the_recipe_says(n, official, fewer):
    """configs/recipe/large.yaml does: whole steps in an epoch, 90 epochs, batches of 1024."""
    assert 90 * streaming.steps_per_epoch(n, 1024) == official - fewer
    assert math.ceil(90 * n / 1024) == official


@given(
    st.integers(1, 4000), st.integers(1, 4000), st.lists(st.floats(0, 1, exclude_max=True), min_size=22, max_size=22)
)
def test_crops_lie_inside_the_image(width, height, uniform):
    left, top, w, h = streaming.crop_box(width, height, 224, np.array(uniform))
    assert left >= 0 and top >= 0 and w >= 1 and h >= 1 and left + w <= width and top + h <= height


def authors_box(width: int, height: int, rng: np.random.RandomState) -> tuple[int, int, int, int]:
    """The crop of the authors' TPU code, which is TensorFlow's: told from its source, in its own arithmetic."""
    smallest, largest = np.float32(0.08) * width * height, np.float32(width * height)
    for _ in range(10):
        aspect = np.float32(rng.random_sample() * (4 / 3 - 3 / 4) + 3 / 4)
        low, high = (int(np.rint(np.sqrt(area / aspect))) for area in (smallest, largest))
        if np.rint(high * aspect) > width:
            high = int((width + 0.5 - 1e-7) / aspect)
        high = min(high, height)
        h = rng.randint(low, high + 1) if low < high else high
        w = int(np.rint(h * aspect))
        if w * h < smallest:
            h += 1
            w = int(np.rint(h * aspect))
        if w * h > largest:
            h -= 1
            w = int(np.rint(h * aspect))
        if not (smallest <= w * h <= largest and 0 < w <= width and 0 < h <= height):
            continue
        if w * h < 0.1 * width * height:
            continue  # covers too little of the one object, which is the image
        if (w, h) == (width, height):
            break
        return rng.randint(width - w) if w < width else 0, rng.randint(height - h) if h < height else 0, w, h
    return streaming.centre_box(width, height, 224)


@pytest.mark.parametrize("width, height", [(500, 375), (375, 500), (64, 64), (300, 100), (96, 128)])
def test_crops_are_distributed_as_the_authors(width, height):
    from scipy.stats import ks_2samp

    n = 4000
    ours = np.array([streaming.crop_box(width, height, 224, streaming.draw(0, 0, i)) for i in range(n)])
    rng = np.random.RandomState(0)
    theirs = np.array([authors_box(width, height, rng) for _ in range(n)])

    def statistics(boxes):
        left, top, w, h = boxes.T
        rest = np.maximum(width - w, 1), np.maximum(height - h, 1)
        return {"area": w * h, "aspect": w / h, "left": left / rest[0], "top": top / rest[1]}

    mine, reference_statistics = statistics(ours), statistics(theirs)
    for name, values in mine.items():
        assert ks_2samp(values, reference_statistics[name]).pvalue > 0.01, name
    assert abs(mine["area"].mean() / reference_statistics["area"].mean() - 1) < 0.02
    if (width, height) == (500, 375):
        assert 0.38 < mine["area"].mean() / (width * height) < 0.395  # torchvision's: 0.43


@pytest.mark.parametrize("width, height", [(1000, 10), (10, 1000), (200, 10), (1, 1)])
def test_images_that_no_crop_fits_get_the_evaluated_one(width, height):
    """Twenty times as wide as high, a tenth is never covered; and a pixel has no crop but itself."""
    for number in range(50):
        box = streaming.crop_box(width, height, 224, streaming.draw(0, 0, number))
        assert box == streaming.centre_box(width, height, 224)


def test_flips_are_fair_and_independent_of_the_crop():
    drawn = np.stack([streaming.draw(0, 0, i) for i in range(4000)])
    flips = drawn[:, -1] < 0.5
    assert abs(flips.mean() - 0.5) < 0.025
    assert np.abs(np.corrcoef(drawn.T)[-1, :-1]).max() < 0.06


@pytest.mark.parametrize(
    "width, height, size, box",
    [
        (256, 256, 224, (16, 16, 224, 224)),  # padding 32
        (366, 366, 320, (23, 23, 320, 320)),  # padding 46
        (500, 375, 224, (86, 24, 328, 328)),
        (375, 500, 320, (24, 87, 327, 327)),
        (512, 600, 448, (32, 76, 448, 448)),  # padding 64
        (1, 1, 224, (0, 0, 1, 1)),
    ],
)
def test_evaluated_crop_is_the_official_one(width, height, size, box):
    assert streaming.centre_box(width, height, size) == box


def test_statistics_are_the_official_ones():
    assert streaming.STATISTICS["inaturalist2017"] == ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192))
    assert streaming.STATISTICS["inaturalist2018"] == streaming.STATISTICS["inaturalist2017"]
    assert streaming.STATISTICS["imagenet"] == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert set(streaming.STATISTICS) == set(config.LARGE)


# Pixels


def reference_pixels(path: Path, box: tuple[int, int, int, int], size: int, flip: bool) -> np.ndarray:
    """As torchvision's reference: decoded whole, cropped, resized by Pillow, flipped."""
    from cbl.vision import v2

    left, top, w, h = box
    image = Image.open(path).convert("RGB")
    bicubic = v2.InterpolationMode.BICUBIC
    image = v2.functional.resized_crop(image, top, left, h, w, [size, size], bicubic, antialias=True)
    return np.asarray(v2.functional.horizontal_flip(image) if flip else image).astype(int)


def difference(folder: Path, path: str, size: int, number: int) -> tuple[int, np.ndarray]:
    """By how much the decoded image is reduced, and the differences to the reference at the same crop."""
    with Image.open(folder / path) as image:
        uniform = streaming.draw(7, 1, number)
        left, top, w, h = streaming.crop_box(*image.size, size, uniform)
    factor = max(f for f in (1, 2, 4, 8) if f == 1 or f * size <= min(w, h))
    edges = [round(edge / factor) * factor for edge in (left, top, left + w, top + h)]  # the reduced image's pixels
    box = edges[0], edges[1], edges[2] - edges[0], edges[3] - edges[1]
    expected = reference_pixels(folder / path, box, size, bool(uniform[-1] < 0.5))
    ours = streaming.Decoder(folder, size).read(streaming.Request(number, path, 0, (7, 1)))
    return factor, np.abs(ours.numpy() - expected)


def test_pixels_are_those_of_torchvisions_pipeline(prepared):
    """Grey, CMYK and PNG among them; two intermediate roundings to 8 bits may fall otherwise."""
    for i, path in enumerate(prepared.paths):
        factor, apart = difference(prepared.images, path, 64, i)
        assert factor == 1 and apart.max() <= 2 and apart.mean() < 0.2, path


def test_a_decode_at_half_or_quarter_size_changes_little(tmp_path):
    loader_speed.photos(tmp_path, 1, (608, 448))
    found = [difference(tmp_path, "0.jpg", 64, number) for number in range(20)]
    assert {factor for factor, _ in found} == {2, 4}
    assert max(apart.mean() for _, apart in found) < 2.5  # of 255, on a picture with a deviation of 50


def test_evaluated_pixels_are_those_of_a_whole_decode(prepared):
    images, labels = collect(loader(prepared, image_size=8).evaluation(7))
    assert labels.tolist() == prepared.labels.tolist()
    for i, path in enumerate(prepared.paths):
        with Image.open(prepared.images / path) as image:
            box = streaming.centre_box(*image.size, 8)
        assert np.abs(images[i].numpy() - reference_pixels(prepared.images / path, box, 8, False)).max() <= 1


def test_orientation_in_the_metadata_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    for name, more in (("plain", {}), ("turned", {"exif": exif})):
        picture(0, 30, 20).save(tmp_path / f"{name}.jpg", **more)
    decoder = streaming.Decoder(tmp_path, SIZE)
    plain, turned = (decoder.read(streaming.Request(0, f"{name}.jpg", 0, (0, 0))) for name in ("plain", "turned"))
    assert torch.equal(plain, turned)


def test_batches_become_normalised_channels_last_input(prepared):
    images, labels = next(iter(loader(prepared).training(0, 0, 6)))
    assert images.shape == (6, SIZE, SIZE, 3) and images.dtype == torch.uint8 and images.is_contiguous()
    assert labels.shape == (6,) and labels.dtype == torch.int64
    mean, std = map(torch.tensor, streaming.STATISTICS["imagenet"])
    x = augment.scale(images, mean, std)
    assert x.shape == (6, 3, SIZE, SIZE) and x.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(x[2, 1, 3, 4], (images[2, 3, 4, 1] / 255 - 0.456) / 0.224)


# Batches


def test_an_epoch_takes_every_image_once_but_for_the_last_partial_batch(prepared):
    batches = list(loader(prepared).training(3, 1, 5))
    assert len(batches) == streaming.steps_per_epoch(N, 5) == 4
    labels = collect(batches)[1].tolist()
    assert labels == prepared.labels[streaming.order(N, 3, 1)[:20]].tolist()


def test_epochs_look_different_and_repeat_exactly(prepared):
    epochs = [collect(loader(prepared).training(0, epoch, 23))[0] for epoch in (0, 1, 0)]
    assert torch.equal(epochs[0], epochs[2])
    first, second = (e[np.argsort(streaming.order(N, 0, i))] for i, e in enumerate(epochs[:2]))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # each image is cropped anew


def test_an_image_looks_the_same_whatever_the_processes_workers_and_batches(prepared):
    whole = collect(loader(prepared).training(0, 2, 20))
    for batch_size, world, accumulation, workers in [(20, 2, 1, 0), (20, 1, 2, 0), (20, 2, 5, 2), (10, 1, 1, 2)]:
        ranks = []
        for rank in range(world):
            this = loader(prepared, workers)
            ranks.append(list(this.training(0, 2, batch_size, rank=rank, world=world, accumulation=accumulation)))
            this.close()
        assert all(len(found) == accumulation * (20 // batch_size) for found in ranks)
        assert all(len(labels) == batch_size // (world * accumulation) for found in ranks for _, labels in found)
        steps = [
            ranks[rank][step * accumulation + part]
            for step in range(20 // batch_size)
            for rank in range(world)
            for part in range(accumulation)
        ]
        images, labels = collect(steps)
        assert torch.equal(images, whole[0]) and torch.equal(labels, whole[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_at_any_step(prepared, workers):
    this = loader(prepared, workers)
    whole = list(this.training(0, 0, 4))
    for first in range(len(whole)):
        rest = list(this.training(0, 0, 4, first_step=first))
        assert len(rest) == len(whole) - first
        assert all(torch.equal(a[0], b[0]) for a, b in zip(rest, whole[first:], strict=True))
    assert not list(this.training(0, 0, 4, first_step=5))
    this.close()


@pytest.mark.parametrize("world", [1, 2, 3, 30])
def test_evaluation_covers_every_image_once_over_all_processes(prepared, world):
    found = [list(loader(prepared).evaluation(4, rank=rank, world=world)) for rank in range(world)]
    sizes = [sum(len(labels) for _, labels in batches) for batches in found]
    assert sum(sizes) == N and max(sizes) - min(sizes) <= 1
    whole = collect(loader(prepared).evaluation(100))
    for rank, batches in enumerate(found):
        if batches:
            images, labels = collect(batches)
            assert torch.equal(images, whole[0][rank::world]) and torch.equal(labels, whole[1][rank::world])


def test_loading_leaves_everybodys_random_numbers_alone(prepared):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    this = loader(prepared, 1)
    list(this.training(0, 0, 5))
    list(loader(prepared).evaluation(5))
    this.close()
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_a_batch_that_cannot_be_cut_or_filled_is_refused_at_once(prepared):
    with pytest.raises(UserError, match=r"batch of 10 images cannot be cut into 6 equal parts \(3 processes times 2"):
        loader(prepared).training(0, 0, 10, world=3, accumulation=2)
    with pytest.raises(UserError, match="batch of 24 images is larger than the training set of 23"):
        loader(prepared).training(0, 0, 24)


def test_starting_another_epoch_ends_the_one_before(prepared):
    this = loader(prepared, 1)
    abandoned = this.training(0, 0, 4)
    next(abandoned)
    whole = list(this.training(0, 1, 4))
    assert torch.equal(collect(whole)[0], collect(loader(prepared).training(0, 1, 4))[0])
    with pytest.raises(RuntimeError, match="Another epoch"):
        next(abandoned)
    this.close()


def test_workers_stay_from_epoch_to_epoch_and_end_at_close(prepared):
    this = loader(prepared, 2)
    list(this.training(0, 0, 4))
    workers = list(this._loader._iterator._workers)
    list(this.training(0, 1, 4))
    assert this._loader._iterator._workers == workers and all(w.is_alive() for w in workers)
    this.close()
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


def test_what_goes_to_a_worker_can_be_pickled(prepared):
    """Where processes are spawned and not forked, this is all that they get."""
    decoder = pickle.loads(pickle.dumps(streaming.Decoder(prepared.images, SIZE)))
    request = pickle.loads(pickle.dumps([streaming.Request(0, prepared.paths[0], 0, (0, 0))]))
    assert not decoder[request].damaged
    for function in (streaming._start_worker, streaming._as_it_is):
        assert pickle.loads(pickle.dumps(function)) is function


@pytest.mark.gpu
def test_batches_arrive_on_the_gpu_as_they_are_on_the_cpu(prepared):
    break_images(prepared, [6])
    expected = collect(loader(prepared, on_damaged="skip").training(0, 0, 5))
    this = streaming.Loader(prepared, SIZE, workers=2, device=torch.device("cuda"), on_damaged="skip")
    images, labels = collect(this.training(0, 0, 5))
    assert images.is_cuda and labels.is_cuda
    assert torch.equal(images.cpu(), expected[0]) and torch.equal(labels.cpu(), expected[1])
    this.close()


# Damage


def break_images(found: index.Index, numbers: list[int]) -> None:
    for i in numbers:
        path = found.images / found.paths[i]
        content = path.read_bytes()
        path.write_bytes([content[: len(content) // 2], b"", b"no image at all"][i % 3])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("number", [6, 7, 8])
def test_a_damaged_image_is_refused_by_name(prepared, workers, number):
    break_images(prepared, [number])
    this = loader(prepared, workers)
    for batches in (this.training(0, 0, 23), this.evaluation(4)):
        with pytest.raises(UserError, match=rf"images/a/{number}.JPEG cannot be read as an image \(.+\)") as caught:
            list(batches)
        assert "\n" not in str(caught.value)
    this.close()


def test_a_missing_image_is_refused_by_name(prepared):
    (prepared.images / prepared.paths[9]).unlink()
    with pytest.raises(UserError, match=r"a/9.JPEG cannot be read .*No such file"):
        list(loader(prepared).evaluation(4))


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_may_be_skipped_in_training(prepared, workers, capsys):
    whole = collect(loader(prepared).training(0, 0, 23))
    break_images(prepared, [6, 7, 22])
    this = loader(prepared, workers, on_damaged="skip")
    for _ in range(2):
        images, labels = collect(this.training(0, 0, 23))
        for slot, number in enumerate(streaming.order(N, 0, 0)):
            if number in (6, 7, 22):  # 8 stands in for 6 and 7, and 0 for the last
                stand_in = {6: 8, 7: 8, 22: 0}[int(number)]
                assert labels[slot] == prepared.labels[stand_in]
                expected = this._decoder.read(streaming.Request(stand_in, prepared.paths[stand_in], 0, (0, 0)))
                assert torch.equal(images[slot], expected)
            else:
                assert torch.equal(images[slot], whole[0][slot]) and labels[slot] == whole[1][slot]
    this.close()
    assert sorted(this.damaged) == ["a/22.JPEG", "a/6.JPEG", "a/7.JPEG"] and all(this.damaged.values())
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and said[-1].endswith("3 so far.") and "Skipped, cannot be read: " in said[0]


def test_damaged_images_may_be_skipped_in_evaluation(prepared):
    whole = collect(loader(prepared).evaluation(4))
    break_images(prepared, [0, 1, 2, 3, 10])  # a whole batch among them
    this = loader(prepared, on_damaged="skip")
    images, labels = collect(this.evaluation(4))
    kept = [i for i in range(N) if i not in (0, 1, 2, 3, 10)]
    assert torch.equal(images, whole[0][kept]) and torch.equal(labels, whole[1][kept])
    assert len(this.damaged) == 5


def test_a_disk_that_is_gone_is_not_skipped_for_ever(prepared):
    prepared.images.rename(prepared.images.with_name("gone"))
    for batches in (
        loader(prepared, on_damaged="skip").training(0, 0, 4),
        loader(prepared, on_damaged="skip").evaluation(4),
    ):
        with pytest.raises(UserError, match=r"23 of the 23 .* images cannot be read, .* is the disk still there"):
            list(batches)


def test_an_evaluation_of_few_of_the_images_is_none(prepared, monkeypatch):
    monkeypatch.setattr(streaming, "_IN_A_ROW", 4)
    break_images(prepared, range(0, 10, 2))
    with pytest.raises(UserError, match=r"5 of the 23 .* images cannot be read"):
        list(loader(prepared, on_damaged="skip").evaluation(4))


def test_a_programming_error_is_not_taken_for_damage(prepared, monkeypatch):
    def wrong(*_):
        raise TypeError("a bug")

    monkeypatch.setattr(streaming, "crop_box", wrong)
    with pytest.raises(TypeError, match="a bug"):
        list(loader(prepared, on_damaged="skip").training(0, 0, 4))


@pytest.mark.parametrize("when", ["before the first batch", "in a step", "after another loader", "between epochs"])
def test_a_worker_that_dies_is_one_sentence_and_no_hang(prepared, monkeypatch, when):
    """Wherever it happens: torch's own signal handler would raise in the middle of a step."""
    if when == "before the first batch":
        read = streaming.Decoder.read
        monkeypatch.setattr(streaming.Decoder, "read", lambda self, r: os._exit(1) if r.number == 13 else read(self, r))
    if when == "after another loader":  # of somebody else's
        monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
        next(iter(DataLoader([1], num_workers=1)))
        assert signal.getsignal(signal.SIGCHLD).__module__ == signal_handling.__name__
    this = loader(prepared, 2)
    batches, began = this.training(0, 0, 2), time.monotonic()
    if when != "before the first batch":
        next(batches)
        if when == "between epochs":
            list(batches)
            batches = this.training(0, 1, 2)
        os.kill(this._loader._iterator._workers[0].pid, signal.SIGKILL)
        time.sleep(0.5)  # the step, in which nothing is raised
    with pytest.raises(UserError, match=r"The loader of the train images stopped .*fewer engine.workers") as caught:
        list(batches)
    assert time.monotonic() - began < 60 and "\n" not in str(caught.value)


def test_a_worker_that_hangs_is_one_sentence(prepared, monkeypatch):
    monkeypatch.setattr(streaming, "_TICK", 1)
    monkeypatch.setattr(streaming, "_PATIENCE", 2)
    monkeypatch.setattr(streaming.Decoder, "read", lambda *_: time.sleep(60))
    with pytest.raises(UserError, match=r"no batch came for 2 seconds; is the disk of .* still there"):
        list(loader(prepared, 1).training(0, 0, 4))


def test_a_slow_worker_is_waited_for(prepared, monkeypatch):
    """Longer than a tick for a batch; also for those of an epoch that was given up, when the next one begins."""
    expected = collect(loader(prepared).training(0, 1, 4))
    read = streaming.Decoder.read
    monkeypatch.setattr(streaming, "_TICK", 1)
    monkeypatch.setattr(streaming.Decoder, "read", lambda self, r: time.sleep(0.5) or read(self, r))
    this = loader(prepared, 2)
    next(this.training(0, 0, 4))
    images, labels = collect(this.training(0, 1, 4))
    assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1])
    this.close()


def test_shared_memory_that_is_full_is_one_sentence(prepared, monkeypatch):
    def full(_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(UserError, match=r"no shared memory \(/dev/shm\) left .*--shm-size") as caught:
        list(loader(prepared, 2).training(0, 0, 4))
    assert "\n" not in str(caught.value)
    assert len(list(loader(prepared, 0).training(0, 0, 4))) == N // 4  # which needs none


# Speed, and torchvision beside another torch


def test_speed_is_compared_turn_by_turn_on_the_same_files(tmp_path, monkeypatch):
    """Of a clock by which ours takes 1, 2 and 4 seconds, and torchvision's pipeline always 3; the first is warming."""
    threads = torch.get_num_threads()
    ticks = iter([1, 3, 2, 3, 4, 3])
    seen = []

    def seconds(batch, epoch):
        seen.append((epoch, tuple(batch(epoch).shape)))
        return next(ticks)

    monkeypatch.setattr(loader_speed, "_seconds", seconds)
    names = loader_speed.photos(tmp_path, 2, (60, 40))
    found = loader_speed.compare(tmp_path, names, image_size=8, rounds=3)
    assert found == {"ours": 2 / 2, "torchvision": 2 / 3, "ratio": 3 / 2}
    assert seen == [(i, shape) for i in (1, 2, 3) for shape in ((2, 8, 8, 3), (2, 3, 8, 8))]
    assert torch.get_num_threads() == threads


def test_a_torchvision_that_fits_is_left_alone(monkeypatch):
    package = {name: types.ModuleType(name) for name in ("torchvision", "torchvision.transforms")}
    package["torchvision.transforms"].v2 = "its transforms"
    for name, module in package.items():
        monkeypatch.setitem(sys.modules, name, module)
    found = runpy.run_path(str(Path(streaming.__file__).parents[1] / "vision.py"))
    assert found["torchvision"] is package["torchvision"] and found["v2"] == "its transforms"
    assert "_declared" not in found


def test_another_failure_of_torchvision_is_not_hidden(monkeypatch):
    class Broken:
        def find_spec(self, name, *_):
            if name == "torchvision":
                raise RuntimeError("something else")

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(RuntimeError, match="something else"):
        runpy.run_path(str(Path(streaming.__file__).parents[1] / "vision.py"))


def test_torchvision_works_here():
    from cbl.vision import torchvision

    assert math.isclose(sum(p.numel() for p in torchvision.models.resnet18(num_classes=3).parameters()), 11_178_051)
