"""What `scripts/benchmark.py` compares: our training step in its forms, and the loops of others, as functions to call.

Each maker returns a `Unit`: a call trains for some steps and returns the images that took part in them.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler

from cbl import ClassBalancedLoss, config, data
from cbl.cores import usable_cores
from cbl.engine import estimate, recipe, resident, streaming, synthetic
from cbl.engine.job import Job, prepare
from cbl.engine.micro_batches import CHECK_STEPS
from cbl.engine.progress import Display
from cbl.engine.step import capture, precision
from cbl.models import resnet_cifar
from cbl.models.resnet_cifar import PoolAndPad
from cbl.tracking import Tracker

Unit = Callable[[], int]


@dataclasses.dataclass(frozen=True)
class Size:
    """What is trained, and how much of it is one unit."""

    device: torch.device
    depth: int = 32
    batch_size: int = 128
    steps: int = 97  # of an epoch, and of a unit; 97 is CIFAR-10 at imbalance factor 100
    n_test: int = 10_000  # test images
    fused: bool = False  # our step in the kernels of cbl/engine/fused.py

    @property
    def images(self) -> int:
        """Of a unit."""
        return self.steps * self.batch_size


def make_run(size: Size, dtype: str, **changes: Any) -> config.Run:
    """A run without end, evaluation or checkpoint; `changes` as `model__depth=8`."""
    values: dict[str, dict[str, Any]] = {
        "model": {"depth": size.depth},
        "recipe": {"batch_size": size.batch_size, "epochs": 10**6, "learning_rate": 0.01, "warmup_epochs": 0},
        "engine": {
            "device": str(size.device),
            "dtype": dtype,
            "eval_every": 10**6,
            "checkpoint_seconds": 1e9,
            "fused": size.fused,
        },
        "tracking": {"mode": "off"},
    }
    values["recipe"]["milestones"] = []
    for key, value in changes.items():
        group, _, name = key.partition("__")
        values.setdefault(group, {})[name] = value
    return config.from_mapping(values)


@functools.lru_cache(maxsize=4)
def made_up(classes: int, n: int, n_test: int) -> data.Data:
    """`n` training images at least, shared by all jobs, as the runs of a sweep share theirs."""
    return estimate.made_up(classes, np.full(classes, -(-n // classes)), n_test, (32, 32, 3))


def make_job(size: Size, run: config.Run, classes: int = 10) -> Job:
    return prepare(run, size.device, made_up(classes, size.images, size.n_test))


def repeated(work: Callable[[], Any], times: int, images: int) -> Unit:
    """`work` so many times, in which so many images take part."""

    def unit() -> int:
        for _ in range(times):
            work()
        return images

    return unit


# -- ours --------------------------------------------------------------------------------------------------------------


def lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    model.to(memory_format=layout)  # type: ignore[call-overload]  # torch's annotations do not know it


def steps(size: Size, run: config.Run, job: Job) -> Unit:
    """The training step of `job` over the rows of an epoch."""
    _, plan = next(job.stream.epochs(run.recipe))
    plan = plan[: size.steps]
    rates = np.full(len(plan), 0.01)

    def unit() -> int:
        job.step.load(plan, rates)
        for _ in plan:
            job.advance()
        return size.images

    return unit


def turns(run: config.Run, job: Job, folder: Path) -> Iterator[tuple[int, bool]]:
    """The training loop itself, `resident.fit`, as `resident.train` takes turns with it, without end.

    Plan, steps, guard against NaN, a row of metrics, evaluation where it is due. Gives the images of a turn and whether
    all of an epoch is queued now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {"epoch": 0, "step": 0, "seconds": 0.0, "train_seconds": 0.0, "best_error": None}
    line = Display(bars=False, quiet=True).run("", job.last_step, run.recipe.batch_size)
    fit = resident.fit(run, job, state, folder, line, Tracker(), math.inf)
    n, epoch, before = len(job.images.subset), 0, 0
    for _ in fit:
        whole = line.done > before and line.done == recipe.epoch_steps(run.recipe, n, epoch).stop
        epoch += whole
        yield (line.done - before) * run.recipe.batch_size, whole
        before = line.done


def epochs(lanes: Sequence[tuple[torch.cuda.Stream | None, Iterator[tuple[int, bool]]]], each: int = 1) -> Unit:
    """`each` epochs of every lane, which is a stream and its `turns`; the lanes take turns."""

    def unit() -> int:
        images, left = 0, {number: each for number in range(len(lanes))}
        while left:
            for number in list(left):
                stream, lane = lanes[number]
                with torch.cuda.stream(stream):  # None: the current one
                    queued, whole = next(lane)
                images += queued
                left[number] -= whole
                if not left[number]:
                    del left[number]
        return images

    return unit


def loop(size: Size, dtype: str, folder: Path) -> Unit:
    """What a run does, but for evaluation and checkpoints; replayed on CUDA."""
    run = make_run(size, dtype)
    return epochs([(None, turns(run, make_job(size, run), folder))])


def replayed(size: Size, dtype: str) -> Unit:
    """The step captured as one CUDA graph; eager on the CPU."""
    run = make_run(size, dtype)
    return steps(size, run, make_job(size, run))


