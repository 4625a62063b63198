"""The search for the fused kernels' tiles: what it tries, that it finds the fastest, that its tables can be pasted."""

import argparse
import concurrent.futures
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_fused import TRITON, interpret

pytest.importorskip(*TRITON)

from cbl.engine import fused

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "tune.py"


def load() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))  # as when it is run; some tests below do without pytest's
    spec = importlib.util.spec_from_file_location("tune", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tune = load()
TILES = {(table, channels): tile for table in tune.TABLES for channels, tile in getattr(fused, table).items()}


@pytest.mark.parametrize("vary", [tune.rounds, tune.shapes, tune.schedules])
@pytest.mark.parametrize("entry", [entry for entry in TILES if entry[1][0] != 1], ids=str)  # colour images
def test_candidates_are_tiles_that_the_kernels_can_take(entry: Any, vary: Any) -> None:
    """Powers of two, outputs that divide the channels, no side below the 16 of a matrix unit, whole sums."""
    table, (ci, co) = entry
    candidates = list(vary(entry, TILES[entry]))
    assert len(candidates) == len(set(candidates)) > 3
    for pixels, inputs, outputs, warps, rounds, *each in candidates:
        assert all(n & (n - 1) == 0 for n in (pixels, inputs, outputs, warps, *each))
        assert pixels >= 32 and inputs >= 16 and outputs >= 16 and 1 <= rounds <= 4
        assert (ci if table == "BACKWARD_DATA" else co) % outputs == 0
        assert len(each) == (table == "BACKWARD_WEIGHT") and all(n % pixels == 0 for n in each)


def compare_with_other_tiles() -> None:
    """Whose inputs at a time are more than three pixels have, and whose outputs are half of them."""
    from test_fused import compare

    tiles = {entry: tile for entry, tile in TILES.items() if entry[1][0] != 1}
    other = {entry: max(tune.shapes(entry, tile), key=lambda t: (t[1], -t[2])) for entry, tile in tiles.items()}
    assert sum(tile[1] > 3 * entry[1][1] for entry, tile in other.items() if entry[0] == "BACKWARD_DATA") >= 3
    assert sum(tile[2] < TILES[entry][2] for entry, tile in other.items()) >= 8
    tune._take(other)
    compare("mean_pool", 3, "cpu")


def test_other_tiles_compute_the_same_network() -> None:
    interpret("from test_tune import compare_with_other_tiles; compare_with_other_tiles()")


def descend(cost: Any, sound: Any = lambda tile: True) -> tuple[dict[Any, Any], list[Any], list[Any]]:
    """What is found of two entries whose times add up, what was reported, what was measured before it was told."""
    tiles = {entry: TILES[entry] for entry in [("FORWARD", (16, 16)), ("BACKWARD_WEIGHT", (32, 64))]}
    known, early, reports = list(tiles.values()), [], []

    def measure(given: dict[Any, Any]) -> float | None:
        early.extend(tile for tile in given.values() if tile not in known)
        times = [cost(tile) for tile in given.values()]
        return None if None in times else sum(times)

    def ready(tried: dict[Any, Any]) -> None:
        known.extend(tile for candidates in tried.values() for tile in candidates)

    def each_sound(given: dict[Any, Any]) -> bool:
        return all(map(sound, given.values()))

    tune.descend(tiles, measure(tiles), measure, each_sound, ready, lambda *report: reports.append(report))
    return tiles, reports, early


def test_descend_finds_the_fastest_and_passes_over_what_does_not_fit() -> None:
    def cost(tile: tuple[int, ...]) -> float | None:
        pixels, inputs, outputs, warps, rounds, *each = tile
        if pixels * inputs > 16384:
            return None
        return 3 * 512 / pixels + 256 / inputs + 64 / outputs + 4 * abs(warps - 8) + rounds + sum(each) / 128

    tiles, reports, early = descend(cost)
    assert not early  # all was compiled before it was measured
    for entry, tile in tiles.items():
        for vary, start in ((tune.shapes, TILES[entry]), (tune.schedules, tile)):
            fits = [(cost(t), t) for t in vary(entry, start) if cost(t) is not None]
            assert vary is tune.shapes or (cost(tile), tile) == min(fits)
            assert cost(tile) <= min(fits)[0]  # type: ignore[operator]
        assert tile != TILES[entry]
    assert [entry for entry, _, _ in reports] == [*tiles, *tiles, *tiles]
    times = [took for _, took, _ in reports]
    assert times == sorted(times, reverse=True) and times[-1] == sum(cost(tile) for tile in tiles.values())  # type: ignore[misc]


def test_a_winner_that_is_not_sound_is_passed_over_for_the_next_best() -> None:
    def cost(tile: tuple[int, ...]) -> float:
        return 5 - tile[4]

    tiles, reports, _ = descend(cost, lambda tile: tile in TILES.values() or tile[4] < 4)
    for entry, tile in tiles.items():
        assert cost(tile) == (2 if cost(TILES[entry]) > 1 else 1)
    assert reports[-1][1] == sum(cost(tile) for tile in tiles.values())


def is_sound() -> None:
    """In the interpreter, on small images: of other tiles, and of one that adds some pixels up twice."""
    model = tune.resnet_cifar(8, seed=0).to(memory_format=torch.channels_last)
    x = torch.randn(5, 3, 8, 8).to(memory_format=torch.channels_last)
    tune._model, tune._images, tune.APART = lambda *_: model, lambda *_: x, {"fp32": tune.APART["fp32"]}
    tiles = {entry: tile for entry, tile in TILES.items() if entry[1][0] != 1}
    sound = tune.Sound(argparse.Namespace(batch_size=5), tiles, lambda: None)
    other = {entry: max(tune.shapes(entry, tile), key=lambda t: (t[1], -t[2])) for entry, tile in tiles.items()}
    assert sound(tiles | other)
    entry = ("BACKWARD_WEIGHT", (16, 16))
    assert not sound(tiles | {entry: (*tiles[entry][:5], 80)})  # no multiple of its 32 pixels


def test_what_computes_other_gradients_is_not_sound() -> None:
    interpret("from test_tune import is_sound; is_sound()")


def test_what_wins_starts_in_every_dtype() -> None:
    """tf32 takes twice the shared memory of bf16 for some tiles; gradients are compared in each."""
    tried: list[str] = []

    class Passes:
        def __init__(self, given: Any, lane: int) -> None:
            self.dtype = given.dtype
            assert given.depth == 8

        def __call__(self) -> list[torch.Tensor]:
            from triton.runtime.errors import OutOfResources

            tried.append(self.dtype)
            if fails[0] == self.dtype:
                raise OutOfResources(262144, 232448, "shared memory")
            return [torch.ones(4) * (1 + apart[0] * (self.dtype == "tf32"))]

    fails, apart, looks = [""], [0.0], list[int]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "_passes", Passes)
        patch.setattr(tune, "_take", lambda tiles: None)
        sound = tune.Sound(tune.parse(["--depth", "20"]), {}, lambda: looks.append(len(tried)))
        assert sound({}) and sorted(tried) == sorted(2 * ["bf16", "tf32", "fp32"])
        assert looks == [0, 1, 2, 3, 4, 5]  # at the clock, before each dtype is compiled
        apart[0] = 0.5
        assert not sound({})
        apart[0], fails[0] = float("nan"), ""
        assert not sound({})
        apart[0], fails[0] = 0.0, "tf32"
        assert not sound({})


