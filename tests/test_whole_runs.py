"""A whole run of each engine against a loop in plain torch: what `train`, not only its step, takes from the settings.

tanh stands for ReLU, whose corners would make rounding grow.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_streaming import CLASSES, prepared, settings  # noqa: F401 - a fixture
from torch import Tensor

from cbl import class_balanced_weights, config, data, models, records
from cbl.data import index
from cbl.data import streaming as loading
from cbl.engine import job as resident_job
from cbl.engine import processes, recipe, resident, streaming


def focal(logits: Tensor, target: Tensor, alpha: Tensor, gamma: float) -> Tensor:
    p = torch.sigmoid(torch.where(F.one_hot(target, logits.shape[1]) > 0, logits, -logits))
    return (alpha[target][:, None] * -((1 - p) ** gamma) * p.log()).sum() / len(target)


def update(optimizer: torch.optim.Optimizer, rate: float, loss: Tensor) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_a_run_on_a_small_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda runs: 1)
    monkeypatch.setattr(F, "relu", torch.tanh)
    values: dict[str, Any] = {
        "dataset": {"name": "digits_lt", "imbalance_factor": 20, "flip": True, "subset_seed": 3},
        "model": {"depth": 8},
        "loss": {"kind": "focal", "gamma": 2.0, "beta": 0.99},
        "recipe": {"epochs": 2, "batch_size": 64, "momentum": 0.8, "warmup_epochs": 0.5, "milestones": [1.5]},
        "engine": {"device": "cpu", "eval_every": 1},
        "tracking": {"mode": "off"},
        "seed": 5,
        "output_dir": str(tmp_path),
    }
    run = config.from_mapping(values)
    (record,) = resident.train([run])
    rows = records.read_metrics(records.folder_of(run))

    images = data.load(run.dataset)
    n = len(images.subset)
    model = models.resnet_cifar(8, in_channels=1, prior_bias=True, seed=5)
    rest = [p for p in model.parameters() if p is not model.fc.bias]
    groups = [{"params": rest, "weight_decay": 2e-4}, {"params": [model.fc.bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.8)
    alpha = class_balanced_weights(images.counts, 0.99).float()
    stream = recipe.Stream(n, 64, 5, "shuffle", 1, True, np.arange(n))
    drawn = np.concatenate([stream.block(k) for k in range(2)], axis=1)
    losses, rates = [], []
    for step in range(2 * n // 64):
        kept, dy, dx, flip = drawn[:, 64 * step : 64 * (step + 1)]
        batch = []
        for i, y, x, flipped in zip(images.subset[kept], dy, dx, flip, strict=True):
            crop = np.pad(images.train_images[i, :, :, 0].numpy(), 1)[y : y + 8, x : x + 8]
            batch.append(crop[:, ::-1] if flipped else crop)
        logits = model(torch.from_numpy(np.stack(batch).astype(np.float32))[:, None] / 128 - 1)
        loss = focal(logits, images.train_labels[images.subset[kept]], alpha, 2.0)
        epoch = step * 64 / n
        rates.append(0.1 * min(1, epoch / 0.5) * (0.01 if epoch >= 1.5 else 1))
        update(optimizer, rates[-1], loss)
        losses.append(loss.item())

    ends = [n // 64, 2 * n // 64]
    assert [row["step"] for row in rows] == ends
    assert [row["epoch"] for row in rows] == [end * 64 / n for end in ends]
    assert [row["lr"] for row in rows] == pytest.approx([rates[end - 1] for end in ends])
    means = [np.mean(losses[: ends[0]]), np.mean(losses[ends[0] :])]
    assert [row["train_loss"] for row in rows] == pytest.approx(means, rel=1e-4)
    weights = torch.load(records.folder_of(run) / "model.pt", weights_only=True)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-2, atol=1e-3, msg=name)
    model.eval()
    wrong = model(images.test_images.permute(0, 3, 1, 2).float() / 128 - 1).argmax(1) != images.test_labels
    assert record["error_last"] == pytest.approx(100 * wrong.double().mean().item(), abs=0.5)


def test_a_run_on_a_large_set(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(F, "relu", torch.tanh)
    run = settings(prepared, tmp_path, recipe__input_scaling="symmetric")  # focal, gamma 0.5, beta 0.99
    run = config.from_mapping(config.to_mapping(run) | {"seed": 5})
    assert streaming.train(run)["status"] == "done"
    rows = records.read_metrics(records.folder_of(run))

    train = index.read(prepared, "inaturalist2018", "train")
    model = models.resnet_cifar(8, num_classes=CLASSES, prior_bias=True, seed=5)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 1e-4},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    alpha = class_balanced_weights(train.counts.tolist(), 0.99).float()
    decoder, losses, rates = loading.Decoder(train.images, 16), [], []
    for step in range(12):
        epoch, at = divmod(step, 6)
        numbers = loading.order(len(train), 5, epoch)[8 * at : 8 * at + 8]
        images = torch.stack([decoder.read(loading.Request(i, train.paths[i], 0, (5, epoch))) for i in numbers])
        loss = focal(
            model(images.permute(0, 3, 1, 2).float() / 128 - 1), torch.from_numpy(train.labels[numbers]), alpha, 0.5
        )
        rates.append(0.05 * min(1, step / 6) * (0.1 if step >= 9 else 1))
        update(optimizer, rates[-1], loss)
        losses.append(loss.item())
    assert [row["lr"] for row in rows] == pytest.approx([rates[5], rates[11]])
    assert [row["train_loss"] for row in rows] == pytest.approx([np.mean(losses[:6]), np.mean(losses[6:])], rel=1e-4)


def test_bf16_is_computed_in_bf16(prepared: Path, tmp_path: Path) -> None:  # noqa: F811
    seen = []
    values: dict[str, Any] = {"dataset": {"name": "digits_lt"}, "model": {"depth": 8}, "recipe": {"batch_size": 64}}
    small = resident_job.prepare(
        config.from_mapping(values | {"engine": {"device": "cpu", "dtype": "bf16"}}), torch.device("cpu")
    )
    small.model.layer1[0].conv1.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    small.step.load(np.zeros((1, 4, 64)), np.zeros(1))
    small.step()
    small.predict()
    run = settings(prepared, tmp_path, engine__dtype="bf16")
    large = streaming.prepare(run, streaming.World(0, 1, torch.device("cpu")))
    large.model.layer1[0].conv1.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    large.step(next(large.batches(0, 0)), rate=0.1)
    streaming.evaluate(run, large)
    assert set(seen) == {torch.bfloat16} and len(seen) >= 4


def test_the_large_network_is_built_as_asked() -> None:
    built = models.build(config.Model(name="resnet_imagenet", depth=50, prior_bias=True), 6, 3, seed=1).state_dict()
    asked = models.resnet_imagenet(50, 6, prior_bias=True, seed=1).state_dict()
    assert all(map(torch.equal, built.values(), asked.values()))


def test_what_a_seed_means_for_the_first_weights_never_changes() -> None:
    first = models.resnet_cifar(8, seed=0).conv1.weight[0, 0, 0].tolist()
    assert first == pytest.approx([-0.00140241, 0.10048509, -0.15417048], rel=1e-5)
    first = models.resnet_imagenet(50, 2, seed=0).conv1.weight[0, 0, 0, :3].tolist()
    assert first == pytest.approx([-0.10556503, -0.10805172, -0.02349565], rel=1e-5)
