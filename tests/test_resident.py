"""The training loop: against a loop written from the paper's words, killed and resumed, failing, side by side."""

import contextlib
import ctypes
import errno
import itertools
import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import confusion_matrix

from cbl import class_balanced_weights, config, data, disk, records, tracking
from cbl.data import folder
from cbl.engine import estimate, evaluate, processes, progress, recipe, resident
from cbl.engine.advice import advise
from cbl.engine.device import choose_device, device_name
from cbl.engine.job import prepare
from cbl.engine.progress import Display
from cbl.errors import UserError
from cbl.models import resnet_cifar

ROOT = Path(__file__).resolve().parent.parent
needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@pytest.fixture(autouse=True)
def one_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """New processes import torch for seconds; the test that is about them asks for them."""
    if "spawned" not in request.node.name:
        monkeypatch.setattr(processes, "count", lambda runs: 1)


def digits(output_dir: Path, **changes: Any) -> config.Run:
    """Some seconds of training; `loss__beta=0.9` sets loss.beta."""
    values: dict[str, Any] = {
        "dataset": {"name": "digits_lt"},
        "model": {"depth": 8},
        "recipe": {"epochs": 6, "batch_size": 64, "milestones": [4.0], "warmup_epochs": 2},
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


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_last_evaluation_is_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict, made = evaluate.predict, []
    monkeypatch.setattr(evaluate, "predict", lambda *given: made.append(predict(*given)) or made[-1])
    run = digits(tmp_path, engine__eval_every=4)
    (record,) = resident.train([run])
    assert len(made) == 2  # after epochs 4 and 6
    assert record["error_last"] == evaluate.error(made[1], data.load(run.dataset).test_labels) != 0


@pytest.mark.parametrize("kind", ["softmax", "focal"])
def test_steps_equal_a_loop_written_from_the_paper(tmp_path: Path, kind: str) -> None:
    """Twelve steps, image by image, with plain torch calls and nothing of cbl.engine but the drawn numbers.

    In float64: in float32 one rounding at the corner of a ReLU would be all that is compared.
    """
    run = digits(tmp_path, loss__kind=kind, loss__beta=0.99)
    images = data.load(run.dataset)
    n, steps = len(images.subset), 12

    model = resnet_cifar(8, num_classes=10, in_channels=1, prior_bias=kind == "focal", seed=run.seed).double()
    last = [model.fc.bias]
    rest = [p for p in model.parameters() if p is not last[0]]
    groups = [{"params": rest, "weight_decay": 2e-4}]
    groups.append({"params": last, "weight_decay": 2e-4 if kind == "softmax" else 0.0})
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=False)
    alpha = class_balanced_weights(images.counts, 0.99).float().double()  # the loss keeps float32 weights
    drawn = np.concatenate(
        [recipe.Stream(n, 64, 0, "shuffle", 1, False, np.arange(n)).block(k) for k in range(4)], axis=1
    )
    expected = []
    for step in range(steps):
        batch, labels = [], []
        for position, dy, dx, _ in drawn[:, 64 * step : 64 * (step + 1)].T:
            image = images.train_images[images.subset[position], :, :, 0].double()
            padded = torch.zeros(10, 10, dtype=torch.float64)
            padded[1:9, 1:9] = image
            batch.append(padded[dy : dy + 8, dx : dx + 8] / 128 - 1)
            labels.append(int(images.train_labels[images.subset[position]]))
        logits, target = model(torch.stack(batch)[:, None]), torch.tensor(labels)
        if kind == "softmax":
            loss = (alpha[target] * F.cross_entropy(logits, target, reduction="none")).sum() / 64
        else:
            sign = 2.0 * F.one_hot(target, 10) - 1
            p = torch.sigmoid(logits * sign)
            loss = (alpha[target][:, None] * -(1 - p) * torch.log(p)).sum() / 64
        epoch = step * 64 / n
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = float(np.float32(0.1 * min(1, epoch / 2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())

    job = prepare(run, choose_device(run.engine))
    for part in (job.model, job.step.loss):
        part.double()
    for kept in job.optimizer.state.values():
        kept["momentum_buffer"] = kept["momentum_buffer"].double()
    job.step.losses = job.step.losses.double()
    job.step.scaling = lambda pixels: pixels.permute(0, 3, 1, 2).double() / 128 - 1
    losses = []
    for begun, plan in job.stream.epochs(run.recipe):
        plan[:, 0] = images.subset[plan[:, 0]]
        job.step.load(plan, np.array([recipe.learning_rate(run.recipe, n, s) for s in begun]))
        for _ in plan:
            job.step()
        losses += job.step.epoch_losses().tolist()
        if len(losses) >= steps:
            break
    np.testing.assert_allclose(losses[:steps], expected, rtol=1e-9)


def test_record_folder_and_columns(tmp_path: Path) -> None:
    run = digits(tmp_path, loss__kind="focal", loss__beta=0.9)
    (record,) = resident.train([run])
    folder = records.folder_of(run)
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "done", "metrics.jsonl", "model.pt", "result.json"]
    assert records.read_record(folder) == json.loads(json.dumps(record))
    assert record["status"] == "done" and record["n_train"] == 304 and record["n_test"] == 500
    missing = [name for name, value in records.row(record).items() if value is None]
    assert set(missing) <= {"failure", "commit", "error_top5"}
    assert len(record["per_class_error"]) == len(record["class_weights"]) == 10
    assert record["error_last"] == pytest.approx(np.mean(record["per_class_error"]))  # the test set is balanced
    rows = records.read_metrics(folder)
    assert [row["step"] for row in rows] == [304 * (e + 1) // 64 for e in range(6)]
    assert [row["test_error"] is not None for row in rows] == [False, True, False, True, False, True]
    assert rows[-1]["test_error"] == record["error_last"]
    assert record["error_best"] == min(row["test_error"] for row in rows if row["test_error"] is not None)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_done_runs_are_skipped(tmp_path: Path) -> None:
    run = digits(tmp_path, engine__max_steps=3)
    resident.train([run])
    before = (records.folder_of(run) / "result.json").stat().st_mtime_ns
    (record,) = resident.train([run])
    assert record["status"] == "done" and record["skipped"] == "done before"
    assert (records.folder_of(run) / "result.json").stat().st_mtime_ns == before


def test_max_steps_ends_early_without_moving_the_milestones(tmp_path: Path) -> None:
    run = digits(tmp_path, engine__max_steps=7)
    (record,) = resident.train([run])
    rows = records.read_metrics(records.folder_of(run))
    assert record["steps"] == rows[-1]["step"] == 7
    whole = digits(tmp_path)
    resident.train([whole])
    others = records.read_metrics(records.folder_of(whole))
    assert rows[0]["train_loss"] == others[0]["train_loss"] and rows[0]["lr"] == others[0]["lr"]


@pytest.mark.parametrize("order", ["shuffle", "official_stream"])
def test_stopped_and_resumed_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    whole, parts = (digits(tmp_path / name, recipe__image_order=order, loss__beta=0.9) for name in "ab")
    (expected,) = resident.train([whole])
    commands, new_record = itertools.count(), records.new_record
    monkeypatch.setattr(records, "new_record", lambda run: new_record(run) | {"started": f"by {next(commands)}"})
    for _ in range(20):
        # an epoch at least is trained each time, and hardly more
        (record,) = resident.train([parts], deadline=time.monotonic() + 0.01)
        assert record["started"] == "by 0"
        if record["status"] == "done":
            break
        assert record["status"] == "running"
    assert record["status"] == "done"
    assert same(weights(records.folder_of(whole)), weights(records.folder_of(parts)))
    timing = {"seconds", "images_per_second"}
    a, b = (records.read_metrics(records.folder_of(run)) for run in (whole, parts))
    assert [{k: v for k, v in row.items() if k not in timing} for row in a] == [
        {k: v for k, v in row.items() if k not in timing} for row in b
    ]
    for key in ("error_last", "error_best", "per_class_error", "ece", "steps"):
        assert record[key] == expected[key]
    # the times of all parts
    assert record["seconds"] == pytest.approx(b[-1]["seconds"], abs=0.01) and b[-1]["seconds"] > b[0]["seconds"] > 0
    steps = np.diff([0, *(row["step"] for row in b)])
    trained = (steps / [row["images_per_second"] for row in b]).sum()
    assert record["images_per_second"] == pytest.approx(record["steps"] / trained, rel=0.01)


class Clock:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1e-3
        return self.now


def test_an_epoch_that_would_pass_the_deadline_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes 10 s, and a fifth more is allowed for."""
    clock, append = Clock(), records.append_metrics
    monkeypatch.setattr(resident, "time", clock)

    def slow(*given: Any) -> None:
        append(*given)
        clock.now += 10

    monkeypatch.setattr(records, "append_metrics", slow)
    (record,) = resident.train([digits(tmp_path, recipe__epochs=4)], deadline=33.0)
    assert record["status"] == "running" and 30 < clock.now < 31
    assert (records.folder_of(digits(tmp_path, recipe__epochs=4)) / "checkpoint.pt").exists()


def test_killed_between_the_last_step_and_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, killed = (digits(tmp_path / name, recipe__epochs=2) for name in "ab")
    resident.train([whole])
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "measure", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            resident.train([killed])
    (record,) = resident.train([killed])
    assert record["status"] == "done"
    assert same(weights(records.folder_of(whole)), weights(records.folder_of(killed)))


def killed_and_resumed(run: config.Run, command: list[str], waits: list[float]) -> int:
    """Runs `command`, kill -9 `waits` seconds after its first checkpoint, then to its end; says how often that hit."""
    folder, hits = records.folder_of(run), 0
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    checkpoint = folder / "checkpoint.pt"
    for wait in waits:
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > before):
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        hits += process.wait() == -signal.SIGKILL
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stderr=subprocess.DEVNULL)
    return hits


def test_kill_9_at_random_and_resume(tmp_path: Path) -> None:
    changes = ["experiment=digits", "loss=focal_g1", "loss.beta=0.9", "recipe.epochs=30", "engine.device=cpu"]
    changes += ["engine.checkpoint_seconds=0", "engine.threads=1", "tracking=off"]
    common = {"recipe__epochs": 30, "recipe__milestones": [32.0], "recipe__warmup_epochs": 5, "engine__eval_every": 5}
    whole, killed = (digits(tmp_path / n, loss__kind="focal", loss__beta=0.9, **common) for n in ("whole", "killed"))
    resident.train([whole])
    command = [sys.executable, "scripts/train.py", f"output_dir={tmp_path / 'killed'}", *changes]
    hits = killed_and_resumed(killed, command, list(np.random.default_rng().uniform(0.0, 0.8, size=2)))
    assert hits >= 1, "the run ended before it could be killed"
    assert same(weights(records.folder_of(whole)), weights(records.folder_of(killed)))


@pytest.mark.slow
@pytest.mark.data
def test_cifar_kill_9_and_resume(tmp_path: Path) -> None:
    """As above on CIFAR-10: 400 steps of ResNet-8 in five epochs, a checkpoint after each."""
    changes = ["model.depth=8", "recipe.epochs=5", "dataset.imbalance_factor=200", "engine.checkpoint_seconds=0"]
    changes += ["engine.max_steps=400", "engine.threads=1", "tracking=off", "engine.device=cpu"]
    common = {"dataset": {"imbalance_factor": 200.0}, "recipe": {"epochs": 5}, "engine__max_steps": 400}
    whole, killed = (digits(tmp_path / name, **common) for name in ("whole", "killed"))
    resident.train([whole])
    command = [sys.executable, "scripts/train.py", f"output_dir={tmp_path / 'killed'}", *changes]
    hits = killed_and_resumed(killed, command, list(np.random.default_rng().uniform(0.0, 3.0, size=2)))
    assert hits >= 1, "the run ended before it could be killed"
    assert same(weights(records.folder_of(whole)), weights(records.folder_of(killed)))


@pytest.mark.slow
@pytest.mark.data
def test_three_epochs_of_cifar_learn(tmp_path: Path) -> None:
    run = config.from_mapping(
        {"recipe": {"epochs": 3, "warmup_epochs": 1}, "engine": {"device": "cpu"}, "tracking": {"mode": "off"},
         "output_dir": str(tmp_path)}
    )  # fmt: skip
    (record,) = resident.train([run])
    rows = records.read_metrics(records.folder_of(run))
    assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"]
    assert record["error_last"] < 80


def test_failures_are_recorded_and_leave_the_others_alone(tmp_path: Path) -> None:
    diverging = digits(tmp_path, recipe__learning_rate=1e30)
    empty = digits(tmp_path, dataset={"name": "digits_lt", "imbalance_factor": 1000})
    fine = digits(tmp_path, engine__max_steps=3)
    ended = resident.train([diverging, empty, fine])
    assert [record["status"] for record in ended] == ["failed", "failed", "done"]
    assert "step" in ended[0]["failure"] and "learning rate" in ended[0]["failure"]
    assert records.read_record(records.folder_of(diverging))["status"] == "failed"
    assert not records.is_done(records.folder_of(diverging))
    assert not records.folder_of(empty).exists()  # refused before anything was written


def test_a_page_says_why_its_run_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[dict[str, Any]] = []
    monkeypatch.setattr(tracking.Tracker, "finish", lambda self, record: closed.append(dict(record)))
    [ended] = resident.train([digits(tmp_path, recipe__learning_rate=1e30)])
    assert [page["failure"] for page in closed] == [ended["failure"]] and "The loss became" in ended["failure"]


def test_spawned_processes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, alone = ([digits(tmp_path / n, seed=seed, recipe__epochs=2) for seed in range(3)] for n in "ab")
    # on one core too, and on systems that do not say which cores may be used
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert processes.count(runs) == 2
    ended = resident.train(runs)
    for run, other, record in zip(runs, alone, ended, strict=True):
        assert record["status"] == "done" and record["run_id"] == config.run_id(run)
        resident.drive(other, Display(quiet=True))
        assert same(weights(records.folder_of(run)), weights(records.folder_of(other)))


def test_the_last_run_left_of_many_takes_one_thread_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bits would be others with more: torch adds in another order."""
    runs = [digits(tmp_path, seed=seed, recipe__epochs=2) for seed in range(2)]
    resident.drive(runs[0], Display(quiet=True))
    given: list[tuple[int, list[config.Run]]] = []

    def train(left: list[config.Run], workers: int, *rest: Any) -> list[tuple[int, dict[str, Any]]]:
        given.append((workers, left))
        return [(0, resident.drive(left[0], Display(quiet=True)))]

    monkeypatch.setattr(processes, "count", lambda runs: min(2, len(runs)))
    monkeypatch.setattr(processes, "train", train)
    assert [record["status"] for record in resident.train(runs)] == ["done", "done"]
    assert given == [(1, runs[1:])]


@pytest.mark.parametrize("key", ["subset_hash", "content_hash"])
def test_other_images_under_the_same_name_are_refused(tmp_path: Path, key: str) -> None:
    run = digits(tmp_path)
    resident.train([run], deadline=time.monotonic() + 0.01)
    path = records.folder_of(run) / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    content["state"][key] = "0000"
    torch.save(content, path)
    (record,) = resident.train([run])
    assert record["status"] == "failed" and f"other images ({key} was 0000, now " in record["failure"]
    del content["state"]["content_hash"]  # as one that was begun before there was such a key
    content["state"]["subset_hash"] = record["subset_hash"]
    torch.save(content, path)
    assert resident.train([run])[0]["status"] == "done"


def test_a_compiled_network_is_trained_and_the_network_itself_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, forwards = torch.compile, []

    def compiled(model: torch.nn.Module, dynamic: bool) -> torch.nn.Module:
        forwards.append(original(model, dynamic=dynamic, backend="eager"))  # which needs no compiler
        return forwards[-1]

    monkeypatch.setattr(torch, "compile", compiled)
    plain, other = (digits(tmp_path / str(c), engine__compile=c, recipe__epochs=1) for c in (False, True))
    assert config.run_id(plain) == config.run_id(other)
    expected, record = resident.train([plain])[0], resident.train([other])[0]
    assert len(forwards) == 1 and record["device"] == expected["device"] + ", torch.compile"
    assert record["per_class_error"] == expected["per_class_error"]
    assert same(weights(records.folder_of(plain)), weights(records.folder_of(other)))
    monkeypatch.setenv("CXX", "no-compiler")
    (record,) = resident.train([digits(tmp_path / "none", engine__compile=True)])
    assert record["failure"] == "engine.compile=true needs a compiler, and there is no no-compiler: leave it out."


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_compiled_for_this_machine_a_run_ends_alike(tmp_path: Path, dtype: str) -> None:
    runs = [digits(tmp_path / str(c), engine__compile=c, engine__dtype=dtype, recipe__epochs=1) for c in (False, True)]
    ended = [resident.train([run])[0] for run in runs]
    assert [record["status"] for record in ended] == ["done", "done"]
    plain, compiled = (weights(records.folder_of(run)) for run in runs)
    for name, value in plain.items():
        near = {"fp32": 1e-3, "bf16": 0.2}[dtype]
        assert (compiled[name].double() - value.double()).norm() <= near * value.double().norm() + 1e-3, name


def draw(root: Path, names: str) -> None:
    """Four images of each class."""
    for split, name, number in [(split, name, n) for split in ("train", "test") for name in names for n in range(4)]:
        path = root / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 20 * number, dtype=np.uint8)).save(path)


