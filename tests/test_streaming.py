"""The engine of the large sets: any number of processes and micro-batches computes what one device would.

Data are a few JPEG files in the form that preparation leaves behind. Where two processes are needed, torchrun starts
this file: see the end.
"""

import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from PIL import Image

from cbl import class_balanced_weights, config, disk, models, records
from cbl.data import index
from cbl.data import streaming as loading
from cbl.engine import checkpoint, distributed, evaluate, micro_batches, progress, recipe, streaming, synthetic
from cbl.engine.distributed import World
from cbl.engine.tally import Tally
from cbl.errors import UserError
from hydra_plugins.cbl_launcher import to_run

ROOT = Path(__file__).resolve().parent.parent
ALONE = World(0, 1, torch.device("cpu"))
CLASSES = 7  # more than 5, so that top-5 says something
N_VAL = 37  # no multiple of anything


def write_set(root: Path, n: int = 48) -> None:
    """A prepared `inaturalist2018` of n + 37 small JPEG files, long-tailed, coloured by class."""
    rng = np.random.default_rng(0)
    folder = root / "inaturalist2018"
    (folder / "images").mkdir(parents=True)
    written = []
    for split, images in (("train", n), ("val", N_VAL)):
        labels = np.minimum(rng.geometric(0.35, images) - 1, CLASSES - 1)
        labels[:CLASSES] = range(CLASSES)
        paths = [f"{split}{number}.jpg" for number in range(images)]
        for path, label in zip(paths, labels, strict=True):
            colour = np.array([30 * label, 255 - 30 * label, 70 * label % 255])
            pixels = (rng.integers(255, size=(6, 6, 3)) + colour) // 2
            Image.fromarray(pixels.astype(np.uint8)).resize((24, 20)).save(folder / "images" / path)
        written.append(index.write(folder, split, paths, labels, [f"species {c}" for c in range(CLASSES)]))
    index.complete(folder, written)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    write_set(root)
    return root


def settings(root: Path, output_dir: Path, **changes: Any) -> config.Run:
    """Two epochs of six steps of eight images; `loss__beta=0.9` sets loss.beta."""
    values: dict[str, Any] = {
        "dataset": {"name": "inaturalist2018", "imbalance_factor": None, "root": str(root), "image_size": 16},
        "model": {"depth": 8},
        "loss": {"kind": "focal", "gamma": 0.5, "beta": 0.99},
        "recipe": {
            "epochs": 2, "batch_size": 8, "learning_rate": 0.05, "nesterov": True, "weight_decay": 1e-4,
            "decay_scope": "not_bn_not_last_bias", "warmup_epochs": 1, "milestones": [1.5], "input_scaling": "mean_std",
        },
        "engine": {"device": "cpu", "checkpoint_seconds": 0, "workers": 0},
        "tracking": {"mode": "off"},
        "output_dir": str(output_dir),
    }  # fmt: skip
    for key, value in changes.items():
        group, _, name = key.partition("__")
        values[group] = values.get(group, {}) | {name: value}
    return config.from_mapping(values)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)


def without_times(run: config.Run) -> list[dict[str, Any]]:
    rows = records.read_metrics(records.folder_of(run))
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


# -- one step: micro-batches and processes -----------------------------------------------------------------------------

# (kind, reduction, batch norm in training mode)
CASES = [
    ("softmax", "batch", False), ("sigmoid", "batch", False), ("focal", "batch", False), ("focal", "weight_sum", False),
    ("softmax", "weight_sum", True), ("focal", "batch", True),
]  # fmt: skip


def exact_job(run: config.Run, world: World) -> streaming.Job:
    """In float64: in float32 one rounding at the corner of a ReLU would be all that is compared."""
    built = models.build
    try:
        models.build = lambda *given: built(*given).double()
        job = streaming.prepare(run, world)
    finally:
        models.build = built
    job.step.loss.double()
    scaling = job.step.scaling
    job.step.scaling = lambda images: scaling(images).double()
    return job


