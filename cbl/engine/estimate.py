"""Short measurements before training, on made-up images of the right shape: how long runs take, how many at once."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from cbl import config, data, longtail
from cbl.engine import processes, recipe, synthetic
from cbl.engine.device import choose_device
from cbl.engine.job import Job, prepare
from cbl.errors import UserError

# data set -> classes, images of the largest class, test images, (H, W, C)
SIZES = {
    "cifar10_lt": (10, 5000, 10000, (32, 32, 3)),
    "cifar20_lt": (20, 2500, 10000, (32, 32, 3)),
    "cifar100_lt": (100, 500, 10000, (32, 32, 3)),
    "digits_lt": (10, 124, 500, (8, 8, 1)),
}


def made_up(classes: int, counts: np.ndarray, n_test: int, shape: tuple[int, int, int]) -> data.Data:
    """Random images in the form of `data.load`, with labels by class."""
    n = int(counts.sum())
    return data.Data(
        train_images=torch.randint(256, (n, *shape), dtype=torch.uint8),
        train_labels=torch.from_numpy(np.repeat(np.arange(classes), counts)),
        subset=np.arange(n),
        test_images=torch.randint(256, (n_test, *shape), dtype=torch.uint8),
        test_labels=torch.arange(n_test) % classes,
        class_names=tuple(map(str, range(classes))),
        counts=counts,
        subset_hash="",
        content="",
        record_order=np.arange(n),
    )


def lanes(runs: Sequence[config.Run], say: Callable[[str], None] = print) -> int:
    """How many of `runs` to train side by side: 1 on the CPU, `engine.lanes` where given, else measured.

    Measured by doubling: as long as all lanes together gain more than 5 % and less than 80 % of the GPU's memory is
    taken, one graph each on a stream of its own.
    """
    if len(runs) < 2:
        return 1
    kept: list[tuple[Job, torch.cuda.Stream]] = []
    for run in runs:  # the first that can be trained stands for all
        with contextlib.suppress(Exception):  # each run will say so itself
            device = choose_device(run.engine)
            if device.type == "cpu" or run.engine.lanes is not None:
                return 1 if device.type == "cpu" else run.engine.lanes
            kept.append(_lane(run, device))
            break
    if not kept:
        return 1
    rate, width = 0.0, 1
    most = min(len(runs), 32)  # torch has no more streams, and a lane takes up to a second to prepare
    while width <= most:
        try:
            while len(kept) < width:
                kept.append(_lane(run, device))
            together = images_per_second(kept)
        except Exception:  # out of memory, or what each run will say itself
            width = max(1, width // 2)
            break
        free, total = torch.cuda.mem_get_info(device)
        if together < 1.05 * rate:
            width //= 2
            break
        rate = max(rate, together)
        if width * 2 > most or total - free > 0.4 * total:  # the next doubling doubles what is taken
            break
        width *= 2
    del kept
    torch.cuda.empty_cache()
    say(f"{width} runs side by side: {rate:,.0f} images/s together in a short measurement.")
    return width


def _lane(run: config.Run, device: torch.device) -> tuple[Job, torch.cuda.Stream]:
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        return _prepared(run, device, run.engine.eval_batch), stream


def images_per_second(lanes: Sequence[tuple[Job, torch.cuda.Stream]], steps: int = 60, repeats: int = 3) -> float:
    """Training images/s of all lanes together: the best of `repeats`, queued in turn, one `advance` each."""
    best = 0.0
    for _ in range(repeats):
        for _, stream in lanes:
            stream.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            for job, stream in lanes:
                with torch.cuda.stream(stream):
                    job.step.at.zero_()
                    job.advance()
        for _, stream in lanes:
            stream.synchronize()
        images = steps * sum(job.step.plan.shape[2] for job, _ in lanes)
        best = max(best, images / (time.perf_counter() - began))
    return best


def seconds(runs: Sequence[config.Run], steps: int = 6, say: Callable[[str], None] = print) -> list[float]:
    """Seconds that each of `runs` adds until all are done: measured once per shape of network and image.

    On the CPU with one thread, for as many processes as `processes.count` says; on a GPU for runs one after another,
    although side by side they take less. Start-up and W&B are left out, some tenths of a second a run. Runs of a shape
    that fails take no time; a `UserError` in which all shapes end is raised.
    """
    at_once = processes.count([run for run in runs if run.dataset.name not in config.LARGE])
    threads = torch.get_num_threads()
    if at_once > 1:
        torch.set_num_threads(runs[0].engine.threads or 1)
    rates: dict[tuple, tuple[float, float]] = {}
    failed: dict[tuple, tuple[config.Run, Exception]] = {}
    each = []
    for run in runs:
        choose_device(run.engine)  # what is wrong here is so for all runs, and raised
        alike = (run.dataset.name, run.dataset.image_size, run.model, run.recipe.batch_size, run.engine)
        taken = 0.0
        ends_here: tuple = (run.dataset,)  # what a failure says something of: these images, then this shape
        try:
            n, n_test = (0, 0) if run.dataset.name in config.LARGE else _images(run)
            ends_here = alike
            if alike in failed:
                pass
            elif run.dataset.name in config.LARGE:
                taken = synthetic.seconds(run)  # one after another, each on all devices
            else:
                if alike not in rates:
                    rates[alike] = _measure(run, n_test, steps)
                taken = _whole(run, n, n_test, *rates[alike]) / at_once
        except Exception as error:
            failed[ends_here] = run, error.with_traceback(None)  # whose frames hold a job's memory
        each.append(taken)
    torch.set_num_threads(threads)
    for run, why in failed.values():
        if isinstance(why, UserError) and not any(each):
            raise why
        what = why if isinstance(why, UserError) else repr(why)
        say(f"{config.run_id(run)} and its like are left out of the time: {what}")
    return each


def _whole(run: config.Run, n: int, n_test: int, per_step: float, per_test_image: float) -> float:
    """Seconds of the steps and evaluations of `run` on `n` training and `n_test` test images."""
    steps = min(recipe.total_steps(run.recipe, n), run.engine.max_steps or n * run.recipe.epochs)
    epochs = math.ceil(steps * run.recipe.batch_size / n)
    evaluations = math.ceil(epochs / run.engine.eval_every)
    return steps * per_step + evaluations * n_test * per_test_image


def _images(run: config.Run) -> tuple[int, int]:
    """Training and test images of `run`; raises `UserError` for an imbalance factor that leaves a class empty."""
    name, factor = run.dataset.name, run.dataset.imbalance_factor
    if name not in SIZES:
        images = data.load(run.dataset)
        return len(images.subset), len(images.test_labels)
    classes, n_max, n_test, _ = SIZES[name]
    try:
        return int(longtail.class_counts(classes, factor, n_max).sum()), n_test
    except ValueError as error:
        raise UserError(f"dataset.imbalance_factor={factor:g} does not suit {name}: {error}") from None


def _prepared(run: config.Run, device: torch.device, n_test: int | None = None, steps: int = 8) -> Job:
    """`run` on made-up images, enough for `steps` steps an epoch."""
    if run.dataset.name in SIZES:
        classes, _, test_images, shape = SIZES[run.dataset.name]
    else:
        own = data.load(run.dataset)
        height, width, channels = own.train_images.shape[1:]
        classes, test_images, shape = len(own.counts), len(own.test_labels), (height, width, channels)
    counts = np.full(classes, -(-steps * run.recipe.batch_size // classes))
    return prepare(run, device, made_up(classes, counts, n_test or test_images, shape))


def _measure(run: config.Run, n_test: int, steps: int) -> tuple[float, float]:
    """Seconds a training step and a test image take: the median step, and one batch of test images."""
    n_test = min(n_test, run.engine.eval_batch)
    job = _prepared(run, choose_device(run.engine), n_test, steps + 2)
    _, plan = next(job.stream.epochs(run.recipe))
    taken = []
    for row in plan[: steps + 2]:
        began = time.perf_counter()
        job.step.load(row[None], np.zeros(1))
        job.advance()
        job.step.epoch_losses()  # waits for the device
        taken.append(time.perf_counter() - began)
    job.predict()
    began = time.perf_counter()
    job.predict().sum().item()
    return float(np.median(taken[2:])), (time.perf_counter() - began) / n_test
