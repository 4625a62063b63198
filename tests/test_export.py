"""scripts/export.py on runs that were just trained: the run's network comes out, here and in plain torchvision."""

import functools
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from safetensors import safe_open

from cbl import config, export, records
from cbl.data import digits, folder, index
from cbl.engine import resident, streaming
from cbl.errors import UserError
from cbl.models import resnet_cifar
from hydra_plugins.cbl_launcher import compose_jobs

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "export.py"
evaluate: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "evaluate.py"))


def settings(output_dir: Path, **groups: Any) -> config.Run:
    """Two epochs on the digits."""
    values: dict[str, Any] = {
        "dataset": {"name": "digits_lt"},
        "model": {"depth": 8},
        "loss": {"kind": "focal", "beta": 0.9},
        "recipe": {"epochs": 2, "batch_size": 32, "milestones": [1.5], "warmup_epochs": 1},
        "engine": {"device": "cpu", "threads": 1},
        "tracking": {"mode": "off", "entity": "nobody-elses-business"},
        "output_dir": str(output_dir),
    }
    return config.from_mapping(values | {name: values.get(name, {}) | keys for name, keys in groups.items()})


def trained(run: config.Run) -> Path:
    train = streaming.train if run.dataset.name in config.LARGE else lambda run: resident.train([run])[0]
    assert train(run)["status"] == "done"
    return records.folder_of(run)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(settings(tmp_path_factory.mktemp("done")))


