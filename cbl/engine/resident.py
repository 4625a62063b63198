"""Many runs on one device, their images in its memory: `train(runs)`.

`journey` is the life of one run, from its data to its record, and `fit` its training loop. Both are generators that
give way after some steps on a GPU and wherever the host would wait for it, so that `train` can keep several runs going
side by side.
"""

import contextlib
import math
import reprlib
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cbl import config, data, disk, records, tracking
from cbl.engine import checkpoint, estimate, evaluate, processes, recipe
from cbl.engine.advice import advise
from cbl.engine.device import choose_device
from cbl.engine.job import Job, prepare
from cbl.engine.progress import Display, Line, closing_line, failure
from cbl.errors import UserError

Journey = Generator[None, None, dict[str, Any]]
QUEUED = 8  # steps that a lane queues on a GPU before the next lane's turn


def train(runs: Sequence[config.Run], deadline: float = math.inf) -> list[dict[str, Any]]:
    """Trains every run that is not done and returns the record of each, in order.

    A run whose folder holds `done` is skipped, a half-done one goes on from its checkpoint, and one that fails (its
    record says `failed` and why) does not take the others down. On a GPU several go side by side, each on a stream of
    its own; on the CPU, in a process a core. When the next epoch would pass `deadline` (of time.monotonic), runs
    under way write a checkpoint and stay `running`, and nothing new is begun. Raises `UserError` when one of those
    processes was killed.
    """
    ended: dict[int, dict[str, Any]] = {}
    display = Display(len(runs))

    def end(number: int, record: dict[str, Any]) -> None:
        ended[number] = record
        display.end(closing_line(record))

    try:
        for number, run in enumerate(runs):
            if records.is_done(folder := records.folder_of(run)):
                try:
                    end(number, _done(run, folder))
                except UserError as error:  # it cannot be read, or is of other images
                    end(number, records.new_record(run) | failure(error))
        waiting = [number for number in range(len(runs)) if number not in ended]
        left = [runs[number] for number in waiting]
        advise(left, display.say)
        if left and (workers := processes.count(runs)) > 1:  # by all: the last one left takes one thread too
            quiet = display.bars is not None
            for place, record in processes.train(left, min(workers, len(left)), deadline, quiet):
                end(waiting[place], record)
        else:
            width = estimate.lanes(left, display.say)
            lanes: dict[int, tuple[Journey, torch.cuda.Stream | None]] = {}
            # torch deals out its 32 streams in turn, three to each run: a new one could be a neighbour's
            spare: dict[str, list[torch.cuda.Stream | None]] = {run.engine.device: [] for run in left}
            while lanes or (waiting and time.monotonic() < deadline):
                while waiting and len(lanes) < width and time.monotonic() < deadline:
                    number = waiting.pop(0)
                    engine = runs[number].engine
                    stream = spare[engine.device].pop() if spare[engine.device] else _new_stream(engine)
                    lanes[number] = journey(runs[number], display, width, deadline, lambda: len(lanes) == 1), stream
                for number, (lane, stream) in list(lanes.items()):
                    record = None
                    try:
                        with torch.cuda.stream(stream):  # on the CPU None, and nothing is done
                            next(lane)
                        continue
                    except StopIteration as last:
                        record = last.value
                    except torch.OutOfMemoryError:  # beside the others, which have more room without it
                        waiting.insert(0, number)
                    del lanes[number]
                    spare[runs[number].engine.device].append(stream)
                    if record is not None:
                        end(number, record)
                    else:
                        width = len(lanes)  # at least 1, and less than before: it does not go on for ever
                        torch.cuda.empty_cache()
                        display.say(f"Out of memory: {width} runs side by side from here on.")
    finally:
        display.close()
    return [ended[number] if number in ended else records.new_record(run) for number, run in enumerate(runs)]


def drive(run: config.Run, display: Display, deadline: float = math.inf) -> dict[str, Any]:
    """One run, from its beginning or its checkpoint to its record."""
    lane = journey(run, display, 1, deadline)
    while True:
        try:
            next(lane)
        except StopIteration as end:
            return end.value


def _new_stream(engine: config.Engine) -> torch.cuda.Stream | None:
    """A lane's own stream; None on the CPU, and for a device that `journey` will refuse."""
    with contextlib.suppress(UserError):
        device = choose_device(engine)
        if device.type == "cuda":
            return torch.cuda.Stream(device)
    return None