def test_a_half_done_run_is_refused_for_another_class_in_the_folder(tmp_path: Path) -> None:
    """Before its weights, which do not fit any more, are looked at."""
    draw(tmp_path / "images", "ab")
    dataset = {"name": "folder", "imbalance_factor": None, "root": str(tmp_path / "images"), "image_size": 8}
    run = digits(tmp_path / "runs", dataset=dataset, recipe__batch_size=4)
    assert estimate.seconds([run], 2)[0] > 0  # an epoch is of two steps
    assert resident.train([run], deadline=time.monotonic() + 0.01)[0]["status"] == "running"
    draw(tmp_path / "images", "c")
    folder._read.cache_clear()
    (record,) = resident.train([run])
    assert record["failure"].startswith(f"{records.folder_of(run)} was begun on other images (subset_hash was ")


def test_a_done_run_is_refused_for_other_images_in_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "images"
    draw(root, "ab")
    dataset = {"name": "folder", "imbalance_factor": None, "root": str(root), "image_size": 8}
    run = digits(tmp_path / "runs", dataset=dataset, recipe__batch_size=4, engine__max_steps=2)
    name = records.folder_of(run)

    def again() -> dict[str, Any]:
        folder._read.cache_clear()  # as in another process
        return resident.train([run])[0]

    assert again()["status"] == "done"
    kept = (name / "result.json").read_bytes()
    assert again()["skipped"] == "done before"
    for old, new, what in (
        (None, "train/a/4.png", "n_train was 8, now 9"),
        ("train/a/4.png", "test/a/4.png", "n_test was 8, now 9"),
        ("test/a/4.png", None, None),
        ("train/a/3.png", "train/b/4.png", "class_counts was [4, 4], now [3, 5]"),
        ("train/b/4.png", "train/a/3.png", None),
    ):
        if new and not old:
            (root / new).write_bytes((root / "train/a/0.png").read_bytes())
        elif old and not new:
            (root / old).unlink()
        else:
            (root / old).rename(root / new)
        record = again()
        if what is None:
            assert record["skipped"] == "done before"
        else:
            assert record["status"] == "failed" and record["failure"] == (
                f"{name} was trained on other images than {root} holds now ({what}): delete the folder to start the "
                "run afresh."
            )
        assert (name / "result.json").read_bytes() == kept
    Image.fromarray(np.full((8, 8, 3), 250, dtype=np.uint8)).save(root / "test/a/3.png")
    assert "trained on other images than" in again()["failure"]
    Image.fromarray(np.full((8, 8, 3), 60, dtype=np.uint8)).save(root / "test/a/3.png")
    root.rename(tmp_path / "elsewhere")
    assert again()["skipped"] == "done before"
    root.mkdir()  # where a disk was mounted
    assert again()["skipped"] == "done before"