@pytest.fixture(scope="module")
def by_own_statistics(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on images of one's own, scaled by their mean and deviation, in an image tree, with another shortcut."""
    tree, rng = tmp_path_factory.mktemp("tree"), np.random.default_rng(0)
    for split, number in (("train", 6), ("test", 4)):
        for label, name in enumerate(("a|b", "c")):
            (tree / split / name).mkdir(parents=True)
            for image in range(number):
                pixels = rng.integers(100 * label, 100 * label + 120, size=(9, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tree / split / name / f"{image}.png")
    run = settings(
        tmp_path_factory.mktemp("own"),
        dataset={"name": "folder", "root": str(tree), "imbalance_factor": None, "image_size": 9},
        model={"shortcut": "projection"},
        recipe={"input_scaling": "mean_std", "batch_size": 4},
    )
    return trained(run), tree


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One step of torchvision's ResNet-50 on a set of few images, prepared as a large one, and where that set is."""
    root, rng = tmp_path_factory.mktemp("prepared"), np.random.default_rng(0)
    (root / "inaturalist2018" / "images").mkdir(parents=True)
    splits = []
    for split, labels in (("train", [0] * 9 + [1] * 3 + [2] * 2 + [3, 4, 5]), ("val", [0, 1, 2, 3, 4, 5, 5])):
        paths = [f"{split}{number}.jpg" for number in range(len(labels))]
        for path in paths:
            pixels = rng.integers(256, size=(40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "inaturalist2018" / "images" / path)
        names = [f"species {c}" for c in range(6)]
        splits.append(index.write(root / "inaturalist2018", split, paths, labels, names))
    index.complete(root / "inaturalist2018", splits)
    run = settings(
        tmp_path_factory.mktemp("large"),
        dataset={"name": "inaturalist2018", "root": str(root), "imbalance_factor": None, "image_size": 32},
        model={"name": "resnet_imagenet", "depth": 50},
        recipe={"input_scaling": "mean_std", "batch_size": 8},
        engine={"workers": 0, "max_steps": 1},
    )
    return trained(run), root


@pytest.fixture(scope="module")
def exported(done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / done.name
    export.write(done, out)
    return out


@pytest.fixture(scope="module")
def large_exported(large: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports")
    export.write(large[0], out)
    return out


def measured(path: Path) -> dict[str, Any]:
    """What scripts/evaluate.py finds, without where it found it."""
    found = evaluate["evaluate_run"](path, "cpu", None)
    return {key: value for key, value in found.items() if key not in ("weights", "config")}


def snippets(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", card, re.M | re.S)


def executed(snippet: str, images: torch.Tensor) -> dict[str, Any]:
    names: dict[str, Any] = {"images": images}
    exec(snippet, names)
    return names


# -- the weights -------------------------------------------------------------------------------------------------------


def test_predictions_are_those_of_the_run(done: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the four lines of the card, against the run's own weights without anything of cbl.export."""
    source = digits.read()
    model = resnet_cifar(8, num_classes=10, in_channels=1).eval()
    model.load_state_dict(torch.load(done / "model.pt", weights_only=True))
    (snippet,) = snippets((exported / "README.md").read_text(encoding="utf-8"), "python")
    assert len(snippet.splitlines()) == 4
    monkeypatch.chdir(exported)
    with torch.no_grad():
        expected = model(source.test_images.permute(0, 3, 1, 2).float() / 128 - 1)
        found = executed(snippet, source.test_images)
    assert torch.equal(found["logits"], expected)
    assert found["names"] == [str(c) for c in expected.argmax(1).tolist()]
    wrong = 100 * (expected.argmax(1) != source.test_labels).double().mean().item()
    assert wrong == pytest.approx(records.read_record(done)["error_last"])


def test_a_run_scaled_by_its_own_images_needs_them_no_more(
    by_own_statistics: tuple[Path, Path], tmp_path: Path
) -> None:
    run, tree = by_own_statistics
    export.write(run, tmp_path / "out")
    model, facts = export.load(tmp_path / "out" / "model.safetensors")
    source = folder.read(str(tree), 9)
    pixels = source.train_images.double() / 255
    assert facts["input"]["mean"] == pytest.approx(pixels.mean((0, 1, 2)).tolist(), rel=1e-6)
    assert facts["input"]["std"] == pytest.approx(pixels.std((0, 1, 2), correction=0).tolist(), rel=1e-6)
    weights = torch.load(run / "model.pt", weights_only=True)
    assert any("shortcut" in name for name in weights)
    assert model.state_dict().keys() == weights.keys()
    with torch.no_grad():
        wrong = model(export.scale(source.test_images, facts)).argmax(1) != source.test_labels
    assert 100 * wrong.double().mean().item() == pytest.approx(records.read_record(run)["error_last"])


def test_a_large_network_in_plain_torchvision(
    large: tuple[Path, Path], large_exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the card's own lines, strictly: every buffer of batch norm is there, and nothing else."""
    import cbl.vision  # noqa: F401 - a torchvision that does not fit this torch can be imported from here on

    _, plain = snippets((large_exported / "README.md").read_text(encoding="utf-8"), "python")
    assert "cbl" not in plain and "torchvision.models.resnet50(num_classes=6)" in plain
    images = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.chdir(large_exported)
    with torch.no_grad():
        found = executed(plain, images)
    assert found["logits"].shape == (2, 6) and not found["model"].training
    weights = torch.load(large[0] / "model.pt", weights_only=True)
    assert sum(name.endswith("num_batches_tracked") for name in weights) == 53
    loaded = found["model"].state_dict()
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)
    scaled = (images / 255 - torch.tensor([0.466, 0.471, 0.380])) / torch.tensor([0.195, 0.194, 0.192])
    torch.testing.assert_close(found["x"], scaled.permute(0, 3, 1, 2))


# -- the header --------------------------------------------------------------------------------------------------------


def test_header_is_the_record_without_the_machine(done: Path, exported: Path) -> None:
    with safe_open(exported / "model.safetensors", framework="pt") as file:
        header = file.metadata()
    assert list(header) == ["cbl"]
    facts, record = json.loads(header["cbl"]), records.read_record(done)
    assert facts["architecture"] == {
        "function": "resnet_cifar",
        "arguments": {"depth": 8, "num_classes": 10, "in_channels": 1, "shortcut": "mean_pool"},
    }
    assert facts["input"] == {"size": 8, "channels": 1, "scaling": "symmetric", "mean": None, "std": None}
    for key in (
        "run_id",
        "class_names",
        "class_counts",
        "error_last",
        "per_class_error",
        "subset_hash",
        "commit",
        "versions",
    ):
        assert facts[key] == record[key]
    assert config.run_id(config.from_mapping(facts["config"])) == facts["run_id"]
    for private in ("nobody-elses-business", str(done.parent), "output_dir", '"root"'):
        assert private not in header["cbl"] and private not in (exported / "README.md").read_text(encoding="utf-8")


def test_facts_of_a_large_run(large: tuple[Path, Path], large_exported: Path) -> None:
    facts, _ = export.read(large_exported / "model.safetensors")
    assert facts["architecture"] == {"function": "resnet_imagenet", "arguments": {"depth": 50, "num_classes": 6}}
    assert facts["input"]["size"] == 32 and facts["input"]["mean"] == [0.466, 0.471, 0.380]
    assert facts["error_top5"] == records.read_record(large[0])["error_top5"]
    assert str(large[1]) not in json.dumps(facts)


# -- the files ---------------------------------------------------------------------------------------------------------


def test_same_run_same_bytes_and_nothing_else_is_overwritten(done: Path, tmp_path: Path) -> None:
    export.write(done, tmp_path / "a")
    export.write(done, tmp_path / "b")
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert set(files) == {"model.safetensors", "README.md"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == files
    export.write(done, tmp_path / "a")  # again, which is fine
    (tmp_path / "b" / "README.md").write_text("the citation is filled in now", encoding="utf-8")
    (tmp_path / "b" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^.*b/README.md is there already and is another: remove it, or choose"):
        export.write(done, tmp_path / "b")
    assert [path.read_text(encoding="utf-8") for path in (tmp_path / "b").iterdir()] == [
        "the citation is filled in now"
    ]


def test_what_cannot_be_exported_is_one_sentence(
    done: Path, by_own_statistics: tuple[Path, Path], tmp_path: Path
) -> None:
    def refuses(run: Path, message: str, **more: Any) -> None:
        with pytest.raises(UserError, match=message) as caught:
            export.write(run, tmp_path / "out", **more)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    copied = shutil.copytree(done, tmp_path / "run")
    weights = torch.load(copied / "model.pt", weights_only=True)
    refuses(tmp_path / "nowhere", "is no run folder: it has no result.json")
    torch.save({name: value for name, value in weights.items() if name != "fc.bias"}, copied / "model.pt")
    refuses(copied, r"run/model.pt does not fit the network that result.json beside it says")
    refuses(copied / "model.pt", r"^.*run/model.pt is no run folder but a file: give a folder such as outputs/runs/")
    (copied / "model.pt").unlink()
    refuses(copied, r"run/model.pt holds no weights that can be read \(No such file or directory\): copy it again")
    (copied / "done").unlink()
    refuses(copied, r"^.*run is not done \(status: done\): finish the run, then export it\.$")
    own, tree = by_own_statistics
    other = shutil.copytree(tree, tmp_path / "other")
    (other / "train" / "c" / "5.png").unlink()
    refuses(own, r"The images under .*other are not those that folder-asis-.* was trained on", data_root=str(other))
    again = shutil.copytree(tree, tmp_path / "again")  # as many images of the same names, with other pixels
    Image.new("RGB", (9, 9)).save(again / "train" / "c" / "5.png")
    refuses(own, r"The images under .*again are not those that folder-asis-.* was trained on", data_root=str(again))
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    with pytest.raises(UserError, match=r"file/out cannot be written to \(Not a directory\)"):
        export.write(done, tmp_path / "file" / "out")


def test_files_that_are_none_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match=r"model.safetensors cannot be read as weights"):
        export.load(path)
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"model.safetensors cannot be read as weights"):
        export.load(path)
    for metadata in (None, {"format": "pt"}, {"cbl": "no json"}, {"cbl": "[]"}, {"cbl": "{}"}):
        safetensors.torch.save_file({"weight": torch.zeros(1)}, path, metadata)
        with pytest.raises(UserError, match=r"was not written by scripts/export.py"):
            export.load(path)


# -- read back by scripts/evaluate.py ----------------------------------------------------------------------------------


def test_evaluated_as_the_run_is(done: Path, exported: Path) -> None:
    expected = measured(done)
    assert measured(exported) == measured(exported / "model.safetensors") == expected
    assert expected["images_apart"] == 0 and expected["notes"] == []


def test_evaluated_with_the_headers_statistics(by_own_statistics: tuple[Path, Path], tmp_path: Path) -> None:
    """Whatever training images lie where the test images are."""
    run, tree = by_own_statistics
    export.write(run, tmp_path / "out")
    other = shutil.copytree(tree, tmp_path / "other")
    for path in (other / "train").rglob("*.png"):
        Image.new("RGB", (9, 9)).save(path)
    found = evaluate["evaluate_run"](tmp_path / "out", "cpu", str(other))
    assert found["ece"] == records.read_record(run)["ece"]


def test_a_large_run_is_evaluated_too(
    large: tuple[Path, Path], large_exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = records.read_record(large[0])
    found = evaluate["evaluate_run"](large_exported, "cpu", str(large[1]))
    assert found["error"] == record["error_last"] and found["images_apart"] == 0 and found["notes"] == []
    for key in ("error_top5", "per_class_error", "ece", "group_classes", "n_test"):
        assert found[key] == record[key]
    assert found["test_counts"] == [1, 1, 1, 1, 1, 2] and sum(found["calibration"]["count"]) == 7
    evaluate["show"](found)
    text = capsys.readouterr().out
    assert f"top-5 error   {record['error_top5']:.2f} %" in text and "confus" not in text.lower()
    assert re.search(r"^5 +species 5 +1 +[\d.]+ +few +2 +[\d.]+ *$", text, re.M)


def test_other_weights_than_the_header_says(exported: Path, tmp_path: Path) -> None:
    facts, tensors = export.read(exported / "model.safetensors")
    del tensors["fc.bias"]
    path = tmp_path / "renamed.safetensors"
    safetensors.torch.save_file(tensors, path, {"cbl": json.dumps(facts)})
    with pytest.raises(UserError, match=r"renamed.safetensors does not fit the network that its header describes"):
        measured(path)


# -- the card ----------------------------------------------------------------------------------------------------------


def test_card_of_a_small_run(done: Path, exported: Path) -> None:
    card, record = (exported / "README.md").read_text(encoding="utf-8"), records.read_record(done)
    assert "imbalance factor 100" in card and "focal (γ = 1), class-balanced with β = 0.9" in card
    assert f"**{record['error_last']:.2f} %** of 500 test images" in card
    rows = re.findall(r"^\| (\d) \| (\d) \| (\d+) \| ([\d.]+) \|$", card, re.M)
    assert [int(row[2]) for row in rows] == record["class_counts"]
    assert [float(row[3]) for row in rows] == pytest.approx(record["per_class_error"], abs=0.006)
    assert f"| many | 4 | 26 to 124 | {record['error_many']:.2f} |" in card
    assert "torchvision" not in card and "CC BY 4.0" in card
    assert "@inproceedings{cui2019class," in card and "{to be filled in}" in card
    trains, exports = snippets(card, "sh")[0].splitlines()
    assert trains.startswith("python scripts/train.py dataset.name=digits_lt ")
    assert exports == f"python scripts/export.py run=outputs/runs/{done.name}"
    assert "With this project and `safetensors` installed, in this folder" in card


def test_card_of_other_runs(by_own_statistics: tuple[Path, Path], large_exported: Path, tmp_path: Path) -> None:
    run, _ = by_own_statistics
    own = export.card(export.write(run, tmp_path / "out"))
    assert "| 0 | a\\|b | 6 | " in own and "imbalance factor 1.00" in own
    assert "few images" not in own  # as many of each
    facts, _ = export.read(large_exported / "model.safetensors")
    card = export.card(facts)
    assert "imbalance factor 9.00" in card and "top-5" in card and "species 5" in card
    assert "the central square of 86.4 % of the short side" in card and "photographer" in card
    names = [f"species {c}" for c in range(101)]
    many = facts | {"class_names": names, "class_counts": [1] * 101, "per_class_error": [None, *[50.0] * 100]}
    assert "species 5" not in export.card(many) and "`per_class_error` (%) in the header" in export.card(many)
    balanced = facts["config"] | {"loss": {"kind": "softmax"}}
    assert "softmax, not class-balanced (β = 0)" in export.card(facts | {"config": balanced})
    assert "torchrun --nproc-per-node=8 scripts/train.py" in export.card(facts | {"processes": 8})
    assert "At commit `1234567` (a + means" in export.card(facts | {"commit": "1234567"})
    outside = export.card(facts | {"commit": None})  # of any checkout
    assert "\nAt an unknown commit:\n" in outside and "a + means" not in outside


COMMANDS = [
    [],
    ["loss=focal_g2", "loss.beta=0.9999", "dataset=cifar100_lt", "dataset.imbalance_factor=20", "seed=3"],
    ["dataset.imbalance_factor=1", "loss=sigmoid", "loss.beta=1", "dataset.subset_seed=2", "engine.dtype=bf16"],
    ["experiment=digits", "loss.reduction=weight_sum", "loss.beta=0.9", "recipe.learning_rate=0.00001"],
    ["model.prior_bias=true", "dataset.flip=false", "recipe.drop=0.1", "model.shortcut=projection", "engine.threads=1"],
    ["dataset=folder", "dataset.root='my images/ä, b=c'", "recipe.milestones=[]", "dataset.image_size=64"],
    *(["dataset=folder", f"dataset.root='{root}'"] for root in ("2024", "1e3", "true", "größe", "nan")),
    ["dataset=folder", r"""dataset.root='a\b "c" \\\"d\\'"""],
    ["experiment=table3_inaturalist2018_resnet50_softmax"],
    ["experiment=table3_imagenet_resnet152_cbfocal320", "engine.micro_batch=64", "engine.sync_bn=true"],
]  # fmt: skip


@pytest.fixture(scope="module")
def composed() -> Any:
    """A run of a command's words, as a sweep composes it, which saves Hydra's time."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        plain = functools.cache(lambda *choices: compose("train", overrides=list(choices)))
        yield lambda words: next(compose_jobs(lambda choices: plain(*choices), [words]))[1]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_command_makes_the_same_run(composed: Callable[[list[str]], config.Run], words: list[str]) -> None:
    run = composed(words)
    start, script, *said = shlex.split(export.command(run))
    assert (start, script) == ("python", "scripts/train.py")
    assert config.run_id(composed(said)) == config.run_id(run)


def test_the_command_says_what_matters_and_no_more() -> None:
    run = config.from_mapping({
        "dataset": {"imbalance_factor": 1, "root": "/away", "image_size": 64}, "loss": {"kind": "sigmoid", "gamma": 2},
        "recipe": {"milestones": [8]}, "engine": {"threads": 1}, "tracking": {"mode": "off"}, "output_dir": "/here",
    })  # fmt: skip
    assert export.command(run, processes=2) == (
        "torchrun --nproc-per-node=2 scripts/train.py dataset.imbalance_factor=1.0 loss.kind=sigmoid "
        "'recipe.milestones=[8.0]'"
    )


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_command_itself(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export.py", f"run={done}"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    weights = Path("exports") / done.name / "model.safetensors"
    record = records.read_record(done)
    said = capsys.readouterr().out
    assert said.startswith(f"{weights}: 75,002 parameters, 0.3 MB, test error {record['error_last']:.2f} %")
    assert export.read(weights)[0]["run_id"] == done.name
    monkeypatch.setattr(sys, "argv", ["export.py", str(done / "model.pt")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out == said
    monkeypatch.setattr(sys, "argv", ["export.py", str(done), "--out", "elsewhere"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert (tmp_path / "elsewhere" / "README.md").exists()
    wrong = subprocess.run([sys.executable, str(SCRIPT), "run=outputs/x"], capture_output=True, text=True, cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "outputs/x is no run folder: it has no result.json.\n"
