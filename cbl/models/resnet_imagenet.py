"""torchvision's ResNet-50, -101 and -152 as the authors' TPU code starts them: the networks of Table 3."""

import math

import torch
from torch import nn


def resnet_imagenet(
    depth: int = 50, num_classes: int = 1000, prior_bias: bool = False, seed: int | None = None
) -> nn.Module:
    """A torchvision ResNet: (B, 3, H, W) → logits (B, num_classes), for images of any size; no weights are downloaded.

    The architecture and the names of the weights are torchvision's: bottleneck blocks with the stride in the 3×3
    convolution, projection shortcuts, batch norm with momentum 0.1 and eps 1e-5. What training starts from is the
    authors': the scale of each block's last batch norm 0, so that every block begins as its shortcut; the dense weight
    N(0, 0.01); convolutions from a normal distribution cut at two deviations, with variance 1 / fan-in.

    depth: 50, 101 or 152.
    prior_bias: start the dense bias at -log(C - 1) and not at 0, so that every sigmoid starts at 1/C (paper, section
        5.2; for sigmoid and focal losses).
    seed: of the initial weights, which are drawn on the CPU: one seed, the same weights on every device. None draws
        from torch's global generator.
    Raises ValueError for another depth and for fewer than 2 classes.
    """
    from cbl.vision import torchvision  # here, because digits and CIFAR do without torchvision

    builders = {
        50: torchvision.models.resnet50,
        101: torchvision.models.resnet101,
        152: torchvision.models.resnet152,
    }
    if depth not in builders:
        raise ValueError(f"depth must be 50, 101 or 152, got {depth}.")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
    # fork_rng: torchvision draws weights as well, which are replaced; nobody else's numbers should depend on that
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        model = builders[depth](weights=None, num_classes=num_classes, zero_init_residual=True)
    initialise(model, prior_bias, seed)
    return model


@torch.no_grad()
def initialise(model: nn.Module, prior_bias: bool, seed: int | None) -> None:
    """Draw all weights of convolutions and the dense layer, in the order of the modules, and set the dense bias."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            # TensorFlow's variance scaling: the deviation before the cut that leaves 1 / fan-in after it
            std = math.sqrt(1 / fan_in) / 0.87962566103423978
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01, generator=generator)
            nn.init.constant_(module.bias, -math.log(module.out_features - 1) if prior_bias else 0.0)
