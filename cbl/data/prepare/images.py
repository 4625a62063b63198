"""Writes the images of a set, on all cores, each whole or not at all."""

import io
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from cbl import disk
from cbl.cores import usable_cores
from cbl.data.prepare.archives import ticker
from cbl.errors import UserError

QUALITY = 95  # of the JPEG that a resized image becomes (with 4:2:0 chroma, as nearly all originals have)


class Member(NamedTuple):
    """One image inside an archive."""

    split: str
    label: int
    path: str  # relative, checked: it does not lead out of the image folder
    content: Callable[[], bytes]  # to be called, if at all, before the next member is asked for


@dataclass(frozen=True)
class Contents:
    """What the archives of a set hold."""

    class_names: list[str]  # by label
    images: dict[str, int]  # by split, where it is known beforehand
    members: Iterator[Member]


def store(
    members: Iterator[Member], folder: Path, total: int, short_side: int | None, workers: int | None
) -> dict[str, dict[str, int]]:
    """Writes every member to `folder / path` unless it is there; returns split → path → label.

    With `short_side` (pixels), images whose short side is longer are resized to it; all others stay byte for byte.
    Raises `UserError` naming an image that cannot be decoded or written.
    """
    rows: dict[str, dict[str, int]] = {"train": {}, "val": {}}
    tick = ticker("Images", total, "images")
    made: set[Path] = set()
    pending: deque[Future[None]] = deque()
    workers = workers or usable_cores()
    # Threads suffice: Pillow decodes, resizes and encodes outside the interpreter lock. And none outlives a kill.
    with disk.writing(folder), ThreadPoolExecutor(workers) as pool:
        for done, member in enumerate(members):
            tick(done)
            rows[member.split][member.path] = member.label
            target = folder / member.path
            if target.parent not in made:
                target.parent.mkdir(parents=True, exist_ok=True)
                made.add(target.parent)
            if not _is_there(target):
                pending.append(pool.submit(_write, member.content(), target, short_side))
            while len(pending) > 8 * workers:  # reading the archive must not run away from writing
                pending.popleft().result()
        while pending:
            pending.popleft().result()
    return rows


def _is_there(path: Path) -> bool:
    try:
        return path.stat().st_size > 0  # empty after a power failure
    except FileNotFoundError:
        return False


def _write(content: bytes, target: Path, short_side: int | None) -> None:
    if short_side is not None:
        try:
            content = resized(content, short_side)
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
            raise UserError(f"{target.name} cannot be read as an image ({error}): its archive is damaged.") from None
    beside = target.with_name(f".{target.name}.part")
    beside.write_bytes(content)
    os.replace(beside, target)


def resized(content: bytes, short_side: int) -> bytes:
    """The image with a short side of `short_side` pixels: bicubic with antialiasing, JPEG of quality `QUALITY`.

    Images that are no larger are returned as they are. Nothing is rotated: the orientation in the EXIF data is
    ignored, as by the official code and by torchvision.
    """
    with Image.open(io.BytesIO(content)) as image:
        if min(image.size) <= short_side:
            image.load()  # so that a damaged one is noticed here
            return content
        scale = short_side / min(image.size)
        width, height = (round(scale * side) for side in image.size)
        small = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
