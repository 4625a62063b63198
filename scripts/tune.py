"""The fastest tiles of the fused kernels on this GPU, printed as the tables of cbl/engine/fused.py.

    python scripts/tune.py                     # for one run
    python scripts/tune.py --lanes 8           # for eight runs side by side

A tile is judged by the time of the whole forward and backward pass of ResNet-32, captured as a CUDA graph, with all
other tiles as they are: first the rounds under way at once, for one kernel after the other, then how many pixels,
inputs and outputs a block of threads takes at a time, then its warps, again the rounds, and the pixels that it adds up.
What does not fit into the GPU's shared memory is passed over, and so is what would win but does not start in another
dtype or computes other gradients. The candidates, some 900, are compiled beforehand, in a process a core.
Interrupted, by Ctrl-C, SIGTERM or --budget, it prints the best so far.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import math
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from command_line import INTERRUPTED, interrupt

from cbl import config
from cbl.cores import usable_cores
from cbl.engine.device import choose_device
from cbl.engine.job import kernels
from cbl.errors import UserError
from cbl.models import resnet_cifar
from cbl.models.resnet_cifar import ResNetCifar

TABLES = ("FORWARD", "BACKWARD_DATA", "BACKWARD_WEIGHT")
# one table holds for all dtypes -> how far gradients may be apart, of their norm: those of ResNet-8 are by up to 0.12
# in bf16 and 0.01 in fp32 when sums are in another order
APART = {"bf16": 0.3, "tf32": 0.1, "fp32": 0.03}
Entry = tuple[str, tuple[int, int]]  # table, (channels in, channels out)
Tile = tuple[int, ...]  # as in the tables: pixels, inputs, outputs, warps, rounds[, pixels added up]


def rounds(entry: Entry, tile: Tile) -> Iterator[Tile]:
    """`tile` with other rounds under way.

    Several are copied past the L1 cache, and the nine taps of a convolution are then nine reads from L2: which shape is
    best depends on it.
    """
    for under_way in (1, 2, 3, 4):
        yield *tile[:4], under_way, *tile[5:]


def shapes(entry: Entry, tile: Tile) -> Iterator[Tile]:
    """`tile` with other pixels, inputs and outputs at a time."""
    table, (ci, co) = entry
    outputs = ci if table == "BACKWARD_DATA" else co
    # channels of three pixels side by side, of which `inputs` are taken at a time
    row = 3 * (co if table == "BACKWARD_DATA" else max(ci, 4))
    each_output = [n for n in (outputs // 2, outputs) if n >= 16]
    for pixels, inputs, n in itertools.product((32, 64, 128, 256, 512), (16, 32, 64, 128, 256), each_output):
        loads = pixels * inputs / (8 * 32 * tile[3])  # of 16 bytes, by a thread in a round
        # half of the tile would be padding; too little or too much for a thread; more pixels than are added up
        if inputs >= 2 * row > 32 or not 1 <= loads <= 16 or (len(tile) > 5 and tile[5] % pixels):
            continue
        if table != "BACKWARD_WEIGHT" and pixels == 32:  # the instruction of four warps takes 64
            continue
        yield pixels, inputs, n, *tile[3:]


def schedules(entry: Entry, tile: Tile) -> Iterator[Tile]:
    """`tile` with other warps and rounds under way, and for the weight's gradient other pixels added up."""
    adds = [(each,) for each in (128, 256, 512, 1024, 2048) if each % tile[0] == 0] if len(tile) > 5 else [()]
    for warps, (_, _, _, _, under_way, *_), each in itertools.product((2, 4, 8), rounds(entry, tile), adds):
        yield *tile[:3], warps, under_way, *each


def descend(
    tiles: dict[Entry, Tile],
    best: float,
    measure: Callable[[dict[Entry, Tile]], float | None],
    sound: Callable[[dict[Entry, Tile]], bool],
    ready: Callable[[dict[Entry, list[Tile]]], None],
    report: Callable[[Entry, float, int], None],
) -> None:
    """Changes `tiles`, which take `best` milliseconds, into the fastest found, one entry after the other.

    `measure` gives the milliseconds of some tiles, None if they do not fit; `sound` says whether they may be taken;
    `ready` is told all that will be measured.
    """
    for vary in (rounds, shapes, schedules):
        tried = {entry: [t for t in vary(entry, tile) if t != tile] for entry, tile in tiles.items()}
        ready(tried)
        for entry, candidates in tried.items():
            for tile in candidates:
                took = measure(tiles | {entry: tile})
                if took is not None and took < best:  # of hundreds some look better by chance: measured once more
                    took = max(took, measure(tiles | {entry: tile}) or took)
                    if took < best and sound(tiles | {entry: tile}):
                        tiles[entry], best = tile, took
            report(entry, best, len(candidates))


