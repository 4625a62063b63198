"""A run made ready on its device: data, network, optimizer, step and evaluation."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from cbl import config, data, models
from cbl.data import augment
from cbl.engine import evaluate, recipe
from cbl.engine.device import device_name, require_compiler
from cbl.engine.step import Scaling, Step, capture, sgd
from cbl.errors import UserError
from cbl.losses import ClassBalancedLoss


@dataclasses.dataclass
class Job:
    """A run's data, network and step, ready on the device."""

    images: data.Data
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    stream: recipe.Stream
    step: Step
    advance: Callable[[], None]  # one training step: `step`, or its replay
    predict: Callable[[], torch.Tensor]  # () -> float32 logits (n_test, C)
    test_labels: torch.Tensor  # (n_test,) on the device
    last_step: int  # steps when the run is over
    facts: dict[str, Any]  # what they add to the record


def prepare(run: config.Run, device: torch.device, images: data.Data | None = None) -> Job:
    """Reads the data (once per process) unless given, builds the network from the seed, moves both to the device."""
    images = data.load(run.dataset) if images is None else images
    height, width, channels = images.train_images.shape[1:]
    classes, n = len(images.counts), len(images.subset)
    last_step = min(recipe.total_steps(run.recipe, n), run.engine.max_steps or sys.maxsize)
    if last_step == 0:
        raise UserError(
            f"recipe.epochs={run.recipe.epochs} with {n} images make no step of recipe.batch_size="
            f"{run.recipe.batch_size}: lower the batch size or train longer."
        )
    model = models.build(run.model, classes, channels, run.seed)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
    loss = ClassBalancedLoss(
        torch.from_numpy(images.counts), run.loss.kind, run.loss.beta, run.loss.gamma, run.loss.reduction
    )
    optimizer = sgd(recipe.parameter_groups(model, run.recipe, run.loss.kind), run.recipe, device)
    shift, dtype, batch_size = run.dataset.shift, run.engine.dtype, run.recipe.batch_size
    scaling = Scaling(images.train_images[images.subset] if run.recipe.input_scaling == "mean_std" else None, device)
    stream = recipe.Stream(
        n, batch_size, run.seed, run.recipe.image_order, shift, run.dataset.flip, images.record_order
    )
    resident = _resident(images.train_images, shift, device)
    network: torch.nn.Module = model
    augmented: Callable[[torch.Tensor], torch.Tensor] | None = None
    if device.type == "cuda" and run.engine.fused:
        at_once = {"recipe.batch_size": batch_size}
        at_once["engine.eval_batch"] = min(run.engine.eval_batch, len(images.test_labels))
        fused = _fused(model, (height, width), at_once)
        network = fused.Fused(model, dtype)
        mean, std = scaling.mean, scaling.std
        augmented = functools.partial(fused.augmented, resident, size=(height, width), mean=mean, std=std)
    trained = network  # its evaluations are few, and would be compiled once more
    if run.engine.compile:
        require_compiler(device)
        trained = torch.compile(network, dynamic=False)  # type: ignore[assignment]
    step = Step(
        trained,
        loss.to(device),
        optimizer,
        resident,
        images.train_labels.to(device),
        scaling,
        (height, width),
        batch_size,
        longest=-(-n // batch_size),
        dtype=dtype,
        augmented=augmented,
    )
    test_images = _resident(images.test_images, 0, device)

    def predict() -> torch.Tensor:
        return evaluate.predict(network, test_images, scaling, run.engine.eval_batch, dtype)

    advance: Callable[[], None] = step
    if device.type == "cuda" and run.engine.capture:
        momentum = [kept["momentum_buffer"] for kept in optimizer.state.values()]
        changed = [*model.parameters(), *model.buffers(), *momentum, step.at, step.losses]
        advance = capture(step, changed)
        predict = capture(predict, [])
    return Job(
        images=images,
        model=model,
        optimizer=optimizer,
        stream=stream,
        step=step,
        advance=advance,
        predict=predict,
        test_labels=images.test_labels.to(device),
        last_step=last_step,
        facts={
            "n_train": n,
            "n_test": len(images.test_labels),
            "class_counts": images.counts.tolist(),
            "class_weights": loss.weights.tolist(),
            "class_names": list(images.class_names),
            "subset_hash": images.subset_hash,
            **({"content_hash": images.content} if images.content else {}),
            "parameters": sum(p.numel() for p in model.parameters()),
            "device": device_name(device)
            + (", fused kernels" if augmented else "")
            + (", torch.compile" if run.engine.compile else ""),  # both round differently
        },
    )


def kernels() -> ModuleType:
    """The module of the kernels of our own; raises `UserError` without the Triton that they need."""
    try:
        from cbl.engine import fused
    except ImportError as error:
        raise UserError(
            f"engine.fused=true needs Triton 3.6 or newer ({error}): upgrade torch to 2.11 or newer, built for CUDA, "
            "which brings it, or set engine.fused=false."
        ) from None
    return fused


def _fused(model: Any, size: tuple[int, int], at_once: dict[str, int]) -> ModuleType:
    """`kernels`; refuses a `model` that they do not compute, and more images at once, by key, than they can."""
    fused = kernels()
    if not fused.supports(model, size):
        raise UserError(
            f"engine.fused=true computes images of 1 or 3 channels whose sides 4 divides, at most 124 pixels wide, and "
            f"no model.shortcut=projection, not this network on {size[0]} x {size[1]} pixels: set engine.fused=false."
        )
    most = fused.most_images(model, size)
    for key, images in at_once.items():
        if images > most:
            raise UserError(
                f"{key} makes {images:,} images of {size[0]} x {size[1]} at once, and engine.fused=true computes at "
                f"most {most:,}: lower it, or set engine.fused=false."
            )
    return fused


@functools.lru_cache(maxsize=8)
def _resident(images: torch.Tensor, shift: int, device: torch.device) -> torch.Tensor:
    """The padded images on the device; the runs of a sweep share one copy (a tensor's hash is its identity)."""
    return augment.pad(images, shift).to(device)
