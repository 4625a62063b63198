"""Batches of a prepared large set (cbl/data/index.py), decoded from JPEG files as fast as a training step eats them.

Worker processes decode, crop, resize and flip; whole uint8 batches go through pinned memory to the device, where
`cbl.data.augment.scale` normalises them. The crop is the authors', which is TensorFlow's and smaller than torchvision's
on average; the bicubic resize is antialiased, as theirs was not.

Nothing here has a state. The order of an epoch is a function of (seed, epoch), what an image looks like in it of
(seed, epoch, number of the image). So a run goes on inside an epoch without a stored generator, and the number of
workers, processes and micro-batches changes neither.

Two things make an image cost about half of what torchvision's pipeline takes, at the same crop: torch's vectorised
resize of uint8 in place of Pillow's, and no floating point in the workers. Where a crop is at least twice as large as
the network's input, libjpeg also decodes at half, quarter or eighth size, and the crop snaps to that image's pixels.
"""

import contextlib
import functools
import math
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info

from cbl.data.index import Index
from cbl.errors import UserError

# Mean and standard deviation of x/255 per channel, as in the official TPU code (its ImageNet ones are the usual ones).
_INATURALIST = ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192))
STATISTICS = {
    "inaturalist2017": _INATURALIST,
    "inaturalist2018": _INATURALIST,
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

AREA = (0.08, 1.0)  # of the crop, as a share of the image
COVERED = 0.1  # and at least this, or it is drawn again
ASPECT = (3 / 4, 4 / 3)  # width / height of the crop
_TRIES = 10  # crops drawn before falling back to the one that is evaluated
_UNIFORMS = 2 * _TRIES + 3  # numbers drawn per image, whatever is done with them
_IN_A_ROW = 100  # unreadable images next to each other are no accident, nor are so many that are 1 % of a set
_TICK = 5  # seconds between two looks whether the workers live
_PATIENCE = 300  # seconds without a batch
_LOST = ("DataLoader worker (pid", "Pin memory thread")  # torch's words for a dead worker
_LATE = "DataLoader timed out"  # and when a tick is over


def steps_per_epoch(n: int, batch_size: int) -> int:
    """`n // batch_size`: images that do not fill a last batch are left to the next epoch's shuffle."""
    return n // batch_size


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """(n,) int64: the images 0..n-1 as epoch `epoch` takes them."""
    # RandomState is the one numpy generator whose stream is promised never to change
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, epoch)))).permutation(n)


