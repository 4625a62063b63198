"""The roofline's counts against counts by hand, the loops that are compared, and scripts/benchmark.py in very small."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cbl import config, records
from cbl.engine import contenders, resident, roofline, synthetic
from cbl.engine.contenders import Size, make_job, make_run
from cbl.engine.micro_batches import CHECK_STEPS
from cbl.errors import UserError
from cbl.models import resnet_cifar
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
CPU = torch.device("cpu")
TINY = Size(CPU, depth=8, batch_size=4, steps=2, n_test=12)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_script", ROOT / "scripts" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "scripts"))  # as when it is called
    try:
        sys.modules[spec.name] = module  # its dataclasses look themselves up there
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return module


# -- the roofline ------------------------------------------------------------------------------------------------------


X = torch.randn(4, 6, 8, 8)  # 6,144 bytes
W = torch.randn(12, 6, 3, 3)  # 2,592 bytes


@pytest.mark.parametrize(
    ("function", "expected"),  # flops, bytes, fused bytes
    [
        (lambda: torch.relu(X), (0, 12288, 0)),
        (lambda: X + X.flip(0), (0, 12288 + 18432, 12288 + 6144)),  # flip is a copy; the sum reads one input more
        (lambda: torch.empty_like(X).add_(1), (0, 12288, 0)),  # in place: read and written
        (lambda: X.to(torch.bfloat16), (0, 6144 + 3072, 0)),
        (lambda: F.conv2d(X, W, padding=1), (2 * 4 * 12 * 64 * 54, 6144 + 2592 + 12288, 6144 + 2592 + 12288)),
        (lambda: X.view(4, -1).t()[2:].unbind(0), (0, 0, 0)),
        (lambda: X[:1].expand(4, -1, -1, -1) * 2.0, (0, 6144 // 4 + 6144, 0)),
        (lambda: X.index_select(0, torch.tensor([3])), (0, 8 + 1536 + 1536, 8 + 1536 + 1536)),  # reads what it returns
        (lambda: torch.empty(10).zero_(), (0, 40, 40)),
        (lambda: torch.empty_like(X).copy_(X), (0, 12288, 12288)),
    ],
)
def test_one_operation_is_counted_as_by_hand(function: Callable[[], Any], expected: tuple[int, int, int]) -> None:
    operations = roofline.count(function)
    assert tuple(sum(getattr(o, name) for o in operations) for name in ("flops", "bytes", "fused_bytes")) == expected


def products(module: nn.Module, x: torch.Tensor) -> int:
    """Multiplications with addition of the convolutions and dense layers of one forward pass."""
    total = 0

    def hook(layer: nn.Module, _: Any, out: torch.Tensor) -> None:
        nonlocal total
        each = layer.weight[0].numel()  # per number that comes out
        total += out.numel() * each

    handles = [m.register_forward_hook(hook) for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    module(x)
    for handle in handles:
        handle.remove()
    return total


def test_products_of_a_step() -> None:
    """Forward once, backward twice (for the input and for the weight) but for the first layer's input."""
    model, x, y = resnet_cifar(8, num_classes=7), torch.randn(2, 3, 32, 32), torch.tensor([3, 5])
    forward = products(model, x)
    first = 2 * 16 * 32 * 32 * 27
    operations = roofline.count(lambda: F.cross_entropy(model(x), y).backward())
    assert sum(o.flops for o in operations) == 2 * (3 * forward - first)


def test_resnet32_needs_what_is_published() -> None:
    """69 million multiplications with addition an image; on meta tensors, nothing is computed."""
    with torch.device("meta"):
        x = torch.empty(128, 3, 32, 32)
    model = resnet_cifar(32).to("meta")
    with torch.no_grad():
        operations = roofline.count(lambda: model(x))
    assert sum(o.flops for o in operations) / 2 / 128 == pytest.approx(69e6, rel=0.01)


def test_the_whole_step_is_counted() -> None:
    """The update reads weight, gradient and momentum and writes them back; bfloat16 halves what the layers move."""
    totals = {}
    for dtype in ("fp32", "bf16"):
        run = contenders.make_run(TINY, dtype)
        job = contenders.make_job(TINY, run)
        job.step.load(next(job.stream.epochs(run.recipe))[1], np.zeros(2))
        operations = roofline.count(job.step)
        parameters = sum(p.numel() for p in job.model.parameters())
        (update,) = [o for o in operations if o.name == "_fused_sgd_"]
        assert update.bytes == 4 * (6 * parameters + 1)  # and the learning rate
        names = {o.name for o in operations}
        assert {"index_select", "convolution_backward", "native_batch_norm_backward", "index_copy_"} <= names
        totals[dtype] = sum(o.bytes for o in operations if "batch_norm" in o.name)
    assert totals["bf16"] == pytest.approx(totals["fp32"] / 2, rel=0.02)


def test_seconds_take_the_tighter_bound_of_every_operation() -> None:
    rates = roofline.Rates(bytes_per_second=10.0, flops_per_second=100.0)
    operations = [roofline.Operation("a", 1000, 10, 10), roofline.Operation("b", 0, 50, 20)]
    assert roofline.seconds(operations, rates, fused=False) == 10 + 5
    assert roofline.seconds(operations, rates, fused=True) == 10 + 2


def test_rates_are_of_this_device() -> None:
    rates = roofline.measure_rates(CPU, "fp32")
    assert 1e8 < rates.bytes_per_second < 1e13 and 1e8 < rates.flops_per_second < 1e15


# -- what is compared --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bare", "loader", "eager", "replayed", "nchw", "without_onednn"])
def test_a_unit_trains_and_says_how_many_images(name: str) -> None:
    unit = getattr(contenders, name)(TINY, "fp32")
    assert unit() == unit() == TINY.images


def test_a_unit_of_the_training_loop_is_an_epoch(tmp_path: Path) -> None:
    """10 images, one a class, in batches of 4: 2 or 3 steps, as batches cross the ends of epochs."""
    unit = contenders.loop(TINY, "fp32", tmp_path)
    images = [unit() for _ in range(4)]
    assert images == [8, 12, 8, 12]
    assert [row["step"] for row in records.read_metrics(tmp_path)] == [2, 5, 7]  # the last is not waited for


