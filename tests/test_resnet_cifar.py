"""The CIFAR ResNet: its size, its shortcuts, its initial weights, and what training asks of it."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cbl.models import resnet_cifar

SHORTCUTS = ("mean_pool", "strided", "projection")


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def projection_parameters() -> int:
    """Two 1×1 convolutions, 16 → 32 → 64, each with scale and shift of a batch normalisation."""
    return 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        ({}, 464_154),
        ({"num_classes": 20}, 464_804),
        ({"num_classes": 100}, 470_004),
        ({"shortcut": "strided"}, 464_154),
        ({"shortcut": "projection"}, 464_154 + projection_parameters()),
        ({"in_channels": 1}, 464_154 - 2 * 9 * 16),
    ],
)
def test_parameter_count(arguments, parameters):
    assert parameters_of(resnet_cifar(**arguments)) == parameters


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 56])
def test_depth_counts_convolutions_and_the_dense_layer(depth):
    modules = list(resnet_cifar(depth).modules())
    assert sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in modules) == depth
    norms = [module for module in modules if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum, norm.affine) for norm in norms} == {(1e-5, 0.1, True)}
    assert not any(module.bias is not None for module in modules if isinstance(module, nn.Conv2d))


@pytest.mark.parametrize("depth", [-1, 0, 2, 7, 9, 30, 33, 34])
def test_a_depth_that_is_not_6n_plus_2_is_refused_with_its_neighbours(depth):
    nearest = {30: "26 and 32", 33: "32 and 38", 34: "32 and 38", 9: "8 and 14"}.get(depth, "8 and 14")
    with pytest.raises(ValueError, match=f"got {depth}; the nearest are {nearest}"):
        resnet_cifar(depth)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"num_classes": 1}, "got 1"), ({"shortcut": "A"}, "'A'"), ({"init": "xavier"}, "'xavier'")],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        resnet_cifar(8, **arguments)


# ---- the forward pass


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (1, 7, 7), (1, 28, 28), (3, 32, 32), (3, 9, 14)])
def test_images_of_any_size(shortcut, channels, height, width):
    model = resnet_cifar(8, num_classes=5, in_channels=channels, shortcut=shortcut, seed=0)
    logits = model(torch.randn(4, channels, height, width))
    assert logits.shape == (4, 5)
    assert logits.isfinite().all()


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("shortcut", ["mean_pool", "strided"])
def test_shortcut_without_parameters_pixel_by_pixel(shortcut, size):
    model = resnet_cifar(8, shortcut=shortcut)
    x = torch.randn(2, 16, size, size, generator=torch.Generator().manual_seed(0))
    expected = np.zeros((2, 32, (size + 1) // 2, (size + 1) // 2), dtype=np.float32)  # 8 channels of zeros on each side
    for row in range(expected.shape[2]):
        for column in range(expected.shape[3]):
            window = x.numpy()[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            pixel = window.mean(axis=(2, 3)) if shortcut == "mean_pool" else window[:, :, 0, 0]
            expected[:, 8:24, row, column] = pixel
    actual = model.layer2[0].shortcut(x)
    assert not list(model.layer2[0].shortcut.parameters())
    torch.testing.assert_close(actual, torch.from_numpy(expected))


def test_block_is_the_post_activation_one():
    """ReLU after the sum: a block whose convolutions are zero is ReLU of its shortcut."""
    block = resnet_cifar(8).layer1[0].eval()
    with torch.no_grad():
        block.conv2.weight.zero_()
        x = torch.randn(1, 16, 4, 4)
        torch.testing.assert_close(block(x), F.relu(x))


def test_widths_and_image_sizes_of_the_stages():
    model = resnet_cifar(14, seed=0)
    shapes = []
    for layer in (model.layer1, model.layer2, model.layer3):
        layer.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    model(torch.randn(1, 3, 32, 32))
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_channels_last_gives_the_same_numbers(shortcut):
    model = resnet_cifar(8, shortcut=shortcut, seed=0)
    x = torch.randn(4, 3, 32, 32)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    hidden = model.layer2(torch.randn(4, 16, 32, 32).to(memory_format=torch.channels_last))
    assert hidden.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)


# ---- initial weights


def test_glorot_uniform_everywhere_and_zero_bias():
    for module in resnet_cifar(20, num_classes=100, seed=1).modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            pixels = module.weight[0, 0].numel()
            bound = math.sqrt(6 / (pixels * (module.weight.shape[0] + module.weight.shape[1])))
            assert 0.95 * bound < module.weight.abs().max() <= bound
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.12)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    assert (module.bias == 0).all()  # the last module is the dense layer


def test_kaiming_normal_over_the_fan_in():
    model = resnet_cifar(20, num_classes=100, init="kaiming", seed=1)
    for weight in (model.layer3[0].conv1.weight, model.layer3[1].conv2.weight, model.fc.weight):
        assert weight.std().item() == pytest.approx(math.sqrt(2 / weight[0].numel()), rel=0.03)
        assert weight.abs().max() > 3 * weight.std()  # normal: a uniform one ends at 1.7
    assert (model.fc.bias == 0).all()


@pytest.mark.parametrize(("classes", "bias"), [(10, -2.1972), (20, -2.9444), (100, -4.5951)])
def test_prior_bias(classes, bias):
    model = resnet_cifar(8, num_classes=classes, prior_bias=True)
    assert model.fc.bias.tolist() == pytest.approx([bias] * classes, abs=5e-5)
    torch.testing.assert_close(model.fc.bias.sigmoid(), torch.full((classes,), 1 / classes))


def test_a_seed_gives_the_same_weights_whatever_happened_before():
    first = resnet_cifar(8, seed=3).state_dict()
    torch.manual_seed(99)
    second = resnet_cifar(8, seed=3).state_dict()
    other = resnet_cifar(8, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_without_a_seed_the_global_generator_decides():
    torch.manual_seed(5)
    first = resnet_cifar(8).conv1.weight
    second = resnet_cifar(8).conv1.weight
    torch.manual_seed(5)
    assert torch.equal(resnet_cifar(8).conv1.weight, first)
    assert not torch.equal(first, second)


def test_weights_are_drawn_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        model = resnet_cifar(8, seed=3)
    assert torch.equal(model.conv1.weight, resnet_cifar(8, seed=3).conv1.weight)


# ---- training


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_gradient_reaches_every_parameter(shortcut):
    model = resnet_cifar(14, in_channels=1, shortcut=shortcut, seed=0)
    F.cross_entropy(model(torch.randn(32, 1, 8, 8)), torch.arange(32) % 10).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_it_learns_a_batch_by_heart():
    generator = torch.Generator().manual_seed(0)
    model = resnet_cifar(8, in_channels=1, seed=0)
    images, target = torch.randn(30, 1, 8, 8, generator=generator), torch.arange(30) % 10
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(40):
        optimiser.zero_grad()
        F.cross_entropy(model(images), target).backward()
        optimiser.step()
    assert (model(images).argmax(1) == target).all()


@pytest.mark.parametrize("as_plain_dict", [False, True])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_state_dict_round_trips_strictly(shortcut, as_plain_dict, tmp_path):
    model = resnet_cifar(8, shortcut=shortcut, seed=0)
    model(torch.randn(8, 3, 32, 32))  # moves the running means
    state = model.state_dict()
    assert not any("num_batches_tracked" in name for name in state)
    torch.save({name: value for name, value in state.items()} if as_plain_dict else state, tmp_path / "model.pt")
    loaded = resnet_cifar(8, shortcut=shortcut, seed=1)
    loaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(x), model.eval()(x))


def test_a_foreign_key_is_still_refused():
    model = resnet_cifar(8)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**model.state_dict(), "bn1.other": torch.zeros(1)}, strict=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({k: v for k, v in model.state_dict().items() if k != "bn1.running_var"}, strict=True)


def test_running_statistics_follow_the_batches():
    norm = resnet_cifar(8).bn1
    x = 3 + 2 * torch.randn(64, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    norm(x)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.var((0, 2, 3)))


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_compiles_without_a_graph_break(shortcut):
    torch.compiler.reset()
    model = resnet_cifar(8, in_channels=1, shortcut=shortcut, seed=0)
    x = torch.randn(4, 1, 8, 8)
    expected = model(x)
    model.load_state_dict(resnet_cifar(8, in_channels=1, shortcut=shortcut, seed=0).state_dict())
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
