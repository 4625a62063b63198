"""The planner: which runs a table needs, against the paper's cells; interrupted, on a budget, with published runs."""

import argparse
import dataclasses
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import reproduce_table

from cbl import config, records, store
from cbl.data import index
from cbl.engine import processes, resident
from cbl.errors import UserError
from cbl.report import formats, paper, readme, tables

ROOT = Path(__file__).resolve().parent.parent


def settings(run: config.Run) -> tuple:
    """What names a cell of the paper."""
    gamma = run.loss.gamma if run.loss.kind == "focal" else None
    return run.dataset.name, run.dataset.imbalance_factor, run.loss.kind, gamma, run.loss.beta


def cells(frame: pd.DataFrame) -> set[tuple]:
    columns = ["dataset", "imbalance_factor", "loss", "gamma", "beta"]
    return {tuple(None if pd.isna(v) else v for v in row) for row in frame[columns].itertuples(index=False, name=None)}


@pytest.mark.parametrize(
    ("table", "runs"),
    [
        ("digits", 25),
        ("1", 0),
        ("2", 70),
        ("grid10", 125),
        ("ablation", 92),
        ("ablation_digits", 46),
        ("conditions", 28),
        ("division", 10),
        ("division_cifar", 5),
        ("ports", 4),
    ],
)
def test_distinct_runs_a_seed(table: str, runs: int) -> None:
    planned = reproduce_table.plan(table, [0, 1])
    assert len(planned) == len({config.run_id(run) for run in planned}) == 2 * runs
    assert [run.seed for run in planned] == [0] * runs + [1] * runs  # an early end leaves whole seeds


def test_every_table_that_is_trained_for_is_one_that_is_shown() -> None:
    assert set(reproduce_table.TABLES) == set(tables.NAMES)


def test_table_2_is_the_papers() -> None:
    planned = reproduce_table.plan("2", [0])
    assert {settings(run) for run in planned} == cells(paper.table2())
    assert all(config.overrides(run) == [] for run in planned)


