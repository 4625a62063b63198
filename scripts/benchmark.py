"""How fast training is here: images/s of one run and of many, beside a plain loop and the floor of the device.

    python scripts/benchmark.py                    # in small on a CPU (three minutes), in full on a GPU
    python scripts/benchmark.py resnet50           # of the three workloads one alone
    python scripts/benchmark.py --full             # in full anywhere
    python scripts/benchmark.py --gpu-report DIR   # on a machine with a GPU: parity tests, then all of it, into DIR

Workloads:
    loader    one core preparing photographs for the large sets, beside torchvision's reference pipeline
    resnet50  the training step of the large sets, 224 pixels and 8,142 classes, beside that of torchvision's reference
              recipe: bf16 with and without torch.compile on a GPU, fp32 with 2 images at a time on a CPU
    cifar     the paper's network on images of CIFAR's shape

An image counts when it has gone through augmentation, forward, loss, backward and update; those of the large sets are
augmented by the loader. What is compared takes turns (A B C A B C ...), the first turn of each warms up and does not
count unless no time is left for another, and the median of the others is reported. Images are made up. Writes
<device>-<date>.json and, made of it, .md, .png and .svg; a workload alone has its name in theirs. Until then the rows
so far are in rows.partial. Interrupted, by Ctrl-C or SIGTERM, it writes <device>-<date>-interrupted of what it has, and
what is left out is named there. What another command has written on the same day stays: this one's names then end in
-2. Where commands are killed after some minutes, keep --budget below that.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import math
import os
import platform
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import INTERRUPTED, interrupt, one_line

from cbl import ClassBalancedLoss, config, disk, records
from cbl.data import loader_speed
from cbl.engine import contenders, roofline, synthetic
from cbl.engine.contenders import Size, Unit, make_job, make_run
from cbl.engine.device import choose_device, device_name, keep_freed_memory
from cbl.engine.step import capture
from cbl.errors import UserError
from cbl.report import bench_plot
from cbl.report.bench_plot import (
    BARE,
    CAPTURED,
    COMPILED,
    EAGER,
    GIVEN_BACK,
    KEPT,
    LOADER,
    LOOP,
    NCHW,
    NO_ONEDNN,
    OUR_COMPILED,
    OURS,
    REFERENCE,
    SEARCHED,
)

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class Bench:
    """How much is measured, on what, and what was found."""

    size: Size
    dtypes: list[str]
    turns: int  # that count, in the main comparison; elsewhere fewer
    lanes: list[int]  # runs side by side
    batches: list[int]
    depths: list[int]
    classes: list[int]
    full: bool
    ends: float  # of time.monotonic()
    photos: int  # files that the loader reads
    image_size: int = 224  # pixels, of the large sets
    turn_seconds: float = 0.3  # at least; whole units
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    failed: bool = False  # some part of it
    partial: Path | None = None  # where the rows so far are kept, should the command be ended from outside

    @property
    def cuda(self) -> bool:
        return self.size.device.type == "cuda"

    def left(self) -> float:
        return self.ends - time.monotonic()

    def over(self, what: str) -> bool:
        """Whether the budget is used up; the report then says that `what` is left out. Raises after SIGTERM."""
        if INTERRUPTED.is_set():
            raise KeyboardInterrupt
        if self.left() >= 0:
            return False
        self.left_out.append(f"{what}: the budget was used up")
        return True

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.size.device)


# -- how it is measured ------------------------------------------------------------------------------------------------


def in_turn(bench: Bench, parts: Sequence[tuple[str, Callable[[], None]]]) -> None:
    """Every part, by its title; the report names those that fail, exceed the budget or are interrupted."""
    for number, (title, part) in enumerate(parts):
        try:
            if bench.over(title):
                continue
            part()
        except (Exception, KeyboardInterrupt) as error:
            if INTERRUPTED.is_set() or isinstance(error, KeyboardInterrupt):  # a library may have made it another
                later = [title for title, _ in parts[number + 1 :]]
                bench.left_out += [f"{what}: interrupted" for what in (f"the rest of {title}", *later)]
                raise KeyboardInterrupt from None
            fail(bench, title, error)


def fail(bench: Bench, what: str, error: Exception) -> None:
    """Says why; what has been measured, for an hour perhaps, is not lost."""
    if isinstance(error, UserError):
        print(f"{what}: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    bench.left_out.append(f"{what}, it failed: {type(error).__name__}")
    bench.failed = True


@contextlib.contextmanager
def passed_over(bench: Bench, what: str) -> Iterator[None]:
    """What fails in it costs only itself, and the report names it."""
    try:
        yield
    except torch.OutOfMemoryError:
        bench.left_out.append(f"{what}: more than the device's memory holds")
    except Exception as error:
        if INTERRUPTED.is_set():  # a library may have made it another
            raise
        fail(bench, what, error)


def race(
    bench: Bench, units: dict[str, Unit], turns: int, share: float, what: str = "", called: bool = False
) -> dict[str, list[float]]:
    """Images/s of every turn that counts, by name: `turns`, or as many as end within `share` of the time left.

    A unit that fails, in whichever turn, or whose turn does not come, is named in the report, with `what`; the first
    is measured even when the time is used up. Units that have been `called` are not called once more to warm up. Where
    no time is left after a first turn, that turn counts of those which were warm before it.
    """
    warm = bench.cuda or called
    first: dict[str, float] = {}
    repeats: dict[str, int] = {}
    seconds: dict[str, float] = {}  # of a turn
    rates: dict[str, list[float]] = {}
    ends = time.monotonic() + share * bench.left()

    def left_out(name: str) -> None:
        bench.left_out.append(f"{what}, {name}: the budget was used up")

    for turn in range(turns + 1):
        for name, unit in units.items():
            if INTERRUPTED.is_set():
                raise KeyboardInterrupt
            if turn == 0:
                if rates and time.monotonic() > ends:
                    left_out(name)
                    continue
                with passed_over(bench, f"{what}, {name}" if name else what):
                    if bench.cuda and not called:
                        unit()  # may compile or choose kernels, and says nothing about how long a unit takes
                    images, taken = timed(bench, unit, 1)
                    repeats[name] = max(1, math.ceil(bench.turn_seconds / taken))
                    first[name], seconds[name], rates[name] = images / taken, repeats[name] * taken, []
            elif name in rates:
                if (warm or any(rates.values())) and time.monotonic() + seconds[name] > ends:
                    continue
                with passed_over(bench, f"{what}, {name}" if name else what):
                    images, taken = timed(bench, unit, repeats[name])
                    rates[name].append(images / taken)
                    continue
                del rates[name]  # what it reached before it failed is no figure of it
    for name in [name for name, found in rates.items() if not found]:
        if warm:
            rates[name] = [first[name]]
        else:
            del rates[name]
            left_out(name)
    return rates


def timed(bench: Bench, unit: Unit, repeats: int) -> tuple[int, float]:
    """Images and seconds of `repeats` units, with nothing queued before or after."""
    bench.synchronize()
    began = time.perf_counter()
    images = sum(unit() for _ in range(repeats))
    bench.synchronize()
    return images, time.perf_counter() - began


def note(bench: Bench, section: str, name: str, rates: list[float], **facts: Any) -> None:
    """A row of the report: images/s of all runs together, and milliseconds in which each of them takes one step."""
    row = {"section": section, "name": name, "dtype": bench.dtypes[0], "runs": 1, "depth": bench.size.depth}
    row |= {"batch_size": bench.size.batch_size, "classes": 10} | facts
    row["images_per_second"] = statistics.median(rates)
    row["milliseconds"] = 1000 * row["batch_size"] * row["runs"] / row["images_per_second"]
    row["turns"] = rates
    keep(bench, row)
    reached = bench_plot.speed(row["images_per_second"])
    print(f"  {section}: {name}, {row['dtype']}: {reached} images/s", file=sys.stderr, flush=True)


def keep(bench: Bench, row: dict[str, Any]) -> None:
    bench.rows.append(row)
    if bench.partial is not None:
        disk.write(bench.partial, json.dumps(bench.rows, indent=1) + "\n")


class Footprint:
    """MiB of GPU memory held on to since it was made; None on the CPU, where there is no such count."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        if bench.cuda:
            bench.synchronize()
            torch.cuda.empty_cache()
            self.before = torch.cuda.memory_reserved(bench.size.device)

    def mib(self) -> float | None:
        self.bench.synchronize()
        return (torch.cuda.memory_reserved(self.bench.size.device) - self.before) / 2**20 if self.bench.cuda else None


