"""One run on one or many devices, its images read from disk while it trains: `train(run)`.

Every process of a run executes all of this on its own equal share of each batch; the leading one alone keeps the
record. What a step computes depends on the batch and on how many images are normalised together (`micro_batch`), not
on whether the micro-batches are worked through side by side, in several processes, or one by one.
"""

import contextlib
import functools
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cbl import config, disk, models, records, tracking
from cbl.data import augment, index
from cbl.data import streaming as data
from cbl.engine import checkpoint, distributed, recipe
from cbl.engine.advice import advise
from cbl.engine.device import device_name, require_compiler
from cbl.engine.distributed import World
from cbl.engine.micro_batches import CHECK_STEPS, Step
from cbl.engine.progress import Display, Line, closing_line, failure
from cbl.engine.step import precision, sgd
from cbl.engine.tally import Tally
from cbl.errors import UserError
from cbl.losses import ClassBalancedLoss

MICRO_BATCH = 128  # images: the authors' batch of 1024 lay on the eight cores of a TPU, and each normalised its own


def train(run: config.Run, deadline: float = math.inf) -> dict[str, Any]:
    """Trains `run` unless it is done, and returns its record; all processes of the run call it.

    A half-done run goes on from its checkpoint, with as many processes as there are now. One that fails says `failed`
    and why. When the next `CHECK_STEPS` steps would pass `deadline` (of time.monotonic), the run writes a checkpoint
    and stays `running`.
    """
    folder, record = records.folder_of(run), records.new_record(run)
    leads = distributed.rank() == 0
    display = Display(1, bars=leads, quiet=not leads)
    with contextlib.ExitStack() as held:  # what is to be closed, however the run ends
        held.callback(display.close)
        try:
            record = journey(run, record, folder, display, held, deadline)
        except Exception as error:
            record |= failure(error)
            if not leads:
                record["failure"] = f"Process {distributed.rank()}: {record['failure']}"
                with contextlib.suppress(OSError):
                    print(record["failure"], file=sys.stderr)
            if "n_train" in record:  # it came with the lock: before, the folder may be another process's
                with contextlib.suppress(UserError):  # on a full disk the record stays as it was: running
                    _write_failure(folder, record, leads, isinstance(error, UserError))
            distributed.fall_out()
        display.end(closing_line(record))
    return record


def _write_failure(folder: Path, record: dict[str, Any], leads: bool, expected: bool) -> None:
    """Of several processes the first to fail says why, be it the leading one or not: the others only lose it."""
    kept = records.read_record(folder) if (folder / "result.json").exists() else {}
    if leads:
        if kept.get("status") == "failed" and not expected and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            record["failure"] = kept["failure"]
        records.write_record(folder, record)
    elif kept.get("status") == "running":
        records.write_record(folder, kept | {key: record[key] for key in ("status", "failure")})


def journey(
    run: config.Run,
    record: dict[str, Any],
    folder: Path,
    display: Display,
    held: contextlib.ExitStack,
    deadline: float,
) -> dict[str, Any]:
    """The life of the run; returns `record`, which it keeps up to date, or that of a run that needs no training."""
    world = distributed.join(run.engine)
    held.enter_context(kernel_search(run, world.device))
    if done := world.tell(_done(folder) if world.leads else None):
        return done

    # ---- what can be wrong is found before anything is written
    job = prepare(run, world)
    held.callback(job.close)
    if not world.tell(world.leads and held.enter_context(disk.alone(folder))):
        return record | {"skipped": "another process is training it"}
    if done := world.tell(_done(folder) if world.leads else None):  # by another command, a moment ago
        return done
    record |= job.facts

    # ---- resume
    state = resume(job, folder, record["started"])
    share, asked, before = job.batch_size // world.size, run.engine.micro_batch, state["micro_batch"]
    job.micro_batch = choose_micro_batch(share, asked, before, functools.partial(fits, run, job), display.say)
    state["micro_batch"] = record["micro_batch"] = job.micro_batch
    record["started"] = state["started"]
    tracker = tracking.Tracker()
    if world.leads:
        history = records.rewind_metrics(folder, state["step"])
        records.write_record(folder, record)
        tracker = tracking.start(run, record, folder, history)
    held.callback(tracker.finish, record)
    _say_start(display, run, job, state)

    # ---- train
    line = display.run(record["run_id"], job.last_step, run.recipe.batch_size, state["step"])
    held.callback(line.close)
    tally = fit(run, job, state, folder, line, tracker, deadline)
    record |= {"steps": state["step"], "seconds": round(state["seconds"], 2), "damaged": state.get("damaged", {})}
    record |= job.step.memory()

    # ---- record; the marker comes last
    if state["step"] == job.last_step:
        record |= (tally or evaluate(run, job)).measure(job.train.counts)
        record |= {"status": "done", "error_best": state["best_error"]}
        trained = state["step"] * run.recipe.batch_size
        record["images_per_second"] = round(trained / max(state["train_seconds"], 1e-9), 1)
    if world.leads:
        if record["status"] == "done":
            checkpoint.save_weights(folder, job.model)
        records.write_record(folder, record)
        if record["status"] == "done":
            records.mark_done(folder)
    return record  # W&B's page is closed after this: a dead server must not hold up the marker