@pytest.mark.parametrize(
    "name",
    [
        "digits",
        "2",
        "grid10",
        "grid100",
        "ablation",
        "ablation_digits",
        "conditions",
        *tables.DIVISIONS,
        "ports",
        "drop",
    ],
)
def test_the_command_of_a_published_table_finds_its_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds and dtype are part of a run: without them REUSE=1 would train all of it again."""
    table = tables.build(name, store.load(ROOT / "results").runs)
    flags = {"TABLE": "--table", "SEEDS": "--seeds", "SET": "--set"}
    said = [word.split("=", 1) for word in table.command.split()[2:]]
    monkeypatch.setattr(sys, "argv", ["", *(part for key, value in said for part in (flags[key], value))])
    asked = reproduce_table.arguments()
    planned = {config.run_id(run) for run in reproduce_table.plan(asked.table, asked.seeds, asked.set)}
    published = {run_id for panel in table.panels for cell in panel.cells() for run_id in cell.run_ids}
    assert planned >= published != set()


def test_seeds_are_a_list_with_ranges() -> None:
    assert reproduce_table.seed_list("0-3, 7") == [0, 1, 2, 3, 7]
    for wrong, answer in {"": "such as", "1,": "such as", "-1": "such as", "a": "such as", "3-1": "write 1-3"}.items():
        with pytest.raises(argparse.ArgumentTypeError, match=answer):
            reproduce_table.seed_list(wrong)


def made_up(planned: list[config.Run]) -> pd.DataFrame:
    """Rows of runs that are done, each with an error of its own."""
    kept = [records.new_record(run) | {"status": "done", "error_last": 20.0 + i} for i, run in enumerate(planned)]
    return pd.DataFrame([records.row(record) for record in kept])


@pytest.mark.parametrize(
    ("name", "seeds", "extra", "command"),
    [
        ("2", [0, 1], ["dataset.subset_seed=4"], "TABLE=2 SEEDS=0,1 SET=dataset.subset_seed=4"),
        ("2", [3], [], "TABLE=2 SEEDS=3"),
        ("2", [3], ["dataset.subset_seed=3,4"], "TABLE=2 SEEDS=3"),  # no one value to name
        ("ablation_digits", [3], [], "TABLE=ablation_digits SEEDS=3"),  # each seed has a subset of its own anyhow
        (
            "ablation_digits",
            [3, 4],
            ["dataset.subset_seed=0"],
            "TABLE=ablation_digits SEEDS=3,4 SET=dataset.subset_seed=0",
        ),
    ],
)
def test_the_command_names_the_choice_of_images(name: str, seeds: list[int], extra: list[str], command: str) -> None:
    table = tables.build(name, made_up(reproduce_table.plan(name, seeds, extra)))
    assert table.command == f"make reproduce-table {command}"
    by_row = [line for line in readme._commands({name: table}) if "row Class-balanced" in line]
    assert ["dataset.subset_seed=4`" in line for line in by_row] == ["=4" in command] * (name == "2")


def test_tables_whose_seeds_have_subsets_of_their_own_are_known() -> None:
    found = {path.stem for path in (ROOT / "configs/table").glob("*.yaml") if "subset_seed=${seed}" in path.read_text()}
    assert found == set(tables.SUBSET_BY_SEED)


@pytest.mark.parametrize(
    ("name", "extra", "said"),
    [
        ("digits", ["recipe.epochs=80"], "Set for every run: recipe.epochs=80."),
        ("digits", ["recipe.milestones=[20,30]"], "Set for every run: recipe.milestones=[20.0,30.0]."),
        ("2", ["recipe.epochs=100", "tracking=off"], "Set for every run: recipe.epochs=100."),
        ("grid10", ["model.depth=20", "engine.dtype=bf16"], "Set for every run: model.depth=20."),
        ("ablation_digits", ["recipe.weight_decay=5e-4"], "Set for every run: recipe.weight_decay=0.0005."),
    ],
)
def test_a_table_shows_the_runs_that_set_has_changed(
    name: str, extra: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the places of the table's own, each run in its own; those are left out, be they ever so many."""
    official = made_up(reproduce_table.plan(name, [0, 1]))
    both = pd.concat([official, made_up(reproduce_table.plan(name, [0], extra))])
    expected = tables.build(name, official[official.seed == 0])
    shown = table_of(name, extra, both, monkeypatch, tmp_path)
    assert said in shown.caption and ("bf16" in shown.caption) == ("engine.dtype=bf16" in extra)
    assert [cell.values for cell in shown.cells()] == [cell.values for cell in expected.cells()]
    again = dict(word.split("=", 1) for word in shlex.split(shown.command)[2:])
    changed = again["SET"].split()
    asked, planned = (reproduce_table.plan(name, [0], words) for words in (extra, changed))
    assert [config.cell(run) for run in asked] == [config.cell(run) for run in planned]


def test_a_table_shows_the_dtype_that_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    half = ["engine.dtype=bf16"]
    both = pd.concat(
        [made_up(reproduce_table.plan("digits", [0, 1])), made_up(reproduce_table.plan("digits", [0], half))]
    )
    shown = table_of("digits", half, both, monkeypatch, tmp_path)
    assert "All runs of ours are in bf16." in shown.caption and "Set for" not in shown.caption
    assert "50 done runs in fp32 left out: not asked for." in shown.notes
    shown = table_of("digits", [], both, monkeypatch, tmp_path)
    assert {len(cell.values) for cell in shown.cells()} == {2}  # of any seed
    assert "25 done runs in bf16 left out: not asked for." in shown.notes and shown.command.endswith("SEEDS=0,1")