def files_up_to(size: int) -> contextlib.AbstractContextManager:
    """A disk that is full for more than `size` bytes a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    stack = contextlib.ExitStack()
    stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
    return stack


def test_a_full_disk_is_one_sentence_and_keeps_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = digits(tmp_path)
    name = records.folder_of(run)
    resident.train([run], deadline=time.monotonic() + 0.01)
    before = (name / "checkpoint.pt").read_bytes()
    with files_up_to(100_000):  # bytes: room for the record
        (record,) = resident.train([run])
    sentence = f"{name} cannot be written to (File too large): make room or mend it, and the same command goes on."
    assert (record["status"], record["failure"]) == ("failed", sentence)
    assert records.read_record(name)["failure"] == sentence
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == f"{name.name}: failed. {sentence}" and "Traceback" not in err
    assert (name / "checkpoint.pt").read_bytes() == before and not list(name.glob("*.tmp"))
    assert resident.train([run])[0]["status"] == "done"


def test_a_disk_without_any_room_leaves_the_other_runs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full, fine = (digits(tmp_path / name, engine__max_steps=3) for name in ("full", "fine"))
    replace, name = os.replace, records.folder_of(full)

    def fill(source: Path, target: Path) -> None:
        if target.parent == name and records.read_metrics(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fill)
    ended = resident.train([full, fine])
    assert [record["status"] for record in ended] == ["failed", "done"]
    assert ended[0]["failure"].startswith(f"{name} cannot be written to (No space left on device): make room")
    assert records.read_record(name)["status"] == "running" and "Traceback" not in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the thread that draws bars
@pytest.mark.parametrize("place", ["terminal", "pipe", pytest.param("log", marks=needs_dev_full)])
def test_nobody_left_to_tell_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """The terminal was closed, the reader of the pipe is gone, the disk of the log is full."""
    monkeypatch.setenv("TERM", "xterm")
    reader, writer = {"terminal": pty.openpty, "pipe": os.pipe, "log": lambda: (None, "/dev/full")}[place]()
    err = open(writer, "w")  # noqa: SIM115 - closed below
    monkeypatch.setattr(sys, "stderr", err)
    display = Display(2)
    assert (display.bars is not None) == (place == "terminal")
    line = display.run("first", 4, 8)
    if reader is not None:
        os.close(reader)
    display.end("first is done")
    assert display.quiet and display.bars is None
    for each in (line, display.run("second", 4, 8)):
        each.shown = 0.0
        each.advance()
        each.close()
    display.close()
    (record,) = resident.train([digits(tmp_path, engine__max_steps=2)])
    assert record["status"] == "done"
    with contextlib.suppress(OSError):
        err.close()


def test_a_run_under_way_elsewhere_is_left_alone(tmp_path: Path) -> None:
    run = digits(tmp_path)
    with disk.alone(records.folder_of(run)):
        (record,) = resident.train([run])
    assert record["skipped"] == "another process is training it"
    assert not (records.folder_of(run) / "result.json").exists()


def test_processors_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=capability: found)
        names.add(device_name(torch.device("cpu")))
        assert any(f", {capability}, {torch.get_num_threads()} thread" in name for name in names)
    assert len(names) == 2


def test_a_long_epoch_is_not_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    line = Display().run("a", steps=100, batch_size=128)
    for now in (1030.0, 1059.0, 1064.0, 1070.0):  # noqa: B007 - read by the clock
        line.advance()
    line.epoch({"epoch": 1.0, "train_loss": 2.0, "test_error": None})
    now = 1200.0
    line.advance()
    assert capsys.readouterr().err.splitlines() == [
        "a: step 3, 3 %, 6 images/s, 34 min left",
        "a: step 5, 5 %, loss 2.000, 3 images/s, 63 min left",
    ]


@pytest.mark.parametrize("dtype", ["tf32", "bf16"])
def test_other_dtypes_train(tmp_path: Path, dtype: str) -> None:
    (record,) = resident.train([digits(tmp_path, engine__dtype=dtype, recipe__epochs=3)])
    rows = records.read_metrics(tmp_path / record["run_id"])
    assert record["status"] == "done" and rows[-1]["train_loss"] < rows[0]["train_loss"]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"recipe__epochs": 2}, 1),
        ({"recipe__epochs": 2, "recipe__milestones": [1.0]}, 0),
        ({"recipe__epochs": 2, "recipe__milestones": []}, 0),  # none is wanted
        ({"recipe__epochs": 2, "recipe__drop": 1.0}, 0),
        ({"engine__max_steps": 1}, 0),  # stopped early on purpose
    ],
)
def test_a_learning_rate_that_never_drops_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: dict[str, Any], said: int
) -> None:
    recipe = {"recipe__milestones": [160.0, 180.0]} | recipe
    advise([digits(tmp_path, seed=seed, **recipe) for seed in (0, 1)], print)
    shown = capsys.readouterr().out
    assert shown.count("The learning rate never drops: ") == said
    assert not said or shown.endswith("are recipe.milestones=[1.6,1.8] here.\n")


NOWHERE = {"engine": {"capture": False, "deterministic": True, "lanes": 1, "workers": 0, "threads": 1}}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"engine": {"device": "cpu:0", "fused": True, "lanes": 4, "dtype": "tf32"}}, "dtype fused lanes on the CPU"),
        ({"engine": {"device": "cuda", "fused": True, "lanes": 4, "dtype": "tf32"}}, ""),
        ({"engine": {"micro_batch": 32, "sync_bn": True, "workers": 2}}, "micro_batch sync_bn workers on cifar10_lt"),
        ({"dataset": {"on_damaged": "skip", "image_size": 64}}, "image_size on_damaged on cifar10_lt"),
        ({"dataset": {"name": "folder", "image_size": 64}, "engine": {"sync_bn": True}}, "sync_bn on folder"),
        ({"dataset": {"name": "imagenet", "image_size": 320, "on_damaged": "skip"}}, ""),
        ({"dataset": {"name": "imagenet"}, "engine": {"micro_batch": 32, "workers": 2}}, ""),
        ({"dataset": {"name": "imagenet"}, "engine": {"device": "cpu", "fused": True}}, "fused on imagenet"),
        ({"dataset": {"name": "imagenet"}, "engine": {"device": "cuda", "lanes": 2}}, "lanes on imagenet"),
        (
            {"dataset": {"name": "imagenet"}, "model": {"name": "resnet_imagenet", "depth": 50, "init": "kaiming"}},
            "init on resnet_imagenet",
        ),
        (NOWHERE, ""),
        ({"dataset": {"name": "imagenet"}} | NOWHERE, ""),
    ],
)
def test_settings_that_do_nothing_are_said_once(
    values: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if values.get("dataset", {}).get("name") in config.LARGE:
        values = values | {"dataset": values["dataset"] | {"imbalance_factor": None}}
    advise([config.from_mapping(values | {"seed": seed}) for seed in (0, 1)], print)
    found = re.findall(r"^\w+\.(\w+)=\S+ has no effect on (.*): leave it out\.$", capsys.readouterr().out, re.MULTILINE)
    assert " ".join([*(key for key, _ in found), *{f"on {place}" for _, place in found}]) == said


@pytest.mark.parametrize(
    ("processor", "dtypes", "said"),
    [("AVX2", ["fp32", "bf16", "bf16"], 1), ("AVX2", ["fp32"], 0), ("AVX512", ["bf16"], 0)],
)
def test_bf16_on_a_processor_without_it_is_said_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    processor: str,
    dtypes: list[str],
    said: int,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    resident.train(
        [digits(tmp_path, engine__dtype=dtype, engine__max_steps=1, seed=i) for i, dtype in enumerate(dtypes)]
    )
    assert capsys.readouterr().err.count("no instructions for bf16") == said


@pytest.mark.parametrize(
    "change",
    [
        {"model__shortcut": "strided"},
        {"model__shortcut": "projection"},
        {"model__init": "kaiming"},
        {"loss__reduction": "weight_sum"},
        {"recipe__input_scaling": "mean_std"},
        {"recipe__decay_scope": "not_bn"},
        {"recipe__decay_scope": "only_last_bias"},
        {"model__prior_bias": True},
        {"recipe__drop": 0.1},
    ],
)
def test_every_ablated_detail_changes_the_run(tmp_path: Path, change: dict[str, Any]) -> None:
    base, other = (
        digits(tmp_path, loss__beta=0.9, recipe__epochs=5),
        digits(tmp_path, loss__beta=0.9, recipe__epochs=5, **change),
    )
    ended = resident.train([base, other])
    assert ended[0]["cell"] != ended[1]["cell"]
    last = [records.read_metrics(records.folder_of(run))[-1]["train_loss"] for run in (base, other)]
    assert last[0] != last[1]


def test_a_run_takes_the_records_as_they_are_written_and_the_statistics_of_its_subset(tmp_path: Path) -> None:
    """The parts are tested elsewhere; here, that they come together. The digits are one file, sorted by class."""
    changes = {"recipe__image_order": "official_stream", "recipe__input_scaling": "mean_std"}
    job = prepare(digits(tmp_path, **changes), torch.device("cpu"))
    labels = job.images.train_labels.numpy()[job.images.subset]
    assert job.stream.record_order.tolist() == np.argsort(labels, kind="stable").tolist() != list(range(len(labels)))
    assert (np.diff(labels[job.stream.record_order]) >= 0).all()
    kept = job.images.train_images.numpy()[job.images.subset] / 255  # (N, H, W, 1)
    assert float(job.step.scaling.mean) == pytest.approx(kept.mean(), rel=1e-5)
    assert float(job.step.scaling.std) == pytest.approx(kept.std(), rel=1e-3)
    assert abs(kept.mean() - job.images.train_images.numpy().mean() / 255) > 1e-4 * kept.mean()  # of all it is another


def test_calibration_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2000, 7, generator=generator)
    other = torch.randint(7, (2000,), generator=generator)
    target = torch.where(torch.rand(2000, generator=generator) < 0.6, logits.argmax(1), other)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(logits.double(), target, strict=True):
        share = row.exp() / row.exp().sum()
        bins.setdefault(int(share.max() * 15), []).append((share.max().item(), bool(share.argmax() == label)))
    expected = sum(abs(sum(c for c, _ in b) - sum(hit for _, hit in b)) for b in bins.values()) / 2000
    assert evaluate.calibration(logits, target)["ece"] == pytest.approx(100 * expected)


def test_confusion_against_the_oracle() -> None:
    logits, target = torch.randn(500, 5), torch.randint(5, (500,))
    np.testing.assert_array_equal(evaluate.confusion(logits, target), confusion_matrix(target, logits.argmax(1)))


PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
@pytest.mark.skipif(PAGES.exists() and "[always]" in PAGES.read_text(), reason="huge pages: there are too few faults")
def test_freed_memory_is_used_again() -> None:
    """In a process of its own, which stays as large as it was: 64 MiB are 16,384 page faults, or none.

    The least of some: at first there are still holes in the heap to fill.
    """
    code = """
