"""Large sets without their images: what a run costs on this device, measured on made-up ones of the right shape."""

import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cbl import config
from cbl.data.index import Index
from cbl.data.prepare import PUBLISHED
from cbl.engine import streaming
from cbl.engine.device import choose_device
from cbl.engine.distributed import World
from cbl.engine.step import precision

CPU_IMAGES = 2  # at a time: on a CPU each of them takes about a second


def make_job(run: config.Run, device: torch.device | None = None) -> streaming.Job:
    """`run` ready to take steps on made-up images, alone on its device; its loaders have nothing to read.

    The set has as many images and classes as the published one, all classes of about one size.
    """
    world = World(0, 1, choose_device(run.engine) if device is None else device)
    published = PUBLISHED[run.dataset.name]
    names = tuple(map(str, range(published.classes)))
    indices = []
    for split in ("train", "val"):
        n = published.images[split]
        labels = np.arange(n) % published.classes
        counts = np.bincount(labels)
        indices.append(Index(run.dataset.name, split, Path("made up"), ("",) * n, labels, names, counts, ""))
    job = streaming.prepare(run, world, (indices[0], indices[1]))
    if world.device.type == "cuda":
        job.micro_batch = streaming.choose_micro_batch(
            job.batch_size, run.engine.micro_batch, None, lambda images: streaming.fits(run, job, images), print
        )
    else:
        job.micro_batch = min(CPU_IMAGES, job.batch_size)
    return job


def make_batch(run: config.Run, job: streaming.Job) -> list[tuple[Tensor, Tensor]]:
    """As `job.batches` yields it, one micro-batch again and again: of a whole step on a GPU, on a CPU only once."""
    images, size, device = job.micro_batch, run.dataset.image_size, job.world.device
    pixels = torch.randint(256, (images, size, size, 3), dtype=torch.uint8, device=device)
    labels = torch.randint(len(job.train.counts), (images,), device=device)
    return [(pixels, labels)] * (job.parts if device.type == "cuda" else 1)


def seconds(run: config.Run) -> float:
    """Seconds that the whole run takes on one device of this machine, if reading images keeps up.

    Measured once for each network and image size. On a GPU the median of whole steps; on the CPU a step with
    `CPU_IMAGES` images, in fp32 whatever the run asks for: a CPU without bf16 arithmetic takes minutes for that.
    """
    if choose_device(run.engine).type == "cpu":
        run = dataclasses.replace(run, engine=dataclasses.replace(run.engine, dtype="fp32"))
    alike = (run.model.name, run.model.depth, run.dataset.image_size, run.recipe.batch_size, run.engine)
    if alike not in _rates:
        with streaming.kernel_search(run, choose_device(run.engine)):
            _rates[alike] = _measure(run)
    trained, tested = _rates[alike]
    images = PUBLISHED[run.dataset.name].images
    epoch_steps = streaming.data.steps_per_epoch(images["train"], run.recipe.batch_size)
    last_step = min(run.recipe.epochs * epoch_steps, run.engine.max_steps or sys.maxsize)
    epochs = math.ceil(last_step / epoch_steps)
    evaluations = math.ceil(epochs / run.engine.eval_every)
    return last_step * run.recipe.batch_size * trained + evaluations * images["val"] * tested


_rates: dict[tuple, tuple[float, float]] = {}  # seconds for a training and for a validation image


def _measure(run: config.Run) -> tuple[float, float]:
    job = make_job(run)
    steps = 3 if job.world.device.type == "cuda" else 1
    batch = make_batch(run, job)
    trained = _median(lambda: job.step(batch, 0.0), job, steps) / (len(batch) * job.micro_batch)
    job.model.eval()

    @torch.no_grad()
    def look() -> None:
        with precision(run.engine.dtype, job.world.device):
            job.model(job.step.scaling(batch[0][0]))

    return trained, _median(look, job, steps) / job.micro_batch


def _median(work: Callable[[], None], job: streaming.Job, repeats: int) -> float:
    """Seconds of `work`, which is done once before."""
    taken = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        work()
        if job.world.device.type == "cuda":
            torch.cuda.synchronize(job.world.device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])
