"""scripts/evaluate.py on runs that were just trained: against their records, a computation by hand, and wrong paths."""

import dataclasses
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cbl import config, records
from cbl.data import digits
from cbl.engine import checkpoint, resident
from cbl.errors import UserError
from cbl.models import resnet_cifar

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "evaluate.py"
script: dict[str, Any] = runpy.run_path(str(SCRIPT))


def settings(output_dir: Path, **groups: Any) -> config.Run:
    """A few steps on the digits."""
    values: dict[str, Any] = {
        "dataset": {"name": "digits_lt"},
        "model": {"depth": 8},
        "loss": {"kind": "focal", "beta": 0.9},
        "recipe": {"epochs": 4, "batch_size": 32, "milestones": [3.0], "warmup_epochs": 1},
        "engine": {"device": "cpu"},
        "tracking": {"mode": "off"},
        "output_dir": str(output_dir),
    }
    return config.from_mapping(values | {name: values.get(name, {}) | keys for name, keys in groups.items()})


def trained(run: config.Run) -> Path:
    """The folder of the run."""
    (record,) = resident.train([run])
    assert record["status"] == "done"
    return records.folder_of(run)


def interrupted(run: config.Run, epochs: int) -> Path:
    """The folder of the run, which a Ctrl-C ended after `epochs`."""
    save, saved = checkpoint.save, []

    def save_and_stop(*arguments: Any) -> None:
        save(*arguments)
        saved.append(arguments)
        if len(saved) == epochs:
            raise KeyboardInterrupt

    run = dataclasses.replace(run, engine=dataclasses.replace(run.engine, checkpoint_seconds=0.0))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", save_and_stop)
        resident.train([run])
    return records.folder_of(run)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(settings(tmp_path_factory.mktemp("done")))


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 of 4 epochs, the second of which was evaluated."""
    return interrupted(settings(tmp_path_factory.mktemp("half")), epochs=2)


@pytest.fixture
def copied(done: Path, tmp_path: Path) -> Path:
    """The done run, to be tampered with."""
    return shutil.copytree(done, tmp_path / "run")


def folders(root: Path, classes: int, train: int) -> Path:
    """Images of one's own: so many a class to train on, and two to test."""
    rng = np.random.default_rng(0)
    for split, each in (("train", train), ("test", 2)):
        for c in range(classes):
            (root / split / f"kind {c:02d}").mkdir(parents=True, exist_ok=True)
            for number in range(each):
                pixels = rng.integers(0, 256, size=(8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / f"kind {c:02d}" / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def many_classes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on 21 classes of one's own images, and the tree that they are in."""
    tree = folders(tmp_path_factory.mktemp("tree"), classes=21, train=3)
    dataset = {"name": "folder", "root": str(tree), "imbalance_factor": None, "image_size": 8}
    run = settings(tmp_path_factory.mktemp("folder"), dataset=dataset, recipe={"epochs": 1, "milestones": []})
    return trained(run), tree


def as_json(path: Path, device: str = "cpu", data_root: str | None = None) -> dict[str, Any]:
    """What --json prints."""
    return json.loads(json.dumps(script["evaluate_run"](path, device, data_root), allow_nan=False))


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command prints to a pipe."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments), "--device", "cpu"])
        capsys.readouterr()
        script["main"]()
        return capsys.readouterr().out

    return run


def test_a_done_run_is_measured_as_its_record_says(done: Path) -> None:
    found, record = as_json(done), records.read_record(done)
    assert found["images_apart"] == 0 and found["notes"] == []
    assert found["error"] == found["error_recorded"] == record["error_last"]
    assert found["step"] == found["last_step"] == record["steps"] == 38
    for key in ("run_id", "status", "per_class_error", "group_classes", "groups", "ece", "class_counts", "class_names"):
        assert found[key] == record[key]
    for group in ("error_many", "error_medium", "error_few"):
        assert found[group] == record[group]


def test_confusion_and_calibration_by_hand(done: Path) -> None:
    """With nothing of cbl.engine: the network, the stored weights, x/128 - 1, and counting."""
    model = resnet_cifar(8, num_classes=10, in_channels=1)
    model.load_state_dict(torch.load(done / "model.pt", weights_only=True))
    model.eval()
    source, target = digits.read(), digits.read().test_labels.numpy()
    with torch.no_grad():
        share = model(source.test_images.permute(0, 3, 1, 2).float() / 128 - 1).double().softmax(1).numpy()  # (500, 10)
    predicted, confidence = share.argmax(1), share.max(1)
    want = np.zeros((10, 10), dtype=int)
    np.add.at(want, (target, predicted), 1)
    found = as_json(done)
    assert found["confusion"] == want.tolist()
    assert found["error"] == pytest.approx(100 * np.mean(predicted != target))
    assert found["per_class_error"] == pytest.approx([100 - 2.0 * want[c, c] for c in range(10)])  # 50 of each class
    in_bin = [(confidence > k / 15) & (confidence <= (k + 1) / 15) for k in range(15)]
    assert found["calibration"]["count"] == [int(chosen.sum()) for chosen in in_bin]
    ece = sum(abs(sum(confidence[chosen] - (predicted == target)[chosen])) for chosen in in_bin) / 500
    assert found["ece"] == found["calibration"]["ece"] == pytest.approx(100 * ece, abs=1e-3)


def test_input_scaling_and_reduced_precision_are_taken_from_the_record(tmp_path: Path) -> None:
    run = settings(tmp_path, recipe={"input_scaling": "mean_std"}, engine={"dtype": "bf16"})
    folder = trained(run)
    assert as_json(folder)["images_apart"] == 0
    path = folder / "result.json"  # that the test above can fail: other scaling, other predictions
    path.write_text(path.read_text(encoding="utf-8").replace("mean_std", "symmetric"), encoding="utf-8")
    assert as_json(folder)["images_apart"] > 0


def test_text_for_a_pipe(done: Path, printed: Callable[..., str]) -> None:
    text, record = printed(f"run={done}"), records.read_record(done)
    assert text.isascii() and "\x1b" not in text
    assert f"{record['error_last']:.2f} % (as recorded)" in text and "Note" not in text
    assert f"{record['ece']:.2f} % expected calibration error" in text
    assert "imbalance factor 100, subset seed 0; 10 classes, 304 training and 500 test images" in text
    assert "focal (gamma 1), beta 0.9, reduction batch" in text
    classes = re.findall(r"^ ?(\d) +(\d) +(\d+) +([\d.]+) +(many|medium|few) +50 +([\d.]+) *$", text, re.M)
    assert [int(line[2]) for line in classes] == record["class_counts"]
    assert [float(line[5]) for line in classes] == pytest.approx(record["per_class_error"])
    groups = re.findall(r"^(many|medium|few) +(\d) +(\d+) to (\d+) +([\d.]+) *$", text, re.M)
    assert [line[:4] for line in groups] == [
        ("many", "4", "26", "124"), ("medium", "3", "5", "16"), ("few", "3", "1", "3")
    ]  # fmt: skip
    matrix = re.findall(r"^(\d)  (\d)((?: +[\d.]+){10}) *$", text, re.M)
    assert [[int(n.replace(".", "0")) for n in line[2].split()] for line in matrix] == as_json(done)["confusion"]
    bins = re.findall(r"^ *[\d.]+ - [\d.]+ +(\d+) ", text, re.M)
    assert [int(n) for n in bins] == as_json(done)["calibration"]["count"]


def test_folder_weights_or_run_equals_name_the_same(done: Path, printed: Callable[..., str]) -> None:
    first = printed(done)
    assert printed(f"run={done}") == printed(done / "model.pt") == printed(f"run={done / 'model.pt'}") == first
    assert json.loads(printed(done, "--json")) == as_json(done)


def test_a_half_done_run_is_called_so(half_done: Path, printed: Callable[..., str]) -> None:
    found, rows = as_json(half_done), records.read_metrics(half_done)
    assert (found["step"], found["last_step"], found["status"]) == (19, 38, "running")
    assert found["weights"] == str(half_done / "checkpoint.pt")
    assert found["error"] == found["error_recorded"] == rows[-1]["test_error"] and found["images_apart"] == 0
    text = printed(half_done / "checkpoint.pt")
    assert "step 19 of 38" in text and "Note: The run is not done: these are its weights after step 19 of 38." in text


def test_a_checkpoint_that_was_not_evaluated_has_nothing_to_equal(tmp_path: Path, printed: Callable[..., str]) -> None:
    folder = interrupted(settings(tmp_path), epochs=1)
    found = as_json(folder)
    assert found["error_recorded"] is None and found["images_apart"] is None
    assert "(not evaluated at this step before)" in printed(folder)


def test_another_error_than_the_recorded_one_is_said(copied: Path, printed: Callable[..., str]) -> None:
    record = records.read_record(copied)
    records.write_record(copied, record | {"error_last": record["error_last"] - 0.6})
    assert as_json(copied)["images_apart"] == 3
    text = printed(copied)
    assert "(not as recorded)" in text and "3 of 500 images apart" in text


def test_other_training_images_are_said(copied: Path, printed: Callable[..., str]) -> None:
    record = records.read_record(copied)
    records.write_record(copied, record | {"subset_hash": "0000"})
    found = as_json(copied)
    assert "training images here are not those of the record" in found["notes"][0]
    assert found["notes"][1:] == [f"The record's error, {record['error_last']:.2f} %, is of its own images."]
    assert found["images_apart"] is None and "of other images" in printed(copied)


def test_final_weights_are_of_the_records_last_step_on_whatever_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folders(tmp_path / "data", classes=2, train=20)
    run = settings(tmp_path, dataset={"name": "folder", "root": str(root), "image_size": 8, "imbalance_factor": None})
    folder = trained(run)
    told = capsys.readouterr().err
    assert "\nimages resized to 8 x 8 (dataset.image_size)\nclasses        kind 00, kind 01\n" in told
    assert "\nclass counts       20     20\n" in told
    first = as_json(folder)
    more = folders(tmp_path / "more", classes=2, train=60)  # which would make more steps
    again = as_json(folder, data_root=str(more))
    assert (again["step"], again["last_step"]) == (first["step"], first["last_step"]) == (5, 5)
    assert again["n_train"] == 120 and first["error_class_mean"] == pytest.approx(first["error"])


def test_of_a_skewed_test_set_the_mean_over_the_classes_is_shown(tmp_path: Path, printed: Callable[..., str]) -> None:
    root = folders(tmp_path / "data", classes=2, train=20)
    for name in ("0", "1"):
        shutil.copy(root / "test/kind 00/0.png", root / f"test/kind 00/{name} again.png")
    run = settings(tmp_path, dataset={"name": "folder", "root": str(root), "image_size": 8, "imbalance_factor": None})
    found = as_json(folder := trained(run))
    assert found["test_counts"] == [4, 2]
    assert found["error_class_mean"] == pytest.approx(sum(found["per_class_error"]) / 2) != found["error"]
    assert f"of classes    {found['error_class_mean']:.2f} % on average" in printed(folder)


def test_above_twenty_classes_the_most_confused_pairs(
    many_classes: tuple[Path, Path], printed: Callable[..., str]
) -> None:
    folder, _ = many_classes
    text, confusion = printed(folder), np.array(as_json(folder)["confusion"])
    assert "Confusion (row" not in text and "as it is on disk" in text
    pairs = re.findall(r"^(kind \d+)  +(kind \d+)  +(\d) +(50|100)\.00 *$", text, re.M)
    off = np.where(np.eye(21, dtype=bool), 0, confusion)
    assert [int(n) for *_, n, _ in pairs] == np.sort(off[off > 0])[::-1][:20].tolist()
    assert all(off[int(true[-2:]), int(taken[-2:])] == int(n) for true, taken, n, _ in pairs)


def test_data_that_has_moved(many_classes: tuple[Path, Path], tmp_path: Path, printed: Callable[..., str]) -> None:
    folder, tree = many_classes
    moved, gone = shutil.copytree(tree, tmp_path / "moved"), tmp_path / "run"
    shutil.copytree(folder, gone)
    record = records.read_record(gone)
    record["config"]["dataset"]["root"] = str(tmp_path / "nowhere")
    records.write_record(gone, record)
    with pytest.raises(UserError, match=r"There is no folder .*nowhere/train"):
        printed(gone)
    assert f"{record['error_last']:.2f} % (as recorded)" in printed(gone, "--data", moved)
    for split in ("train", "test"):
        (moved / split / "kind 20").rename(moved / split / "another")
    again = shutil.copytree(moved, tmp_path / "again")  # a tree is read once per process
    with pytest.raises(UserError, match=r"^The classes under .*again are not those that folder-asis-.* was trained on"):
        as_json(gone, data_root=str(again))


def test_nothing_is_downloaded_to_where_the_data_is_said_to_be(copied: Path, tmp_path: Path) -> None:
    run = dataclasses.replace(settings(tmp_path), dataset=config.Dataset(shift=4, flip=True))
    records.write_record(copied, records.read_record(copied) | {"config": config.to_mapping(run)})
    with pytest.raises(UserError, match=r"CIFAR-10 is not complete under .*elsewhere"):
        as_json(copied, data_root=str(tmp_path / "elsewhere"))
    assert not (tmp_path / "elsewhere").exists()


def test_a_large_set_that_is_not_prepared(copied: Path, tmp_path: Path) -> None:
    """One that is: tests/test_export.py."""
    large = {
        "dataset": {"name": "imagenet", "imbalance_factor": None},
        "model": {"name": "resnet_imagenet", "depth": 50},
    }
    run = config.to_mapping(config.from_mapping(large))
    records.write_record(copied, records.read_record(copied) | {"config": run})
    with pytest.raises(UserError, match=rf"^imagenet is not prepared under {re.escape(str(tmp_path))}"):
        as_json(copied, data_root=str(tmp_path))


def test_what_cannot_be_evaluated_is_one_sentence(copied: Path, tmp_path: Path) -> None:
    def refuses(path: Path, message: str, device: str = "cpu") -> None:
        with pytest.raises(UserError, match=message) as caught:
            as_json(path, device)
        assert str(path) in str(caught.value) or device in str(caught.value)

    refuses(tmp_path / "nowhere", r"^.*nowhere is no run: give a folder such as outputs/runs/<run_id>, or its model.pt")
    refuses(copied / "result.json", "is no run: give")
    refuses(copied, r"^engine.device is 'quantum'", device="quantum")
    (tmp_path / "alone").mkdir()
    shutil.copy(copied / "model.pt", tmp_path / "alone")
    refuses(tmp_path / "alone", "is no run folder: it has no result.json")
    state = torch.load(copied / "model.pt", weights_only=True)
    torch.save({name: value for name, value in state.items() if name != "fc.bias"}, copied / "model.pt")
    refuses(copied, "does not fit the network that result.json beside it describes")
    saved = (copied / "model.pt").read_bytes()
    for content in (b"no weights", saved[: len(saved) // 2], b""):
        (copied / "model.pt").write_bytes(content)
        refuses(
            copied,
            r"model.pt holds no weights that can be read \(torch.save did not write it, or it is damaged\): copy",
        )
    torch.save([1, 2], copied / "model.pt")
    refuses(copied, r"model.pt holds no weights that can be read \(it is no state dict\): copy")
    (copied / "model.pt").unlink()
    refuses(copied, "has no weights, neither model.pt nor checkpoint.pt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(done: Path) -> None:
    with pytest.raises(UserError, match=r"^engine.device is 'cuda', but torch .* sees 0 CUDA devices here"):
        as_json(done, "cuda")


def test_a_terminal_gets_ruled_tables_with_nothing_cut(
    done: Path, printed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = printed(done).split()
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the pipe for a terminal, which is no dumb one
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "30")
    text = printed(done)
    assert "\x1b[1m" in text and "─────" in text
    assert re.sub(r"\x1b\[[\d;]*m|─", "", text).split() == words


def test_long_class_names_are_printed_whole_and_what_is_beside_them(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json(done)
    names = [f"class {name} of those {'whose names are long ' * 10}and end" for name in found["class_names"]]
    said = []
    for shown in (found["class_names"], names):
        script["show"](found | {"class_names": shown})
        said.append(capsys.readouterr().out)
    short, long = said
    assert all(long.count(name) == 2 for name in names)  # among the classes, and in the confusion
    for name, was in zip(names, found["class_names"], strict=True):
        long = long.replace(name, was)
    assert long.split() == short.split()


def test_the_command_itself(tmp_path: Path, printed: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, str(SCRIPT), "run=outputs/runs/x"]
    wrong = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.count("\n") == 1 and wrong.stderr.startswith("outputs/runs/x is no run: give a folder")
    with pytest.raises(SystemExit) as left:
        printed("--help")
    helped = capsys.readouterr().out
    assert left.value.code == 0 and "run=outputs/runs/<run_id>" in helped and "--data ROOT" in helped
