"""The networks of the paper, one file per family."""

from torch import nn

from cbl import config
from cbl.models.resnet_cifar import resnet_cifar
from cbl.models.resnet_imagenet import resnet_imagenet

__all__ = ["build", "resnet_cifar", "resnet_imagenet"]


def build(model: config.Model, classes: int, channels: int, seed: int) -> nn.Module:
    """The network that a configuration describes, on the CPU: (B, channels, H, W) -> (B, classes).

    Raises `ValueError` as its family does.
    """
    bias = bool(model.prior_bias)
    if model.name == "resnet_imagenet":
        return resnet_imagenet(model.depth, classes, bias, seed)
    return resnet_cifar(model.depth, classes, channels, bias, model.shortcut, model.init, seed)