def trajectory(
    root: Path, case: tuple[str, str, bool], world: World, micro_batch: int, steps: int = 4
) -> dict[str, torch.Tensor]:
    """Losses and state after some steps, and a tally of the validation set."""
    kind, reduction, training = case
    run = settings(root, root / "unused", loss__kind=kind, loss__reduction=reduction)
    job = exact_job(run, world)
    job.micro_batch = micro_batch
    job.model.train(training)
    batches = job.batches(epoch=0, first_step=0)
    for step in range(steps):
        job.step(next(batches), rate=0.05 * (step + 1))
    losses, _ = job.step.report()
    tally = streaming.evaluate(run, job)
    counted = {name: getattr(tally, name) for name in ("images", "top1", "top5", "count", "hits", "confidence")}
    return {"losses": torch.from_numpy(losses), **job.model.state_dict(), **counted}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(
                found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.fixture(scope="module")
def by_two_processes(prepared: Path) -> list[dict[str, torch.Tensor]]:
    """`trajectory` of every case, in two gloo processes of two micro-batches of two images."""
    out = prepared / "two.pt"
    torchrun(str(Path(__file__)), str(prepared), str(out))
    return torch.load(out, weights_only=True)


def torchrun(*arguments: str, succeeds: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert (done.returncode == 0) == succeeds, done.stderr
    return done


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{k}-{r}-{'train' if t else 'eval'}" for k, r, t in CASES])
def test_two_processes_equal_one(prepared: Path, by_two_processes: list[dict], number: int) -> None:
    """With batch norm in eval mode the same as the whole batch at once; in training mode the same as one process that
    normalises each micro-batch by itself. The validation set of 37 images is counted once in either."""
    case = CASES[number]
    expected = trajectory(prepared, case, ALONE, micro_batch=2 if case[2] else 8)
    assert_same(by_two_processes[number], expected)
    assert expected["images"].sum() == N_VAL


@pytest.mark.parametrize("case", [case for case in CASES if not case[2]], ids=lambda case: "-".join(case[:2]))
def test_accumulation_equals_the_whole_batch(prepared: Path, case: tuple[str, str, bool]) -> None:
    assert_same(trajectory(prepared, case, ALONE, micro_batch=2), trajectory(prepared, case, ALONE, micro_batch=8))


@pytest.mark.parametrize("reduction", ["batch", "weight_sum"])
@pytest.mark.parametrize("micro_batch", [8, 4])
def test_steps_equal_a_loop_written_from_the_definitions(prepared: Path, reduction: str, micro_batch: int) -> None:
    """Three steps with plain torch calls: weighted loss over the whole batch, Nesterov, decay of the weights alone."""
    run = settings(prepared, prepared / "unused", loss__kind="softmax", loss__reduction=reduction)
    job = exact_job(run, ALONE)
    job.micro_batch = micro_batch
    train = job.train

    model = models.build(run.model, CLASSES, 3, run.seed).double()
    decayed = [p for p in model.parameters() if p.ndim > 1]  # convolutions and the dense weight
    others = [p for p in model.parameters() if p.ndim == 1]  # batch norm, the last bias
    groups = [{"params": decayed, "weight_decay": 1e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, foreach=False)
    alpha = class_balanced_weights(train.counts.tolist(), 0.99).float().double()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in loading.STATISTICS["inaturalist2018"])
    decoder = loading.Decoder(train.images, 16)
    order = loading.order(len(train), run.seed, 0).reshape(-1, 8)
    running = [model.bn1.running_mean.clone(), model.bn1.running_var.clone()]
    batches, expected = job.batches(0, 0), []
    for step in range(3):
        images = [decoder.read(loading.Request(i, train.paths[i], 0, (run.seed, 0))) for i in order[step]]
        x = ((torch.stack(images).permute(0, 3, 1, 2).float() / 255 - mean) / std).double()
        target = torch.from_numpy(train.labels[order[step]])
        logits = torch.cat([model(part) for part in x.split(micro_batch)])
        loss = F.cross_entropy(logits, target, weight=alpha, reduction="sum")
        loss = loss / (8 if reduction == "batch" else alpha[target].sum())
        with torch.no_grad():  # batch norm's running statistics: 0.9 of the old, 0.1 of the mean over micro-batches
            stem = [model.conv1(part) for part in x.split(micro_batch)]
            running[0] = 0.9 * running[0] + 0.1 * torch.stack([s.mean((0, 2, 3)) for s in stem]).mean(0)
            running[1] = 0.9 * running[1] + 0.1 * torch.stack([s.var((0, 2, 3)) for s in stem]).mean(0)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = float(np.float32(0.1))  # the engine keeps it as float32
        optimizer.step()
        expected.append(loss.item())
        job.step(next(batches), rate=0.1)
    losses, _ = job.step.report()
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    for found, parameter in zip(job.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter, rtol=1e-7, atol=1e-9)
    job.step.statistics.settle()
    torch.testing.assert_close(job.model.bn1.running_mean, running[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(job.model.bn1.running_var, running[1], rtol=1e-9, atol=1e-12)


# -- micro-batches that fit --------------------------------------------------------------------------------------------


def test_the_micro_batch_is_halved_aloud_until_it_fits() -> None:
    said: list[str] = []
    tried: list[int] = []

    def fits(images: int) -> bool:
        tried.append(images)
        return images <= 40

    assert streaming.choose_micro_batch(1024, None, None, fits, said.append) == 32
    assert tried == [128, 64, 32] and len(said) == 2 and "64 images do not fit" in said[1]
    assert streaming.choose_micro_batch(96, None, None, lambda n: n <= 10, said.append) == 6  # a divisor of 96
    assert streaming.choose_micro_batch(64, None, None, lambda n: True, said.append) == 64  # a process's whole share
    assert streaming.choose_micro_batch(512, None, 32, lambda n: True, said.append) == 32  # as the part that is done
    assert streaming.choose_micro_batch(512, 256, 32, lambda n: True, said.append) == 256
    del said[:]
    # by more processes than before
    assert streaming.choose_micro_batch(16, None, 32, lambda n: True, said.append) == 16
    assert said == ["Batch norm normalised 32 images together until now and 16 from here on."]


@pytest.mark.parametrize(
    ("asked", "limit", "message"),
    [
        (100, 1024, r"engine.micro_batch is 100, but the 1024 images of each process .*: choose 64, or null\.$"),
        (2048, 2048, r"engine.micro_batch is 2048, but each process has only 1024 images .*: choose at most 1024, or"),
        (128, 64, r"engine.micro_batch is 128, but so many images do not fit .* null\.$"),
        (None, 0, r"Not even one image fits"),
    ],
)
def test_micro_batches_that_are_impossible(asked: int | None, limit: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        streaming.choose_micro_batch(1024, asked, None, lambda images: images <= limit, lambda text: None)


def test_trying_out_what_fits_changes_nothing(prepared: Path) -> None:
    job = streaming.prepare(settings(prepared, prepared / "unused"), ALONE)
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    assert job.step.fits(4, 16)

    def too_large(images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    job.step.scaling = too_large
    assert not job.step.fits(4, 16)
    assert all(torch.equal(before[name], value) for name, value in job.model.state_dict().items())
    assert all(p.grad is None for p in job.model.parameters()) and job.step.count == 0
    assert not any(kept["momentum_buffer"].any() for kept in job.optimizer.state.values())


def test_batch_norm_over_all_processes(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """On GPUs alone; the optimizer, which is made before, has the parameters that are trained."""
    imagenet = {"model__name": "resnet_imagenet", "model__depth": 50}
    run = settings(prepared, tmp_path, engine__sync_bn=True, **imagenet)
    with pytest.raises(UserError, match=r"engine\.sync_bn needs GPUs"):
        streaming.prepare(run, World(0, 2, torch.device("cpu")))
    request.getfixturevalue("stand_in")
    monkeypatch.setattr(micro_batches, "DistributedDataParallel", lambda model, **given: model)  # there is no other one
    job, alone = (streaming.prepare(run, World(0, size, torch.device("cuda"))) for size in (2, 1))
    norms = [module for module in job.model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 53 and {type(module) for module in norms} == {torch.nn.SyncBatchNorm}
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in alone.model.modules())
    trained = [id(p) for group in job.optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in job.model.parameters())
    assert job.model.state_dict().keys() == alone.model.state_dict().keys()


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.parametrize("changes", [{"engine__micro_batch": 2}, {"loss__reduction": "weight_sum"}])
def test_on_a_stand_in_for_a_gpu_a_run_gives_the_cpus_bits(
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    changes: dict[str, Any],
) -> None:
    """Loader, micro-batches, evaluation, and the memory of an image, which is measured there."""
    searched, fit = [torch.backends.cudnn.benchmark], streaming.fit
    monkeypatch.setattr(streaming, "fit", lambda *given: searched.append(torch.backends.cudnn.benchmark) or fit(*given))
    on_cpu = settings(prepared, tmp_path / "cpu", **changes)
    expected = streaming.train(on_cpu)
    request.getfixturevalue("stand_in")
    on_gpu = settings(prepared, tmp_path / "gpu", **changes | {"engine__device": "cuda"})
    record = streaming.train(on_gpu)
    assert (record["status"], record["device"]) == ("done", "stand-in")
    assert record["per_class_error"] == expected["per_class_error"] and all(
        torch.equal(value, weights(records.folder_of(on_gpu))[name])
        for name, value in weights(records.folder_of(on_cpu)).items()
    )
    assert [*searched, torch.backends.cudnn.benchmark] == [False, False, True, False]  # before, within each, after
    assert record["memory_peak_mib"] == 3 and 0 < record["memory_per_image_mib"] <= 2


def test_a_command_that_fails_leaves_the_record_of_a_run_under_way_alone(prepared: Path, tmp_path: Path) -> None:
    """The same run, as `dataset.root` does not name it, with the images given wrong the second time."""
    run = settings(prepared, tmp_path, engine__max_steps=2)
    folder = records.folder_of(run)
    with disk.alone(folder):
        records.write_record(folder, records.new_record(run))
        before = (folder / "result.json").read_bytes()
        record = streaming.train(settings(tmp_path / "nowhere", tmp_path, engine__max_steps=2))
        assert record["status"] == "failed" and record["run_id"] == config.run_id(run)
        assert (folder / "result.json").read_bytes() == before


def test_every_process_has_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.os, "sched_getaffinity", lambda pid: set(range(16)))
    for variables, expected in (
        ({}, 16),
        ({"LOCAL_WORLD_SIZE": "8"}, 2),  # torchrun
        ({"LOCAL_WORLD_SIZE": "32"}, 1),
        ({"LOCAL_WORLD_SIZE": "8", "SUBMITIT_EXECUTOR": "slurm", "SLURM_CPUS_PER_TASK": "12"}, 12),
        ({"LOCAL_WORLD_SIZE": "8", "SUBMITIT_EXECUTOR": "slurm", "SLURM_CPUS_PER_TASK": "32"}, 16),
    ):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("LOCAL_WORLD_SIZE", "SUBMITIT_EXECUTOR", "SLURM_CPUS_PER_TASK"):
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            assert distributed.cores() == expected


def test_cores_are_counted_where_affinity_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(distributed.os, "sched_getaffinity", raising=False)  # as on macOS
    monkeypatch.setattr(distributed.os, "cpu_count", lambda: 6)
    for name in ("LOCAL_WORLD_SIZE", "SUBMITIT_EXECUTOR"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.cores() == 6


@pytest.mark.gpu
def test_memory_of_an_image_is_recorded_on_a_gpu(prepared: Path, tmp_path: Path) -> None:
    run = settings(prepared, tmp_path, engine__device="cuda", engine__dtype="bf16")
    record = streaming.train(run)
    assert record["status"] == "done" and 0 < record["memory_per_image_mib"] < record["memory_peak_mib"]


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_tally_equals_the_measures_of_all_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, target = 3 * torch.randn(211, 23, generator=generator), torch.randint(22, (211,), generator=generator)
    counts = np.array([500, 300, 150, 101, 100, 50, 20, 19, 5, *[1] * 14])
    tally = Tally(23, torch.device("cpu"))
    for part, wanted in zip(logits.split(50), target.split(50), strict=True):
        tally.add(part, wanted)
    found = tally.measure(counts)
    expected = evaluate.measure(logits[:, :22], target, counts[:22])  # without the class that has no image
    shown = logits.clone()
    shown[:, 22] = -100
    again = Tally(23, torch.device("cpu"))
    again.add(shown, target)
    for name in ("error_last", "error_many", "error_medium", "error_few", "ece"):
        assert again.measure(counts)[name] == pytest.approx(expected[name], rel=1e-12)
    assert again.measure(counts)["per_class_error"][:22] == pytest.approx(expected["per_class_error"])
    ranked = logits.argsort(1, descending=True)[:, :5]
    assert found["error_top5"] == pytest.approx(100 * (1 - (ranked == target[:, None]).any(1).float().mean().item()))
    assert found["per_class_error"][22] is None and found["n_test"] == 211
    assert found["groups"] == "shots" and found["group_classes"]["many"] == [0, 1, 2, 3]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_no_numbers_are_measured_by_nobody(value: float) -> None:
    """A loss is taken before its update: what the last one spoils, no loss shows."""
    logits, target = torch.zeros(6, 10), torch.arange(6)
    logits[4, 3] = value
    with pytest.raises(UserError, match=r"not finite: try a lower recipe\.learning_rate"):
        evaluate.measure(logits, target, np.ones(10, dtype=int))
    tally = Tally(10, torch.device("cpu"))
    for part, wanted in zip(logits.split(2), target.split(2), strict=True):
        tally.add(part, wanted)
    with pytest.raises(UserError, match=r"not finite: try a lower recipe\.learning_rate"):
        tally.measure(np.ones(10, dtype=int))


# -- a run -------------------------------------------------------------------------------------------------------------


def test_record_folder_and_rows(prepared: Path, tmp_path: Path) -> None:
    run = settings(prepared, tmp_path)
    record = streaming.train(run)
    folder = records.folder_of(run)
    assert record["status"] == "done", record.get("failure")
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "done", "metrics.jsonl", "model.pt", "result.json"]
    assert records.read_record(folder) == json.loads(json.dumps(record))
    missing = {name for name, value in records.row(record).items() if value is None}
    assert missing <= {"failure", "commit", "imbalance_factor"}
    assert (record["n_train"], record["n_test"], record["processes"], record["micro_batch"]) == (48, N_VAL, 1, 8)
    assert record["error_top5"] <= record["error_last"] and record["damaged"] == {}
    assert len(record["per_class_error"]) == CLASSES and record["class_names"][0] == "species 0"
    rows = records.read_metrics(folder)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1.0, 6), (2.0, 12)]
    assert rows[0]["test_error"] is None and rows[1]["test_error"] == record["error_last"] == record["error_best"]
    assert rows[1]["lr"] == pytest.approx(0.005)  # dropped by a tenth at epoch 1.5, as on all large sets
    assert streaming.train(run)["skipped"] == "done before"


def test_stopped_within_an_epoch_and_resumed_ends_with_the_same_bits(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "CHECK_STEPS", 4)
    whole, parts = (settings(prepared, tmp_path / name, engine__micro_batch=4) for name in "ab")
    expected = streaming.train(whole)
    steps = []
    while True:
        record = streaming.train(parts, deadline=time.monotonic())
        assert record["status"] in ("running", "done"), record
        steps.append(record["steps"])
        if record["status"] == "done":
            break
    assert steps == [4, 6, 8, 12]
    a, b = weights(records.folder_of(whole)), weights(records.folder_of(parts))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert without_times(whole) == without_times(parts)
    for key in ("error_last", "error_top5", "error_best", "per_class_error", "ece"):
        assert record[key] == expected[key]


def test_what_would_pass_the_deadline_is_not_begun(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes a second, and a fifth more than the last ones took is allowed for the next ones."""
    clock, learning_rate = SimpleNamespace(now=0.0), recipe.learning_rate

    def step(*given: Any) -> float:
        clock.now += 1
        return learning_rate(*given)

    monkeypatch.setattr(streaming, "CHECK_STEPS", 4)
    monkeypatch.setattr(streaming, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(recipe, "learning_rate", step)
    record = streaming.train(settings(prepared, tmp_path), deadline=9.0)
    assert (record["status"], record["steps"]) == ("running", 8)


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "CHECK_STEPS", 4)
    whole, killed = (settings(prepared, tmp_path / name, engine__micro_batch=4) for name in "ab")
    streaming.train(whole)
    save, saved = checkpoint.save, []

    def save_and_stop(*given: Any) -> None:
        save(*given)
        saved.append(given)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint, "save", save_and_stop)
        streaming.train(killed)
    drawn, advance = [], streaming.Line.advance
    monkeypatch.setattr(streaming.Line, "advance", lambda line: drawn.append(line) or advance(line))
    assert streaming.train(killed)["status"] == "done"
    assert len(drawn) == 12 - 6  # checkpoints are due at steps 4 and 6
    a, b = (weights(records.folder_of(run)) for run in (whole, killed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_another_number_of_processes_goes_on_at_the_right_image(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun by one process, stopped after 4 of 12 steps, ended by two under torchrun."""
    whole, parts = (settings(prepared, tmp_path / name, engine__micro_batch=4) for name in "ab")
    expected = streaming.train(whole)
    with monkeypatch.context() as patched:
        patched.setattr(streaming, "CHECK_STEPS", 4)
        assert streaming.train(parts, deadline=time.monotonic())["steps"] == 4
    told = torchrun("scripts/train.py", *overrides(parts))
    assert "goes on from step 4" in told.stderr and "2 processes × 1 micro-batch of 4" in told.stderr
    record = records.read_record(records.folder_of(parts))
    assert (record["status"], record["processes"], record["steps"]) == ("done", 2, 12)
    a, b = weights(records.folder_of(whole)), weights(records.folder_of(parts))
    for name in a:  # in float32, so not to the bit
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-4)
    losses = [[row["train_loss"] for row in without_times(run)] for run in (whole, parts)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert record["error_last"] == pytest.approx(expected["error_last"], abs=100 / N_VAL)


def overrides(run: config.Run) -> list[str]:
    """The command line that makes `run`."""
    start = ["dataset=inaturalist2018", "model=resnet8", "loss=focal_g0.5", "recipe=large", "engine=streaming"]
    values = {k: v for k, v in config.flat(run).items() if k not in ("recipe.drop", "model.prior_bias")}
    return start + [f"{key}={'null' if value is None else json.dumps(value)}" for key, value in values.items()]


def test_a_diverging_run_stops_with_one_sentence(prepared: Path, tmp_path: Path) -> None:
    record = streaming.train(settings(prepared, tmp_path, recipe__learning_rate=1e30, engine__eval_every=9))
    assert record["status"] == "failed"
    assert "The loss became" in record["failure"] and "learning rate" in record["failure"]
    assert records.read_record(tmp_path / record["run_id"])["failure"] == record["failure"]
    assert not records.is_done(tmp_path / record["run_id"])


def test_refused_before_anything_is_written(prepared: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"dataset__root": str(tmp_path / "nowhere")}, "is not prepared under"),
        ({"recipe__batch_size": 64}, "recipe.batch_size is 64: it must be at most the 48 training images"),
        ({"engine__device": "cuda:99"}, "engine.device is 'cuda:99'"),
    ]
    for changes, message in cases:
        record = streaming.train(settings(prepared, tmp_path / "runs", **changes))
        assert record["status"] == "failed" and message in record["failure"]
    assert not (tmp_path / "runs").exists()


def test_a_full_disk_is_one_sentence_and_keeps_the_checkpoint(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fallen: list[bool] = []
    monkeypatch.setattr(distributed, "fall_out", lambda: fallen.append(True))
    monkeypatch.setattr(streaming, "CHECK_STEPS", 4)
    run = settings(prepared, tmp_path)
    folder = records.folder_of(run)
    assert streaming.train(run, deadline=time.monotonic())["steps"] == 4
    before = (folder / "checkpoint.pt").read_bytes()
    sentence = f"{folder} cannot be written to (File too large): make room or mend it, and the same command goes on."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room, status in ((50_000, "failed"), (100, "running")):  # bytes: for the record, and for nothing
        record = records.read_record(folder) | {"status": "running"}
        records.write_record(folder, record)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            with monkeypatch.context() as patched:
                if status == "running":  # it would not come to the first step
                    patched.setattr(records, "rewind_metrics", lambda folder, step: [])
                ended = streaming.train(run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (ended["status"], ended["failure"]) == ("failed", sentence)
        err = capsys.readouterr().err
        assert err.splitlines()[-1] == f"{folder.name}: failed. {sentence}" and "Traceback" not in err
        assert records.read_record(folder)["status"] == status
        assert (folder / "checkpoint.pt").read_bytes() == before and not list(folder.glob("*.tmp"))
    assert fallen == [True, True]
    assert streaming.train(run)["status"] == "done"


def test_what_several_processes_cannot_have(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = World(1, 2, torch.device("cpu"))
    with pytest.raises(UserError, match=r"recipe.batch_size is 9: .* a multiple of the 2 processes\.$"):
        streaming.prepare(settings(prepared, tmp_path, recipe__batch_size=9), two)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"engine.device is 'cuda:1', but 2 processes train together"):
        distributed.join(config.Engine(device="cuda:1"))


def test_the_record_says_why_a_process_that_does_not_lead_failed(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "inaturalist2018/images/val5.jpg").write_bytes(b"not a JPEG")  # every other one is the second's
    run = settings(tmp_path, tmp_path / "runs")
    torchrun("scripts/train.py", *overrides(run), succeeds=False)
    record = records.read_record(records.folder_of(run))
    assert record["status"] == "failed" and record["n_train"] == 48
    assert record["failure"].startswith("Process 1: ") and "val5.jpg" in record["failure"]


def test_the_closing_line_of_a_large_set_has_top_5_too() -> None:
    record = {"run_id": "large", "status": "done", "error_last": 40.0, "error_best": 39.5, "error_top5": 20.0}
    record |= {"seconds": 7.4, "images_per_second": 1234.5}
    said = "large: error 40.00 % (top-5 20.00 %) after the last step, best 39.50 %"
    assert progress.closing_line(record) == f"{said}, 7 s, 1,234 images/s"
    assert progress.closing_line(record | {"skipped": "done before"}) == f"{said} (done before)"


def test_the_closing_line_of_a_skewed_test_set_has_the_mean_over_the_classes() -> None:
    record = {"run_id": "own", "status": "done", "error_last": 3.21, "error_best": 3.0, "per_class_error": [0.0, 20.0]}
    record |= {"seconds": 7.4, "images_per_second": 1234.5}
    said = "own: error 3.21 % after the last step, mean over the classes 10.00 %, best 3.00 %, 7 s, 1,234 images/s"
    assert progress.closing_line(record) == said
    assert "mean" not in progress.closing_line(record | {"error_last": 10.0})


def test_images_prepared_too_small_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_set(tmp_path)
    path = tmp_path / "inaturalist2018/prepared.json"
    told = []
    for side in (17, 18, None):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"short_side": side}))
        streaming.train(settings(tmp_path, tmp_path / f"runs{side}", engine__max_steps=1))
        told.append("a short side of 17 pixels: those of 16 are cut from 18" in capsys.readouterr().err)
    assert told == [True, False, False]


def test_a_damaged_image_is_named_or_skipped(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "inaturalist2018/images/val5.jpg").write_bytes(b"not a JPEG")
    record = streaming.train(settings(tmp_path, tmp_path / "runs"))
    assert record["status"] == "failed" and "val5.jpg" in record["failure"]
    record = streaming.train(settings(tmp_path, tmp_path / "runs", dataset__on_damaged="skip"))
    assert record["status"] == "done" and list(record["damaged"]) == ["val5.jpg"]
    assert record["n_test"] == N_VAL - 1 and 'dataset.on_damaged="skip"' in record["overrides"]


def test_images_skipped_before_a_stop_are_in_the_record_of_the_end(tmp_path: Path) -> None:
    write_set(tmp_path)
    path = tmp_path / "inaturalist2018/images/train0.jpg"
    good = path.read_bytes()
    path.write_bytes(b"not a JPEG")
    run = settings(tmp_path, tmp_path / "runs", dataset__on_damaged="skip")
    record = streaming.train(run, deadline=time.monotonic())
    assert record["status"] == "running" and list(record["damaged"]) == ["train0.jpg"]
    path.write_bytes(good)
    record = streaming.train(run)
    assert record["status"] == "done" and list(record["damaged"]) == ["train0.jpg"]


def test_other_images_and_other_processes_are_refused(prepared: Path, tmp_path: Path) -> None:
    run = settings(prepared, tmp_path / "runs")
    assert streaming.train(run, deadline=time.monotonic())["status"] == "running"
    with disk.alone(records.folder_of(run)):
        assert streaming.train(run)["skipped"] == "another process is training it"
    write_set(tmp_path, n=50)
    other = dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, root=str(tmp_path)))
    assert config.run_id(other) == config.run_id(run)  # where the images lie is no part of the name
    record = streaming.train(other)
    assert record["status"] == "failed" and "was begun on other images" in record["failure"]