def test_a_table_shows_what_else_it_has_places_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of Table 2 the footnote's runs; of the digits no other schedule."""
    official = reproduce_table.plan("2", [0])
    dropped = [dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, drop=0.01)) for run in official]
    rows = made_up([*official, *(run for run in dropped if run.dataset.imbalance_factor == 1)])
    shown = table_of("2", [], rows, monkeypatch, tmp_path)
    [footnote] = [panel for panel in shown.panels if panel.title.startswith("IF 1 with")]
    assert all(cell.values for cell in footnote.cells())
    longer = reproduce_table.plan("digits", [0, 1], ["recipe.epochs=80"])
    shown = table_of("digits", [], made_up([*reproduce_table.plan("digits", [0]), *longer]), monkeypatch, tmp_path)
    assert "40 epochs" in shown.caption and {len(cell.values) for cell in shown.cells()} == {1}


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("seed=3", r"^--set seed=… is not for a table: give its seeds as --seeds"),
        ("loss.beta=0.5", r"^--set makes one run of several cells of the table \(digits_lt-if100-softmax-b0\.5-s0-"),
        ("loss=sigmoid", r"^--set makes one run of several cells of the table"),
        ("dataset.imbalance_factor=20", None),
    ],
)
def test_one_run_has_one_place_in_a_table(monkeypatch: pytest.MonkeyPatch, word: str, says: str | None) -> None:
    monkeypatch.setattr(sys, "argv", ["", "--dry", "--seeds", "0", "--set", word])
    if says:
        with pytest.raises(UserError, match=says):
            reproduce_table.main()
    else:
        reproduce_table.one_in_a_place(reproduce_table.plan_pairs("digits", [0], [word]))
        # what is changed in a row of the table may be what is changed in all
        reproduce_table.one_in_a_place(reproduce_table.plan_pairs("ablation", [0], ["model.prior_bias=false"]))
        with pytest.raises(UserError, match="makes one run of several cells"):
            reproduce_table.one_in_a_place(reproduce_table.plan_pairs("3", [0], ["model=resnet50"]))


def test_several_values_of_a_key_are_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["", "--dry", "--seeds", "0", "--set", "recipe.epochs=1,2"])
    with pytest.raises(
        UserError, match=r"makes several runs of one of the table's \(digits_lt-.*give one value for each key"
    ):
        reproduce_table.main()
    reproduce_table.one_in_a_place(reproduce_table.plan_pairs("digits", [0], ["engine.dtype=fp32,bf16"]))


