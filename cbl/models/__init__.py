"""The networks of the paper, one file per family."""

from cbl.models.resnet_cifar import resnet_cifar
from cbl.models.resnet_imagenet import resnet_imagenet

__all__ = ["resnet_cifar", "resnet_imagenet"]