def journey(
    run: config.Run, display: Display, lanes: int, deadline: float, alone: Callable[[], bool] = lambda: True
) -> Journey:
    """One run with all that can happen to it; yields while the device works, returns the record.

    Raises `torch.OutOfMemoryError` alone, and where the run is not `alone`: it may fit later.
    """
    folder, record = records.folder_of(run), records.new_record(run)

    def may_fit_later(error: Exception) -> bool:
        return isinstance(error, torch.OutOfMemoryError) and not alone()

    try:
        job = prepare(run, choose_device(run.engine))  # what can be wrong is found before anything is written
        with disk.alone(folder) as mine:
            if not mine:
                return record | {"skipped": "another process is training it"}
            if records.is_done(folder):  # by another process, a moment ago
                return _done(run, folder)
            record |= job.facts | {"lanes": lanes}
            try:
                yield from live(run, job, record, folder, display, deadline, may_fit_later)
            except Exception as error:
                if may_fit_later(error):
                    raise
                if record["status"] != "failed":  # it came before the training
                    record |= failure(error)
                with contextlib.suppress(UserError):  # on a full disk it stays as it was: running
                    records.write_record(folder, record)
            return record
    except Exception as error:
        if may_fit_later(error):
            raise
        return record | failure(error)


def live(
    run: config.Run,
    job: Job,
    record: dict[str, Any],
    folder: Path,
    display: Display,
    deadline: float,
    may_fit_later: Callable[[Exception], bool],
) -> Generator[None, None, None]:
    """The life of a run whose folder is ours: resume, train, evaluate, record; keeps `record` up to date."""
    # ---- resume
    images = {"subset_hash": job.images.subset_hash, "content_hash": job.images.content}
    state = checkpoint.load(folder, job.model, job.optimizer, images)
    if state is None:
        state = {"epoch": 0, "step": 0, "seconds": 0.0, "train_seconds": 0.0, "best_error": None}
        state |= images | {"started": record["started"]}
    record["started"] = state["started"]
    history = records.rewind_metrics(folder, state["step"])
    records.write_record(folder, record)
    tracker = tracking.start(run, record, folder, history)
    _say_start(display, run, job, state)
    line = display.run(record["run_id"], job.last_step, run.recipe.batch_size, state["step"])
    try:
        # ---- train
        logits = yield from fit(run, job, state, folder, line, tracker, deadline)
        record |= {"steps": state["step"], "seconds": round(state["seconds"], 2)}

        # ---- record; the marker comes last
        if state["step"] == job.last_step:
            logits = job.predict() if logits is None else logits
            record |= evaluate.measure(logits, job.test_labels, job.images.counts)
            record |= {"status": "done", "error_best": state["best_error"]}
            trained = state["step"] * run.recipe.batch_size
            record["images_per_second"] = round(trained / max(state["train_seconds"], 1e-9), 1)
            checkpoint.save_weights(folder, job.model)
        records.write_record(folder, record)
        if record["status"] == "done":
            records.mark_done(folder)
    except Exception as error:
        if not may_fit_later(error):
            record |= failure(error)  # before W&B's page is closed, which says it too
        raise
    finally:
        line.close()
        tracker.finish(record)  # after the marker: a dead server must not hold that up


def _done(run: config.Run, folder: Path) -> dict[str, Any]:
    """The record of a run that is done; raises `UserError` when it is of other images than a `folder` holds now."""
    record = records.read_record(folder)
    # all other sets are what they were, and images that are gone or cannot be read are no others
    if run.dataset.name == "folder":
        try:
            images = data.load(run.dataset)
        except (UserError, OSError):
            return record | {"skipped": "done before"}
        now = {
            "n_train": len(images.subset),
            "n_test": len(images.test_labels),
            "class_names": list(images.class_names),
            "class_counts": images.counts.tolist(),
            "subset_hash": images.subset_hash,
            "content_hash": images.content,
        }
        for key, value in now.items():
            if (before := record.get(key, value)) != value:
                raise UserError(
                    f"{folder} was trained on other images than {run.dataset.root} holds now ({key} was "
                    f"{reprlib.repr(before)}, now {reprlib.repr(value)}): delete the folder to start the run afresh."
                )
    return record | {"skipped": "done before"}