def written(tiles: dict[Entry, Tile]) -> str:
    """The tables as Python."""
    lines = []
    for table in TABLES:
        lines.append(f"{table} = {{")
        lines += [f"    {channels}: {tile}," for (name, channels), tile in tiles.items() if name == table]
        lines.append("}  # fmt: skip")
    return "\n".join(lines)


def _take(tiles: dict[Entry, Tile]) -> None:
    from cbl.engine import fused

    for (table, channels), tile in tiles.items():
        getattr(fused, table)[channels] = tile


@functools.cache
def _model(depth: int, lane: int) -> ResNetCifar:
    return resnet_cifar(depth, seed=lane).to("cuda", memory_format=torch.channels_last)


@functools.cache
def _images(number: int, lane: int) -> torch.Tensor:
    return torch.randn(number, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)


def _passes(given: argparse.Namespace, lane: int) -> Callable[[], Any]:
    """() -> the gradients of one forward and backward pass with the tiles of now."""
    from cbl.engine import fused

    model, x = _model(given.depth, lane), _images(given.batch_size, lane)
    network, parameters = fused.Fused(model, given.dtype), list(model.parameters())
    return lambda: torch.autograd.grad(network(x).sum(), parameters)


def _compile(work: tuple[argparse.Namespace, dict[Entry, Tile]]) -> None:
    """Into Triton's cache on the disk, by running it; what fails will say so when it is measured."""
    given, tiles = work
    _take(tiles)
    with contextlib.suppress(Exception):
        _passes(given, 0)()
        torch.cuda.synchronize()


def _try(function: Callable[[], Any]) -> bool:
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        function()
    except (OutOfResources, PTXASError):
        return False
    except RuntimeError as error:
        if "PassManager" not in str(error):  # as Triton says that its compiler gave up
            raise
        return False
    return True