import resource, torch
from cbl.engine.device import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = min(faults() for _ in range(20))
keep_freed_memory()
print(given_back, min(faults() for _ in range(20)))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    given_back, kept = map(int, found.stdout.split())
    assert kept < 200 < given_back


class OutOfResources(Exception):
    """As Triton's for a kernel that wants more shared memory than there is."""


def some_fail(
    monkeypatch: pytest.MonkeyPatch, error: Exception, which: Callable[[config.Run], bool], modules: Any = None
) -> None:
    for module in modules or (estimate, resident):

        def made(run: config.Run, *rest: Any) -> Any:
            if which(run):
                raise error
            return prepare(run, *rest)

        monkeypatch.setattr(module, "prepare", made)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("error", [OutOfResources("shared memory"), UserError("no network of ours")], ids=repr)
def test_a_first_run_that_fails_decides_nothing_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    some_fail(monkeypatch, error, lambda run: run.seed == 0)
    monkeypatch.setattr(estimate, "images_per_second", lambda lanes: 1000.0 * len(lanes))
    runs = [digits(tmp_path, seed=seed, engine__device="cuda", engine__max_steps=2) for seed in range(3)]
    assert estimate.lanes(runs, lambda text: None) == estimate.lanes(runs[1:], lambda text: None) == 2
    assert [record["status"] for record in resident.train(runs)] == ["failed", "done", "done"]
    some_fail(monkeypatch, error, lambda run: True)
    assert estimate.lanes(runs, lambda text: None) == 1