def eager(size: Size, dtype: str) -> Unit:
    """The step called as it is."""
    run = make_run(size, dtype, engine__capture=False)
    return steps(size, run, make_job(size, run))


def changed(size: Size, dtype: str, change: Callable[[Job], None]) -> Unit:
    """The step in torch's kernels after `change` of its job; captured on CUDA."""
    size = dataclasses.replace(size, fused=False)
    run = make_run(size, dtype, engine__capture=False)
    job = make_job(size, run)
    change(job)
    if size.device.type == "cuda":
        job.advance = capture(job.step, [])
    return steps(size, run, job)


def nchw(size: Size, dtype: str) -> Unit:
    """Our step with torch's default memory layout in place of channels_last."""

    def change(job: Job) -> None:
        lay_out(job.model, torch.contiguous_format)
        for parameter, kept in job.optimizer.state.items():
            kept["momentum_buffer"] = torch.zeros_like(parameter)
        scaling = job.step.scaling
        job.step.scaling = lambda images: scaling(images).contiguous()  # type: ignore[assignment]

    return changed(size, dtype, change)


def without_onednn(size: Size, dtype: str) -> Unit:
    """Our step with torch's own convolutions on the CPU."""
    step = eager(size, dtype)

    def unit() -> int:
        before = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
        try:
            return step()
        finally:
            torch.backends.mkldnn.enabled = before

    return unit


def compiled(size: Size, dtype: str) -> Unit:
    """Our step with the network through torch.compile."""

    def change(job: Job) -> None:
        job.step.model = torch.compile(job.model)  # type: ignore[assignment]

    return changed(size, dtype, change)


def searched(size: Size, dtype: str) -> Unit:
    """Our step with the convolutions that cuDNN finds fastest by trying."""
    size = dataclasses.replace(size, fused=False)
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        return replayed(size, dtype)
    finally:
        torch.backends.cudnn.benchmark = before


# -- others' -----------------------------------------------------------------------------------------------------------


def train(
    dtype: str, model: nn.Module, loss: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """A step of anybody's loop."""
    with precision(dtype, x.device):
        value = loss(model(x), y)
    with precision(dtype, x.device, autocast=False):
        value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value.detach()


def plain(size: Size, layout: torch.memory_format) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """Network, loss and optimizer as torch has them."""
    model = resnet_cifar(size.depth, seed=0).to(size.device)
    lay_out(model, layout)
    loss = ClassBalancedLoss([1] * 10, "softmax", beta=0).to(size.device)
    return model, loss, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=2e-4)


def bare(size: Size, dtype: str) -> Unit:
    """Forward, loss, backward and update on one fixed batch: what a loop in Python cannot do without."""
    model, loss, optimizer = plain(size, torch.channels_last)
    x = torch.randn(size.batch_size, 3, 32, 32, device=size.device).to(memory_format=torch.channels_last)
    y = torch.arange(size.batch_size, device=size.device) % 10
    return repeated(functools.partial(train, dtype, model, loss, optimizer, x, y), size.steps, size.images)


class Augmented(Dataset):
    """Images as other code of this kind gives them: one by one, through PIL."""

    def __init__(self, images: data.Data) -> None:
        from cbl.vision import torchvision

        known = torchvision.transforms
        self.images, self.labels = images.train_images.numpy(), images.train_labels.tolist()
        self.transform = known.Compose(
            [known.RandomCrop(32, padding=4), known.RandomHorizontalFlip(), known.ToTensor(),
             known.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))]
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def loader(size: Size, dtype: str) -> Unit:
    """The loop of the ports: a DataLoader, augmentation image by image on the CPU, the loss read at every step.

    Four worker processes beside a GPU, none on a CPU, where they would only share its cores. The loader never ends,
    so that starting its workers does not count.
    """
    model, loss, optimizer = plain(size, torch.contiguous_format)
    images = Augmented(made_up(10, size.images, size.n_test))
    endless = RandomSampler(images, replacement=True, num_samples=10**9)
    cuda = size.device.type == "cuda"
    workers = min(4, usable_cores()) if cuda else 0
    batches = iter(DataLoader(images, size.batch_size, sampler=endless, num_workers=workers, pin_memory=cuda))

    def step() -> None:
        x, y = (part.to(size.device, non_blocking=True) for part in next(batches))
        train(dtype, model, loss, optimizer, x, y).item()

    return repeated(step, size.steps, size.images)


# -- stacked weights: K networks as one with grouped convolutions ------------------------------------------------------


@torch.no_grad()
def stack(models: Sequence[nn.Module]) -> nn.Module:
    """One network that computes all `models`: (B, K * 3, H, W) -> (B, K, C), their channels side by side."""
    one = copy.deepcopy(models[0])
    for name, module in list(one.named_modules()):
        parts: list[Any] = [model.get_submodule(name) for model in models]
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):  # batch norm knows no neighbours: more channels are enough
            for key, _ in list(module.named_parameters(recurse=False)):
                setattr(module, key, nn.Parameter(torch.cat([getattr(part, key) for part in parts])))
            for key, _ in list(module.named_buffers(recurse=False)):
                setattr(module, key, torch.cat([getattr(part, key) for part in parts]))
            if isinstance(module, nn.Conv2d):
                module.groups = len(models)
        elif isinstance(module, PoolAndPad):
            one.set_submodule(name, StackedPoolAndPad(len(models), module))
        elif isinstance(module, nn.Linear):
            one.set_submodule(name, StackedLinear(parts))
    return one