# -- the sections of the report ----------------------------------------------------------------------------------------


def one_run(bench: Bench, dtype: str, folder: Path) -> None:
    """One run at a time, and what our loop and step cost over the bare loop, turn against turn."""
    makers: dict[str, Callable[[Size, str], Unit]] = {
        BARE: contenders.bare,
        LOOP: functools.partial(contenders.loop, folder=folder),
        EAGER: contenders.eager,
        LOADER: contenders.loader,
        NCHW: contenders.nchw,
    }
    if bench.cuda:
        makers |= {CAPTURED: contenders.replayed, SEARCHED: contenders.searched}
    else:
        makers |= {NO_ONEDNN: contenders.without_onednn}
    if bench.full:
        makers[OUR_COMPILED] = contenders.compiled
    units: dict[str, Unit] = {}
    memory = {}
    for name, make in makers.items():
        what = f"one run in {dtype}, {name}"
        if bench.over(what):
            continue
        with passed_over(bench, what):
            footprint = Footprint(bench)
            unit = make(bench.size, dtype)
            unit()
            units[name], memory[name] = unit, footprint.mib()
    rates = race(bench, units, bench.turns, share=0.5, what=f"one run in {dtype}", called=True)
    for name, found in rates.items():
        note(bench, "one run", name, found, dtype=dtype, mebibytes=memory[name])
    for name in (LOOP, EAGER):
        if not {BARE, name} <= rates.keys():
            continue
        # the time may have been up for one of them before it was for the other
        percent = [100 * (reached / ours - 1) for reached, ours in zip(rates[BARE], rates[name], strict=False)]
        keep(bench, {"section": "overhead", "name": name, "dtype": dtype, "percent": percent})