@pytest.mark.usefixtures("stand_in")
def test_lanes_take_turns_within_an_epoch_and_are_measured_over_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "QUEUED", 1)
    size = dataclasses.replace(TINY, device=torch.device("cuda"))
    run = make_run(size, "fp32", engine__eval_every=2)
    lanes = [(None, contenders.turns(run, make_job(size, run), tmp_path / str(k))) for k in range(2)]
    assert [next(lanes[0][1]) for _ in range(2)] == [(4, False), (4, True)]  # two steps, of which one ends the epoch
    assert contenders.epochs(lanes)() == 12 + 8
    assert contenders.epochs(lanes, each=2)() == 8 + 12 + 12 + 8
    assert [row["step"] for row in records.read_metrics(tmp_path / "0")] == [2, 5, 7]
    assert [row["test_error"] is None for row in records.read_metrics(tmp_path / "0")] == [True, False, True]


def test_memory_layout_does_not_change_what_is_computed() -> None:
    """So that channels_last and NCHW are compared at equal mathematics. Two steps: with so few images and so large a
    learning rate, rounding, which is another on every CPU, is amplified a hundredfold by each further one."""
    losses = []
    for layout in (torch.channels_last, torch.contiguous_format):
        model, loss, optimizer = contenders.plain(TINY, layout)
        x = torch.linspace(-1, 1, 4 * 3 * 32 * 32).reshape(4, 3, 32, 32).contiguous(memory_format=layout)
        y = torch.arange(4)
        losses.append([contenders.train("fp32", model, loss, optimizer, x, y).item() for _ in range(2)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.parametrize("shortcut", ["mean_pool", "strided", "projection"])
def test_stacked_networks_compute_what_each_computes_alone(shortcut: str) -> None:
    models = [resnet_cifar(8, num_classes=5, shortcut=shortcut, seed=seed).double() for seed in range(3)]
    stack = contenders.stack(models)
    x = torch.randn(4, 9, 16, 16, dtype=torch.float64)
    y = torch.randint(5, (4, 3))
    together = stack(x)  # (4, 3, 5)
    contenders.StackedLoss(nn.CrossEntropyLoss())(together, y.flatten()).backward()
    for number, model in enumerate(models):
        logits = model(x[:, 3 * number : 3 * number + 3])
        torch.testing.assert_close(together[:, number], logits)
        F.cross_entropy(logits, y[:, number]).backward()
        torch.testing.assert_close(stack.fc.bias.grad[number], model.fc.bias.grad)
        torch.testing.assert_close(stack.conv1.weight.grad[16 * number : 16 * number + 16], model.conv1.weight.grad)
        mean = stack.bn1.running_mean[16 * number : 16 * number + 16]
        torch.testing.assert_close(mean, model.bn1.running_mean)


# -- the script --------------------------------------------------------------------------------------------------------


def small_bench(benchmark: ModuleType, **changes: Any) -> Any:
    given = benchmark.parse(["--device", "cpu", "--depth", "8", "--batch-size", "4", "--dtypes", "fp32"])
    bench = benchmark.make_bench(given, CPU)
    quick = {"turns": 2, "turn_seconds": 0.0, "batches": [2, 4], "depths": [8, 14], "classes": [10, 30]}
    quick |= {"photos": 2, "image_size": 32}
    return dataclasses.replace(bench, **quick | changes)


def test_turns_alternate_and_the_first_of_each_does_not_count(benchmark: ModuleType) -> None:
    order: list[str] = []
    units = {name: (lambda name=name: order.append(name) or 7) for name in "AB"}
    rates = benchmark.race(small_bench(benchmark), units, turns=3, share=1.0)
    assert order == list("ABABABAB") and [len(found) for found in rates.values()] == [3, 3]
    assert all(rate > 0 for found in rates.values() for rate in found)


def test_one_turn_counts_even_when_the_budget_is_used_up(benchmark: ModuleType) -> None:
    rates = benchmark.race(small_bench(benchmark, ends=0.0), {"A": lambda: 1}, turns=9, share=0.5)
    assert len(rates["A"]) == 1


@pytest.mark.parametrize("turn", [0, 1, 3])
def test_what_fails_in_any_turn_costs_only_itself(benchmark: ModuleType, turn: int) -> None:
    left = iter(range(turn))

    def fails() -> int:
        if next(left, None) is None:
            raise torch.OutOfMemoryError
        return 1

    bench = small_bench(benchmark)
    rates = benchmark.race(bench, {"A": lambda: 1, "B": fails, "C": lambda: 1}, turns=3, share=1.0, what="k")
    assert {name: len(found) for name, found in rates.items()} == {"A": 3, "C": 3}
    assert bench.left_out == ["k, B: more than the device's memory holds"]


class Clock:
    """Stands for the module `time`: units say how long they take."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def unit(self, seconds: float, calls: list[float]) -> Callable[[], int]:
        def call() -> int:
            self.now += seconds
            calls.append(seconds)
            return 1

        return call


@pytest.mark.parametrize(
    ("cuda", "called", "counted", "left_out"),
    [
        # seconds: 2 x 1 + 2 x 2 + 2 x 4 = 14 > 12
        (True, False, {"1": [1.0], "2": [1 / 2], "4": [1 / 4]}, ["8", "16"]),
        # 1 + 2 + 4 + 8 = 15 > 12
        (True, True, {"1": [1.0], "2": [1 / 2], "4": [1 / 4], "8": [1 / 8]}, ["16"]),
        (False, True, {"1": [1.0], "2": [1 / 2], "4": [1 / 4], "8": [1 / 8]}, ["16"]),
        # a first turn, which warms up, counts for none; one that counts of the first unit all the same
        (False, False, {"1": [1.0]}, ["16", "2", "4", "8"]),
    ],
)
def test_what_is_measured_ends_with_the_budget(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, cuda: bool, called: bool, counted: Any, left_out: Any
) -> None:
    clock, calls = Clock(), []
    monkeypatch.setattr(benchmark, "time", clock)
    monkeypatch.setattr(benchmark.Bench, "cuda", cuda)
    monkeypatch.setattr(benchmark.Bench, "synchronize", lambda bench: None)
    bench = small_bench(benchmark, ends=60.0)
    units = {str(k): clock.unit(k, calls) for k in (1, 2, 4, 8, 16)}
    assert benchmark.race(bench, units, turns=3, share=0.2, what="k", called=called) == counted
    assert bench.left_out == [f"k, {name}: the budget was used up" for name in left_out]


def test_a_turn_that_would_end_after_the_budget_is_not_begun(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those that are shorter go on."""
    clock, calls = Clock(), []
    monkeypatch.setattr(benchmark, "time", clock)
    bench = small_bench(benchmark, ends=27.0)
    rates = benchmark.race(bench, {"A": clock.unit(1, calls), "B": clock.unit(10, calls)}, turns=9, share=1.0)
    assert [len(found) for found in rates.values()] == [6, 1] and clock.now == 27 and bench.left_out == []


@pytest.fixture(scope="module")
def written(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The report of all workloads but the part that starts processes: 8 layers, and ResNet-50 on 32 pixels."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        made = small_bench(benchmark)
        patch.setattr(benchmark, "make_bench", lambda given, device: made)
        patch.setattr(benchmark, "processes", lambda bench: None)
        patch.setattr(benchmark, "freed_memory", lambda bench: None)
        assert benchmark.main(["--device", "cpu", "--out", str(folder)]) == 0
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text()), folder


def test_report_has_every_section(written: tuple[dict[str, Any], Path]) -> None:
    report, folder = written
    sections = {row["section"] for row in report["rows"]}
    assert sections == {
        "one run", "overhead", "floor", "evaluation", "first step", "depth", "batch size", "classes", "loss alone",
        "loader", "resnet50", "resnet50 ratio", "resnet50 loss",
    }  # fmt: skip
    assert report["left_out"] == [] and report["environment"]["kind"] == "cpu"
    assert {"torch", "threads", "device", "commit", "load_average"} <= report["environment"].keys()
    for row in report["rows"]:
        if "images_per_second" in row:
            assert row["images_per_second"] == pytest.approx(np.median(row["turns"]))
            took = 1000 * row["batch_size"] * row["runs"] / row["images_per_second"]
            assert row["milliseconds"] == pytest.approx(took)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".md", ".png", ".svg"}


@pytest.mark.parametrize(
    ("turns", "said"), [([1.0, 4.9], False), ([1.0, 5.0], True), ([4.0, 9.0], True), ([5.0, 9.0], False)]
)
def test_turns_on_both_sides_of_a_target_are_said(turns: list[float], said: bool) -> None:
    assert ("both sides" in bench_plot.undecided(turns, 5.0)) is said


def test_the_memory_of_a_process_is_its_own() -> None:
    held = np.ones(2**27)  # 1 GiB, in the process that starts the other one
    code = "import sys; sys.path[:0] = ['scripts']; import benchmark; print(benchmark.peak_mib())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 10 < float(done.stdout) < held.nbytes / 2**20


def test_page_says_what_matters(written: tuple[dict[str, Any], Path]) -> None:
    report, folder = written
    (page,) = [path.read_text() for path in folder.glob("*.md")]
    (overhead,) = [row for row in report["rows"] if row["section"] == "overhead" and row["name"] == LOOP]
    percent = np.median(overhead["percent"])
    assert f"{LOOP} against {BARE}, fp32: {percent:+.1f} %" in page
    between = bench_plot.undecided(overhead["percent"], 5)
    assert f"Target under 5 %: {'met' if percent < 5 else 'missed'}{between}." in page
    assert "GPU figures: none in this report" in page and "--gpu-report" in page
    (bare,) = [row for row in report["rows"] if row["section"] == "one run" and row["name"] == BARE]
    assert f"| {BARE} | fp32 | {bare['images_per_second']:,.0f} |" in page


def test_page_says_what_was_tried_on_the_cpu(written: tuple[dict[str, Any], Path]) -> None:
    report, folder = written
    (page,) = [path.read_text() for path in folder.glob("*.md")]
    rate = {row["name"]: row["images_per_second"] for row in bench_plot.select(report, "one run")}
    layout, onednn = (f"{rate[name] / rate[EAGER]:.2f}" for name in (NCHW, NO_ONEDNN))
    assert f"torch's default memory layout {layout}, torch's own convolutions in place of oneDNN's {onednn}." in page
    assert f"{onednn}. Not measured: torch.compile (`--full`)." in page
    shared = [
        {"section": "side by side", "name": "processes", "runs": k, "images_per_second": 100.0 * k} for k in (1, 2)
    ]
    memory = [
        {"section": section, "name": name, "images_per_second": rate, "mebibytes": 10 * rate}
        for section, rates in (("freed memory", (107, 100)), ("freed memory, evaluation", (180, 100)))
        for name, rate in zip((KEPT, GIVEN_BACK), rates, strict=True)
    ]
    more = report["rows"] + shared + memory
    (_, freed, said) = bench_plot.tried_on_cpu(report | {"rows": more, "environment": {"threads": 2}})
    assert "gives steps 1.07 and evaluations 1.80 times the images/s" in freed
    assert "1,070 MiB in place of 1,000" in freed
    assert said.startswith(
        "One process of 2 threads 100 images/s, 2 processes of 1 200: a sweep takes a process a core"
    )


def test_large_sets_are_measured_against_torchvision(written: tuple[dict[str, Any], Path]) -> None:
    report, folder = written
    (page,) = [path.read_text() for path in folder.glob("*.md")]
    ours, theirs = bench_plot.select(report, "resnet50")
    assert (ours["name"], theirs["name"]) == (OURS, REFERENCE)
    for row in (ours, theirs):
        facts = [row[name] for name in ("dtype", "depth", "classes", "image_size", "at_once", "mebibytes_per_image")]
        assert facts == ["fp32", 50, 8142, 32, 2, None]
    (ratio,) = bench_plot.select(report, "resnet50 ratio")
    assert ratio["ratio"] == pytest.approx([a / b for a, b in zip(ours["turns"], theirs["turns"], strict=True)])
    losses = bench_plot.select(report, "resnet50 loss")
    assert [row["name"] for row in losses] == ["softmax", "sigmoid", "focal"]
    for row in losses:
        assert row["percent"] == pytest.approx(100 * row["milliseconds"] / ours["milliseconds"])
    (loader,) = bench_plot.select(report, "loader")
    met = {
        "under 2 %": max(row["percent"] for row in losses) < 2,
        "at least 1.5": loader["ratio"] >= 1.5,
    }
    for target, holds in met.items():
        assert f"Target {target}: {'met' if holds else 'missed'}." in page
    assert f"Target at least 0.95: {'met' if np.median(ratio['ratio']) >= 0.95 else 'missed'}" in page
    assert "Loader: " in page and "ResNet-50, 32 pixels, 8,142 classes, fp32, made-up images: our step, 2" in page
    assert "Target on an H200" not in page  # images/s say nothing of a CPU
    assert f"| {REFERENCE} | fp32 | 2 | {bench_plot.speed(theirs['images_per_second'])} |" in page


def test_overhead_is_paired_by_turn(written: tuple[dict[str, Any], Path]) -> None:
    report, _ = written
    turns = {row["name"]: row["turns"] for row in report["rows"] if row["section"] == "one run"}
    for row in [row for row in report["rows"] if row["section"] == "overhead"]:
        expected = [100 * (b / ours - 1) for b, ours in zip(turns[BARE], turns[row["name"]], strict=True)]
        assert row["percent"] == pytest.approx(expected)


def test_a_gpu_report_names_targets_launches_and_no_gap(written: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """Made of a CPU's figures: what is said of a GPU, and that the picture has room for it."""
    report = json.loads(json.dumps(written[0]))
    report["environment"] |= {
        "kind": "cuda",
        "device": "GPU",
        "nvidia_smi": {"power.limit": "700.00 W", "driver_version": "1"},
    }
    (floor,) = [row for row in report["rows"] if row["section"] == "floor"]
    floor["launch_microseconds"] = 2.0
    (loop,) = [row for row in report["rows"] if row["section"] == "one run" and row["name"] == LOOP]
    loop |= {"images_per_second": 130_000.0, "turns": [130_000.0]}
    for k, rate in ((1, 130_000.0), (8, 260_000.0)):
        row = loop | {"section": "side by side", "name": "streams, whole runs with evaluation", "runs": k}
        report["rows"].append(row | {"images_per_second": rate, "mebibytes": 100.0 * k})
    ours, theirs = bench_plot.select(report, "resnet50")
    ours |= {"images_per_second": 2900.0, "batch_size": 1024, "at_once": 128, "mebibytes_per_image": 87.654}
    report["rows"].append(theirs | {"name": REFERENCE + COMPILED})
    report["rows"].append(ours | {"name": OURS + COMPILED, "images_per_second": 2700.0})
    against = {"section": "resnet50 ratio", "against": "theirs"}
    report["rows"] = [row for row in report["rows"] if row["section"] != "resnet50 ratio"]
    report["rows"].append(against | {"name": OURS, "ratio": [0.96, 0.98, 0.9]})
    report["rows"].append(against | {"name": OURS + COMPILED, "ratio": [0.94]})
    kernels = "Our steps and runs are in the Triton kernels of `engine.fused=true`, but for the rows step, NCHW; "
    assert kernels not in bench_plot.markdown(report, measured_on_gpu=True)
    page = bench_plot.markdown(report | {"fused": True}, measured_on_gpu=True)
    assert kernels in page
    assert (
        "reaches 0.960 (0.900 to 0.980, turns: 3) of the images/s of theirs. Target at least 0.95: met by the" in page
    )
    assert "reaches 0.940 (0.940 to 0.940, turns: 1) of the images/s of theirs. Target at least 0.95: missed." in page
    assert "It is 2,900 images/s. Target on an H200 at least 2,800: met." in page
    assert "It is 2,700 images/s. Target on an H200 at least 2,800: missed." in page
    assert "| 0.960 | 87.7 |" in page and "| 0.940 | 87.7 |" in page
    assert "GPU figures: none" not in page and "Power limit 700.00 W" in page
    assert "One run: 130,000 images/s in fp32. Target on an H200 at least 120,000: met." in page
    assert "Many runs together: 260,000 images/s in fp32. Target on an H200 at least 300,000: missed." in page
    assert f"{floor['operations']} kernels, 2.00 µs apart" in page
    assert "| 8 | 260,000 | 32,500 | 2.00 | 800 |" in page
    assert [path.suffix for path in bench_plot.save(report, tmp_path / "gpu")] == [".svg", ".png"]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_report_may_end_after_any_row(written: tuple[dict[str, Any], Path], tmp_path: Path, kind: str) -> None:
    report = json.loads(json.dumps(written[0]))
    report["environment"]["kind"] = kind
    for n in range(len(report["rows"])):
        shorter = report | {"rows": report["rows"][:n]}
        assert bench_plot.markdown(shorter, measured_on_gpu=True)
        if n < 2:
            assert len(bench_plot.save(shorter, tmp_path / str(n))) == 2


def test_a_large_run_is_that_of_table_3() -> None:
    for compiled in (False, True):
        run = contenders.make_large_run(CPU, 224, compiled)
        assert (run.engine.dtype, run.engine.compile, run.recipe.batch_size) == ("fp32", compiled, 1024)
        assert config.cell(run).startswith("inaturalist2018") and (run.loss.kind, run.loss.beta) == ("focal", 0.999)
    assert contenders.make_large_run(torch.device("cuda"), 224).engine.dtype == "bf16"


@pytest.mark.parametrize("whose", ["theirs", "ours"])
def test_each_batch_size_is_compiled_for_itself(monkeypatch: pytest.MonkeyPatch, whose: str) -> None:
    """The second of a process would else be compiled for any."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda model, **how: asked.append(how) or model)
    run = contenders.make_large_run(CPU, 32, compiled=True)
    if whose == "theirs":
        contenders.torchvision_recipe(run, CPU, 2, 10)
    else:
        synthetic.make_job(run, CPU)
    assert asked == [{"dynamic": False}]


def test_our_large_step_goes_on_beyond_the_losses_it_has_room_for() -> None:
    run = contenders.make_large_run(CPU, 32)
    told: list[int] = []

    class Step:
        count = 0

        def __call__(self, batch: list[Any], rate: float) -> None:
            assert self.count < CHECK_STEPS and [tuple(images.shape) for images, _ in batch] == [(3, 32, 32, 3)]
            self.count += 1

        def report(self) -> None:
            told.append(self.count)
            self.count = 0

    train, world = SimpleNamespace(counts=[1] * 9), SimpleNamespace(device=CPU)
    job = SimpleNamespace(step=Step(), micro_batch=3, batch_size=1024, train=train, world=world)
    unit = contenders.large(run, job)
    assert sum(unit() for _ in range(2 * CHECK_STEPS + 1)) == 3 * (2 * CHECK_STEPS + 1)
    assert told == [CHECK_STEPS] * 2


def test_on_a_gpu_torchvision_may_have_the_larger_batch_and_both_are_compiled(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU adds, with stand-ins for its steps: a compiled one of torchvision's does not fit."""

    def recipe(run: config.Run, device: torch.device, images: int, classes: int) -> Callable[[], int]:
        if run.engine.compile and images == 256:
            raise torch.OutOfMemoryError
        return lambda: images * images  # so that the larger is the faster

    job = SimpleNamespace(train=SimpleNamespace(counts=np.arange(1, 9)), micro_batch=128, batch_size=1024)
    monkeypatch.setattr(benchmark.Bench, "cuda", True)
    monkeypatch.setattr(benchmark.Bench, "synchronize", lambda bench: None)
    monkeypatch.setattr(benchmark.synthetic, "make_job", lambda run, device: job)
    monkeypatch.setattr(benchmark, "image_mebibytes", lambda bench, unit, images: 1.5)
    monkeypatch.setattr(contenders, "large", lambda run, job: lambda: 1024)
    monkeypatch.setattr(contenders, "torchvision_recipe", recipe)
    monkeypatch.setattr(benchmark, "timed", lambda bench, unit, repeats: (unit(), 1.0))
    bench = small_bench(benchmark)
    searched = torch.backends.cudnn.benchmark
    benchmark.resnet50(bench)
    assert torch.backends.cudnn.benchmark == searched
    found = [row for row in bench.rows if row["section"] == "resnet50"]
    assert [(row["name"], row["at_once"], row["batch_size"]) for row in found] == [
        (OURS, 128, 1024),
        (REFERENCE, 128, 128),
        (REFERENCE, 256, 256),
        (OURS + COMPILED, 128, 1024),
        (REFERENCE + COMPILED, 128, 128),
    ]
    assert bench.left_out == [f"{REFERENCE}{COMPILED}, 256 at a time: more than the device's memory holds"]
    ratios = [(row["name"], row["against"], row["ratio"]) for row in bench.rows if row["section"] == "resnet50 ratio"]
    assert ratios == [
        (OURS, f"{REFERENCE}, 256 at a time", [1024 / 256**2] * 2),
        (OURS + COMPILED, f"{REFERENCE}{COMPILED}, 128 at a time", [1024 / 128**2] * 2),
    ]


def test_a_workload_alone_has_its_name_in_its_files(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = small_bench(benchmark)
    monkeypatch.setattr(benchmark, "make_bench", lambda given, device: made)
    assert benchmark.main(["loader", "--device", "cpu", "--out", str(tmp_path)]) == 0
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 4 and all("-loader-" in name for name in names)
    report = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert [row["section"] for row in report["rows"]] == ["loader"]


@pytest.mark.parametrize("option", ["--out", "--gpu-report"])
def test_interrupted_it_reports_what_was_measured(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str
) -> None:
    """And only what was measured: under a name of its own, with the rest named."""

    def ended(bench: Any, folder: Path | None = None) -> None:
        benchmark.note(bench, "one run", EAGER, [100.0], mebibytes=None)
        assert json.loads((tmp_path / "rows.partial").read_text())[0]["turns"] == [100.0]  # were it killed now
        raise KeyboardInterrupt

    made, about = small_bench(benchmark), benchmark.environment(CPU)
    kind = "cuda" if option == "--gpu-report" else "cpu"
    monkeypatch.setattr(benchmark, "make_bench", lambda given, device: made)
    monkeypatch.setattr(benchmark, "choose_device", lambda engine: torch.device(kind))
    monkeypatch.setattr(benchmark, "environment", lambda device: about)
    monkeypatch.setattr(benchmark, "parity", lambda path, seconds: True)
    monkeypatch.setattr(benchmark, "WORKLOADS", {"resnet50": ended, "cifar": benchmark.cifar})
    assert benchmark.main([option, str(tmp_path)]) == 130
    (path,) = tmp_path.glob("*.json")
    assert path.stem.endswith("-interrupted") and not (tmp_path / "rows.partial").exists()
    report = json.loads(path.read_text())
    assert [row["name"] for row in report["rows"]] == [EAGER]
    assert report["parity_tests_passed"] is (True if option == "--gpu-report" else None)
    page = path.with_suffix(".md").read_text()
    assert "Left out: the rest of resnet50: interrupted; cifar: interrupted." in page


def test_an_interrupted_workload_names_its_sections(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "one_run", ended)
    bench = small_bench(benchmark)
    with pytest.raises(KeyboardInterrupt):
        benchmark.cifar(bench)
    assert bench.left_out[:2] == ["the rest of one run in fp32: interrupted", "floor: interrupted"]


def test_ended_by_a_signal_the_command_still_reports(tmp_path: Path) -> None:
    """As a machine does that gives a command so many minutes."""
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "--device", "cpu", "--out", str(tmp_path)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while running.poll() is None and not (tmp_path / "rows.partial").exists():
            time.sleep(0.05)
        running.terminate()
        time.sleep(0.2)
        running.terminate()  # as `timeout` does
        _, err = running.communicate(timeout=120)
    finally:
        running.kill()
    # a library may print the exception that it loses; that of an end without a report would stand last
    assert running.returncode == 130 and err.splitlines()[-1] != "KeyboardInterrupt"
    (path,) = tmp_path.glob("*-interrupted.json")
    report = json.loads(path.read_text())
    assert report["rows"][0]["section"] == "loader"
    assert report["left_out"] == ["the rest of resnet50: interrupted", "cifar: interrupted"]


@pytest.mark.parametrize("becomes", [None, RuntimeError])
def test_a_signal_whose_exception_is_lost_ends_it_all_the_same(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, becomes: type[Exception] | None
) -> None:
    """Nothing is raised, or something else, where it strikes in a callback of a library."""
    monkeypatch.setattr(benchmark, "INTERRUPTED", threading.Event())
    done: list[str] = []

    def struck() -> None:
        benchmark.INTERRUPTED.set()
        if becomes:
            raise becomes
        benchmark.race(bench, {"unit": lambda: done.append("unit") or 1}, 1, share=1.0)

    bench = small_bench(benchmark)
    with pytest.raises(KeyboardInterrupt):
        benchmark.in_turn(bench, [("first", struck), ("second", lambda: done.append("second"))])
    assert not done and not bench.failed
    assert bench.left_out == ["the rest of first: interrupted", "second: interrupted"]


def test_a_section_that_fails_costs_no_other(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError

    for name in ("one_run", "growth", "classes", "processes", "freed_memory"):
        monkeypatch.setattr(benchmark, name, lambda *_: None)
    monkeypatch.setattr(benchmark, "floors", fails)
    bench = small_bench(benchmark)
    benchmark.cifar(bench)
    assert bench.failed and bench.left_out == ["floor, it failed: OutOfMemoryError"]
    assert [row["section"] for row in bench.rows] == ["evaluation", "first step"]


def test_a_workload_that_fails_costs_only_its_own_rows(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(bench: Any) -> None:
        raise RuntimeError("no compiler")

    made, alone = small_bench(benchmark), small_bench(benchmark)
    monkeypatch.setattr(benchmark, "make_bench", lambda given, device: made)
    monkeypatch.setattr(benchmark, "WORKLOADS", {"loader": benchmark.loader, "resnet50": fails})
    assert benchmark.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "RuntimeError: no compiler" in capsys.readouterr().err
    assert "Left out: resnet50, it failed: RuntimeError." in next(tmp_path.glob("*.md")).read_text()
    monkeypatch.setattr(benchmark, "make_bench", lambda given, device: alone)
    assert benchmark.main(["resnet50", "--device", "cpu", "--out", str(tmp_path / "none")]) == 1
    assert "Nothing was measured: resnet50, it failed: RuntimeError." in capsys.readouterr().err
    assert not list((tmp_path / "none").iterdir())


def test_a_loop_that_fails_costs_no_other(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_compiler(*_: Any) -> Any:
        raise RuntimeError("inductor: no C compiler")

    def too_large(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    def at_its_first_call(*_: Any) -> Any:
        return no_compiler

    bench = small_bench(benchmark, full=True)
    monkeypatch.setattr(contenders, "compiled", no_compiler)
    monkeypatch.setattr(contenders, "loader", at_its_first_call)
    monkeypatch.setattr(contenders, "nchw", too_large)
    benchmark.one_run(bench, "fp32", tmp_path)
    names = [row["name"] for row in bench.rows if row["section"] == "one run"]
    assert names == [BARE, LOOP, EAGER, NO_ONEDNN] and bench.failed
    assert bench.left_out == [
        f"one run in fp32, {LOADER}, it failed: RuntimeError",
        f"one run in fp32, {NCHW}: more than the device's memory holds",
        f"one run in fp32, {OUR_COMPILED}, it failed: RuntimeError",
    ]


def test_a_size_that_fails_costs_no_other(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def replayed(size: Size, dtype: str) -> Callable[[], int]:
        if size.depth == 14:
            raise torch.OutOfMemoryError
        return (lambda: 1 // 0) if size.depth == 20 else (lambda: 4)

    monkeypatch.setattr(contenders, "replayed", replayed)
    bench = small_bench(benchmark)
    benchmark.growth(bench, "depth", "depth", [8, 14, 20, 26])
    assert [row["depth"] for row in bench.rows] == [8, 26] and bench.failed
    assert bench.left_out == [
        "depth 14 in fp32: more than the device's memory holds",
        "depth in fp32, 20, it failed: ZeroDivisionError",
    ]


@pytest.mark.parametrize("fails", [OURS, OURS + COMPILED, REFERENCE])
def test_of_the_large_sets_one_that_fails_costs_no_other(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    job = SimpleNamespace(train=SimpleNamespace(counts=np.arange(1, 9)), micro_batch=128, batch_size=1024)

    def make(run: config.Run, *_: Any) -> Any:
        if fails == OURS + (COMPILED if run.engine.compile else ""):
            raise RuntimeError("no compiler")
        return job

    def recipe(run: config.Run, device: torch.device, images: int, classes: int) -> Callable[[], int]:
        return (lambda: 1 // 0) if fails == REFERENCE else (lambda: images)

    monkeypatch.setattr(benchmark.Bench, "cuda", True)
    monkeypatch.setattr(benchmark.Bench, "synchronize", lambda bench: None)
    monkeypatch.setattr(benchmark.synthetic, "make_job", make)
    monkeypatch.setattr(benchmark, "image_mebibytes", lambda bench, unit, images: unit() and 1.5)
    monkeypatch.setattr(contenders, "large", lambda run, job: lambda: 1024)
    monkeypatch.setattr(contenders, "torchvision_recipe", recipe)
    monkeypatch.setattr(contenders, "loss_alone", lambda *_: lambda: 4)
    bench = small_bench(benchmark)
    benchmark.resnet50(bench)
    forms = {row["name"] for row in bench.rows if row["section"] == "resnet50"}
    of = {OURS: {OURS, REFERENCE}, OURS + COMPILED: {OURS + COMPILED, REFERENCE + COMPILED}}
    assert forms == ({OURS, OURS + COMPILED} if fails == REFERENCE else {*of[OURS], *of[OURS + COMPILED]} - of[fails])
    assert bench.failed and all("it failed" in what for what in bench.left_out)
    assert len([row for row in bench.rows if row["section"] == "resnet50 loss"]) == 3


def test_of_the_large_sets_no_step_is_made_when_the_budget_is_used_up(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may compile for minutes."""
    monkeypatch.setattr(benchmark.Bench, "cuda", True)
    monkeypatch.setattr(benchmark.synthetic, "make_job", lambda *_: pytest.fail("made"))
    bench = small_bench(benchmark, ends=0.0)
    benchmark.resnet50(bench)
    assert bench.left_out == [f"the large sets' step{form}: the budget was used up" for form in ("", COMPILED)]


def test_what_is_measured_in_torch_s_kernels_is_so_beside_fused_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a page of --fused says it of its rows."""
    sizes = []
    monkeypatch.setattr(contenders, "make_job", lambda size, run: sizes.append((size, run)) or stop())
    for make in (contenders.nchw, contenders.compiled, contenders.searched):
        with pytest.raises(StopIteration):
            make(Size(CPU, fused=True), "fp32")
    assert not any(size.fused or run.engine.fused for size, run in sizes) and len(sizes) == 3


def stop() -> None:
    raise StopIteration


@pytest.mark.usefixtures("stand_in")
def test_of_lanes_that_do_not_fit_those_that_do_are_measured(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[Any] = []

    def make(size: Size, run: config.Run) -> Any:
        if len(made) >= 3:
            raise torch.OutOfMemoryError
        made.append(make_job(size, run))
        return made[-1]

    monkeypatch.setattr(benchmark, "make_job", make)
    monkeypatch.setattr(contenders, "stacked", lambda *_: lambda: 1 // 0)
    bench = small_bench(benchmark, turns=1, lanes=[1, 2, 4])
    bench.size = dataclasses.replace(bench.size, device=torch.device("cuda"), n_test=8, steps=1)
    benchmark.side_by_side(bench, "fp32", tmp_path)
    assert [(row["name"], row["runs"]) for row in bench.rows] == [
        (name, k) for name in ("streams", "streams, whole runs with evaluation") for k in (1, 2)
    ]
    assert bench.left_out == [
        "side by side in fp32, 4 runs: more than the device's memory holds",
        "side by side in fp32, 2 stacked, it failed: ZeroDivisionError",
        "side by side in fp32, 4 stacked, it failed: ZeroDivisionError",
    ]


def test_on_a_gpu_the_dtype_of_the_target_comes_first(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    bench = benchmark.make_bench(benchmark.parse([]), cuda)
    titles: list[str] = []
    monkeypatch.setattr(benchmark, "in_turn", lambda bench, parts: titles.extend(title for title, _ in parts))
    benchmark.cifar(bench)
    assert bench.dtypes[0] == "bf16" and titles[0] == "one run in bf16"
    assert titles[:6][-2:] == ["side by side in bf16", "one run in fp32"]


def test_a_report_of_another_command_is_not_overwritten(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        benchmark, "loader", lambda bench: benchmark.note(bench, "one run", EAGER, [1.0], mebibytes=None)
    )
    monkeypatch.setattr(benchmark, "WORKLOADS", {"loader": benchmark.loader})
    monkeypatch.setattr(bench_plot, "markdown", lambda *_: "")
    monkeypatch.setattr(bench_plot, "save", lambda *_: [])
    monkeypatch.setattr(bench_plot, "show", lambda *_: None)
    (tmp_path / "rows.partial").write_text("of a killed one")
    (tmp_path / "rows-2.partial").write_text("of another")
    for more in (["--batch-size", "2"], ["--batch-size", "4"], ["--batch-size", "2"], ["--batch-size", "4"]):
        benchmark.main(["loader", "--device", "cpu", "--out", str(tmp_path), *more])
    found = {path.stem[-13:]: json.loads(path.read_text())["command"][-1] for path in tmp_path.glob("*.json")}
    today = found.keys() - {name for name in found if name.endswith("-2")}
    assert len(found) == 2 and found[today.pop()] == "2" and sorted(found.values()) == ["2", "4"]
    kept = {path.name: path.read_text() for path in tmp_path.glob("*.partial")}
    assert kept == {"rows-2.partial": "of another", "rows-3.partial": "of a killed one"}
    next(tmp_path.glob("*.json")).write_text("no report")
    benchmark.main(["loader", "--device", "cpu", "--out", str(tmp_path), "--batch-size", "8"])
    assert len(list(tmp_path.glob("*-3.json"))) == 1


def test_parity_tests_end_with_the_budget(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], stdout: Any, timeout: float | None, **_: Any) -> Any:
        asked.append(timeout)
        stdout.write(b"said")
        if timeout is not None:
            raise subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(returncode=0)

    asked: list[float | None] = []
    made, about = small_bench(benchmark), benchmark.environment(CPU)
    monkeypatch.setattr(benchmark, "make_bench", lambda given, device: made)
    monkeypatch.setattr(benchmark, "choose_device", lambda engine: torch.device("cuda"))
    monkeypatch.setattr(benchmark, "environment", lambda device: about)
    monkeypatch.setattr(benchmark.subprocess, "run", run)
    monkeypatch.setattr(
        benchmark, "WORKLOADS", {"loader": lambda bench: benchmark.note(bench, "one run", EAGER, [1.0], mebibytes=None)}
    )
    (tmp_path / "parity.txt").write_text("before")
    for more, left in (([], 50.0), (["--budget", "100"], 50.0), (["--budget", "900"], 500.0)):
        made.ends, made.left_out = time.monotonic() + left, []
        assert benchmark.main(["--gpu-report", str(tmp_path), *more]) == 0
    assert asked[:2] == [None, 60.0] and asked[2] == pytest.approx(500, abs=5)
    assert made.left_out == ["the rest of the parity tests: the budget was used up"]
    assert (tmp_path / "parity.txt").read_text() == "before" and (tmp_path / "parity-4.txt").read_text() == "said"
    pages = sorted(path.read_text() for path in tmp_path.glob("*.md"))
    assert len(pages) == 3 and sum("Parity tests: passed, see parity-2.txt." in page for page in pages) == 1


def test_a_budget_of_nothing_is_used_up(benchmark: ModuleType) -> None:
    for budget, left in (("0", 0.0), ("900", 900.0)):
        made = benchmark.make_bench(benchmark.parse(["--device", "cpu", "--budget", budget]), CPU)
        assert left - 60 < made.left() <= left


def test_what_does_not_fit_into_the_budget_is_named(benchmark: ModuleType) -> None:
    bench = small_bench(benchmark, ends=0.0)
    benchmark.cifar(bench)
    assert bench.rows == [] and bench.left_out[0] == "one run in fp32: the budget was used up"


def test_the_budget_is_looked_at_within_a_section(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = small_bench(benchmark, lanes=[1, 2])

    def used_up(*_: Any) -> Any:
        bench.ends = 0.0
        return lambda: 4

    monkeypatch.setattr(contenders, "bare", used_up)
    benchmark.one_run(bench, "fp32", tmp_path)
    bench.ends = np.inf
    monkeypatch.setattr(contenders, "replayed", used_up)
    benchmark.growth(bench, "depth", "depth", [8, 14])
    bench.ends = np.inf
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(benchmark, "share_out", lambda *_: used_up() and [{"images_per_second": 1.0, "mebibytes": 1.0}])
    benchmark.processes(bench)
    assert [(row["section"], row["name"]) for row in bench.rows] == [
        ("one run", BARE),
        ("depth", "step"),
        ("side by side", "processes"),
    ]
    left = [what.removesuffix(": the budget was used up") for what in bench.left_out]
    assert f"one run in fp32, {LOOP}" in left and left[-2:] == ["depth 14 in fp32", "2 processes side by side"]


def test_other_files_beside_the_reports_are_passed_over(benchmark: ModuleType, tmp_path: Path) -> None:
    for number, text in enumerate(["[1]", "{}", '{"environment": "conda"}', '{"environment": {}}', "no JSON"]):
        (tmp_path / f"{number}.json").write_text(text)
    assert not benchmark.measured_on_gpu(tmp_path)
    (tmp_path / "ours.json").write_text('{"environment": {"kind": "cuda"}}')
    assert benchmark.measured_on_gpu(tmp_path)


def test_processes_have_the_memory_that_this_one_no_longer_uses(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(benchmark.Bench, "cuda", True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    monkeypatch.setattr(benchmark, "share_out", lambda task, k: done.append(f"{k} started") or [{}])
    benchmark.processes(small_bench(benchmark, lanes=[2]))
    assert done == ["emptied", "2 started"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu-report", "somewhere"], "--gpu-report needs a GPU"),
        (["--fused", "--device", "cpu"], "--fused needs a GPU"),
        (["--dtypes", "fp16"], "--dtypes has 'fp16'"),
        (["--lanes", "1,x"], "--lanes is '1,x'"),
        (["--lanes", "4,0"], "--lanes is '4,0'"),
        (["--depth", "9"], "model.depth is 9"),
        (["--batch-size", "0"], "recipe.batch_size is 0"),
        (["--device", "tpu"], "engine.device is 'tpu'"),
        (["--threads", "0"], "--threads is 0"),
        (["--out", "/dev/null/bench"], "--out /dev/null/bench cannot be written"),
    ],
)
def test_mistakes_are_one_sentence(benchmark: ModuleType, arguments: list[str], message: str) -> None:
    if "--gpu-report" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match=f"^{message}"):
        benchmark.main(arguments)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.usefixtures("stand_in")
def test_the_benchmark_measures_all_that_a_gpu_has(benchmark: ModuleType, tmp_path: Path) -> None:
    bench = small_bench(benchmark, turns=1, lanes=[1, 2])
    bench.size = dataclasses.replace(bench.size, device=torch.device("cuda"), n_test=8, steps=1)
    benchmark.one_run(bench, "fp32", tmp_path)
    benchmark.side_by_side(bench, "fp32", tmp_path)
    found = [(row["section"], row["name"], row["runs"]) for row in bench.rows if row["section"] != "overhead"]
    assert {name for section, name, _ in found if section == "one run"} >= {CAPTURED, SEARCHED}
    assert [(name, runs) for section, name, runs in found if section == "side by side"] == [
        ("streams", 1),
        ("streams", 2),
        ("streams, whole runs with evaluation", 1),
        ("streams, whole runs with evaluation", 2),
        ("stacked", 2),
    ]
    assert all(row["mebibytes"] is not None for row in bench.rows if row["section"] in ("one run", "side by side"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.usefixtures("stand_in")
def test_the_whole_benchmark_on_a_gpu(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "processes", lambda bench: None)  # others, which have no stand-in
    bench = small_bench(benchmark, dtypes=["fp32", "tf32"], lanes=[1, 2])
    bench.size = dataclasses.replace(bench.size, device=torch.device("cuda"), n_test=8)
    benchmark.cifar(bench)
    assert bench.left_out == [] and {row["dtype"] for row in bench.rows if "dtype" in row} == {"fp32", "tf32"}


@pytest.mark.slow
def test_processes_side_by_side(benchmark: ModuleType) -> None:
    """Two processes are started, wait for each other and report."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        bench = small_bench(benchmark, lanes=[1, 2])
        benchmark.processes(bench)
    finally:
        torch.set_num_threads(threads)
    assert [(row["name"], row["runs"]) for row in bench.rows] == [("processes", 1), ("processes", 2)]
    assert all(row["images_per_second"] > 0 and row["mebibytes"] > 100 for row in bench.rows)


@pytest.mark.slow
def test_freed_memory_is_kept_and_given_back(benchmark: ModuleType) -> None:
    bench = small_bench(benchmark)
    benchmark.freed_memory(bench)
    assert [(row["section"], row["name"]) for row in bench.rows] == [
        ("freed memory", KEPT),
        ("freed memory, evaluation", KEPT),
        ("freed memory", GIVEN_BACK),
        ("freed memory, evaluation", GIVEN_BACK),
    ]
    assert bench.left_out == [] and all(row["images_per_second"] > 0 for row in bench.rows)


def test_a_failed_process_is_named(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark.sys, "executable", "false")
    bench = small_bench(benchmark, lanes=[1])
    benchmark.processes(bench)
    benchmark.freed_memory(bench)
    assert bench.rows == [] and "a process on its own: one failed, see above" in bench.left_out[0]
    assert "freed memory: a process failed" in bench.left_out[1]


def test_eager_step_is_the_row_of_a_second_dtype(benchmark: ModuleType) -> None:
    bench = small_bench(benchmark)
    benchmark.one_step(bench, "bf16")
    (row,) = bench.rows
    assert (row["name"], row["dtype"], len(row["turns"])) == (EAGER, "bf16", 1)