def _done(folder: Path) -> dict[str, Any] | None:
    return records.read_record(folder) | {"skipped": "done before"} if records.is_done(folder) else None


@contextlib.contextmanager
def kernel_search(run: config.Run, device: torch.device) -> Iterator[None]:
    """On a GPU cuDNN tries its convolutions and takes the fastest, unless the run is to be deterministic."""
    before = torch.backends.cudnn.benchmark
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not run.engine.deterministic
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@dataclass
class Job:
    """A run's data, network and step, ready on this process's device."""

    world: World
    train: index.Index
    training: data.Loader
    validation: data.Loader
    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Step
    batch_size: int  # of a step, over all processes
    micro_batch: int  # of those, normalised together
    seed: int
    epoch_steps: int
    last_step: int  # steps when the run is over
    facts: dict[str, Any]  # what they add to the record

    @property
    def parts(self) -> int:
        """Micro-batches of a step in this process."""
        return self.batch_size // (self.world.size * self.micro_batch)

    def batches(self, epoch: int, first_step: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """This process's micro-batches of each step of the epoch, images (B, S, S, 3) uint8 and labels (B,)."""
        parts = self.training.training(
            self.seed,
            epoch,
            self.batch_size,
            first_step=first_step,
            rank=self.world.rank,
            world=self.world.size,
            accumulation=self.parts,
        )
        while batch := list(itertools.islice(parts, self.parts)):
            yield batch

    def damaged(self) -> dict[str, str]:
        """path -> what is wrong with it, of the images that any process could not read."""
        found: dict[str, str] = {}
        for part in self.world.gather(self.training.damaged | self.validation.damaged):
            found |= part
        return found

    def close(self) -> None:
        self.training.close()
        self.validation.close()


def prepare(run: config.Run, world: World, indices: tuple[index.Index, index.Index] | None = None) -> Job:
    """Reads the indices of training and validation set unless they are given, builds the network from the seed.

    Raises `UserError` for a set that is not prepared, and for settings that do not suit it or the processes.
    """
    name, root, device, batch_size = run.dataset.name, run.dataset.root, world.device, run.recipe.batch_size
    train, val = indices or (index.read(root, name, "train"), index.read(root, name, "val"))
    classes, n = len(train.counts), len(train)
    if not train.counts.all():
        empty = train.class_names[int(train.counts.argmin())]
        raise UserError(f"Class '{empty}' of {name} has no training image: prepare the set again.")
    if batch_size > n or batch_size % world.size:
        raise UserError(
            f"recipe.batch_size is {batch_size}: it must be at most the {n:,} training images and a multiple of the "
            f"{world.size} processes."
        )
    if run.engine.sync_bn and world.size > 1 and device.type == "cpu":
        raise UserError("engine.sync_bn needs GPUs: leave it out on the CPU.")
    if run.engine.compile:
        require_compiler(device)
    model = models.build(run.model, classes, 3, run.seed).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loss = ClassBalancedLoss(train.counts.tolist(), run.loss.kind, run.loss.beta, run.loss.gamma, "none")
    optimizer = sgd(recipe.parameter_groups(model, run.recipe, run.loss.kind), run.recipe, device)
    if run.engine.sync_bn and world.size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # its parameters stay the same objects
    scaling: Callable[[Tensor], Tensor] = augment.scale
    if run.recipe.input_scaling == "mean_std":
        mean, std = (torch.tensor(values, device=device) for values in data.STATISTICS[name])
        scaling = functools.partial(augment.scale, mean=mean, std=std)
    load = functools.partial(
        data.Loader,
        image_size=run.dataset.image_size,
        workers=distributed.cores() if run.engine.workers is None else run.engine.workers,
        device=device,
        on_damaged=run.dataset.on_damaged,
    )
    epoch_steps = data.steps_per_epoch(n, batch_size)
    return Job(
        world=world,
        train=train,
        training=load(train),
        validation=load(val),
        model=model,
        optimizer=optimizer,
        step=Step(model, loss.to(device), run.loss.reduction, optimizer, scaling, run, world),
        batch_size=batch_size,
        micro_batch=batch_size // world.size,
        seed=run.seed,
        epoch_steps=epoch_steps,
        last_step=min(run.recipe.epochs * epoch_steps, run.engine.max_steps or sys.maxsize),
        facts={
            "n_train": n,
            "n_test": len(val),
            "class_counts": train.counts.tolist(),
            "class_weights": loss.weights.tolist(),
            "class_names": list(train.class_names),
            "subset_hash": train.hash,
            "parameters": sum(p.numel() for p in model.parameters()),
            "device": (f"{world.size} × " if world.size > 1 else "")
            + device_name(device)
            + (", torch.compile" if run.engine.compile else ""),  # which rounds differently
            "processes": world.size,
            "lanes": 1,
        },
    )


def resume(job: Job, folder: Path, started: str) -> dict[str, Any]:
    """Where the run stands, after its last checkpoint: weights and momentum are put in place in all processes.

    The position is counted in steps over the whole batch, so any number of processes goes on at the right image.
    """
    world, state, trouble = job.world, None, ""
    if world.leads:
        try:
            state = checkpoint.load(folder, job.model, job.optimizer, {"subset_hash": job.train.hash})
        except UserError as error:
            trouble = str(error)
    state, trouble = world.tell((state, trouble))
    if trouble:
        raise UserError(trouble)
    if state is None:
        return {
            "step": 0, "seconds": 0.0, "train_seconds": 0.0, "best_error": None, "micro_batch": None,
            "epoch_loss": 0.0, "epoch_steps": 0, "epoch_seconds": 0.0,
            "subset_hash": job.train.hash, "started": started,
        }  # fmt: skip
    momentum = [kept["momentum_buffer"] for kept in job.optimizer.state.values()]
    world.share([*job.model.parameters(), *job.model.buffers(), *momentum])
    job.step.statistics.take()
    return state


def choose_micro_batch(
    share: int, asked: int | None, before: int | None, fits: Callable[[int], bool], say: Callable[[str], None]
) -> int:
    """Of the `share` of a batch that a process has, how many images it works on at a time.

    That is `asked` (engine.micro_batch); else as many as `before`, in the part of the run that is done; else
    `MICRO_BATCH`, halved until they fit. Fewer than `share` means that gradients are accumulated. Raises `UserError`
    when what is asked for is impossible.
    """
    if asked and asked > share:
        raise UserError(
            f"engine.micro_batch is {asked}, but each process has only {share} images of a batch: choose at most "
            f"{share}, or null."
        )
    wanted = min(share, asked or before or MICRO_BATCH)
    size = _divisor(share, wanted)
    if asked and size != wanted:
        raise UserError(
            f"engine.micro_batch is {asked}, but the {share} images of each process cannot be cut into such parts: "
            f"choose {size}, or null."
        )
    while not fits(size):
        if asked:
            raise UserError(
                f"engine.micro_batch is {asked}, but so many images do not fit in the device's memory: choose less, or "
                "null."
            )
        if size == 1:
            raise UserError("Not even one image fits in the device's memory: choose a smaller network or image.")
        size, large = _divisor(share, size // 2), size
        say(
            f"{large} images do not fit in the device's memory: gradients are accumulated over micro-batches of "
            f"{size}, each of which batch norm normalises by itself."
        )
    if before and not asked and size != before:
        say(f"Batch norm normalised {before} images together until now and {size} from here on.")
    return size


def fits(run: config.Run, job: Job, images: int) -> bool:
    """Whether so many images at a time fit in the memory of every process's device; on the CPU taken for granted."""
    lacking = job.world.device.type == "cuda" and not job.step.fits(images, run.dataset.image_size)
    return not job.world.sum(torch.tensor(float(lacking), device=job.world.device)).item()


def _divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`."""
    return next(size for size in range(limit, 0, -1) if number % size == 0)


def fit(
    run: config.Run,
    job: Job,
    state: dict[str, Any],
    folder: Path,
    line: Line,
    tracker: tracking.Tracker,
    deadline: float,
) -> Tally | None:
    """The training loop; keeps `state`, what a checkpoint holds besides the weights, up to date.

    Returns the evaluation after the last step; None when it was not reached, or had been reached before.
    """
    n, leads = job.epoch_steps * job.batch_size, job.world.leads  # images of an epoch; the recipe counts by them
    began = saved = time.monotonic()
    rates: list[float] = []
    while state["step"] < job.last_step:
        epoch, first = divmod(state["step"], job.epoch_steps)
        for batch in job.batches(epoch, first):
            rates.append(recipe.learning_rate(run.recipe, n, state["step"]))
            job.step(batch, rates[-1])
            state["step"] += 1
            line.advance()
            last = state["step"] == job.last_step
            whole = last or state["step"] % job.epoch_steps == 0
            if not whole and state["step"] % CHECK_STEPS:
                continue

            now = time.monotonic()
            late = now + 1.2 * (now - began) >= deadline
            due = now - saved >= run.engine.checkpoint_seconds
            losses, (late, due) = job.step.report(leads and late, leads and due)
            recipe.refuse_divergence(losses, rates, state["step"] - len(losses))
            trained = time.monotonic() - began
            state["train_seconds"] += trained
            state["epoch_loss"] += float(losses.sum())
            state["epoch_steps"] += len(losses)
            state["epoch_seconds"] += trained
            tally = None
            if last or (whole and (epoch + 1) % run.engine.eval_every == 0):
                tally = evaluate(run, job)
                best = state["best_error"]
                state["best_error"] = tally.error if best is None else min(tally.error, best)
            state["seconds"] += time.monotonic() - began
            if whole:
                row = {
                    "epoch": state["step"] / job.epoch_steps,
                    "step": state["step"],
                    "lr": rates[-1],
                    "train_loss": state["epoch_loss"] / state["epoch_steps"],
                    "test_error": tally.error if tally else None,
                    "best_error": state["best_error"],
                    "images_per_second": round(state["epoch_steps"] * job.batch_size / state["epoch_seconds"], 1),
                    "seconds": round(state["seconds"], 3),
                }
                state |= {"epoch_loss": 0.0, "epoch_steps": 0, "epoch_seconds": 0.0}
                if leads:
                    records.append_metrics(folder, row)
                tracker.log(row)
                line.epoch(row)
            if last or late or due:
                state["damaged"] = state.get("damaged", {}) | job.damaged()  # those before a resume too
                job.step.statistics.settle()
                if leads:
                    checkpoint.save(folder, job.model, job.optimizer, state)
                saved = time.monotonic()
            if last or late:
                return tally
            rates.clear()
            began = time.monotonic()
    return None


@torch.no_grad()
def evaluate(run: config.Run, job: Job) -> Tally:
    """The whole validation set, every image once over all processes, with batch norm's running statistics."""
    job.step.statistics.settle()
    tally = Tally(len(job.train.counts), job.world.device)
    # without gradients an image takes far less than half the memory, so twice a micro-batch fits
    batch_size = min(run.engine.eval_batch, 2 * job.micro_batch)
    job.model.eval()
    for images, target in job.validation.evaluation(batch_size, rank=job.world.rank, world=job.world.size):
        with precision(run.engine.dtype, job.world.device), kernel_search(run, job.world.device):
            logits = job.model(job.step.scaling(images)).float()  # (B, C)
        tally.add(logits, target)
    job.model.train()
    return tally.sum(job.world)


def _say_start(display: Display, run: config.Run, job: Job, state: dict[str, Any]) -> None:
    """What the run is, and how a batch is spread."""
    counts, weights = job.train.counts, job.facts["class_weights"]
    head, tail = int(counts.argmax()), int(counts.argmin())
    processes = f"{job.world.size} process{'es' if job.world.size > 1 else ''}"
    spread = f"{processes} × {job.parts} micro-batch{'es' if job.parts > 1 else ''} of {job.micro_batch}"
    resumed = f", goes on from step {state['step']:,}" if state["step"] else ""
    display.say(f"{config.run_id(run)} on {job.facts['device']}, {run.engine.dtype}")
    advise([run], display.say)
    display.say(
        f"{len(counts):,} classes, {job.facts['n_train']:,} training and {job.facts['n_test']:,} validation images"
    )
    facts, size = index.prepared(Path(run.dataset.root) / run.dataset.name) or {}, run.dataset.image_size
    if (side := facts.get("short_side")) and side < (whole := size + round(size / 7)):
        display.say(
            f"The images were prepared with a short side of {side} pixels: those of {size} are cut from {whole}, to "
            f"which they are enlarged. make data RESIZE={whole} under another root has them whole."
        )
    display.say(f"largest class {counts[head]:,} images, weight {weights[head]:.4f}")
    display.say(f"smallest class {counts[tail]:,} images, weight {weights[tail]:.4f}")
    if run.engine.sync_bn and job.world.size == 1:
        display.say("engine.sync_bn=true has no effect on one process: leave it out.")
    if job.step.image_bytes is not None:
        display.say(f"{job.step.image_bytes / 2**20:.1f} MiB of the device's memory an image")
    display.say(f"{job.last_step:,} steps of {job.batch_size} images ({spread}){resumed}")