@pytest.mark.parametrize("change", [{"engine__dtype": "bf16"}, {"recipe__input_scaling": "symmetric"}])
def test_other_dtypes_and_scalings_train(prepared: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    record = streaming.train(settings(prepared, tmp_path, recipe__epochs=4, **change))
    rows = records.read_metrics(tmp_path / record["run_id"])
    assert record["status"] == "done" and rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_torchvisions_network_takes_a_step(prepared: Path, tmp_path: Path) -> None:
    run = settings(
        prepared, tmp_path, model__name="resnet_imagenet", model__depth=50, engine__max_steps=1,
        dataset__image_size=32,
    )  # fmt: skip
    job = streaming.prepare(run, ALONE)
    images, target = next(job.batches(0, 0))[0]
    job.step([(images[:4], target[:4]), (images[4:], target[4:])], rate=0.1)
    losses, _ = job.step.report()
    bias = math.log(CLASSES - 1)
    assert job.model.fc.bias.detach().mean().item() != pytest.approx(-bias, abs=1e-6)  # it has learned
    assert np.isfinite(losses).all()
    assert job.facts["parameters"] == 23_508_032 + 2048 * CLASSES + CLASSES


def test_compiled_network_computes_the_same(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.compile
    # no compiler is needed
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: original(model, dynamic=dynamic, backend="eager"))
    plain, compiled = (settings(prepared, tmp_path, engine__compile=c, engine__micro_batch=4) for c in (False, True))
    assert config.run_id(plain) == config.run_id(compiled)
    jobs = [streaming.prepare(run, ALONE) for run in (plain, compiled)]
    for job in jobs:
        job.micro_batch = 4
        for batch in job.batches(0, 0):
            job.step(batch, rate=0.1)
    assert jobs[1].step.forward is not jobs[1].step.network
    assert jobs[1].facts["device"] == jobs[0].facts["device"] + ", torch.compile"  # the name of the run does not tell
    np.testing.assert_allclose(jobs[1].step.report()[0], jobs[0].step.report()[0], rtol=1e-6)


def test_cost_of_a_run_on_made_up_images(tmp_path: Path) -> None:
    run = settings(tmp_path, tmp_path, dataset__image_size=8, recipe__batch_size=1024)
    job = synthetic.make_job(run)
    assert (job.facts["n_train"], job.facts["n_test"], len(job.train.counts)) == (437_513, 24_426, 8142)
    assert job.last_step == 2 * 427
    job.step(synthetic.make_batch(run, job) * 2, rate=0.1)
    assert np.isfinite(job.step.report()[0]).all()
    assert 0 < synthetic.seconds(run) < math.inf


# -- recipe and configurations of Table 3 ------------------------------------------------------------------------------


@pytest.fixture
def composed() -> Any:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        yield lambda *words, **kwargs: to_run(compose("train", overrides=list(words), **kwargs))


@pytest.mark.parametrize(
    ("name", "loss", "base"),
    [("inaturalist2018", "softmax", 0.1), ("imagenet", "focal", 0.2), ("inaturalist2017", "focal", 0.4)],
)
def test_the_recipe_at_its_epochs(name: str, loss: str, base: float) -> None:
    """Linear warm-up over 5 epochs from 0, a tenth at 30, 60 and 80; base rate per 256 images at batch 1024."""
    large = config.official_large(name, loss)
    values = {k.partition(".")[2]: v for k, v in large.items() if k.startswith("recipe.")}
    run = config.from_mapping(
        {"dataset": {"name": name, "imbalance_factor": None}, "loss": {"kind": loss}, "recipe": values}
    )
    n = 400 * 1024  # 400 steps an epoch
    peak = base * 1024 / 256

    def rate(epoch: float) -> float:
        return recipe.learning_rate(run.recipe, n, round(400 * epoch)) / peak

    assert [rate(e) for e in (0, 2.5, 5, 29.9, 30, 59.9, 60, 79.9, 80, 89.9)] == pytest.approx(
        [0, 0.5, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )
    assert recipe.total_steps(run.recipe, n) == 36_000


def test_table_3_is_27_experiments_with_the_papers_numbers(composed: Callable[..., config.Run]) -> None:
    paper = pd.read_csv(ROOT / "results/paper/table3.csv")
    paths = sorted((ROOT / "configs/experiment").glob("table3_*.yaml"))
    assert len(paths) == 27
    cells = set()
    for path in paths:
        run = composed(f"experiment={path.stem}")
        assert run.engine.dtype == "bf16" and run.dataset.imbalance_factor is None and run.recipe.drop == 0.1
        assert run.loss.kind == "softmax" or (run.loss.gamma, run.loss.beta, run.model.prior_bias) == (0.5, 0.999, True)
        assert config.overrides(run) == ([] if run.dataset.image_size == 224 else ["dataset.image_size=320"])
        of = (paper.network == config.model_name(run)) & (paper.loss == run.loss.kind)
        of &= (paper.dataset == run.dataset.name) & (paper.image_size == run.dataset.image_size)
        error = paper[of].set_index("metric").error
        text = path.read_text(encoding="utf-8")
        assert f"{error['top1']:.2f} % top-1, {error['top5']:.2f} % top-5" in text
        cells.add(config.cell(run))
    assert len(cells) == 27


def test_official_large_recipe_is_the_yaml_spelled_out(composed: Callable[..., config.Run]) -> None:
    for name in config.LARGE:
        run = composed(f"dataset={name}", "model=resnet50", "recipe=large")
        assert config.overrides(run) == []
        focal = composed(f"dataset={name}", "model=resnet50", "recipe=large", "loss=focal_g0.5")
        assert config.overrides(focal) == ["recipe.learning_rate=0.4"]  # the experiments multiply it


def test_names_on_large_sets(composed: Callable[..., config.Run]) -> None:
    run = composed("experiment=table3_inaturalist2018_resnet50_cbfocal")
    assert config.run_id(run) == "inaturalist2018-resnet50-224-focal-g0.5-b0.999-s0-02516d4a"
    for key, value in {"micro_batch": 64, "sync_bn": True}.items():  # what batch norm normalises changes a result
        other = dataclasses.replace(run, engine=dataclasses.replace(run.engine, **{key: value}))
        assert config.run_id(other) != config.run_id(run)
    for key, value in {"compile": True, "workers": 3, "eval_batch": 7}.items():
        other = dataclasses.replace(run, engine=dataclasses.replace(run.engine, **{key: value}))
        assert config.run_id(other) == config.run_id(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dataset__imbalance_factor": 100.0},
            r"^dataset.imbalance_factor is 100, but .* is taken as it is: write null\.$",
        ),
        (
            {"model__name": "resnet_imagenet", "model__depth": 32},
            r"^model.depth is 32, but of resnet_imagenet it must be",
        ),
        ({"recipe__image_order": "official_stream"}, r"^recipe.image_order is official_stream, but"),
        ({"recipe__momentum": 0.0}, r"^recipe.nesterov is true, but it needs recipe.momentum above 0\.$"),
        ({"engine__micro_batch": 0}, r"^engine.micro_batch is 0, but"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(Path("a"), Path("b"), **changes)


# -- Slurm -------------------------------------------------------------------------------------------------------------


def test_slurm_composes() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs hydra-submitit-launcher")
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        words = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.tasks_per_node=8"]
        launcher = compose("train", overrides=words, return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher") and launcher.partition == "gpu" and launcher.tasks_per_node == 8


@pytest.mark.slow
def test_submitit_runs_a_sweep_and_a_run_of_two_tasks(prepared: Path, tmp_path: Path) -> None:
    """In submitit's local mode: two jobs of two steps on digits, then one job of two tasks that train together."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs hydra-submitit-launcher")
    common = ["-m", "hydra/launcher=submitit_local", f"hydra.sweep.dir={tmp_path / 'jobs'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}

    def run(*words: str) -> None:
        command = [sys.executable, "scripts/train.py", *common, *words]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    words = ["experiment=digits", "engine.max_steps=2", "engine.device=cpu", "tracking=off", "loss.beta=0,0.9"]
    run(*words, f"output_dir={tmp_path / 'digits'}")
    assert len(list((tmp_path / "digits").glob("*/done"))) == 2
    together = settings(prepared, tmp_path / "together")
    run("hydra.launcher.tasks_per_node=2", *overrides(together))
    assert records.read_record(records.folder_of(together))["processes"] == 2


# -- in two processes: `torchrun tests/test_streaming.py ROOT OUT` -----------------------------------------------------

if __name__ == "__main__":
    root, out = map(Path, sys.argv[1:])
    world = distributed.join(config.Engine(device="cpu"))
    found = [trajectory(root, case, world, micro_batch=2) for case in CASES]
    if world.leads:
        torch.save(found, out)
