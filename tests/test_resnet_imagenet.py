"""The large networks: torchvision's architecture, started as the authors' TPU code starts it."""

import math

import pytest
import torch
from torch import nn

from cbl import config
from cbl.engine import recipe
from cbl.models import resnet_imagenet


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return resnet_imagenet(50, num_classes=8142, prior_bias=True, seed=0)


def test_parameters_of_the_published_networks(model: nn.Module) -> None:
    """25,557,032 and 44,549,160 at 1,000 classes in torchvision's own table of weights."""
    dense = 2048 * 8142 + 8142
    assert sum(p.numel() for p in model.parameters()) - dense == 25_557_032 - (2048 * 1000 + 1000)
    deeper = resnet_imagenet(101, num_classes=2, seed=0)
    assert sum(p.numel() for p in deeper.parameters()) == 44_549_160 - 2049 * 998
    assert [len(stage) for stage in (deeper.layer1, deeper.layer2, deeper.layer3, deeper.layer4)] == [3, 4, 23, 3]


def test_weights_load_into_plain_torchvision_and_agree(model: nn.Module) -> None:
    from cbl.vision import torchvision

    plain = torchvision.models.resnet50(weights=None, num_classes=8142)
    plain.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(plain.eval()(images), model.eval()(images))


def test_stride_is_in_the_3x3_convolution(model: nn.Module) -> None:
    for stage in (model.layer2, model.layer3, model.layer4):
        first = stage[0]
        assert (first.conv1.stride, first.conv2.stride, first.conv3.stride) == ((1, 1), (2, 2), (1, 1))
        assert first.conv2.kernel_size == (3, 3) and first.downsample[0].stride == (2, 2)  # a projection shortcut
        assert all(block.conv2.stride == (1, 1) and block.downsample is None for block in stage[1:])


def test_every_block_begins_as_its_shortcut(model: nn.Module) -> None:
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
    assert len(blocks) == 16
    for block in blocks:
        assert not block.bn3.weight.any() and bool((block.bn1.weight == 1).all())
    block = blocks[1].eval()
    x = torch.rand(1, 256, 4, 4)
    assert torch.equal(block(x), x)


def test_initial_weights(model: nn.Module) -> None:
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert model.fc.bias.unique().tolist() == pytest.approx([-math.log(8141)])  # every sigmoid starts at 1/C
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        fan_in = conv.weight[0].numel()
        std = conv.weight.std().item()
        assert std == pytest.approx(fan_in**-0.5, rel=0.05)
        assert conv.weight.abs().max().item() <= 2 * fan_in**-0.5 / 0.8796 + 1e-6  # cut at two deviations
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.momentum, m.eps) for m in norms} == {(0.1, 1e-5)}


def test_weights_are_a_function_of_the_seed() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    one = resnet_imagenet(50, num_classes=2, seed=3)
    assert torch.equal(torch.rand(1), expected)  # nobody else's random numbers are used up
    other = resnet_imagenet(50, num_classes=2, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert not one.fc.bias.any()  # without prior bias
    assert not torch.equal(one.conv1.weight, resnet_imagenet(50, num_classes=2, seed=4).conv1.weight)


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"depth must be 50, 101 or 152, got 32\."):
        resnet_imagenet(32)
    with pytest.raises(ValueError, match=r"num_classes must be at least 2, got 1\."):
        resnet_imagenet(50, num_classes=1)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "focal"])
def test_neither_batch_norm_nor_the_last_bias_decays(model: nn.Module, kind: str) -> None:
    settings = config.Recipe(weight_decay=1e-4, decay_scope="not_bn_not_last_bias")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {
        group["weight_decay"]: {names[id(p)] for p in group["params"]}
        for group in recipe.parameter_groups(model, settings, kind)
    }
    weights = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert groups == {1e-4: weights, 0.0: set(names.values()) - weights}