@pytest.mark.parametrize(
    ("error", "fits"), [(RuntimeError("PassManager::run failed"), False), (RuntimeError("CUDA error"), None)]
)
def test_a_tile_at_which_the_compiler_gives_up_does_not_fit(error: RuntimeError, fits: bool | None) -> None:
    def passes() -> None:
        raise error

    if fits is None:
        with pytest.raises(RuntimeError, match="CUDA error"):
            tune._try(passes)
    else:
        assert tune._try(passes) is fits


def test_a_shape_is_judged_with_the_best_rounds() -> None:
    def cost(tile: tuple[int, ...]) -> float:
        pixels, rounds = tile[0], tile[4]
        return 1 + pixels / 1000 if rounds == 1 else 3 - pixels / 1000

    tiles, _, _ = descend(cost)
    for entry, tile in tiles.items():
        assert tile[4] == 1 and tile[0] == min(t[0] for t in tune.shapes(entry, tile))


def test_a_time_that_was_short_by_chance_changes_nothing() -> None:
    asked: dict[Any, int] = {}

    def cost(tile: tuple[int, ...]) -> float:
        asked[tile] = asked.get(tile, 0) + 1
        return 1.0 if tile in TILES.values() or asked[tile] > 1 else 0.5

    tiles, _, _ = descend(cost)
    assert all(tiles[entry] == TILES[entry] for entry in tiles)


