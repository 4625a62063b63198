"""Crop, flip and scaling on the device, in whole batches.

Training images stay resident as padded uint8, so that one gather does crop and flip. Nothing here waits for the
device, so everything but `channel_statistics` may be captured in a CUDA graph or compiled.
"""

import numpy as np
import torch
import torch.nn.functional as F


def pad(images: torch.Tensor, shift: int) -> torch.Tensor:
    """(M, H, W, C) uint8 → (M, H+2·shift, W+2·shift, C): a ring of zeros, laid before scaling as officially."""
    return F.pad(images, (0, 0, shift, shift, shift, shift))


def draw_augmentation(
    rng: np.random.RandomState, n: int, shift: int, flip: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row offsets and column offsets (n,) int64, uniform over 0..2·shift, and flips (n,) bool with probability 1/2.

    Without `flip` all flips are False. 3n numbers are drawn whatever the settings, so that what is drawn next from
    `rng` does not depend on them.
    """
    uniform = rng.random_sample((3, n))
    dy, dx = (uniform[:2] * (2 * shift + 1)).astype(np.int64)
    return dy, dx, (uniform[2] < 0.5) & flip


def crop_flip(
    padded: torch.Tensor,
    index: torch.Tensor,
    dy: torch.Tensor,
    dx: torch.Tensor,
    flip: torch.Tensor,
    size: tuple[int, int],
) -> torch.Tensor:
    """Crops of `size` (H, W) from the images `index`, mirrored left to right where `flip`.

    padded (M, H+2·shift, W+2·shift, C) contiguous; index, dy, dx (B,) int64; flip (B,) bool. Returns (B, H, W, C).
    Image b is `padded[index[b], dy[b] : dy[b] + H, dx[b] : dx[b] + W]`, its columns reversed where flip[b].
    """
    height, width = size
    row = torch.arange(height, device=padded.device)
    column = torch.arange(width, device=padded.device)
    row = (index * padded.shape[1] + dy)[:, None] + row  # (B, H), counted over all images
    column = dx[:, None] + torch.where(flip[:, None], width - 1 - column, column)  # (B, W)
    pixel = row[:, :, None] * padded.shape[2] + column[:, None, :]  # (B, H, W)
    # index_select copies whole pixels: on the CPU three times as fast as padded[index, row, column]
    picked = padded.view(-1, padded.shape[3]).index_select(0, pixel.view(-1))  # (B·H·W, C)
    return picked.view(*pixel.shape, padded.shape[3])


def scale(images: torch.Tensor, mean: torch.Tensor | None = None, std: torch.Tensor | None = None) -> torch.Tensor:
    """(B, H, W, C) uint8 → (B, C, H, W) float32 in channels_last memory.

    x/128 - 1 as the official code, or (x/255 - mean) / std with `mean` and `std` (C,).
    """
    x = images.permute(0, 3, 1, 2).float()  # (B, C, H, W); the bytes stay in NHWC order, which is channels_last
    if mean is None or std is None:
        return x / 128 - 1
    return (x / 255 - mean[:, None, None]) / std[:, None, None]


def channel_statistics(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and (population) standard deviation of x/255 per channel of (N, H, W, C) uint8, each (C,) float32."""
    # 256 possible values: exact counts of each instead of a long floating-point sum
    counts = torch.stack([channel.reshape(-1).bincount(minlength=256) for channel in images.unbind(3)]).double()
    share = counts / counts.sum(1, keepdim=True)  # (C, 256)
    value = torch.arange(256, dtype=torch.float64, device=images.device) / 255
    mean = share @ value  # (C,)
    variance = (share * (value - mean[:, None]) ** 2).sum(1)
    return mean.float(), variance.sqrt().float()