def table_of(
    name: str, extra: list[str], rows: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> tables.Table:
    """What is shown of these rows when seed 0 is asked for."""
    shown: list[tables.Table] = []
    monkeypatch.setattr(
        reproduce_table.store, "read_folders", lambda _: store.Store(rows, pd.DataFrame(), pd.DataFrame())
    )
    monkeypatch.setattr(formats, "show", shown.append)
    words = ["--table", name, "--seeds", "0", "--out", str(folder), *(["--set", *extra] if extra else [])]
    monkeypatch.setattr(sys, "argv", ["", *words])
    asked = reproduce_table.arguments()
    reproduce_table.render(asked, None, reproduce_table.plan_pairs(name, [0], asked.set))
    return shown[0]


def test_several_set_are_all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce_table.py", "--set", "a=1", "b=2", "--set", "c=3"])
    assert reproduce_table.arguments().set == ["a=1", "b=2", "c=3"]


@pytest.mark.parametrize("table", ["grid10", "grid20", "grid100"])
def test_grids_are_the_papers(table: str) -> None:
    printed = paper.grids()
    printed = printed[printed.dataset == f"cifar{table.removeprefix('grid')}_lt"]
    assert {settings(run) for run in reproduce_table.plan(table, [0])} == cells(printed)


def test_ablation_changes_one_detail_at_a_time_or_the_three_of_most_ports() -> None:
    planned = reproduce_table.plan("ablation", [0])
    changes = Counter()
    for run in planned:
        changed = config.overrides(run) + ([run.loss.reduction] if run.loss.reduction != "batch" else [])
        assert len(changed) <= 1 or sorted(changed) == tables.AS_MOST_PORTS.split()
        changes[" ".join(sorted(changed)) or "official"] += 1
    assert changes["official"] == 8  # softmax and focal, plain and balanced, two data sets
    assert changes["weight_sum"] == 4  # without weights it is the official run
    assert changes["model.prior_bias=false"] == 4  # softmax has none
    assert changes['recipe.decay_scope="everything"'] == 4  # which is what the official code does for softmax
    assert changes[tables.AS_MOST_PORTS] == 8
    assert len(changes) == 13
    small = reproduce_table.plan("ablation_digits", [3])
    assert {run.dataset.subset_seed for run in small} == {3}  # a subset for each seed
    assert {tuple(sorted(config.overrides(run))) for run in small if changes_nothing(run)} == {
        tuple(tables.DIGITS[0].split())
    }


def changes_nothing(run: config.Run) -> bool:
    return len(config.overrides(run)) == len(tables.DIGITS[0].split()) and run.loss.reduction == "batch"


def words(folder: Path, *more: str) -> list[str]:
    small = ["recipe.epochs=1", "engine.eval_every=1", "tracking=off"]
    runs, out = str(folder / "runs"), str(folder / "out")
    return ["scripts/reproduce_table.py", "--seeds", "0", "--runs", runs, "--out", out, *more, "--set", *small]


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, *words(folder, *more)]


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """New processes import torch for seconds."""
    monkeypatch.setattr(processes, "count", lambda runs: 1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ("dataset.imbalance_factor=200", "dataset.imbalance_factor=200 does not suit digits_lt: "),
        ("dataset=folder", "There is no folder "),
    ],
)
def test_settings_that_suit_no_data_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_process: None, changes: str, sentence: str
) -> None:
    monkeypatch.setattr(sys, "argv", [*words(tmp_path, "--dry"), changes])
    with pytest.raises(UserError, match=f"^{sentence}"):
        reproduce_table.main()


def test_a_budget_of_nothing_trains_nothing(tmp_path: Path) -> None:
    """In the processes of a sweep: no run is begun there after the deadline."""
    done = subprocess.run(command(tmp_path, "--budget", "0"), cwd=ROOT, capture_output=True, text=True, check=True)
    assert "25 of 25 runs are left: the same command goes on with them." in done.stdout
    assert not list(tmp_path.glob("runs/*"))


def test_runs_of_a_sweep_take_one_thread_and_those_of_the_large_sets_all() -> None:
    small, large = reproduce_table.plan("2", [0])[0], reproduce_table.plan("3", [0])[0]
    assert reproduce_table.one_thread(small).engine.threads == 1
    assert config.run_id(reproduce_table.one_thread(small)) == config.run_id(small)
    assert reproduce_table.one_thread(large).engine.threads is None


def test_table_1_counts_the_sets_that_are_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "inaturalist2018"
    written = index.write(folder, "train", [f"{i}.jpg" for i in range(1002)], [0] * 1000 + [1] * 2, ["a", "b"])
    index.complete(folder, [written])
    asked = ["--table", "1", "--out", str(tmp_path / "out"), "--set", f"dataset.root={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["", *asked])
    assert reproduce_table.main() == 0
    table = (tmp_path / "out/tables/table1.md").read_text(encoding="utf-8")
    assert "| 500 | 500 = |" in table and "| 437,513 | 1,002 ≠ |" in table
    assert "Not checked: iNaturalist 2017, ILSVRC 2012." in table


def test_interrupted_three_times_ends_with_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_process: None
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for _ in range(3):
        process = subprocess.Popen(
            command(parts), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        before = len(list(parts.glob("runs/*/done")))
        while process.poll() is None and len(list(parts.glob("runs/*/done"))) == before:
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.5))
        os.kill(process.pid, signal.SIGKILL)  # its workers end by themselves
        process.wait()
    done = subprocess.run(command(parts), cwd=ROOT, check=True, capture_output=True, text=True)
    assert "25 runs: " in done.stdout
    monkeypatch.setattr(sys, "argv", [*words(whole), "engine.threads=1"])
    assert reproduce_table.main() == 0
    tables = [pd.read_csv(folder / "out/tables/digits.csv") for folder in (whole, parts)]
    pd.testing.assert_frame_equal(*tables)
    assert tables[0]["n"].max() == 1


