"""The fast paths give what the plain one gives: a captured step, runs side by side, whatever K and the neighbours.

What needs no GPU is tested on the CPU, where runs side by side are interleaved epoch by epoch and every bit is held
to. The tests marked gpu (`pytest -m gpu`) hold the CUDA graphs to the eager step, and say the tolerance.
"""

import functools
import gc
import itertools
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stand_in_gpu import Graph

from cbl import config, records
from cbl.engine import estimate, evaluate, processes, progress, resident
from cbl.engine import step as engine_step
from cbl.engine.device import choose_device
from cbl.engine.job import Job, prepare
from cbl.engine.progress import Display
from cbl.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def digits(output_dir: Path, **changes: Any) -> config.Run:
    """Some seconds of training; `loss__beta=0.9` sets loss.beta."""
    values: dict[str, Any] = {
        "dataset": {"name": "digits_lt"},
        "model": {"depth": 8},
        "recipe": {"epochs": 4, "batch_size": 64, "milestones": [3.0], "warmup_epochs": 1},
        "engine": {"device": "cpu", "checkpoint_seconds": 0},
        "tracking": {"mode": "off"},
        "output_dir": str(output_dir),
    }
    for key, value in changes.items():
        group, _, name = key.partition("__")
        if name:
            values[group] = values.get(group, {}) | {name: value}
        else:
            values[group] = value
    return config.from_mapping(values)


def several(output_dir: Path, **changes: Any) -> list[config.Run]:
    """Runs as unlike as those of a sweep, and one that diverges."""
    unlike: list[dict[str, Any]] = [
        {"seed": 1},
        {"seed": 2, "loss__kind": "focal", "loss__beta": 0.999},
        {"seed": 1, "recipe__learning_rate": 1e30},  # NaN within the first epochs
        {"seed": 3, "loss__kind": "sigmoid", "dataset": {"name": "digits_lt", "imbalance_factor": 20.0}},
        {"seed": 4, "recipe__batch_size": 48, "recipe__epochs": 3},
    ]
    return [digits(output_dir, **changes | one) for one in unlike]