@pytest.mark.usefixtures("stand_in")
def test_what_fails_in_the_measurement_of_lanes_leaves_half_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rate(lanes: Any) -> float:
        if len(lanes) == 4:
            raise OutOfResources
        return 1000.0 * len(lanes)

    monkeypatch.setattr(estimate, "images_per_second", rate)
    runs = [digits(tmp_path, seed=seed, engine__device="cuda") for seed in range(5)]
    assert estimate.lanes(runs, lambda text: None) == 2


def test_the_hours_of_a_table_are_told_without_the_rows_that_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = [digits(tmp_path, seed=seed, model__shortcut="projection") for seed in range(2)]
    fine = digits(tmp_path)
    said: list[str] = []
    error = UserError("engine.fused=true computes no model.shortcut=projection: set engine.fused=false.")
    some_fail(monkeypatch, error, lambda run: run.model.shortcut == "projection", [estimate])
    taken = estimate.seconds([*refused, fine], 2, said.append)
    assert taken[:2] == [0, 0] and taken[2] > 0
    assert said == [f"{config.run_id(refused[0])} and its like are left out of the time: {error}"]
    with pytest.raises(UserError, match=r"^engine\.fused=true computes"):  # all of them
        estimate.seconds(refused, 2, said.append)
    some_fail(monkeypatch, OutOfResources("shared memory"), lambda run: True, [estimate])
    assert estimate.seconds([fine], 2, said.append) == [0]
    assert said[1:] == [f"{config.run_id(fine)} and its like are left out of the time: OutOfResources('shared memory')"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"^engine\.device is 'cuda'"):
        estimate.seconds([digits(tmp_path, engine__device="cuda"), fine], 2, said.append)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("place", ["at its start", "under way"])