def test_the_tables_can_be_pasted() -> None:
    found: dict[str, Any] = {}
    exec(tune.written(TILES), found)
    for table in tune.TABLES:
        assert found[table] == getattr(fused, table)


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "measured on a GPU"),
        (["--lanes", "0"], "--lanes is 0: it must be 1"),
        (["--budget", "0"], "--budget is 0"),
        (["--depth", "9"], "--depth: depth must be 6n + 2"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(arguments: list[str], said: str) -> None:
    done = call(*arguments)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1 and not done.stdout


def search_without_a_gpu(end: str) -> None:
    """The search with a made-up stopwatch, each time of which is shorter, ended early in the way `end`."""
    times = iter(range(1000, 0, -1))

    def stopwatch(tiles: Any) -> float:
        took = next(times)
        if took == 990 and end == "budget":
            time.sleep(2)
        elif took == 990:
            with contextlib.suppress(KeyboardInterrupt) if end == "lost" else contextlib.nullcontext():
                os.kill(os.getpid(), signal.SIGTERM)
        return float(took)

    tune.choose_device = lambda engine: torch.device("cuda")
    tune.torch.cuda.get_device_name = lambda: "made up"

    class Sound(tune.Sound):
        def __init__(self, *_: Any) -> None: ...

        def __call__(self, tiles: Any) -> bool:
            return True

    class Pool(concurrent.futures.ThreadPoolExecutor):
        """One for all phases: on a GPU its processes take many seconds to start."""

        def __init__(self, *of: Any) -> None:
            super().__init__(1)
            pools.append(self)

    pools: list[Pool] = []
    tune.Stopwatch = lambda given: stopwatch
    tune.Sound = Sound
    tune.concurrent.futures.ProcessPoolExecutor = Pool
    tune._compile = lambda work: time.sleep(2) if end == "at once" else None
    try:
        tune.main(["--budget", "1" if end == "at once" else "2"] if end in ("budget", "at once") else [])
    finally:
        assert len(pools) == 1 and pools[0]._shutdown


@pytest.mark.parametrize("end", ["SIGTERM", "lost", "budget"])  # lost: the signal's exception, in a library's callback
def test_ended_early_it_prints_the_best_so_far(end: str) -> None:
    code = f"import test_tune; test_tune.search_without_a_gpu({end!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True)
    if end == "budget":
        assert done.returncode == 0 and "the budget of 2 s is used up" in done.stdout
    else:
        assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"
    entry = next(entry for entry in TILES if entry[1][0] != 1)
    assert f"changed:\n  {entry[0]} {entry[1]}: {TILES[entry]} -> " in done.stdout
    found: dict[str, Any] = {}
    exec(done.stdout[done.stdout.index("FORWARD = {") :], found)
    assert found["FORWARD"] != fused.FORWARD and found["BACKWARD_WEIGHT"] == fused.BACKWARD_WEIGHT


def test_a_budget_too_short_for_the_first_tiles_is_a_sentence() -> None:
    code = "import test_tune; test_tune.search_without_a_gpu('at once')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True)
    said = done.stderr.splitlines()[-1]
    assert said.endswith("UserError: --budget is 1: the tiles as they are took longer; give more.")
    assert "ms" not in done.stdout


@pytest.mark.gpu
def test_a_tile_is_timed_and_one_that_does_not_fit_is_passed_over() -> None:
    given = tune.parse(["--depth", "8", "--lanes", "2"])
    tiles = {entry: tile for entry, tile in TILES.items() if entry[1][0] != 1}
    try:
        stopwatch = tune.Stopwatch(given)
        assert 0 < stopwatch(tiles) < 100
        too_large = {("FORWARD", (64, 64)): (512, 256, 64, 4, 4)}
        assert stopwatch(tiles | too_large) is None
        assert 0 < stopwatch(tiles) < 100
        sound = tune.Sound(given, tiles, lambda: None)
        assert sorted(sound.expected) == sorted(tune.APART) and sound(tiles) and not sound(tiles | too_large)
        other = {entry: min(tune.shapes(entry, tile)) for entry, tile in tiles.items()}
        assert sound(tiles | other)
        # fits in bf16 and not in tf32 on an H100 and an H200
        assert not sound(
            tiles | {("FORWARD", (64, 64)): (128, 128, 64, 4, 4)}
        ) or torch.cuda.get_device_capability() != (9, 0)
    finally:
        tune._take(TILES)