def weights(run: config.Run) -> dict[str, torch.Tensor]:
    return torch.load(records.folder_of(run) / "model.pt", weights_only=True)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def side_by_side(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three lanes in one process, which the CPU has not otherwise; the run ids in the order their epochs ended."""
    order: list[str] = []
    append = records.append_metrics
    monkeypatch.setattr(processes, "count", lambda runs: 1)
    monkeypatch.setattr(estimate, "lanes", lambda runs, say: 3)
    monkeypatch.setattr(records, "append_metrics", lambda folder, row: (order.append(folder.name), append(folder, row)))
    return order


def one_by_one(runs: list[config.Run]) -> list[dict[str, Any]]:
    return [resident.train([run])[0] for run in runs]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[config.Run, dict[str, Any]]]:
    """The runs of `several`, each trained with nothing beside it."""
    runs = several(tmp_path_factory.mktemp("alone"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "count", lambda runs: 1)
        return list(zip(runs, one_by_one(runs), strict=True))


def assert_as_alone(alone: list[tuple[config.Run, dict[str, Any]]], runs: list[config.Run], ended: list[dict]) -> None:
    for (single, expected), run, record in zip(alone, runs, ended, strict=True):
        assert record["status"] == expected["status"]
        if record["status"] == "done":
            assert same(weights(run), weights(single))
            rows, others = (records.read_metrics(records.folder_of(one)) for one in (run, single))
            assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in others]
            assert [record[key] for key in ("error_last", "ece")] == [expected[key] for key in ("error_last", "ece")]
        else:
            assert record["failure"] == expected["failure"]  # at the same step


def test_runs_side_by_side_give_the_bits_of_single_runs(tmp_path: Path, alone: Any, side_by_side: list[str]) -> None:
    runs = several(tmp_path)
    ended = resident.train(runs)
    assert [record["status"] for record in ended] == ["done", "done", "failed", "done", "done"]
    turns = sum(a != b for a, b in itertools.pairwise(side_by_side))
    assert turns > len(runs), f"not interleaved: {side_by_side}"
    assert_as_alone(alone, runs, ended)


def test_whatever_the_neighbours(tmp_path: Path, alone: Any, side_by_side: list[str]) -> None:
    """In another order, so that every run has other neighbours and begins at another moment."""
    runs = several(tmp_path)
    order = [3, 2, 0, 4, 1]
    ended = dict(zip(order, resident.train([runs[number] for number in order]), strict=True))
    assert_as_alone(alone, runs, [ended[number] for number in range(len(runs))])


def test_stopped_and_resumed_side_by_side(tmp_path: Path, alone: Any, side_by_side: list[str]) -> None:
    runs, stops = several(tmp_path), 0
    for _ in range(60):
        ended = resident.train(runs, deadline=time.monotonic() + 0.02)
        if all(record["status"] in ("done", "failed") for record in ended):
            break
        stops += 1
    assert stops >= 2, "nothing was stopped"
    assert_as_alone(alone, runs, ended)


def made_up_job(run: config.Run, device: torch.device, steps: int = 50) -> Job:
    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    counts = np.full(10, -(-steps * run.recipe.batch_size // 10))
    images = estimate.made_up(10, counts, 500, (32, 32, 3))
    torch.random.set_rng_state(generator)
    return prepare(run, device, images)


def cifar_run(**changes: Any) -> config.Run:
    values: dict[str, Any] = {"engine": {}, "recipe": {}, "model": {}, "loss": {"kind": "focal", "beta": 0.999}}
    for key, value in changes.items():
        group, _, name = key.partition("__")
        values[group][name] = value
    return config.from_mapping(values)


@pytest.mark.parametrize("dtype", ["fp32", "tf32", "bf16"])
def test_the_backward_pass_computes_in_the_precision_of_the_forward_pass(dtype: str) -> None:
    """torch allows TF32 in cuDNN's convolutions by default, and their backward pass asks when it runs.

    bf16's autocast alone is for the forward pass.
    """
    job = made_up_job(cifar_run(engine__dtype=dtype, model__depth=8, recipe__batch_size=2), CPU, steps=4)
    seen: list[tuple[bool, ...]] = []

    def look(gradient: torch.Tensor) -> None:
        allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        seen.append((*allowed, torch.is_autocast_enabled("cpu")))

    job.model.conv1.weight.register_hook(look)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    job.step.load(np.zeros((1, 4, 2)), np.zeros(1))
    job.step()
    assert seen == [(dtype == "tf32", dtype == "tf32", False)]
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


def test_capture_leaves_no_trace_of_its_warm_up(stand_in: list[Graph]) -> None:
    """Weights, batch statistics, momentum and the counter are as before, in the same memory: the graph holds it."""
    run = cifar_run(model__depth=8, recipe__batch_size=4)
    plain, job = made_up_job(run, CPU, steps=8), made_up_job(run, CPU, steps=8)
    momentum = [kept["momentum_buffer"] for kept in job.optimizer.state.values()]
    changed = [*job.model.parameters(), *job.model.buffers(), *momentum, job.step.at, job.step.losses]
    before, places = [tensor.clone() for tensor in changed], [tensor.data_ptr() for tensor in changed]
    _, plan = next(job.stream.epochs(run.recipe))
    for one in (plain, job):
        one.step.load(plan, np.full(len(plan), 0.1))
    engine_step.capture(job.step, changed)
    assert all(torch.equal(a, b) for a, b in zip(before, changed, strict=True))
    assert places == [tensor.data_ptr() for tensor in changed]
    for one in (plain, job):
        for _ in plan:
            one.step()
    np.testing.assert_array_equal(plain.step.epoch_losses(), job.step.epoch_losses())
    assert same(plain.model.state_dict(), job.model.state_dict())


def test_what_a_graph_reads_lives_as_long_as_its_replay(stand_in: list[Graph]) -> None:
    """A graph keeps addresses, not tensors: memory that only the captured function held would be given to others."""
    values = torch.ones(3)
    freed: list[bool] = []

    class Held:
        def __del__(self) -> None:
            freed.append(True)

    def function(held: Held = Held()) -> torch.Tensor:  # noqa: B008  # as a closure over images on the device
        return values

    replay = engine_step.capture(function, [])
    del function
    gc.collect()
    assert not freed
    assert replay() is values


def test_a_job_is_freed_when_nobody_holds_it(tmp_path: Path) -> None:
    """A cycle would keep its images and weights in a GPU's memory until Python looks for cycles."""
    job = prepare(digits(tmp_path), CPU)
    step = weakref.ref(job.step)
    gc.disable()
    try:
        job.step.load(np.zeros((1, 4, 64)), np.zeros(1))
        job.advance()
        del job
        assert step() is None
    finally:
        gc.enable()


# -- the CUDA path on a stand-in for a GPU ----------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The measurement of how many runs to train at once takes two steps, not hundreds."""
    short = functools.partial(estimate.images_per_second, steps=2, repeats=1)
    monkeypatch.setattr(estimate, "images_per_second", short)


@pytest.mark.usefixtures("quick")
def test_runs_side_by_side_give_the_cpus_bits(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured steps and evaluations, lanes, a run that diverges: as one after another on the CPU."""
    monkeypatch.setattr(resident, "QUEUED", 2)  # of 5 steps an epoch: lanes take turns within it
    made: list[Any] = []
    make = resident._new_stream
    monkeypatch.setattr(resident, "_new_stream", lambda engine: made.append(make(engine)) or made[-1])
    turns: list[int] = []
    advance = progress.Line.advance
    monkeypatch.setattr(progress.Line, "advance", lambda line: turns.append(id(line)) or advance(line))
    on_cpu = several(tmp_path / "cpu")
    expected = [resident.drive(run, Display(len(on_cpu))) for run in on_cpu]
    graphs: list[Graph] = request.getfixturevalue("stand_in")
    on_gpu = several(tmp_path / "gpu", engine={"device": "cuda", "lanes": 3, "checkpoint_seconds": 0})
    turns.clear()
    ended = resident.train(on_gpu)
    first, second, third = dict.fromkeys(turns[:6])
    assert turns[:6] == [first, first, second, second, third, third]
    assert len(graphs) == 2 * len(on_gpu) and all(graph.operations for graph in graphs)
    assert len(made) == 3  # a run that begins takes the stream of one that has ended
    assert [record["status"] for record in ended] == ["done", "done", "failed", "done", "done"]
    for run, alone, other, record in zip(on_cpu, expected, on_gpu, ended, strict=True):
        assert (record["device"], record["lanes"]) == ("stand-in", 3)
        assert record.get("failure") == alone.get("failure")
        if record["status"] == "done":
            assert record["per_class_error"] == alone["per_class_error"] and same(weights(run), weights(other))


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe__input_scaling": "mean_std", "loss__beta": 0.9, "loss__reduction": "weight_sum"},
        {"recipe__image_order": "official_stream", "model__shortcut": "projection", "engine__capture": False},
        {"model__shortcut": "strided", "loss__kind": "focal", "engine__eval_batch": 77},
    ],
)
def test_every_part_of_the_step_is_on_the_device(
    tmp_path: Path, request: pytest.FixtureRequest, changes: dict[str, Any]
) -> None:
    """And a run that is interrupted there and goes on: the CPU's bits, uninterrupted."""
    whole = digits(tmp_path / "cpu", **changes)
    resident.drive(whole, Display(2))
    request.getfixturevalue("stand_in")
    run = digits(tmp_path / "gpu", **changes | {"engine__device": "cuda"})
    assert resident.drive(run, Display(2), deadline=time.monotonic())["status"] == "running"
    assert 0 < records.read_metrics(records.folder_of(run))[-1]["step"] < 19
    assert resident.drive(run, Display(2))["status"] == "done"
    assert same(weights(whole), weights(run))


@pytest.mark.usefixtures("quick", "stand_in")
def test_how_many_runs_go_side_by_side_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [digits(tmp_path, seed=seed, engine__device="cuda") for seed in range(5)]
    said: list[str] = []
    width = estimate.lanes(runs, said.append)
    assert width in (1, 2, 4) and said[0].startswith(f"{width} runs side by side: ")
    for rates, expected in (([100, 190, 300], 4), ([100, 190, 195], 2), ([100, 90], 1)):
        reached = iter(rates)
        monkeypatch.setattr(estimate, "images_per_second", lambda lanes, reached=reached: next(reached))
        assert estimate.lanes(runs, said.append) == expected


@pytest.mark.usefixtures("quick", "stand_in")
def test_a_first_run_without_data_does_not_take_the_others_down(tmp_path: Path) -> None:
    on_gpu = {"engine": {"device": "cuda"}}
    nowhere = digits(tmp_path, dataset={"name": "folder", "root": str(tmp_path / "nowhere")}, **on_gpu)
    ended = resident.train([nowhere, digits(tmp_path, **on_gpu)])
    assert [record["status"] for record in ended] == ["failed", "done"]
    assert "nowhere" in ended[0]["failure"]


@pytest.mark.usefixtures("stand_in")
def test_streams_and_graphs_are_made_on_the_gpu_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("cuda:3", "cuda"):
        choose_device(cifar_run(engine__device=name).engine)
    assert current == [torch.device("cuda:3")]


@pytest.mark.parametrize(
    ("engine", "evaluations"),
    [({}, 100), ({"eval_every": 3}, 67), ({"max_steps": 20}, 1), ({"max_steps": 20, "eval_every": 1000}, 1)],
)
def test_evaluations_are_counted_as_a_run_makes_them(
    monkeypatch: pytest.MonkeyPatch, engine: dict[str, Any], evaluations: int
) -> None:
    """Of the test set, at 10,000 images a second: those of the epochs that are trained."""
    monkeypatch.setattr(estimate, "_measure", lambda *_: (0.0, 1e-4))
    monkeypatch.setattr(processes, "count", lambda runs: 1)
    values = {"dataset": {"name": "cifar10_lt"}, "engine": {"device": "cpu"} | engine}
    assert estimate.seconds([config.from_mapping(values)]) == [pytest.approx(evaluations)]


def test_an_estimate_gives_the_threads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a sweep are one each; what is trained afterwards may want them all."""
    measured: list[int] = []
    monkeypatch.setattr(estimate, "_measure", lambda *_: measured.append(torch.get_num_threads()) or (0.0, 1e-4))
    monkeypatch.setattr(processes, "count", lambda runs: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        estimate.seconds([config.from_mapping({"engine": {"device": "cpu"}})])
        assert measured == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_each_image_size_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_measure", lambda run, *_: (float(run.dataset.image_size), 0.0))
    monkeypatch.setattr(estimate, "_images", lambda run: (128, 1))
    monkeypatch.setattr(processes, "count", lambda runs: 1)
    of = {"name": "folder", "root": "photos", "imbalance_factor": None}
    runs = [
        config.from_mapping({"dataset": of | {"image_size": size}, "engine": {"device": "cpu", "max_steps": 1}})
        for size in (8, 64, 8)
    ]
    assert estimate.seconds(runs) == [8.0, 64.0, 8.0]


def test_a_set_that_an_imbalance_factor_does_not_suit_leaves_out_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_measure", lambda *_: (1.0, 0.0))
    runs = [
        config.from_mapping({"dataset": {"name": name, "imbalance_factor": factor}, "engine": {"device": "cpu"}})
        for name, factor in (("cifar10_lt", 600.0), ("cifar100_lt", 600.0), ("cifar100_lt", 100.0))
    ]
    said: list[str] = []
    ten, hundred, other = estimate.seconds(runs, say=said.append)
    assert min(ten, other) > 0 == hundred
    (line,) = said
    assert "imbalance_factor=600 does not suit cifar100_lt" in line
    with pytest.raises(UserError, match="does not suit cifar100_lt"):
        estimate.seconds(runs[1:2])


@pytest.mark.usefixtures("quick", "stand_in")
def test_hours_are_estimated(tmp_path: Path) -> None:
    short, long = estimate.seconds([digits(tmp_path, engine__device="cuda", recipe__epochs=n) for n in (4, 40)], 2)
    assert 0 < 5 * short < long


# -- on a GPU ----------------------------------------------------------------------------------------------------------


KINDS = [("softmax", False), ("focal", False), ("focal", True)]  # fused or not
TOLERANCES = {"fp32": 1e-4, "tf32": 1e-3, "bf16": 1e-2}


def twice(**changes: Any) -> list[config.Run]:
    """A run captured and not; deterministic, so that what differs is the capture, but the fused kernels are not."""
    deterministic = not changes.get("engine__fused", False)
    return [
        cifar_run(engine__device="cuda", engine__deterministic=deterministic, engine__capture=c, **changes)
        for c in (True, False)
    ]


def captured_and_eager(**changes: Any) -> tuple[Job, Job, config.Run]:
    both = twice(**changes)
    for run in both:
        choose_device(run.engine)
    return made_up_job(both[0], CUDA), made_up_job(both[1], CUDA), both[0]


def test_what_is_compared_on_a_gpu_is_allowed() -> None:
    """Where there is none nothing else would notice: a setting may come to be refused."""
    for (kind, fused), dtype in itertools.product(KINDS, TOLERANCES):
        assert len(twice(engine__dtype=dtype, engine__fused=fused, loss__kind=kind)) == 2


@pytest.fixture
def not_deterministic() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.usefixtures("not_deterministic")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("kind", "fused"), KINDS)
def test_captured_step_equals_eager_step(dtype: str, kind: str, fused: bool) -> None:
    """50 steps of ResNet-32: losses within a tolerance of themselves, weights within it of their largest.

    The fused kernels add in any order, which ReLU can amplify: at least 1e-3 for them.
    """
    tolerance = max(TOLERANCES[dtype], 1e-3 if fused else 0)
    captured, eager, run = captured_and_eager(engine__dtype=dtype, engine__fused=fused, loss__kind=kind)
    _, plan = next(captured.stream.epochs(run.recipe))
    for job in (captured, eager):
        job.step.load(plan[:50], np.full(50, 0.02))
        for _ in range(50):
            job.advance()
    assert captured.advance is not captured.step and eager.advance is eager.step
    np.testing.assert_allclose(captured.step.epoch_losses(), eager.step.epoch_losses(), rtol=tolerance)
    for name, expected in eager.model.state_dict().items():
        close = tolerance * expected.abs().max().item()
        torch.testing.assert_close(captured.model.state_dict()[name], expected, rtol=0, atol=close, msg=name)
    torch.testing.assert_close(captured.predict(), eager.predict(), rtol=tolerance, atol=100 * tolerance)


@pytest.mark.gpu
def test_fp32_is_true_fp32_on_a_gpu_forwards_and_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of one step against the CPU's: TF32 would be wrong in the third digit, fp32 in the fifth.

    Without the corner of ReLU, where one rounding turns a gradient on or off: the CPU's own gradient in fp32 is 1.6 %
    from that in float64 with it.
    """
    monkeypatch.setattr(torch.nn.functional, "relu", torch.tanh)
    gradients = []
    for device in (CPU, CUDA):
        job = made_up_job(cifar_run(engine__device=device.type, model__depth=8, recipe__weight_decay=0.0), device)
        _, plan = next(job.stream.epochs(cifar_run().recipe))
        job.step.load(plan[:1], np.zeros(1))
        job.advance()
        gradients.append([kept["momentum_buffer"].cpu() for kept in job.optimizer.state.values()])
    # measured on the CPU: 8e-5 between two orders of adding, 2e-3 with operands rounded as TF32 does
    assert max(((b - a).norm() / a.norm()).item() for a, b in zip(*gradients, strict=True)) < 6e-4


@pytest.mark.gpu
def test_nothing_in_a_step_waits_for_the_host() -> None:
    job = made_up_job(cifar_run(engine__device="cuda", engine__capture=False), CUDA)
    job.step.load(np.zeros((4, 4, 128)), np.zeros(4))
    job.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        job.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_graph_outlives_its_neighbours() -> None:
    """What a finished run gives back must not be what another's graph works in (cuBLAS's workspace, test images)."""
    run = cifar_run(engine__device="cuda", model__depth=8)
    jobs: list[Job] = []
    for _ in range(40):  # more captures than torch has streams, and more data sets than stay in memory
        with torch.cuda.stream(torch.cuda.Stream()):
            jobs.append(made_up_job(run, CUDA, steps=4))
    first = jobs[0]
    expected = first.predict().clone()
    del jobs
    gc.collect()
    torch.cuda.empty_cache()
    given_back = torch.full((2**28,), float("nan"), device=CUDA)  # takes what they left
    torch.testing.assert_close(first.predict(), expected, rtol=0, atol=1e-5)
    _, plan = next(first.stream.epochs(run.recipe))
    first.step.load(plan, np.full(len(plan), 0.01))
    for _ in plan:
        first.advance()
    assert np.isfinite(first.step.epoch_losses()).all()
    assert given_back.isnan().all(), "a graph wrote into memory that is another's"


@pytest.mark.gpu
@pytest.mark.usefixtures("not_deterministic")
def test_many_runs_on_one_gpu_give_the_bits_of_single_runs(tmp_path: Path) -> None:
    """Deterministic kernels; 14 runs in 12 lanes, so that some begin while others are under way."""
    on_gpu = {"engine": {"device": "cuda", "deterministic": True, "checkpoint_seconds": 0, "lanes": 12}}
    many, singles = (
        [
            digits(tmp_path / name, seed=seed, loss__kind=kind, **on_gpu)
            for seed in range(7)
            for kind in ("softmax", "focal")
        ]
        for name in ("many", "single")
    )
    ended = resident.train(many)
    assert [record["status"] for record in ended] == ["done"] * 14 and ended[0]["lanes"] == 12
    for together, single in zip(many[::4], singles[::4], strict=True):
        resident.train([single])
        assert same(weights(together), weights(single))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_captured_evaluation_equals_eager_evaluation(dtype: str) -> None:
    run = cifar_run(engine__device="cuda", engine__dtype=dtype)
    job = made_up_job(run, CUDA)
    images = estimate.made_up(10, np.full(10, 10), 300, (32, 32, 3)).test_images.to(CUDA)
    eager = evaluate.predict(job.model, images, job.step.scaling, 300, dtype)
    parts = evaluate.predict(job.model, images, job.step.scaling, 77, dtype)
    # batches of another size may take other kernels: bf16 rounds after every layer, and logits here are around 1
    rtol, atol = (1e-2, 5e-2) if dtype == "bf16" else (1e-4, 1e-3)
    torch.testing.assert_close(parts, eager, rtol=rtol, atol=atol)
    replayed = engine_step.capture(lambda: evaluate.predict(job.model, images, job.step.scaling, 300, dtype), [])
    torch.testing.assert_close(replayed(), eager, rtol=0, atol=0)