def test_a_run_without_memory_beside_others_waits_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], at_once: int, place: str
) -> None:
    """There is memory for `at_once` of three runs; none is ever too large when it is alone. None has failed."""
    live, most, pages = set(), [], []
    finish = tracking.Tracker.finish
    monkeypatch.setattr(
        tracking.Tracker, "finish", lambda page, record: pages.append(record["status"]) or finish(page, record)
    )

    class Held:
        def __init__(self, run: config.Run) -> None:
            if len(live) >= at_once:
                raise torch.OutOfMemoryError("CUDA out of memory")
            live.add(id(self))
            most.append(len(live))

        def __del__(self) -> None:
            live.discard(id(self))

    def made(run: config.Run, *rest: Any) -> Any:
        if place == "at its start":
            held = Held(run)
            job = prepare(run, *rest)
            job.held = held  # type: ignore[attr-defined]
            return job
        return prepare(run, *rest)

    def fit(run: config.Run, *rest: Any) -> Any:
        yield
        held = Held(run) if place == "under way" else None
        yield from whole_fit(run, *rest)
        del held

    whole_fit = resident.fit
    monkeypatch.setattr(resident, "prepare", made)
    monkeypatch.setattr(resident, "fit", fit)
    runs = [digits(tmp_path, seed=s, engine__device="cuda", engine__lanes=3, engine__max_steps=9) for s in range(3)]
    assert [record["status"] for record in resident.train(runs)] == ["done"] * 3
    assert max(most) == at_once and not live
    assert "Traceback" not in capfd.readouterr().err
    # running: closed as interrupted
    assert set(pages) == ({"done"} if place == "at its start" else {"running", "done"})
    assert all(records.is_done(records.folder_of(run)) for run in runs)


@pytest.mark.usefixtures("stand_in")
def test_a_run_too_large_for_the_memory_fails_and_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_fail(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), lambda run: run.seed == 1, [resident])
    runs = [digits(tmp_path, seed=s, engine__device="cuda", engine__lanes=3, engine__max_steps=3) for s in range(4)]
    ended = resident.train(runs)
    assert [record["status"] for record in ended] == ["done", "failed", "done", "done"]
    assert ended[1]["failure"].startswith("The GPU is out of memory: lower engine.eval_batch")
    (alone,) = resident.train(runs[1:2])
    assert alone["status"] == "failed"