def crop_box(width: int, height: int, image_size: int, uniform: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, width, height) in pixels of a random crop; `uniform` are at least 2·10 + 2 numbers in [0, 1).

    Distributed as that of the authors' TPU code: the aspect is uniform over `ASPECT`, the height between those of the
    areas `AREA` at that aspect, as far as the image reaches. Up to 10 times, until it covers enough of the image; else,
    and when it is the whole image, `centre_box`.
    """
    for i in range(_TRIES):
        aspect = ASPECT[0] + (ASPECT[1] - ASPECT[0]) * float(uniform[2 * i])
        low, high = (round(math.sqrt(share * width * height / aspect)) for share in AREA)
        high = min(high, height, int((width + 0.5 - 1e-7) / aspect))  # the last: the width is rounded
        low = min(low, high)
        h = low + int(uniform[2 * i + 1] * (high - low + 1))
        w = round(h * aspect)
        if (w, h) == (width, height):
            break
        if w <= width and w * h >= max(1, COVERED * width * height):
            x, y = uniform[2 * _TRIES : 2 * _TRIES + 2]
            return int(x * (width - w)), int(y * (height - h)), w, h  # never the last place, as theirs
    return centre_box(width, height, image_size)


def centre_box(width: int, height: int, image_size: int) -> tuple[int, int, int, int]:
    """(left, top, side, side) in pixels of the crop that is evaluated, as in the authors' TPU code.

    The central square of `size / (size + padding)` of the short side, with the official padding of 32 at size 224
    and 46 at 320, that is a seventh of the size.
    """
    padding = round(image_size / 7)
    side = max(1, int(image_size / (image_size + padding) * min(width, height)))
    return (width - side + 1) // 2, (height - side + 1) // 2, side, side


class Request(NamedTuple):
    """One image that a worker is to read."""

    number: int  # in the index
    path: str  # relative
    label: int
    key: tuple[int, int] | None  # (seed, epoch) of the augmentation; None: centre crop


class Batch(NamedTuple):
    """What a worker hands back."""

    images: torch.Tensor  # (B, S, S, 3) uint8
    labels: torch.Tensor  # (B,) int64
    damaged: list[tuple[int, Request, str]]  # slot in the batch, its image, what is wrong with it


@dataclass(frozen=True)
class Decoder:
    """Reads whole batches; the DataLoader's data set, without any state, so that workers are cheap to start."""

    images: Path  # folder
    image_size: int  # S, pixels

    def __getitem__(self, requests: list[Request]) -> Batch:
        size = self.image_size
        images = torch.zeros(len(requests), size, size, 3, dtype=torch.uint8)
        damaged = []
        for slot, request in enumerate(requests):
            try:
                images[slot] = self.read(request)
            except Unreadable as error:
                damaged.append((slot, request, str(error)))
        labels = torch.tensor([request.label for request in requests])
        if get_worker_info() is not None:  # here, as the thread that hands it over would drop a batch it cannot share
            try:
                images.share_memory_(), labels.share_memory_()
            except RuntimeError as error:
                raise NoSharedMemory(str(error)) from None
        return Batch(images, labels, damaged)

    def read(self, request: Request) -> torch.Tensor:
        """(S, S, 3) uint8; raises `Unreadable` for a file that is missing, truncated or no image."""
        with _reading():
            image = Image.open(self.images / request.path)
        with image:
            width, height = image.size
            if request.key is None:
                left, top, w, h = centre_box(width, height, self.image_size)
                flip, shrink = False, 1  # decoded whole: what is reported must not depend on a short cut
            else:
                uniform = draw(*request.key, request.number)
                left, top, w, h = crop_box(width, height, self.image_size, uniform)
                flip, shrink = bool(uniform[-1] < 0.5), max(1, min(w, h) // self.image_size)
            with _reading():
                if shrink > 1:
                    image.draft(None, (width // shrink, height // shrink))  # a JPEG by the next lower power of two
                    shrink = round(width / image.size[0])
                image.load()
            x, y = _shrunk(left, w, shrink, image.size[0]), _shrunk(top, h, shrink, image.size[1])
            crop = image.crop((x[0], y[0], x[1], y[1]))
        if crop.mode != "RGB":  # grey, CMYK and, in ImageNet, one PNG
            crop = crop.convert("RGB")
        if flip:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(crop))[None].permute(0, 3, 1, 2)  # (1, 3, h, w), in channels_last memory
        size = (self.image_size, self.image_size)
        return F.interpolate(pixels, size, mode="bicubic", antialias=True).permute(0, 2, 3, 1)[0]


class Unreadable(Exception):
    """An image file that cannot be decoded, and why."""


class NoSharedMemory(Exception):
    """A worker has no room for a batch where the process that trains could read it."""


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise Unreadable(str(error) or type(error).__name__) from None


def draw(seed: int, epoch: int, number: int) -> np.ndarray:
    """The random numbers of image `number` in an epoch, in [0, 1)."""
    # 1 +: numpy takes (seed, epoch) and (seed, epoch, 0) for the same. PCG64 starts six times as fast as the usual
    # MT19937, whose start would be a tenth of an image's time.
    key = np.random.SeedSequence((seed, epoch, 1 + number))
    return np.random.RandomState(np.random.PCG64(key)).random_sample(_UNIFORMS)


def _shrunk(start: int, length: int, factor: int, limit: int) -> tuple[int, int]:
    """First and last pixel (exclusive) of a stretch in an image decoded at 1 / factor."""
    first = min(round(start / factor), limit - 1)
    return first, min(max(first + 1, round((start + length) / factor)), limit)


class _Queue:
    """What the workers are to read next; the DataLoader asks for it anew at the start of every epoch."""

    batches: Iterable[list[Request]] = ()

    def __iter__(self) -> Iterator[list[Request]]:
        return iter(self.batches)


class Loader:
    """Batches of one split. Workers start at the first batch and stay until `close`.

    `workers=0` decodes in this process. A file that cannot be read raises `UserError` with its name (`"refuse"`) or is
    named, counted in `damaged` and passed over (`"skip"`): in training the next image of the index stands in for it,
    in evaluation the batch is one smaller. One epoch at a time: starting another ends the one before.
    """

    def __init__(
        self,
        index: Index,
        image_size: int,
        *,
        workers: int,
        device: torch.device,
        on_damaged: Literal["refuse", "skip"] = "refuse",
    ) -> None:
        self.index = index
        self.damaged: dict[str, str] = {}  # path → what is wrong with it
        self._device = device
        self._refuse = on_damaged == "refuse"
        self._decoder = Decoder(index.images, image_size)
        self._queue = _Queue()
        self._epoch: object = None  # whose turn it is
        self._new = functools.partial(
            DataLoader,
            self._decoder,  # type: ignore[arg-type]  # indexed by requests, one batch each
            batch_size=None,
            sampler=self._queue,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            num_workers=workers,
            pin_memory=device.type == "cuda",
            timeout=_TICK if workers else 0,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # so that it does not draw from everybody's
            persistent_workers=workers > 0,
        )
        self._loader: DataLoader | None = self._new()

    def training(
        self,
        seed: int,
        epoch: int,
        batch_size: int,
        *,
        first_step: int = 0,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Micro-batches of one epoch: images (B, S, S, 3) uint8 and labels (B,) int64, on the device.

        `batch_size` is that of a step over all processes, B = batch_size / (world · accumulation). Step s takes
        `order(...)[s·batch_size : (s+1)·batch_size]` in world · accumulation equal parts; process `rank` yields its
        `accumulation` parts of every step from `first_step` on. Raises `UserError` when there is no such B or no whole
        step, and as the class says.
        """
        n, parts = len(self.index), world * accumulation
        if batch_size % parts:
            raise UserError(
                f"A batch of {batch_size} images cannot be cut into {parts} equal parts ({world} processes times "
                f"{accumulation} micro-batches): choose numbers whose product divides it."
            )
        steps = steps_per_epoch(n, batch_size)
        if not steps:
            raise UserError(f"A batch of {batch_size} images is larger than the training set of {n}: choose less.")
        taken = order(n, seed, epoch)[first_step * batch_size : steps * batch_size]
        taken = taken.reshape(-1, world, accumulation, batch_size // parts)[:, rank]
        return self._read(list(taken.reshape(-1, batch_size // parts)), (seed, epoch))

    def evaluation(
        self, batch_size: int, *, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Centre crops as `training` yields them, every image once over all processes: `rank` has rank, rank+world, ...

        The last batch may be smaller, and processes may differ by one image.
        """
        mine = np.arange(rank, len(self.index), world)
        return self._read([mine[i : i + batch_size] for i in range(0, len(mine), batch_size)], None)

    def close(self) -> None:
        """Ends the workers."""
        self._epoch, self._loader = None, None

    def _read(
        self, batches: list[np.ndarray], key: tuple[int, int] | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self._epoch = mine = object()
        assert self._loader is not None, "the loader is closed"
        self._queue.batches = ([self._request(number, key) for number in batch] for batch in batches)
        received = self._begin()
        for _ in batches:
            if self._epoch is not mine:
                raise RuntimeError("Another epoch of this loader was started, which ended this one.")
            images, labels, damaged = self._next(received)
            if damaged:
                images, labels = self._mend(images, labels, damaged)
            if len(labels):
                yield images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)

    def _request(self, number: int, key: tuple[int, int] | None) -> Request:
        return Request(int(number), self.index.paths[number], int(self.index.labels[number]), key)

    def _begin(self) -> Iterator[Batch]:
        with self._workers_needed():
            try:
                return _iterator(self._loader)
            except RuntimeError as error:
                if _LATE not in str(error):
                    raise
            self._loader = self._new()  # the workers were still at an epoch that was given up
            return _iterator(self._loader)

    def _next(self, received: Iterator[Batch]) -> Batch:
        with self._workers_needed():
            for _ in range(math.ceil(_PATIENCE / _TICK)):  # ticks, not a clock: a process may be stopped for a while
                try:
                    return next(received)
                except RuntimeError as error:
                    if _LATE not in str(error):
                        raise
        self.close()
        raise UserError(
            f"The loader of the {self.index.split} images stopped: no batch came for {_PATIENCE} seconds; is the disk "
            f"of {self.index.images} still there, and not too slow?"
        )

    @contextlib.contextmanager
    def _workers_needed(self) -> Iterator[None]:
        """A worker lost is one sentence."""
        try:
            yield
        except NoSharedMemory:
            self.close()
            raise UserError(
                f"The loader of the {self.index.split} images stopped: its workers have no shared memory (/dev/shm) "
                "left for their batches; give the machine more (docker run --shm-size=8g), or use fewer "
                "engine.workers."
            ) from None
        except RuntimeError as error:
            if not any(sign in str(error) for sign in _LOST):
                raise
            self.close()
            raise UserError(
                f"The loader of the {self.index.split} images stopped ({' '.join(str(error).split())}): a worker was "
                "killed, most often for want of memory; use fewer engine.workers or give the machine more."
            ) from error

    def _mend(
        self, images: torch.Tensor, labels: torch.Tensor, damaged: list[tuple[int, Request, str]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch without its damaged images, or `UserError`."""
        kept = torch.ones(len(labels), dtype=torch.bool)
        for slot, request, reason in damaged:
            self._report(request, reason)
            if request.key is None:
                kept[slot] = False
            else:
                images[slot], labels[slot] = self._stand_in(request)
        return (images, labels) if bool(kept.all()) else (images[kept], labels[kept])

    def _stand_in(self, request: Request) -> tuple[torch.Tensor, int]:
        """The next image of the index that can be read, and its label."""
        for step in range(1, min(_IN_A_ROW, len(self.index))):
            other = self._request((request.number + step) % len(self.index), request.key)
            try:
                return self._decoder.read(other), other.label
            except Unreadable as error:
                self._report(other, str(error))
        raise UserError(
            f"{self.index.images / request.path} and the images after it cannot be read: is the disk still there?"
        )

    def _report(self, request: Request, reason: str) -> None:
        path = self.index.images / request.path
        if self._refuse:
            raise UserError(
                f"{path} cannot be read as an image ({reason}): remove it and {self.index.folder / 'prepared.json'} "
                "and prepare the set again, or set dataset.on_damaged=skip."
            )
        if request.path not in self.damaged:
            self.damaged[request.path] = reason
            if (count := len(self.damaged)) > max(_IN_A_ROW, len(self.index) // 100) or count == len(self.index):
                raise UserError(
                    f"{count:,} of the {len(self.index):,} {self.index.split} images cannot be read, {path} ({reason}) "
                    "among them: is the disk still there?"
                )
            print(f"Skipped, cannot be read: {path} ({reason}); {len(self.damaged)} so far.", file=sys.stderr)


def _iterator(loader: DataLoader) -> Iterator[Batch]:
    """`iter(loader)`, without the signal handler that torch sets there.

    It raises wherever the process happens to be when a worker dies, most often in the middle of a step. The next batch
    says so as well, in five seconds.
    """
    if threading.current_thread() is not threading.main_thread():  # where torch sets none
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    if before is None or getattr(before, "__module__", "").startswith("torch."):  # set by another loader before
        before = signal.SIG_DFL
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, before)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _start_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends the workers
    warnings.filterwarnings("ignore", module="PIL")  # on odd metadata, thousands of times