def fit(
    run: config.Run,
    job: Job,
    state: dict[str, Any],
    folder: Path,
    line: Line,
    tracker: tracking.Tracker,
    deadline: float,
) -> Generator[None, None, torch.Tensor | None]:
    """The training loop; keeps `state`, what a checkpoint holds besides the weights, up to date.

    Returns the logits after the last step, on a GPU valid until the next `predict`; None when that step was not
    reached, or had been reached before.
    """
    if state["step"] == job.last_step:
        return None  # killed after its last step, before its record
    n, saved = len(job.images.subset), time.monotonic()
    epochs = job.stream.epochs(run.recipe, first=state["epoch"])
    ahead = next(epochs)
    while True:
        # ---- an epoch is queued, and the next one drawn while the device works
        began = time.monotonic()
        steps, plan = ahead
        plan = plan[: max(0, job.last_step - steps.start)]
        plan[:, 0] = job.images.subset[plan[:, 0]]  # from positions in the subset to images
        rates = np.array([recipe.learning_rate(run.recipe, n, steps.start + i) for i in range(len(plan))])
        job.step.load(plan, rates)
        cuda = job.step.device.type == "cuda"
        for number in range(len(plan)):
            job.advance()
            line.advance()
            if cuda and number % QUEUED == QUEUED - 1 and number + 1 < len(plan):
                yield  # where the driver's queue is full the host waits: by then every lane is to have some of it
        due = steps.start + len(plan) == job.last_step or (state["epoch"] + 1) % run.engine.eval_every == 0
        logits, stepped = None, _mark(cuda)
        if cuda and due:
            # queued too: the host would otherwise wait while it takes its turn among the kernels of all other runs
            logits = job.predict()
        evaluated = _mark(cuda)
        ahead = next(epochs, ahead)
        yield

        # ---- its losses are waited for
        yield from _wait(stepped)
        trained = time.monotonic() - began
        yield from _wait(evaluated)
        losses = job.step.epoch_losses()
        recipe.refuse_divergence(losses, rates, steps.start)
        state["epoch"] += 1
        state["step"] = steps.start + len(plan)
        state["train_seconds"] += trained

        # ---- evaluation
        last = state["step"] == job.last_step
        error = None
        if due:
            logits = job.predict() if logits is None else logits
            error = evaluate.error(logits, job.test_labels)
            state["best_error"] = min(error, state["best_error"] if state["best_error"] is not None else error)
        state["seconds"] += time.monotonic() - began

        # ---- row and checkpoint
        if len(plan):
            row = {
                "epoch": state["step"] * run.recipe.batch_size / n,
                "step": state["step"],
                "lr": float(rates[-1]),
                "train_loss": float(losses.mean(dtype=np.float64)),
                "test_error": error,
                "best_error": state["best_error"],
                "images_per_second": round(losses.size * run.recipe.batch_size / trained, 1),
                "seconds": round(state["seconds"], 3),
            }
            records.append_metrics(folder, row)
            tracker.log(row)
            line.epoch(row)
        now = time.monotonic()
        ending = last or now + 1.2 * (now - began) >= deadline
        if ending or time.monotonic() - saved >= run.engine.checkpoint_seconds:
            checkpoint.save(folder, job.model, job.optimizer, state)
            saved = time.monotonic()
        if ending:
            return logits if last else None


def _mark(cuda: bool) -> torch.cuda.Event | None:
    """The place in the stream that has been reached when all that is queued so far is done."""
    event = torch.cuda.Event() if cuda else None
    if event is not None:
        event.record()
    return event


def _wait(event: torch.cuda.Event | None) -> Generator[None, None, None]:
    """Gives way until the device is there: a host that slept would leave the other lanes without work."""
    while event is not None and not event.query():
        time.sleep(1e-4)  # for W&B's threads
        yield


def _say_start(display: Display, run: config.Run, job: Job, state: dict[str, Any]) -> None:
    """Counts and weights, in full when the run is alone."""
    if display.total != 1:
        return
    counts, weights = job.facts["class_counts"], job.facts["class_weights"]
    width = max(len(str(counts[0])), 6)

    def listed(values: list, form: str) -> str:
        shown = values if len(values) <= 20 else [*values[:8], None, *values[-8:]]
        return " ".join("…" if v is None else f"{v:>{width}{form}}" for v in shown)

    display.say(f"{config.run_id(run)} on {job.facts['device']}, {run.engine.dtype}")
    display.say(f"{len(counts)} classes, {job.facts['n_train']:,} training and {job.facts['n_test']:,} test images")
    if run.dataset.name == "folder":
        display.say(f"images resized to {run.dataset.image_size} x {run.dataset.image_size} (dataset.image_size)")
    if run.dataset.name == "folder" and len(counts) <= 20:
        display.say(f"classes        {', '.join(job.facts['class_names'])}")
    display.say(f"class counts   {listed(counts, 'd')}")
    display.say(f"class weights  {listed(weights, '.4f')}")
    resumed = f", goes on from step {state['step']:,}" if state["step"] else ""
    display.say(f"{job.last_step:,} steps of {run.recipe.batch_size} images{resumed}")
