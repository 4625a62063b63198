"""The README's example runs as it stands, and its commands name things that exist."""

import re
from pathlib import Path

from hydra import compose, initialize_config_dir

from cbl import config, store
from cbl.report import tables
from hydra_plugins.cbl_launcher import to_run

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs() -> None:
    (code,) = re.findall(r"<!-- example:begin -->\n```python\n(.*?)```\n<!-- example:end -->", README, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["loss"].item() > 0 and names["model"].weight.grad.abs().sum() > 0


def test_the_folder_it_shows_is_that_of_its_first_run() -> None:
    (arguments,) = re.findall(r"^python scripts/train\.py (dataset=cifar10_lt .*)$", README, re.MULTILINE)[:1]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        run = to_run(compose("train", arguments.split()))
    assert f"outputs/runs/{config.run_id(run)}/" in README


def test_the_digits_that_are_expected_are_those_published() -> None:
    """The head of configs/experiment/digits.yaml."""
    words = (ROOT / "configs/experiment/digits.yaml").read_text(encoding="utf-8")
    (expected,) = re.findall(r"softmax ([\d.]+) %, ([\d.]+) % at beta 0.9999", words)
    panel = tables.build("digits", store.load(ROOT / "results").runs).panels[0]
    [row] = [cells for label, cells in panel.rows if label == "Softmax"]
    assert expected == (f"{row[0].mean:.2f}", f"{row[-1].mean:.2f}")


def test_the_gains_on_cifar100_are_as_it_says() -> None:
    """Runs added there may end this: then its sentence on them is to be written anew."""
    [panel] = [p for p in tables.build("2", store.load(ROOT / "results").runs).panels if p.title == "CIFAR-100"]
    [gains] = [cells for label, cells in panel.rows if label == "Gain of balancing"]
    at = {factor: gain.values for factor, gain in zip(panel.columns, gains, strict=True) if gain and gain.values}
    assert {factor: len(values) for factor, values in at.items()} == {"IF 200": 2, "IF 100": 1, "IF 50": 1}
    assert sorted(gain > 0 for values in at.values() for gain in values) == [False, False, True, True]
    assert max(abs(gain) for values in at.values() for gain in values) < 0.7


def test_what_it_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)) <= targets | {"help"}
    for path in re.findall(r"python (scripts/\w+\.py)", README):
        assert (ROOT / path).exists(), path
    for group, option in re.findall(r"\b(dataset|loss|sweep|experiment|tracking)=(\w[\w.]*)(?![\w.(])", README):
        assert (ROOT / f"configs/{group}/{option}.yaml").exists(), f"{group}={option}"
    for table in re.findall(r"TABLE=(\w+)", README):
        assert (ROOT / f"configs/table/{table}.yaml").exists(), table
