"""The CIFAR ResNet of the paper's experiments (ResNet-32), with the authors' choices as defaults.

Post-activation ("v1") residual network of He et al. (2016), section 4.2: a 3×3 stem, three stages of n basic blocks
with 16, 32 and 64 channels, global average pooling, one dense layer; depth = 6n + 2.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHORTCUTS = ("mean_pool", "strided", "projection")
INITS = ("glorot", "kaiming")


def resnet_cifar(
    depth: int = 32,
    num_classes: int = 10,
    in_channels: int = 3,
    prior_bias: bool = False,
    shortcut: str = "mean_pool",
    init: str = "glorot",
    seed: int | None = None,
) -> "ResNetCifar":
    """A CIFAR ResNet of depth 6n + 2: (B, in_channels, H, W) → logits (B, num_classes), for images of any size.

    ResNet-32 has 464,154 parameters at 10 classes and 470,004 at 100.
    prior_bias: start the dense bias at -log(C - 1) and not at 0, so that every sigmoid starts at 1/C (paper, section
        5.2; for sigmoid and focal losses).
    shortcut: how the identity passes a stage change. "mean_pool" averages 2×2 pixels (the authors' code), "strided"
        takes every second pixel (most PyTorch ports), both pad the channels with zeros before and after; "projection"
        is a 1×1 convolution and batch normalisation.
    init: of convolutions and dense weight. "glorot" is Glorot-uniform (the authors' code), "kaiming" is Kaiming-normal
        over the fan-in (the ports that follow LDAM-DRW). Batch normalisation starts at scale 1, shift 0 in both.
    seed: of the initial weights, which are drawn on the CPU: one seed, the same weights on every device. None draws
        from torch's global generator.
    Raises ValueError for a depth that is not 6n + 2, fewer than 2 classes, or an unknown shortcut or init.
    """
    if depth < 8 or depth % 6 != 2:
        below = depth - (depth - 2) % 6
        nearest = f"{below} and {below + 6}" if below >= 8 else "8 and 14"
        raise ValueError(f"depth must be 6n + 2 with n >= 1, got {depth}; the nearest are {nearest}.")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
    if shortcut not in SHORTCUTS:
        raise ValueError(f"shortcut must be one of {', '.join(SHORTCUTS)}, got {shortcut!r}.")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}.")
    with torch.device("cpu"):  # whatever the default device is
        model = ResNetCifar(depth, num_classes, in_channels, shortcut)
        initialise(model, init, prior_bias, seed)
    return model


@torch.no_grad()
def initialise(model: "ResNetCifar", init: str, prior_bias: bool, seed: int | None) -> None:
    """Draw all weights of convolutions and the dense layer, in the order of the modules, and set the dense bias."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            if init == "glorot":
                nn.init.xavier_uniform_(module.weight, generator=generator)
            else:
                nn.init.kaiming_normal_(module.weight, generator=generator)
    nn.init.constant_(model.fc.bias, -math.log(model.fc.out_features - 1) if prior_bias else 0.0)


class ResNetCifar(nn.Module):
    """The network of `resnet_cifar`, which also initialises it."""

    def __init__(self, depth: int, num_classes: int, in_channels: int, shortcut: str) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = conv3x3(in_channels, 16, stride=1)
        self.bn1 = BatchNorm(16)
        self.layer1 = stage(16, 16, blocks, shortcut)
        self.layer2 = stage(16, 32, blocks, shortcut)
        self.layer3 = stage(32, 64, blocks, shortcut)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))  # (B, 16, H, W)
        x = self.layer1(x)  # (B, 16, H, W)
        x = self.layer2(x)  # (B, 32, ceil(H/2), ceil(W/2))
        x = self.layer3(x)  # (B, 64, ceil(H/4), ceil(W/4))
        return self.fc(x.mean(dim=(2, 3)))  # (B, num_classes)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut; halves the image when it changes the number of channels."""

    def __init__(self, channels_in: int, channels_out: int, shortcut: str) -> None:
        super().__init__()
        stride = 1 if channels_in == channels_out else 2
        self.conv1 = conv3x3(channels_in, channels_out, stride)
        self.bn1 = BatchNorm(channels_out)
        self.conv2 = conv3x3(channels_out, channels_out, stride=1)
        self.bn2 = BatchNorm(channels_out)
        self.shortcut = make_shortcut(channels_in, channels_out, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class PoolAndPad(nn.Module):
    """Shortcut without parameters: halve the image by mean or by stride, pad channels with zeros before and after."""

    def __init__(self, added_channels: int, shortcut: str) -> None:
        super().__init__()
        self.each_side = added_channels // 2
        self.mean = shortcut == "mean_pool"

    def forward(self, x: Tensor) -> Tensor:
        # ceil_mode: at an odd size the last row and column count, as they do in the block's strided convolution.
        x = F.avg_pool2d(x, 2, ceil_mode=True) if self.mean else x[:, :, ::2, ::2]
        return F.pad(x, (0, 0, 0, 0, self.each_side, self.each_side))  # (B, C_out, ceil(H/2), ceil(W/2))


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation without its counter of batches.

    At a fixed momentum nothing reads the counter, and it would cost one kernel launch per layer and step.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-5, momentum=0.1)
        self.num_batches_tracked = None

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *rest: Any
    ) -> None:
        # A plain dict of tensors carries no version, and the base class would add the counter to it: an unexpected key.
        super()._load_from_state_dict(state_dict, prefix, {**local_metadata, "version": 2}, *rest)


def conv3x3(channels_in: int, channels_out: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=stride, padding=1, bias=False)


def stage(channels_in: int, channels_out: int, blocks: int, shortcut: str) -> nn.Sequential:
    rest = [BasicBlock(channels_out, channels_out, shortcut) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(channels_in, channels_out, shortcut), *rest)


def make_shortcut(channels_in: int, channels_out: int, shortcut: str) -> nn.Module:
    if channels_in == channels_out:
        return nn.Identity()
    if shortcut == "projection":
        conv = nn.Conv2d(channels_in, channels_out, kernel_size=1, stride=2, bias=False)
        return nn.Sequential(conv, BatchNorm(channels_out))
    return PoolAndPad(channels_out - channels_in, shortcut)