class StackedPoolAndPad(nn.Module):
    def __init__(self, k: int, one: PoolAndPad) -> None:
        super().__init__()
        self.k, self.one = k, one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, *size = x.shape
        x = self.one(x.reshape(batch * self.k, -1, *size))  # zeros go around the channels of each network
        return x.reshape(batch, -1, *x.shape[2:])


class StackedLinear(nn.Module):
    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([part.weight for part in parts]))  # (K, C, F)
        self.bias = nn.Parameter(torch.stack([part.bias for part in parts]))  # (K, C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(len(x), len(self.weight), -1)  # (B, K, F)
        return torch.einsum("bkf,kcf->bkc", x, self.weight) + self.bias


class StackedLoss(nn.Module):
    """Of logits (B, K, C): every network gets the gradient that it would get alone."""

    def __init__(self, one: nn.Module) -> None:
        super().__init__()
        self.one = one

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return logits.shape[1] * self.one(logits.flatten(0, 1), target)  # target (B·K,)


def stacked(size: Size, dtype: str, k: int) -> Unit:
    """K networks in one, on a fixed batch each; the step captured on CUDA."""
    model = stack([resnet_cifar(size.depth, seed=seed) for seed in range(k)]).to(size.device)
    lay_out(model, torch.channels_last)
    loss = StackedLoss(ClassBalancedLoss([1] * 10, "softmax", beta=0)).to(size.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=2e-4, fused=True)
    x = torch.randn(size.batch_size, 3 * k, 32, 32, device=size.device).to(memory_format=torch.channels_last)
    y = torch.arange(size.batch_size * k, device=size.device) % 10
    step = functools.partial(train, dtype, model, loss, optimizer, x, y)
    return repeated(capture(step, []) if size.device.type == "cuda" else step, size.steps, size.images * k)


# -- the large sets ----------------------------------------------------------------------------------------------------


def make_large_run(device: torch.device, image_size: int, compiled: bool = False) -> config.Run:
    """ResNet-50 on iNaturalist 2018 with the class-balanced focal loss of Table 3; bf16 on a GPU, fp32 on a CPU."""
    values: dict[str, dict[str, Any]] = {
        "dataset": {"name": "inaturalist2018"},
        "model": {"depth": 50},
        "loss": {"kind": "focal", "gamma": 0.5, "beta": 0.999},
        "engine": {"device": str(device), "dtype": "bf16" if device.type == "cuda" else "fp32", "compile": compiled},
    }
    for key, value in config.official_large("inaturalist2018", "focal").items():
        group, _, name = key.partition(".")
        values.setdefault(group, {})[name] = value
    values["dataset"]["image_size"] = image_size
    return config.from_mapping(values)


def large(run: config.Run, job: streaming.Job) -> Unit:
    """Our step over a whole batch of resident uint8 images, its micro-batches one by one; on a CPU over one of them."""
    batch = synthetic.make_batch(run, job)

    def unit() -> int:
        job.step(batch, 0.01)
        if job.step.count == CHECK_STEPS:  # as in a run: it has room for no more losses
            job.step.report()
        return len(batch) * job.micro_batch

    return unit


def torchvision_recipe(run: config.Run, device: torch.device, images: int, classes: int) -> Unit:
    """The step of torchvision's reference recipe at its best: channels_last, bf16 by autocast, cuDNN's search.

    On one fixed batch of floats, without reading loss and accuracy, which the reference does at every step.
    """
    from cbl.vision import torchvision

    model = torchvision.models.resnet50(num_classes=classes).to(device)
    lay_out(model, torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)
    # else the second batch size of a process is compiled for any, into slower code, whose rival ours would beat
    forward = torch.compile(model, dynamic=False) if run.engine.compile else model
    size = run.dataset.image_size
    x = torch.randn(images, 3, size, size, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(classes, (images,), device=device)

    def unit() -> int:
        with torch.autocast(device.type, torch.bfloat16, enabled=run.engine.dtype == "bf16"):
            loss = F.cross_entropy(forward(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return images

    return unit


# -- a part ------------------------------------------------------------------------------------------------------------


def loss_alone(size: Size, loss: nn.Module, number: int) -> Unit:
    """Forward and backward of `loss` on logits of `number` classes; captured on CUDA."""
    loss.to(size.device)
    logits = torch.randn(size.batch_size, number, device=size.device, requires_grad=True)
    target = torch.arange(size.batch_size, device=size.device) % number

    def both() -> None:
        loss(logits, target).backward()
        logits.grad = None

    return repeated(capture(both, []) if size.device.type == "cuda" else both, 20, 20 * size.batch_size)