def one_step(bench: Bench, dtype: str) -> None:
    """A further dtype on the CPU: processors without bfloat16 arithmetic are ten times slower in it."""
    unit = contenders.eager(dataclasses.replace(bench.size, steps=1), dtype)
    for rates in race(bench, {"": unit}, 1, share=0.1, what=f"one run in {dtype}").values():
        note(bench, "one run", EAGER, rates, dtype=dtype, mebibytes=None)


def floors(bench: Bench) -> None:
    """Operations and bytes of our step, counted while it runs, and the time they need at this device's rates."""
    size = dataclasses.replace(bench.size, steps=1, fused=False)  # what a Triton kernel moves cannot be counted
    for dtype in bench.dtypes:
        run = make_run(size, dtype, engine__capture=False)
        job = make_job(size, run)
        job.step.load(next(job.stream.epochs(run.recipe))[1], np.zeros(1))
        operations = roofline.count(job.step)
        rates = roofline.measure_rates(size.device, dtype)
        row = {"section": "floor", "name": "step", "dtype": dtype, "batch_size": size.batch_size, "depth": size.depth}
        row |= dataclasses.asdict(rates) | {"operations": len(operations)}
        row["gigaflop"] = sum(o.flops for o in operations) / 1e9
        for name, fused in (("fused", True), ("alone", False)):
            row[f"gigabytes_{name}"] = sum(o.fused_bytes if fused else o.bytes for o in operations) / 1e9
            row[f"milliseconds_{name}"] = 1000 * roofline.seconds(operations, rates, fused)
        if bench.cuda:
            row["launch_microseconds"] = 1e6 * launch_seconds(size.device)
        keep(bench, row)


def launch_seconds(device: torch.device, launches: int = 1000) -> float:
    """Seconds between two kernels of a graph that do next to nothing."""
    one = torch.zeros(1, device=device)
    return roofline.best_seconds(capture(lambda: [one.add_(1) for _ in range(launches)], []), device) / launches


def side_by_side(bench: Bench, dtype: str, folder: Path) -> None:
    """K runs on one GPU: in one process with a stream and a graph each, and stacked in one network."""
    footprint = Footprint(bench)
    run = make_run(bench.size, dtype, engine__eval_every=2)
    lanes: list[tuple[torch.cuda.Stream, Unit]] = []
    whole: list[tuple[torch.cuda.Stream, Iterator[tuple[int, bool]]]] = []
    memory = {}
    for k in bench.lanes:
        what = f"side by side in {dtype}, {k} runs"
        if bench.over(what):
            continue
        with passed_over(bench, what):
            while len(lanes) < k:
                stream = torch.cuda.Stream(bench.size.device)
                with torch.cuda.stream(stream):
                    job = make_job(bench.size, run)
                unit = contenders.steps(bench.size, run, job)
                whole.append((stream, contenders.turns(run, job, folder / str(len(lanes)))))
                lanes.append((stream, unit))
            memory[k] = footprint.mib()
    most = max(memory, default=0)
    del lanes[most:], whole[most:]  # of more than fit: their memory is the others'
    sides: dict[str, dict[str, Unit]] = {
        "streams": {f"{k} runs": functools.partial(together, lanes[:k]) for k in memory},
        "streams, whole runs with evaluation": {
            f"{k} runs": contenders.epochs(whole[:k], run.engine.eval_every) for k in memory
        },
    }
    for name, units in sides.items():
        rates = race(bench, units, 3, share=0.2, what=f"side by side in {dtype}, {name}")
        for k in [k for k in memory if f"{k} runs" in rates]:
            found = rates[f"{k} runs"]
            note(bench, "side by side", name, found, dtype=dtype, runs=k, mebibytes=memory[k])
    del lanes, whole, units, sides
    for k in [k for k in bench.lanes if 1 < k <= 8]:
        what = f"side by side in {dtype}, {k} stacked"
        if bench.over(what):
            continue
        with passed_over(bench, what):
            footprint = Footprint(bench)
            stacked = race(bench, {"": contenders.stacked(bench.size, dtype, k)}, 3, share=0.1, what=what)
            for found in stacked.values():
                note(bench, "side by side", "stacked", found, dtype=dtype, runs=k, mebibytes=footprint.mib())