def test_dry_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_process: None
) -> None:
    monkeypatch.setattr(sys, "argv", words(tmp_path, "--dry"))
    assert reproduce_table.main() == 0
    said = capsys.readouterr().out
    assert "25 runs: 0 done" in said and "of training on this machine" in said
    assert not (tmp_path / "runs").exists()


def test_published_runs_count_as_done_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = reproduce_table.plan("digits", [0])[0]
    record = records.new_record(run) | {"status": "done", "error_last": 20.0, "error_best": 19.0}
    folder = tmp_path / "elsewhere" / config.run_id(run)
    folder.mkdir(parents=True)
    records.write_record(folder, record)
    (folder / "done").touch()
    store.publish(store.read_folders([tmp_path / "elsewhere"]), tmp_path / "results")
    arguments = ["--dry", "--seeds", "0", "--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    for more, count in (([], 0), (["--reuse"], 1)):
        monkeypatch.setattr(sys, "argv", ["reproduce_table.py", *arguments, *more])
        assert reproduce_table.main() == 0
        assert f"25 runs: {count} done" in capsys.readouterr().out


def test_a_wrong_argument_is_one_sentence(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "scripts/reproduce_table.py", "--set", "loss.bta=1"], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 2 and ended.stderr == "Unknown key 'loss.bta'; did you mean 'loss.beta'?\n"


def test_any_path_will_do_for_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is no text of Hydra's grammar."""
    runs = tmp_path / "ü, (1) k=v {a}"
    [run] = [run for run in reproduce_table.plan("digits", [0]) if run.loss.kind == "softmax" and not run.loss.beta]
    record = records.new_record(run) | {"status": "failed", "failure": "made up"}
    (runs / config.run_id(run)).mkdir(parents=True)
    records.write_record(runs / config.run_id(run), record)
    monkeypatch.setattr(sys, "argv", ["", "--dry", "--seeds", "0", "--runs", str(runs)])
    assert reproduce_table.main() == 0
    assert "25 runs: 0 done, 0 half done, 1 failed before, 24 not begun." in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["", "--dry", "--set", f"output_dir={tmp_path}"])
    with pytest.raises(UserError, match="as --runs"):
        reproduce_table.main()


def test_a_record_that_cannot_be_read_stops_no_other_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_process: None
) -> None:
    planned = reproduce_table.plan("digits", [0])[:2]
    runs = [dataclasses.replace(run, output_dir=str(tmp_path)) for run in planned]
    for run in runs:
        folder = records.folder_of(run)
        folder.mkdir()
        (folder / "result.json").write_text("{")
    (records.folder_of(runs[0]) / "done").touch()
    reproduce_table.say_plan(runs[1:], set())
    assert "1 failed before" in capsys.readouterr().out
    short = [dataclasses.replace(run, engine=dataclasses.replace(run.engine, max_steps=1)) for run in runs[1:]]
    ended = resident.train([runs[0], *short])
    assert [record["status"] for record in ended] == ["failed", "done"]
    assert "cannot be read" in ended[0]["failure"]


def test_threads_that_were_asked_for_are_kept() -> None:
    run = config.Run(engine=config.Engine(threads=2))
    assert reproduce_table.one_thread(run) == run
    assert reproduce_table.one_thread(config.Run()).engine.threads == 1


def test_wrong_folders_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cases = {"--reuse --results": "has no runs.csv: give --results", "--out": "cannot be a folder"}
    for words, sentence in cases.items():
        command = [sys.executable, "scripts/reproduce_table.py", "--table", "1", *words.split(), str(tmp_path / "file")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr
