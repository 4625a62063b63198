"""How fast one core prepares training images, beside torchvision's reference pipeline on the same files."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cbl.data import streaming


def photos(folder: Path, n: int, size: tuple[int, int] = (500, 375), seed: int = 0) -> list[str]:
    """Writes `n` JPEG files of (width, height) pixels, made to cost what photographs cost, and returns their names.

    Smooth shading, coarse texture and fine grain, quality 90: about 70 KB at 500 x 375, the usual size in ImageNet.
    """
    rng = np.random.RandomState(seed)
    width, height = size
    y, x = np.mgrid[:height, :width]
    names = [f"{i}.jpg" for i in range(n)]
    for name in names:
        waves = [
            np.sin(x / rng.uniform(30, 70) + rng.uniform(0, 6)) * np.cos(y / rng.uniform(20, 70)) for _ in range(3)
        ]
        coarse = rng.normal(128, 25, (height // 4, width // 4, 3)).clip(0, 255).astype(np.uint8)
        texture = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), dtype=np.float64) - 128
        pixels = 127 + 100 * np.stack(waves, axis=-1) + texture + rng.normal(0, 6, (height, width, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name, quality=90)
    return names


def compare(folder: Path, names: Sequence[str], image_size: int = 224, rounds: int = 7) -> dict[str, float]:
    """Images per second of CPU time of this process: `ours`, `torchvision` (medians) and the median of their `ratio`.

    The reference is that of torchvision's training recipe, at the same crops: Pillow decodes the file whole, resized
    crop (bicubic, antialiased), flip, tensor, float, normalised, stacked into a batch. Ours ends with the uint8 batch,
    as the rest happens on the device. Both take turns, so that a machine that is busy with others is so for both.
    """
    ours, reference = _ours(folder, names, image_size), _reference(folder, names, image_size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ours(0), reference(0)  # imports and caches
        pairs = [(_seconds(ours, i), _seconds(reference, i)) for i in range(1, rounds + 1)]
    finally:
        torch.set_num_threads(threads)
    return {
        "ours": len(names) / statistics.median(a for a, _ in pairs),
        "torchvision": len(names) / statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
    }


def _ours(folder: Path, names: Sequence[str], image_size: int) -> Callable[[int], torch.Tensor]:
    decoder = streaming.Decoder(folder, image_size)

    def batch(epoch: int) -> torch.Tensor:
        found = decoder[[streaming.Request(i, name, 0, (0, epoch)) for i, name in enumerate(names)]]
        assert not found.damaged
        return found.images

    return batch


def _reference(folder: Path, names: Sequence[str], image_size: int) -> Callable[[int], torch.Tensor]:
    from cbl.vision import v2

    transform = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(*streaming.STATISTICS["imagenet"]),
        ]
    )

    def batch(epoch: int) -> torch.Tensor:
        images = []
        for i, name in enumerate(names):
            with open(folder / name, "rb") as handle:
                image = Image.open(handle).convert("RGB")
            left, top, w, h = streaming.crop_box(*image.size, image_size, streaming.draw(0, epoch, i))
            size, bicubic = [image_size, image_size], v2.InterpolationMode.BICUBIC
            images.append(transform(v2.functional.resized_crop(image, top, left, h, w, size, bicubic, antialias=True)))
        return torch.stack(images)

    return batch


def _seconds(batch: Callable[[int], torch.Tensor], epoch: int) -> float:
    began = time.process_time()
    batch(epoch)
    return time.process_time() - began