class Stopwatch:
    """Milliseconds of one pass of each lane with some tiles, None where they do not fit."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.streams = [torch.cuda.Stream() for _ in range(given.lanes)]

    def __call__(self, tiles: dict[Entry, Tile]) -> float | None:
        from cbl.engine.step import capture

        _take(tiles)
        passes = [_passes(self.given, lane) for lane in range(self.given.lanes)]
        if not _try(passes[0]):
            return None
        replays = []
        for stream, function in zip(self.streams, passes, strict=True):
            with torch.cuda.stream(stream):
                replays.append(capture(function, [], warm_up=1))
        times = []
        for _ in range(4):  # the fastest: what disturbs a time makes it longer; the first also warms up
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(8):
                for stream, replay in zip(self.streams, replays, strict=True):
                    with torch.cuda.stream(stream):
                        replay()
            torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - began) / 8)
        return min(times)


class Sound:
    """Whether some tiles start in every dtype in which the first do, and give the gradients that those give.

    With ResNet-8: it has all the tables' convolutions of colour images, and a deeper one amplifies rounding more.
    `in_time` is called before each dtype of some tiles, which takes seconds to compile.
    """

    def __init__(self, given: argparse.Namespace, first: dict[Entry, Tile], in_time: Callable[[], None]) -> None:
        self.given, self.in_time = given, in_time
        _take(first)
        self.expected: dict[str, list[torch.Tensor]] = {}
        for dtype in APART:
            in_time()
            if (found := self._gradients(dtype)) is not None:
                self.expected[dtype] = found

    def __call__(self, tiles: dict[Entry, Tile]) -> bool:
        _take(tiles)
        for dtype, expected in self.expected.items():
            self.in_time()
            found = self._gradients(dtype)
            if found is None:
                return False
            for a, b in zip(found, expected, strict=True):
                if not (a - b).norm() <= APART[dtype] * b.norm():  # as NaN is not
                    return False
        return True

    @staticmethod
    def of(given: argparse.Namespace, dtype: str) -> argparse.Namespace:
        """What is run for the gradients of one dtype."""
        return argparse.Namespace(**vars(given) | {"depth": 8, "dtype": dtype})

    def _gradients(self, dtype: str) -> list[torch.Tensor] | None:
        given = self.of(self.given, dtype)
        found: list[torch.Tensor] = []
        return found if _try(lambda: found.extend(_passes(given, 0)())) else None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lanes", type=int, default=1, metavar="N", help="runs side by side; default 1")
    parser.add_argument("--dtype", choices=["bf16", "tf32", "fp32"], default="bf16", help="default bf16")
    parser.add_argument("--depth", type=int, default=32, metavar="N", help="of the ResNet; default 32")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument("--processes", type=int, default=usable_cores(), metavar="N", help="that compile; default all")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="at most; default no limit")
    given = parser.parse_args(arguments)
    for name in ("lanes", "batch_size", "processes", "budget"):
        if getattr(given, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(given, name)}: it must be 1 or more.")
    try:
        resnet_cifar(given.depth)
    except ValueError as error:
        raise UserError(f"--depth: {error}") from None
    return given


class OutOfTime(Exception):
    """The budget is used up."""


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    ends = time.monotonic() + given.budget
    device = choose_device(config.Engine())
    if device.type != "cuda":
        raise UserError(f"Tiles are measured on a GPU, and torch {torch.__version__} uses {device} here.")
    kernels()

    def in_time() -> None:
        if INTERRUPTED.is_set():
            raise KeyboardInterrupt
        if time.monotonic() > ends:
            raise OutOfTime

    signal.signal(signal.SIGTERM, interrupt)
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    pool = concurrent.futures.ProcessPoolExecutor(given.processes, spawn)  # one: a process takes seconds to start
    try:
        search(given, pool, in_time)
    finally:
        pool.shutdown(cancel_futures=True)  # interrupted, it waits for those under way alone


def search(given: argparse.Namespace, pool: concurrent.futures.Executor, in_time: Callable[[], None]) -> None:
    """Prints the fastest tiles that are found until `in_time` raises; `pool` compiles."""
    from cbl.engine import fused

    before = {(table, channels): tile for table in TABLES for channels, tile in getattr(fused, table).items()}
    tiles = {entry: tile for entry, tile in before.items() if entry[1][0] != 1}  # measured on colour images

    def compiled(work: list[tuple[argparse.Namespace, dict[Entry, Tile]]]) -> None:
        try:
            _progress(pool.map(_compile, work), len(work), in_time)
        except BrokenProcessPool:
            print("a process that compiled has died: what it left is compiled as it is measured", flush=True)

    def ready(tried: dict[Entry, list[Tile]]) -> None:
        compiled([(given, tiles | {entry: tile}) for entry, candidates in tried.items() for tile in candidates])

    try:
        compiled([(given, tiles), *((Sound.of(given, dtype), tiles) for dtype in APART)])
        stopwatch, sound = Stopwatch(given), Sound(given, tiles, in_time)
        in_time()
        first = stopwatch(tiles)
    except OutOfTime:
        raise UserError(f"--budget is {given.budget:g}: the tiles as they are took longer; give more.") from None
    if first is None:
        raise UserError("The tiles of cbl/engine/fused.py do not fit this GPU: lower their rounds or pixels there.")
    print(f"{torch.cuda.get_device_name()}: {first:.3f} ms with the tiles as they are", flush=True)
    best = first

    def report(entry: Entry, took: float, tried: int) -> None:
        nonlocal best
        best = took
        print(f"{entry[0]} {entry[1]}: {tiles[entry]} of {tried + 1}, {took:.3f} ms", flush=True)

    def measure(tiles: dict[Entry, Tile]) -> float | None:
        in_time()
        return stopwatch(tiles)

    try:
        descend(tiles, first, measure, sound, ready, report)
    except OutOfTime:
        print(f"the budget of {given.budget:g} s is used up", flush=True)
    finally:
        images = given.batch_size * given.lanes
        print(f"{first:.3f} -> {best:.3f} ms for {images} images, forward and backward pass; changed:")
        changed = [f"  {e[0]} {e[1]}: {before[e]} -> {tile}" for e, tile in tiles.items() if tile != before[e]]
        print("\n".join(changed) or "  nothing")
        print(written(before | tiles), flush=True)


def _progress(finished: Iterable[None], total: int, in_time: Callable[[], None]) -> None:
    began, shown = time.monotonic(), 0.0
    for number, _ in enumerate(finished, 1):
        in_time()
        if number == total or time.monotonic() - shown > 5:
            shown = time.monotonic()
            print(f"compiled {number} of {total} candidates, {shown - began:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