def together(lanes: list[tuple[torch.cuda.Stream, Unit]]) -> int:
    """A unit of every lane, queued one after another."""
    images = 0
    for stream, unit in lanes:
        with torch.cuda.stream(stream):
            images += unit()
    return images


def processes(bench: Bench) -> None:
    """K runs in K processes: on the CPU each with its share of the threads, on a GPU through MPS where that runs."""
    control = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")) / "control"
    way = ("processes, MPS" if control.exists() else "processes, no MPS") if bench.cuda else "processes"
    threads = torch.get_num_threads()
    if bench.cuda:
        torch.cuda.empty_cache()  # what this process no longer uses is for the others
    for k in bench.lanes:
        what = f"{k} processes side by side" if k > 1 else "a process on its own"
        if (not bench.cuda and k > threads) or bench.over(what):
            continue
        found = share_out(make_task(bench, max(1, threads // k)), k)
        if not all(found):
            bench.left_out.append(f"{what}: one failed, see above")
            continue
        memory = sum(one["mebibytes"] for one in found)
        note(bench, "side by side", way, [sum(one["images_per_second"] for one in found)], runs=k, mebibytes=memory)


def freed_memory(bench: Bench) -> None:
    """On a CPU: step and evaluation with freed memory kept for what comes next, and given back to the system.

    In processes of their own, as the system's allocator learns from what went before.
    """
    turns: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for _ in range(2):
        for kept, found in turns.items():
            found += share_out(make_task(bench, torch.get_num_threads()) | {"keep": kept}, 1)
    if not all(turns[True] + turns[False]):
        bench.left_out.append("freed memory: a process failed, see above")
        return
    for kept, name in ((True, KEPT), (False, GIVEN_BACK)):
        memory = max(one["mebibytes"] for one in turns[kept])
        note(bench, "freed memory", name, [one["images_per_second"] for one in turns[kept]], mebibytes=memory)
        batch = config.Engine.eval_batch
        rates = [one["test_per_second"] for one in turns[kept]]
        note(bench, "freed memory, evaluation", name, rates, batch_size=batch, mebibytes=memory)


def make_task(bench: Bench, threads: int) -> dict[str, Any]:
    """What a worker is to do: our step, for some seconds."""
    task = dataclasses.asdict(bench.size) | {"device": str(bench.size.device), "dtype": bench.dtypes[0]}
    return task | {"threads": threads, "seconds": 10 if bench.full else 5, "keep": True}


def share_out(task: dict[str, Any], k: int) -> list[dict[str, float]]:
    """What `k` processes found that did `task` at the same time; an empty one where a process failed."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(task)]
    started: list[subprocess.Popen[str]] = []
    try:
        for _ in range(k):
            started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        ready = [process.stdout.readline() for process in started]
        if any(line != "ready\n" for line in ready):
            return [{}]
        for process in started:
            process.stdin.write("go\n")
            process.stdin.flush()
        return [json.loads(process.stdout.readline() or "{}") for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()


def peak_mib() -> float:
    """Most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says begins, in a process that another started, at what that one held
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work(task: dict[str, Any]) -> None:
    """One of several processes: makes its job ready, says so, waits for the word, trains, prints what it reached."""
    torch.set_num_threads(task.pop("threads"))
    if task.pop("keep") and task["device"] == "cpu":
        keep_freed_memory()
    lasts, dtype = task.pop("seconds"), task.pop("dtype")
    size = Size(**task | {"device": torch.device(task["device"])})
    run = make_run(size, dtype)
    job = make_job(size, run)
    unit = contenders.steps(size, run, job)
    unit()
    job.predict()
    print("ready", flush=True)
    sys.stdin.readline()
    images, began = 0, time.perf_counter()
    while (taken := time.perf_counter() - began) < lasts:
        images += unit()
        job.step.epoch_losses()  # waits for the device
    found = {"images_per_second": images / taken}
    began = time.perf_counter()
    found["test_per_second"] = len(job.predict().cpu()) / (time.perf_counter() - began)
    found["mebibytes"] = peak_mib()
    if size.device.type == "cuda":
        found["mebibytes"] = torch.cuda.max_memory_reserved(size.device) / 2**20
    print(json.dumps(found), flush=True)
    sys.stdin.readline()  # until the parent ends it


def growth(bench: Bench, section: str, field: str, values: list[int]) -> None:
    """Our step against a `field` of the size, about as many images a unit."""
    for dtype in bench.dtypes if bench.cuda else bench.dtypes[:1]:
        sizes, units = {}, {}
        for value in values:
            what = f"{section} {value} in {dtype}"
            if bench.over(what):
                continue
            size = dataclasses.replace(bench.size, **{field: value})
            size = dataclasses.replace(size, steps=max(1, round(bench.size.images / size.batch_size)))
            with passed_over(bench, what):
                sizes[str(value)], units[str(value)] = size, contenders.replayed(size, dtype)
        for name, rates in race(bench, units, 3, share=0.25, what=f"{section} in {dtype}").items():
            size = sizes[name]
            note(bench, section, "step", rates, dtype=dtype, depth=size.depth, batch_size=size.batch_size)


def classes(bench: Bench) -> None:
    """What the loss costs as classes grow: its forward and backward alone, and in a whole step."""
    for number in bench.classes:
        if bench.over(f"{number} classes"):
            continue
        counts = np.maximum(1, 1000 // np.arange(1, number + 1))
        alone, whole = {}, {}
        for kind in ("softmax", "sigmoid", "focal"):
            loss = ClassBalancedLoss(counts, kind, beta=0.999)
            alone[kind] = contenders.loss_alone(bench.size, loss, number)
            if kind != "focal":
                run = make_run(bench.size, bench.dtypes[0], loss__kind=kind, loss__beta=0.999)
                whole[kind] = contenders.steps(bench.size, run, make_job(bench.size, run, number))
        for kind, rates in race(bench, alone, 5, share=0.1, what=f"loss of {number} classes alone").items():
            note(bench, "loss alone", kind, rates, dtype="fp32", classes=number)
        for kind, rates in race(bench, whole, 2, share=0.2, what=f"{number} classes").items():
            note(bench, "classes", kind, rates, classes=number)


def evaluation(bench: Bench) -> None:
    """Test images/s."""
    for dtype in bench.dtypes if bench.cuda else bench.dtypes[:1]:
        run = make_run(bench.size, dtype)
        predict = make_job(bench.size, run).predict
        units = {"": lambda predict=predict: len(predict())}
        for rates in race(bench, units, 3, share=0.1, what=f"evaluation in {dtype}").values():
            note(bench, "evaluation", "test set", rates, dtype=dtype, batch_size=run.engine.eval_batch)


def first_step(bench: Bench) -> None:
    """Seconds from a run's start to the end of its first step, when others have run in the process."""
    taken = []
    for seed in range(3):
        began = time.perf_counter()
        run = dataclasses.replace(make_run(bench.size, bench.dtypes[0]), seed=seed)
        job = make_job(bench.size, run)
        _, plan = next(job.stream.epochs(run.recipe))
        job.step.load(plan, np.zeros(len(plan)))
        job.advance()
        job.step.epoch_losses()  # waits for the device
        taken.append(time.perf_counter() - began)
    row = {"section": "first step", "name": "start of a run to its first step", "dtype": bench.dtypes[0]}
    keep(bench, row | {"seconds": statistics.median(taken), "turns": taken})


def cifar(bench: Bench) -> None:
    """The paper's network on images of CIFAR's shape; the sections that matter most come first."""
    first, *others = bench.dtypes
    part = functools.partial
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sections: list[tuple[str, Callable[[], None]]] = [
            (f"one run in {first}", part(one_run, bench, first, folder / first)),
            ("floor", part(floors, bench)),
            ("evaluation", part(evaluation, bench)),
            ("first step", part(first_step, bench)),
        ]
        if bench.cuda:
            lanes = [
                (f"side by side in {dtype}", part(side_by_side, bench, dtype, folder / f"{dtype}-lanes"))
                for dtype in bench.dtypes
            ]
            alone = [(f"one run in {dtype}", part(one_run, bench, dtype, folder / dtype)) for dtype in others]
            sections += [*lanes[:1], *alone, *lanes[1:]]
        sections += [
            ("depth", part(growth, bench, "depth", "depth", bench.depths)),
            ("batch size", part(growth, bench, "batch size", "batch_size", bench.batches)),
            ("classes", part(classes, bench)),
            ("processes side by side", part(processes, bench)),
        ]
        if not bench.cuda:
            sections += [("freed memory", part(freed_memory, bench))]
            sections += [(f"one run in {dtype}", part(one_step, bench, dtype)) for dtype in others]
        in_turn(bench, sections)


def loader(bench: Bench) -> None:
    """Images/s of one core, ours and torchvision's, on the same files."""
    with tempfile.TemporaryDirectory() as name:
        names = loader_speed.photos(Path(name), bench.photos)
        found = loader_speed.compare(Path(name), names, bench.image_size, bench.turns)
    row = {"section": "loader", "name": "one core", "images": bench.photos, "image_size": bench.image_size}
    keep(bench, row | {"turns": bench.turns} | found)
    print(f"  loader: {found['ours']:,.0f} images/s of one core", file=sys.stderr, flush=True)


def resnet50(bench: Bench) -> None:
    """The step of the large sets and torchvision's, turn against turn; what an image takes; the share of the loss."""
    search = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = bench.cuda  # both recipes do
    try:
        _resnet50(bench)
    finally:
        torch.backends.cudnn.benchmark = search


def _resnet50(bench: Bench) -> None:
    device = bench.size.device
    units: dict[str, Unit] = {}
    facts: dict[str, dict[str, Any]] = {}
    for form in ("", COMPILED) if bench.cuda else ("",):
        if bench.over(f"the large sets' step{form}"):
            continue
        run = contenders.make_large_run(device, bench.image_size, bool(form))
        job = None
        with passed_over(bench, f"the large sets' step{form}"):
            job = synthetic.make_job(run, device)
        if job is None:
            continue
        counts, at_once = job.train.counts.tolist(), job.micro_batch
        makers: dict[tuple[str, int], Callable[[], Unit]] = {
            (OURS, at_once): functools.partial(contenders.large, run, job)
        }
        # its recipe does not accumulate gradients: it may have the batch that suits it better
        for images in (at_once, 2 * at_once) if bench.cuda else (at_once,):
            makers[REFERENCE, images] = functools.partial(
                contenders.torchvision_recipe, run, device, images, len(counts)
            )
        for (name, images), make in makers.items():
            key = f"{name}{form}, {images} at a time"
            if bench.over(key):
                continue
            with passed_over(bench, key):
                unit = make()
                memory = image_mebibytes(bench, unit, images)
                units[key] = unit
                whole = job.batch_size if bench.cuda and name == OURS else images  # images of an update
                facts[key] = {"name": name + form, "dtype": run.engine.dtype, "at_once": images, "batch_size": whole}
                facts[key] |= {"mebibytes_per_image": memory, "image_size": bench.image_size}
                facts[key] |= {"depth": run.model.depth, "classes": len(counts)}
    longer = dataclasses.replace(bench, turn_seconds=10 * bench.turn_seconds if bench.cuda else bench.turn_seconds)
    rates = race(longer, units, bench.turns, share=0.3, what="resnet50", called=bench.cuda)
    bench.failed |= longer.failed
    for key, found in rates.items():
        note(bench, "resnet50", rates=found, **facts[key])

    for form in ("", COMPILED):
        ours = [key for key in rates if facts[key]["name"] == OURS + form]
        theirs = [key for key in rates if facts[key]["name"] == REFERENCE + form]
        if ours and theirs:
            best = max(theirs, key=lambda key: statistics.median(rates[key]))
            row = {"section": "resnet50 ratio", "name": OURS + form, "against": best}
            # the time may have been up for one of them before it was for the other
            keep(bench, row | {"ratio": [a / b for a, b in zip(rates[ours[0]], rates[best], strict=False)]})

    ours = [statistics.median(rates[key]) for key in rates if facts[key]["name"].startswith(OURS)]
    if not ours or bench.over("resnet50 loss"):
        return
    size = dataclasses.replace(bench.size, batch_size=at_once)
    for kind in ("softmax", "sigmoid", "focal"):
        loss = ClassBalancedLoss(counts, kind, beta=0.999)
        alone = {kind: contenders.loss_alone(size, loss, len(counts))}
        for found in race(bench, alone, 5, share=0.1, what="resnet50 loss").values():
            note(bench, "resnet50 loss", kind, found, dtype="fp32", batch_size=at_once, depth=50, classes=len(counts))
            bench.rows[-1]["percent"] = 100 * max(ours) / statistics.median(found)  # of the time of an image


def image_mebibytes(bench: Bench, unit: Unit, images: int) -> float | None:
    """MiB of GPU memory that a unit takes while it runs, over the `images` that are in it at a time."""
    if not bench.cuda:
        return None
    unit()  # may compile or choose kernels
    bench.synchronize()
    torch.cuda.reset_peak_memory_stats(bench.size.device)
    before = torch.cuda.memory_allocated(bench.size.device)
    unit()
    bench.synchronize()
    return (torch.cuda.max_memory_allocated(bench.size.device) - before) / images / 2**20


# by name on the command line: what fills the rows of a Bench; the last takes what is left of the budget
WORKLOADS: dict[str, Callable[[Bench], None]] = {"loader": loader, "resnet50": resnet50, "cifar": cifar}


# -- the report --------------------------------------------------------------------------------------------------------


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    about = {"device": device_name(device), "kind": device.type, "threads": torch.get_num_threads()}
    about |= records.environment() | {"cpu_count": os.cpu_count(), "platform": platform.platform()}
    about["load_average"] = round(os.getloadavg()[0], 2)  # before: above 0, others were at work
    names = ("CUDA_DEVICE_MAX_CONNECTIONS", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS")
    about["variables"] = {name: os.environ[name] for name in names if name in os.environ}
    if device.type == "cuda":
        about |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        fields = "name,memory.total,power.limit,driver_version,clocks.max.sm,clocks.max.memory,compute_mode"
        number = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # torch counts the visible ones, it all
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={number}"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
            about["nvidia_smi"] = dict(zip(fields.split(","), answer.strip().split(", "), strict=True))
        except (OSError, subprocess.SubprocessError, ValueError):
            about["nvidia_smi"] = None  # not every machine lets its users ask
    return about


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """<device>-<date>.json, and made of it .md, .png and .svg; of one workload alone <device>-<workload>-<date>.

    With the fused kernels -fused before the date; interrupted -interrupted after it, beside the report of a whole one.
    Where another command's report has that name, -2 behind it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", report["environment"]["device"].lower()).strip("-")
    alone = [] if report["workload"] == "all" else [report["workload"]]
    alone += ["fused"] if report["fused"] else []
    name = "-".join([slug, *alone, report["date"], *(["interrupted"] if report["interrupted"] else [])])
    path = next(
        path for path in numbered(folder / f"{name}.json") if not path.exists() or command_of(path) == report["command"]
    )
    files, stem = [path, path.with_suffix(".md")], path.with_suffix("")
    disk.write(files[0], json.dumps(report, indent=1) + "\n")
    disk.write(files[1], bench_plot.markdown(report, measured_on_gpu(folder)))
    return [*files, *bench_plot.save(report, stem)]


def numbered(path: Path) -> Iterator[Path]:
    """`path`, then others with -2, -3, ... in their names."""
    yield path
    for number in itertools.count(2):
        yield path.with_stem(f"{path.stem}-{number}")


def unused(path: Path) -> Path:
    return next(path for path in numbered(path) if not path.exists())


def command_of(path: Path) -> str | None:
    """Of a report; None of another file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["command"]
    except (ValueError, TypeError, KeyError):
        return None


def measured_on_gpu(folder: Path) -> bool:
    """Whether one of the reports in `folder` is a GPU's."""
    for path in folder.glob("*.json"):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # another's, as is one without our keys
            continue
        match report:
            case {"environment": {"kind": "cuda"}}:
                return True
    return False


def parity(path: Path, seconds: float | None) -> bool | None:
    """Whether the tests that need a GPU pass, None if `seconds` are too few; what they say goes to `path` and here."""
    # these files alone: collecting the others wants W&B and Jupyter, and one that cannot be imported stops all
    files = [str(p) for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text(encoding="utf-8")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-rA", *files]
    passed = None
    with path.open("wb") as said, contextlib.suppress(subprocess.TimeoutExpired):
        # at once: what has been said outlasts an interruption
        done = subprocess.run(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, timeout=seconds)
        passed = done.returncode == 0
    print(path.read_text(encoding="utf-8", errors="replace"))  # the time may have been up within a letter
    return passed


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", nargs="?", choices=["all", *WORKLOADS], default="all", help="default all")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="in small; what a CPU does unless told otherwise")
    size.add_argument("--full", action="store_true", help="everything; what a GPU does unless told otherwise")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="about so long, with parity tests; default 180, in full 3600"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", default=ROOT / "results" / "bench")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument("--dtypes", metavar="A,B", help="cifar: of fp32,tf32,bf16; default those of the device")
    parser.add_argument("--lanes", metavar="A,B", help="cifar: runs side by side; default 1,2,4,8,16,32")
    parser.add_argument("--depth", type=int, metavar="N", help="cifar: of the ResNet; default 32")
    parser.add_argument("--batch-size", type=int, metavar="N", help="cifar: default 128")
    parser.add_argument("--fused", action="store_true", help="cifar, on a GPU: our step with engine.fused=true")
    parser.add_argument("--gpu-report", type=Path, metavar="DIR", help="parity tests, then --full, all of it into DIR")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def make_bench(given: argparse.Namespace, device: torch.device) -> Bench:
    """How much to measure; raises `UserError` for an option that makes no sense."""
    cuda = device.type == "cuda"
    full = given.full or (cuda and not given.quick)
    dtypes = given.dtypes.split(",") if given.dtypes else ["bf16", "fp32", "tf32"] if cuda else ["fp32", "bf16"]
    if wrong := [name for name in dtypes if name not in ("fp32", "tf32", "bf16")]:
        raise UserError(f"--dtypes has '{wrong[0]}': write some of fp32,tf32,bf16.")
    try:
        lanes = sorted({int(part) for part in (given.lanes or "1,2,4,8,16,32").split(",")})
    except ValueError:
        lanes = [0]
    if lanes[0] < 1:
        raise UserError(f"--lanes is '{given.lanes}': write whole numbers with commas between, such as 1,2,4.")
    size = Size(device) if cuda else Size(device, steps=2, n_test=1000)
    asked = {"depth": given.depth, "batch_size": given.batch_size, "fused": given.fused}
    size = dataclasses.replace(size, **{name: value for name, value in asked.items() if value is not None})
    make_run(size, dtypes[0])  # checks them
    return Bench(
        size=size,
        dtypes=dtypes,
        turns=9 if full else 5,
        lanes=lanes,
        batches=[32, 64, 128, 256, 512, 1024] if full else [32, 128, 256],
        depths=[8, 20, 32, 56],
        classes=[10, 100, 1000, 8142] if full else [10, 8142],
        full=full,
        photos=32 if full else 8,
        ends=time.monotonic() + ((3600.0 if full else 180.0) if given.budget is None else given.budget),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    if given.worker:
        work(given.worker)
        return 0
    if given.threads is not None and given.threads < 1:
        raise UserError(f"--threads is {given.threads}: it must be 1 or more.")
    device = choose_device(dataclasses.replace(config.Engine(), device=given.device, threads=given.threads))
    if given.gpu_report:
        if device.type != "cuda":
            raise UserError(f"--gpu-report needs a GPU, and torch {torch.__version__} sees none here.")
        given.full, given.out = True, given.gpu_report
    if given.fused and device.type != "cuda":
        raise UserError(f"--fused needs a GPU, and torch {torch.__version__} uses {device} here: leave it out.")
    bench = make_bench(given, device)
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / ".write").touch()
        (given.out / ".write").unlink()
    except OSError as error:  # said now, not when all has been measured
        raise UserError(f"--out {given.out} cannot be written ({error.strerror}): give another folder.") from None
    bench.partial = given.out / "rows.partial"
    if bench.partial.exists():  # of a command that was killed: all that there is of it
        bench.partial.rename(unused(bench.partial))
    report: dict[str, Any] = {"workload": given.workload, "date": datetime.date.today().isoformat()}
    report["command"] = " ".join(["python scripts/benchmark.py", *(sys.argv[1:] if arguments is None else arguments)])
    report |= {
        "full": bench.full,
        "fused": bench.size.fused,
        "parity_tests_passed": None,
        "environment": environment(device),
    }
    names = WORKLOADS if given.workload == "all" else [given.workload]
    began, interrupted = time.monotonic(), False
    try:
        if given.gpu_report:
            said = unused(given.out / "parity.txt")
            report["parity_file"] = said.name
            passed = parity(said, None if given.budget is None else max(60.0, bench.left()))
            report["parity_tests_passed"] = passed
            if passed is None:
                bench.left_out.append("the rest of the parity tests: the budget was used up")
            began = time.monotonic()
        in_turn(bench, [(name, functools.partial(WORKLOADS[name], bench)) for name in names])
    except KeyboardInterrupt:
        interrupted = True
    if not bench.rows:
        print("Nothing was measured: " + ("; ".join(bench.left_out) or "interrupted") + ".", file=sys.stderr)
        return 130 if interrupted else 1
    report |= {"seconds": round(time.monotonic() - began), "left_out": bench.left_out, "interrupted": interrupted}
    report["process_mebibytes"] = round(peak_mib())
    report["rows"] = bench.rows
    files = write(report, given.out)
    bench.partial.unlink(missing_ok=True)
    bench_plot.show(report, measured_on_gpu(given.out))
    print("Written: " + ", ".join(str(file) for file in files))
    return 130 if interrupted else 1 if bench.failed or report["parity_tests_passed"] is False else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    with one_line():
        sys.exit(main())
