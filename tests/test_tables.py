"""From recorded runs to tables: on the miniature store, on runs made here, and on none at all."""

import dataclasses
import io
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import reproduce_table
from hypothesis import given
from hypothesis import strategies as st
from make_miniature import MINIATURE, run
from omegaconf import OmegaConf

from cbl import config, records, store
from cbl.errors import UserError
from cbl.report import formats, readme, tables
from cbl.report.tables import Cell, Panel, Table

SHORT = {"model": {"depth": 8}, "recipe": {"epochs": 60, "batch_size": 64, "milestones": [48.0]}}  # not the digits' own


@pytest.fixture(scope="module")
def miniature() -> pd.DataFrame:
    return store.read_folders([MINIATURE / "runs"]).runs


@pytest.fixture(scope="module")
def nothing(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    return store.load(tmp_path_factory.mktemp("results")).runs


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function from [(run, error), ...] to rows of runs.csv, by way of that file."""
    monkeypatch.setattr(records, "environment", lambda: {"commit": "synthetic", "torch": None, "versions": {}})

    def rows(*ends: tuple[Any, float]) -> pd.DataFrame:
        known = {"status": "done", "device": "synthetic"}
        found = [
            records.row(
                records.new_record(run)
                | known
                | {"error_last": error, "error_best": error - 0.25, "error_few": 2 * error}
            )
            for run, error in ends
        ]
        pd.DataFrame(found).to_csv(tmp_path / "runs.csv", index=False)
        return store.load(tmp_path).runs

    return rows


def at(panel: Panel, row: str, column: str) -> Cell:
    [cells] = [cells for label, cells in panel.rows if label == row]
    cell = cells[panel.columns.index(column)]
    assert cell is not None
    return cell


def on_subset(one: config.Run, subset_seed: int) -> config.Run:
    return dataclasses.replace(one, dataset=dataclasses.replace(one.dataset, subset_seed=subset_seed))


# -- what a table is made of -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cells"), [("digits", 25), ("2", 72), ("grid10", 125), ("grid20", 125), ("grid100", 125), ("3", 54)]
)
def test_without_runs_every_cell_is_a_gap(name: str, cells: int, nothing: pd.DataFrame) -> None:
    table = tables.build(name, nothing)
    assert len(table.cells()) == cells
    for panel in table.panels:
        assert all(not cell.values and cell.verdict == "–" for cell in panel.cells())
        assert all(formats.ours_text(cell) == formats.GAP for cell in panel.cells())
    assert "Nothing of this table was run yet." in table.caption
    assert (formats.tidy(table)["n"] == 0).all()


def test_the_papers_numbers_are_in_their_places(nothing: pd.DataFrame) -> None:
    ten, hundred, *_ = tables.build("2", nothing).panels
    assert ten.columns == ["IF 200", "IF 100", "IF 50", "IF 20", "IF 10", "IF 1"]
    assert at(ten, "Softmax", "IF 100").paper == 29.64
    assert at(ten, "Focal γ 0.5", "IF 1").paper == 6.75
    assert at(hundred, "Class-balanced", "IF 10").paper == 42.01
    assert at(hundred, "Class-balanced", "IF 10").setting[:5] == ("cifar100_lt", 10, "focal", 0.5, 0.999)
    assert at(hundred, "Gain of balancing", "IF 10").paper == pytest.approx(44.30 - 42.01)
    grid = tables.build("grid20", nothing).panels[0]
    assert at(grid, "Sigmoid β 0.99", "IF 200").paper == 54.82
    assert at(grid, "Focal γ 2.0 β 0.9999", "IF 10").paper == 30.90
    large = tables.build("3", nothing).panels[0]
    assert at(large, "ResNet-101, CB Focal γ 0.5 β 0.999, 320 px", "iNat 2018 top-5").paper == 14.27


def test_class_balanced_row_is_the_lowest_of_the_grid(nothing: pd.DataFrame) -> None:
    table2 = tables.build("2", nothing).panels
    for place, name in ((0, "grid10"), (1, "grid100")):
        grid = tables.build(name, nothing).panels[0]
        best = dict(table2[place].rows)["Class-balanced"]
        assert formats.lowest(grid, "paper") == [cell.paper for cell in best[:5] if cell is not None]


def test_unknown_table_is_one_sentence(nothing: pd.DataFrame) -> None:
    with pytest.raises(UserError, match=r"no table 'grid1'; did you mean 'grid1"):
        tables.build("grid1", nothing)


# -- which runs a cell holds -------------------------------------------------------------------------------------------


def test_cells_of_the_miniature(miniature: pd.DataFrame) -> None:
    table = tables.build("2", miniature)
    three = at(table.panels[0], "Softmax", "IF 100")
    mine = miniature[
        (miniature["loss"] == "softmax") & (miniature["imbalance_factor"] == 100) & (miniature["beta"] == 0)
    ]
    mine = mine[(mine["overrides"] == "") & (mine["dtype"] == "fp32") & (mine["dataset"] == "cifar10_lt")]
    assert len(mine) == 3
    assert three.values == tuple(mine.sort_values("seed")["error_last"])
    assert three.seeds == ("0", "1", "2")
    assert set(three.run_ids) == set(mine["run_id"])
    assert three.sd == pytest.approx(mine["error_last"].std())
    assert three.difference == pytest.approx(mine["error_last"].mean() - 29.64)
    assert three.verdict == "worse"
    assert three.best == tuple(mine.sort_values("seed")["error_best"])
    one = at(table.panels[0], "Focal γ 1.0", "IF 50")
    assert (len(one.values), one.sd) == (1, None)
    # failed, under way, killed while it was copied
    for panel, column in ((1, "IF 50"), (0, "IF 10"), (0, "IF 20")):
        assert at(table.panels[panel], "Softmax", column).values == ()
    for status in ("failed", "running"):
        assert not any(cell.values for cell in tables.build("2", miniature.assign(status=status)).cells())


def test_gains_are_paired_by_seed(miniature: pd.DataFrame, made: Any) -> None:
    cell = at(tables.build("grid10", miniature).panels[1], "Softmax β 0.9999", "IF 100")
    done = miniature[(miniature["dtype"] == "fp32") & (miniature["overrides"] == "") & (miniature["loss"] == "softmax")]
    done = done[(done["dataset"] == "cifar10_lt") & (done["imbalance_factor"] == 100)]
    errors = done.pivot_table(index="seed", columns="beta", values="error_last")
    assert cell.values == pytest.approx((errors[0.0] - errors[0.9999]).tolist())
    assert cell.paper == pytest.approx(29.64 - 27.63)
    # seeds 0 and 1 of the one, 1 and 2 of the other: one pair, and no interval
    ends = [(run("cifar10_lt", 50, "sigmoid", 0.0, seed), 20.0 + seed) for seed in (0, 1)]
    ends += [(run("cifar10_lt", 50, "sigmoid", 0.99, seed), 10.0 + 3 * seed) for seed in (1, 2)]
    cell = at(tables.build("grid10", made(*ends)).panels[1], "Sigmoid β 0.99", "IF 50")
    assert (cell.values, cell.seeds, cell.interval) == ((8.0,), ("1",), None)


def test_a_table_shows_one_dtype(made: Any) -> None:
    def ends(dtype: str, seeds: range) -> list:
        return [(run("cifar10_lt", 20, "softmax", 0.0, seed, engine={"dtype": dtype}), 17.0 + seed) for seed in seeds]

    for most, other in (("fp32", "bf16"), ("bf16", "fp32")):
        table = tables.build("grid10", made(*ends(most, range(3)), *ends(other, range(2))))
        assert at(table.panels[0], "Softmax", "IF 20").values == (17.0, 18.0, 19.0)
        assert f"All runs of ours are in {most}." in table.caption
        assert f"2 done runs in {other} left out: a table shows one dtype." in table.notes
    alone = (run("cifar10_lt", 10, "softmax", engine={"dtype": "bf16"}), 13.0)  # a gap all the same
    table = tables.build("grid10", made(*ends("fp32", range(2)), alone))
    assert at(table.panels[0], "Softmax", "IF 10").values == ()
    table = tables.build("2", made(*ends("bf16", range(2)), *ends("fp32", range(2))))
    assert "fp32" in table.caption  # of equals


@pytest.mark.parametrize(
    ("factor", "subsets", "says"), [(20, (0, 0), True), (20, (0, 1), False), (20, (0,), False), (1, (0, 0), False)]
)
def test_a_table_says_when_its_seeds_share_the_choice_of_images(
    made: Any, factor: int, subsets: tuple[int, ...], says: bool
) -> None:
    ends = [
        (on_subset(run("cifar10_lt", factor, "softmax", 0.0, seed), subset), 17.0)
        for seed, subset in enumerate(subsets)
    ]
    assert ("They share one choice of training images" in tables.build("grid10", made(*ends)).caption) == says


def test_runs_of_another_cell_are_never_averaged(made: Any) -> None:
    """Two of one setting whose names say that they differ in something that the table does not know."""
    rows = made(*((run("cifar10_lt", 20, "softmax", 0.0, seed), 17.0 + seed) for seed in range(3)))
    rows.loc[2, "cell"] += "-0123abcd"
    table = tables.build("grid10", rows)
    assert at(table.panels[0], "Softmax", "IF 20").values == (17.0, 18.0)
    assert "1 done run of another `cell` left out: these are never averaged." in table.notes


def test_seeds_are_named_in_short_where_they_are_in_a_row() -> None:
    for seeds, said in (((0,), "0"), ((0, 1, 2), "0,1,2"), (range(20), "0-19"), ((0, 1, 2, 5), "0,1,2,5")):
        assert tables.seed_words(list(seeds)) == said


def test_other_settings_stay_out_of_a_cell(made: Any) -> None:
    official = [(run("cifar10_lt", 100, "softmax", 0.9, seed), 30.0 + seed) for seed in (0, 1)]
    others = [
        (run("cifar10_lt", 100, "softmax", 0.9, seed, **changed), 50.0)
        for seed in (2, 3)
        for changed in (
            {"model": {"depth": 20}},
            {"recipe": {"epochs": 100}},
            {"recipe": {"weight_decay": 1e-3}},
            {"engine": {"max_steps": 10}},
        )
    ]
    cell = at(tables.build("grid10", made(*official, *others)).panels[0], "Softmax β 0.9", "IF 100")
    assert cell.values == (30.0, 31.0)


def test_subset_seeds_are_told_apart(made: Any) -> None:
    def end(seed: int, subset_seed: int, error: float) -> tuple:
        return on_subset(run("cifar100_lt", 10, "softmax", 0.0, seed), subset_seed), error

    cell = at(tables.build("2", made(end(0, 1, 43.0), end(0, 0, 44.0))).panels[1], "Softmax", "IF 10")
    assert (cell.seeds, cell.values) == (("0", "0.1"), (44.0, 43.0))


def test_balanced_column_and_its_footnote(made: Any) -> None:
    runs = made(
        (run("cifar10_lt", 1, "sigmoid"), 6.3),
        (run("cifar10_lt", 1, "sigmoid", recipe={"drop": 0.01}), 6.9),
        (run("cifar100_lt", 1, "softmax", recipe={"drop": 0.01}), 30.0),
    )
    table = tables.build("2", runs)
    assert at(table.panels[0], "Sigmoid", "IF 1").values == (6.3,)
    assert at(table.panels[0], "Class-balanced", "IF 1") == at(table.panels[0], "Sigmoid", "IF 1")
    assert dict(table.panels[0].rows)["Gain of balancing"][-1] is None
    assert at(table.panels[1], "Softmax", "IF 1").values == ()
    footnote = table.panels[2]
    assert footnote.title == "IF 1 with the ×0.01 drops" and footnote.apart
    assert at(footnote, "Sigmoid", "CIFAR-10").values == at(footnote, "Class-balanced", "CIFAR-10").values == (6.9,)
    assert at(footnote, "Softmax", "CIFAR-100").verdict == "agrees"
    assert len(table.cells()) == 72  # without the footnote
    assert table.notes[-1].endswith("recipe.drop=0.01 seed=0,1,2")
    in_bf16 = tables.build("2", made((run("cifar10_lt", 1, "sigmoid", engine={"dtype": "bf16"}), 6.3)))
    assert in_bf16.notes[-1].endswith("recipe.drop=0.01 seed=0,1,2 engine.dtype=bf16")


def test_ablation_pairs_each_change_with_the_official_run(miniature: pd.DataFrame, made: Any) -> None:
    panel = tables.build("ablation", miniature).panels[0]
    assert panel.rows[0][0] == "Default configuration (%)"
    assert len(at(panel, "Default configuration (%)", "Softmax").values) == 3
    strided = at(panel, "Shortcut: strided slice", "Softmax")
    errors = miniature[miniature["overrides"] == 'model.shortcut="strided"']["error_last"].tolist()
    official = at(panel, "Default configuration (%)", "Softmax").values[0]
    assert strided.values == pytest.approx((errors[0] - official,)) and strided.seeds == ("0",)

    def end(error: float, seed: int, beta: float = 0.0, **changed: dict) -> tuple:
        if "loss" in changed:
            changed = {"loss": {"kind": "focal", "beta": beta} | changed["loss"]}
        return run("cifar100_lt", 100, "focal", beta, seed, **changed), error

    runs = made(
        *(end(60.0 + seed, seed) for seed in (0, 1)),
        *(end(61.0 + 3 * seed, seed, recipe={"drop": 0.1}) for seed in (0, 1)),
        end(70.0, 0, recipe={"drop": 0.1}, model={"init": "kaiming"}),  # two details at once
        end(71.0, 0, recipe={"weight_decay": 1e-3}),  # none of the planned ones
        end(72.0, 0, engine={"max_steps": 10}),
        end(58.0, 0, beta=0.9),
        end(59.5, 0, beta=0.9, loss={"reduction": "weight_sum"}),
    )
    _, panel, _, _, _, gains = tables.build("ablation", runs).panels
    drop = at(panel, "Learning rate drops: ×0.1", "Focal γ 1.0")
    assert (drop.values, drop.interval) == ((1.0, 3.0), (1.0, 3.0))
    assert at(panel, "Initial weights: Kaiming", "Focal γ 1.0").values == ()
    assert at(panel, "recipe.weight_decay=0.001", "Focal γ 1.0").values == (11.0,)
    assert not any("max_steps" in label for label, _ in panel.rows)
    weighted = dict(panel.rows)["Loss divided by the sum of the drawn weights"]
    assert weighted[2] is None  # at beta 0 it divides by the same
    assert weighted[3] is not None and weighted[3].values == pytest.approx((1.5,))
    assert gains.title == "CIFAR-100, what balancing gains (points)" and gains.apart
    assert gains.columns == ["Softmax β 0.9", "Focal γ 1.0 β 0.9"]
    gained = {label: cells for label, cells in gains.rows if any(cell and cell.values for cell in cells)}
    assert {label: cells[1].values for label, cells in gained.items() if cells[1]} == {
        "Default configuration": (2.0,),
        "Loss divided by the sum of the drawn weights": (0.5,),  # against the default at beta 0
    }
    assert dict(gains.rows)["No prior in the last bias"][0] is None  # softmax has none


def test_pairs_trained_on_two_devices_are_named(made: Any) -> None:
    settings = [(beta, seed, drop) for beta in (0.0, 0.9999) for seed in (0, 1) for drop in (0.01, 0.1)]
    runs = made(
        *((run("cifar10_lt", 100, "focal", b, seed, recipe={"drop": drop}), 30.0) for b, seed, drop in settings)
    )
    names = "grid10", "ablation"
    noted = {name: tables.build(name, runs).notes for name in names}
    assert not any("devices" in note for notes in noted.values() for note in notes)
    runs.loc[(runs["beta"] == 0) & (runs["seed"] == 1) & (runs["overrides"] == ""), "device"] = "another"
    first = "Pairs trained on two devices, which round differently: "
    assert [tables.build(name, runs).notes for name in names] == [
        [*noted["grid10"], f"{first}Focal γ 1.0 β 0.9999 on CIFAR-10 IF 100 (1 of 2 pairs)."],
        [
            *noted["ablation"],
            f"{first}Focal γ 1.0 on CIFAR-10 IF 100 with recipe.drop=0.1 (1 of 2 pairs); Focal γ 1.0 β 0.9999 on "
            "CIFAR-10 IF 100 against β 0 (1 of 2 pairs).",
        ],
    ]
    runs["device"] = "another"
    assert {name: tables.build(name, runs).notes for name in names} == noted


def test_every_planned_run_of_the_ablation_on_digits_has_its_cell(made: Any) -> None:
    planned = reproduce_table.plan("ablation_digits", [0, 1])
    table = tables.build("ablation_digits", made(*((run, 10.0 + number) for number, run in enumerate(planned))))
    panel, fewest, gains = table.panels
    assert [len(cell.values) for cell in panel.cells()] == [len(cell.values) for cell in fewest.cells()] == [2] * 46
    assert [len(cell.values) for cell in gains.cells()] == [2] * 24  # every weighted run against one without weights
    assert {name for cell in panel.cells() for name in cell.run_ids} == {config.run_id(run) for run in planned}
    official = at(panel, "Default configuration (%)", "Focal γ 1.0 β 0.9999")
    assert official.seeds == ("0", "1.1")  # each on a subset of its own
    reduction = at(panel, "Loss divided by the sum of the drawn weights", "Softmax β 0.9999")
    assert reduction.values == (3.0, 3.0)  # planned three runs after the official one
    assert not panel.apart and fewest.apart  # the same runs once more
    few = at(fewest, "Loss divided by the sum of the drawn weights", "Softmax β 0.9999")
    assert (few.values, few.interval) == ((6.0, 6.0), (6.0, 6.0))
    assert at(fewest, "Default configuration (%)", "Softmax").values == (20.0, 112.0)  # twice 10 and 10 + 46


def test_every_planned_run_of_the_conditions_has_its_cell(made: Any) -> None:
    planned = reproduce_table.plan("conditions", [0, 1])
    runs = made(*((run, 10.0 + number) for number, run in enumerate(planned)))
    changes, fewest, errors = tables.build("conditions", runs).panels
    assert [len(cell.values) for cell in changes.cells()] == [2] * 16
    assert {name for cell in changes.cells() for name in cell.run_ids} == {config.run_id(run) for run in planned}
    assert [len(cell.values) for cell in errors.cells()] == [2] * 12
    prior = at(changes, "Warm-up over 20 epochs in place of 5", "Sigmoid, no prior")
    assert prior.values == (1.0, 1.0)  # planned right after the one with it
    assert at(fewest, "Warm-up over 20 epochs in place of 5", "Sigmoid, no prior").values == (2.0, 2.0)
    long = at(changes, "160 epochs in place of 40", "Focal γ 1.0, official stream")
    assert long.setting.epochs == 160 and "recipe.milestones=[128.0]" in long.setting.departures
    # what they change is no further detail of the ablation
    assert len(tables.build("ablation_digits", runs).panels[0].rows) == len(tables.DETAILS) + 1


@pytest.mark.parametrize("name", tables.DIVISIONS)
def test_every_planned_run_of_a_division_has_its_cell(name: str, made: Any) -> None:
    planned, columns = reproduce_table.plan(name, [0, 1]), len(tables.DIVISIONS[name].losses)
    runs = made(*((run, 10.0 + number) for number, run in enumerate(planned)))
    panel, fewest = tables.build(name, runs).panels
    assert [len(cell.values) for cell in panel.cells()] == [len(cell.values) for cell in fewest.cells()]
    assert {len(cell.values) for cell in panel.cells()} == {2} and len(panel.cells()) == 5 * columns
    assert {name for cell in panel.cells() for name in cell.run_ids} == {config.run_id(run) for run in planned}
    for place, (label, _) in enumerate(tables.DIVISIONS[name].rows(), 1):  # planned in the rows' order
        assert at(panel, label, "Softmax β 0.9999").values == (1.0 * columns * place,) * 2
        assert at(fewest, label, panel.columns[-1]).values == (2.0 * columns * place,) * 2
    more = [(run, 50.0) for run in reproduce_table.plan(name, [5])[:columns]]  # not all of that seed
    assert tables.build(name, pd.concat([runs, made(*more)])).panels[0] == panel
    # that learning rate is no further detail of the ablation
    assert len(tables.build("ablation_digits", runs).panels[0].rows) == len(tables.DETAILS) + 1


def test_what_balancing_gains_with_the_details_of_most_ports(made: Any) -> None:
    planned = reproduce_table.plan("ports", [0, 1])
    assert len(planned) == 8
    for run_ in planned:
        assert run_.dataset.name == "cifar10_lt" and run_.loss.kind == "softmax"
    ends = {(0.0, False): 35.0, (0.9999, False): 32.0, (0.0, True): 34.0, (0.9999, True): 33.5}
    runs = made(
        *((r, ends[r.loss.beta, r.model.init == "kaiming"] + r.seed) for r in planned),
        *((run("cifar10_lt", 200, "softmax", beta, 2), 90.0) for beta in (0.0, 0.9999)),
    )  # the default has more seeds
    panel, fewest, gains = tables.build("ports", runs).panels
    assert [cell.values for cell in panel.cells()] == [(35.0, 36.0), (32.0, 33.0), (-1.0, -1.0), (1.5, 1.5)]
    assert fewest.apart and not gains.apart
    assert [cell.values for cell in gains.cells()] == [(3.0, 3.0), (0.5, 0.5)]
    assert {name for cell in gains.cells() for name in cell.run_ids} == {config.run_id(r) for r in planned}
    [said] = readme._gains(tables.build("ports", runs))
    assert said.endswith("in 2 of 2 settings; the range of the 2 pairs is above zero in 2 and below zero in 0.")
    ablated = tables.build(
        "ablation", made(*((run("cifar10_lt", 100, "softmax", beta), 30.0) for beta in (0.0, 0.9999)))
    )
    assert at(ablated.panels[4], "Default configuration", "Softmax β 0.9999").values == (0.0,)
    assert readme._gains(ablated) == []  # Table 2 says it


def test_what_the_conditions_change_is_a_detail_of_cifar_as_any_other(made: Any) -> None:
    """`recipe.batch_size=64` is the digits' own, and that warm-up one of their conditions."""
    details = {"recipe.batch_size=64": {"batch_size": 64}, "recipe.warmup_epochs=20.0": {"warmup_epochs": 20}}
    changed = [(run("cifar10_lt", 100, "softmax", recipe=recipe), 31.0) for recipe in details.values()]
    table = tables.build("ablation", made((run("cifar10_lt", 100, "softmax"), 30.0), *changed))
    for word in details:
        cell = at(table.panels[0], word, "Softmax")
        assert cell.values == (1.0,)
        assert tables.full_label(cell.setting) == f"Softmax on CIFAR-10 IF 100 with {word}"


@pytest.mark.parametrize("name", ["ablation", "ablation_digits"])
def test_the_ablation_has_a_row_for_every_planned_detail(name: str) -> None:
    path = Path(__file__).parents[1] / f"configs/table/{name}.yaml"
    planned = OmegaConf.to_container(OmegaConf.load(path))["details"]
    rows = [sorted(word.replace('"', "").split()) for _, word in tables.DETAILS]  # as on a command line
    assert sorted(rows) == sorted(sorted([detail] if isinstance(detail, str) else detail) for detail in planned)


def test_moved_drops_are_rows_and_their_spread_a_sentence(made: Any, nothing: pd.DataFrame) -> None:
    planned = reproduce_table.plan("drop", [0, 1])
    assert len(planned) == 2 * 2 * len(tables.DROPS)
    assert all(run.recipe.milestones[0] + tables.AFTER_DROP == run.recipe.epochs for run in planned)
    table = tables.build("drop", made(*((run, 30.0 + number) for number, run in enumerate(planned))))
    assert [len(cell.values) for cell in table.cells()] == [2] * 14  # every planned run has its cell
    said = readme._moved(table)
    assert said[0] == "Softmax, seed 0: 30.00 to 42.00 % over 7 drops, standard deviation 4.32."
    assert [words.partition(":")[0] for words in said] == [
        "Softmax, seed 0",
        "Softmax, seed 1",
        "Softmax β 0.9999, seed 0",
        "Softmax β 0.9999, seed 1",
    ]
    assert readme._moved(tables.build("drop", made((planned[0], 30.0), (planned[2], 31.0)))) == []  # two say too little
    assert readme._moved(tables.build("drop", nothing)) == []


def test_digits_show_the_embedded_configuration_and_count_the_runs_of_others(made: Any) -> None:
    official = reproduce_table.plan("digits", [0], ["engine.dtype=fp32"])[0]
    others = [run("digits_lt", 100, "softmax", beta, seed, **SHORT) for beta in (0, 0.9) for seed in (0, 1)]
    others.append(run("digits_lt", 100, "softmax"))  # the defaults, which are made for CIFAR
    table = tables.build("digits", made((official, 20.0), *((other, 90.0) for other in others)))
    assert [cell.values for cell in table.cells() if cell.values] == [(20.0,)]
    assert table.caption.startswith("ResNet-8, 40 epochs, engine.eval_every=5 recipe.batch_size=64 ")
    assert table.notes == ["5 done runs with another network or schedule left out."]
    assert not table.panels[0].with_paper


def test_only_the_searches_that_table_2_took_its_best_from_say_so(nothing: pd.DataFrame) -> None:
    captions = {name: tables.build(name, nothing).caption for name in tables.GRIDS}
    assert [name for name, caption in captions.items() if "Table 2" in caption] == ["grid10", "grid100"]


def test_table1_computes_what_the_paper_has(nothing: pd.DataFrame) -> None:
    table = tables.build("1", nothing)
    checked = [cell for cell in table.panels[0].cells() if cell.setting.dataset in tables.SIZES]
    assert len(checked) == 17 * 5 and {cell.verdict for cell in checked} == {"equal"}
    assert at(table.panels[0], "CIFAR-100, IF 200", "largest / smallest").values == (250.0,)
    assert at(table.panels[0], "iNaturalist 2018", "images").values == ()
    assert table.notes == [
        "Not checked: iNaturalist 2017, iNaturalist 2018, ILSVRC 2012. `make reproduce-table TABLE=1` counts the "
        "images of those that `make data` has prepared."
    ]
    given = tables.build("1", nothing, {"inaturalist2018": [1000, 2, 7]})
    assert at(given.panels[0], "iNaturalist 2018", "largest / smallest").verdict == "equal"
    assert at(given.panels[0], "iNaturalist 2018", "images").verdict == "differs"
    assert formats.ours_text(at(given.panels[0], "iNaturalist 2018", "images")) == "1,009 ≠"
    assert "iNaturalist 2018" not in given.notes[0]
    rounded = tables.build("1", nothing, {"imagenet": [1300, 732], "inaturalist2017": [3919, 9]})  # to two decimals
    for name in ("ILSVRC 2012", "iNaturalist 2017"):
        assert at(rounded.panels[0], name, "largest / smallest").verdict == "equal"


def test_table3_takes_runs_of_the_large_sets(made: Any) -> None:
    def end(seed: int, error: float, size: int, **loss: Any) -> tuple:
        official = {"dataset.name": "inaturalist2018", "model.depth": 50, "engine.dtype": "bf16", "seed": seed}
        official |= config.official_large("inaturalist2018", loss["kind"]) | {"dataset.image_size": size}
        nested: dict[str, Any] = {"loss": loss}
        for key, value in official.items():
            group, _, name = key.rpartition(".")
            (nested.setdefault(group, {}) if group else nested)[name] = value
        return config.from_mapping(nested), error

    balanced = {"kind": "focal", "gamma": 0.5, "beta": 0.999}
    runs = made(end(0, 43.0, 224, kind="softmax"), end(0, 35.5, 320, **balanced), end(1, 36.0, 320, **balanced))
    panel = tables.build("3", runs).panels[0]
    assert at(panel, "ResNet-50, Softmax, 224 px", "iNat 2018 top-1").values == (43.0,)
    assert at(panel, "ResNet-50, CB Focal γ 0.5 β 0.999, 320 px", "iNat 2018 top-1").values == (35.5, 36.0)
    assert at(panel, "ResNet-50, CB Focal γ 0.5 β 0.999, 224 px", "iNat 2018 top-1").values == ()
    assert at(panel, "ResNet-50, Softmax, 224 px", "iNat 2018 top-5").values == ()


def test_table3_takes_loss_and_balancing_apart(made: Any) -> None:
    planned = reproduce_table.plan("3", [0])
    added = [run for run in planned if (run.loss.kind == "softmax") == (run.loss.beta > 0)]
    assert len(added) == 6 and len(planned) == 33
    runs = made(*((run, 40.0 + number) for number, run in enumerate(added)))
    apart = tables.build("3", runs).panels[1]
    assert apart.apart and [label for label, _ in apart.rows] == [
        "Softmax",
        "Softmax β 0.999",
        "Focal γ 0.5",
        "Focal γ 0.5 β 0.999",
    ]
    shown = [cell.values for _, cells in apart.rows for cell in cells if cell is not None and cell.values]
    assert sorted(value for values in shown for value in values) == [40.0 + number for number in range(6)]
    assert at(apart, "Softmax", "iNat 2018 top-5").paper == 21.31 and at(apart, "Focal γ 0.5", "iNat 2018 top-1").values


# -- written out -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=tables.NAMES)
def table(request: pytest.FixtureRequest, miniature: pd.DataFrame) -> Table:
    return tables.build(request.param, miniature)


def test_text_of_a_cell() -> None:
    setting = tables.Setting("cifar10_lt", 100.0, "softmax", None, 0.0)
    assert formats.ours_text(Cell("error", setting, 30.0, (29.0, 30.0, 31.0))) == "30.00 ± 1.00 (3) ≈"
    assert formats.ours_text(Cell("error", setting, 30.0, (20.0,))) == "20.00 (1) ↓"
    assert formats.ours_text(Cell("error", setting, None, (20.0, 21.0))) == "20.50 ± 0.71 (2)"
    assert (
        formats.ours_text(Cell("gain", setting, 1.0, (-2.0, 1.0), interval=(-2.0, 1.0))) == "−0.50 [−2.00, +1.00] (2)"
    )
    assert formats.ours_text(Cell("error", setting, 30.0)) == "–"
    assert formats.paper_text(Cell("gain", setting, 1.0)) == "+1.00"


def test_csv_holds_every_run_and_reads_back(table: Table, miniature: pd.DataFrame, tmp_path: Path) -> None:
    paths = {path.suffix: path for path in formats.write(table, tmp_path / "tables")}
    lines = pd.read_csv(paths[".csv"], dtype={"seeds": "str", "values": "str"})
    assert len(lines) == sum(
        cell.kind != "best" for panel in table.panels for cell in panel.cells()
    )  # best-on-test is a column
    by_run = miniature.set_index("run_id")
    for line in lines[lines["n"] > 0].to_dict("records"):
        values = [float(value) for value in line["values"].split()]
        assert len(values) == line["n"]
        assert np.mean(values) == pytest.approx(line["mean"], abs=1e-3)
        if line["kind"] == "error":
            column = "error_few" if line["panel"].endswith(tables.FEWEST) else "error_last"
            assert values == [round(by_run.loc[name, column], 4) for name in line["run_ids"].split()]
            assert len(line["seeds"].split()) == line["n"]
            assert column == "error_few" or line["best_on_test_mean"] < line["mean"]
        if line["kind"] == "error" and line["paper"] > 0:
            assert line["difference"] == pytest.approx(line["mean"] - line["paper"], abs=1e-3)
            assert line["verdict"] in ("agrees", "better", "worse")
    assert lines[lines["n"] == 0]["mean"].isna().all()


def test_markdown_rows_have_all_their_columns(table: Table) -> None:
    written = formats.markdown(table)
    assert table.command in written and table.caption in written
    for panel in table.panels:
        lines = formats.panel_markdown(panel)
        assert "\n".join(lines) in written
        assert len(lines) == 2 + len(panel.rows)
        assert {line.count("|") for line in lines} == {lines[1].count("|")}


def test_markdown_marks_the_lowest(nothing: pd.DataFrame) -> None:
    lines = formats.panel_markdown(tables.build("grid100", nothing).panels[0])
    assert sum(line.count("**") for line in lines) == 2 * 5
    assert any(line.startswith("| Focal γ 1.0 β 0.9 | **63.77** | – | **60.40** |") for line in lines)


def test_latex_is_balanced_ascii(table: Table) -> None:
    written = formats.latex(table)
    assert written.isascii()
    bare = re.sub(r"\\[{}]", "", written)
    depth = np.cumsum([{"{": 1, "}": -1}.get(c, 0) for c in bare])
    assert depth.min() == 0 and depth[-1] == 0
    for name in ("table", "tabular"):
        assert written.count(rf"\begin{{{name}}}") == written.count(rf"\end{{{name}}}") == len(table.panels)
    for body in re.findall(r"\\midrule\n(.*?)\\bottomrule", written, re.DOTALL):
        assert len({len(re.findall(r"(?<!\\)&", line)) for line in body.strip().split("\n")}) == 1


def test_latex_counts_pairs_where_a_cell_is_of_pairs(made: Any) -> None:
    ends = [(run("cifar10_lt", 50, "softmax", beta, seed), 20.0) for beta in (0.0, 0.9) for seed in (0, 1, 2)]
    errors, gains, _ = formats.latex(tables.build("grid10", made(*ends))).split(r"\end{table}")[:3]
    assert "3 runs in each cell" in errors and "3 pairs in each cell" in gains


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles(miniature: pd.DataFrame, tmp_path: Path) -> None:
    names = [path for name in tables.NAMES for path in formats.write(tables.build(name, miniature), tmp_path)]
    inputs = "\\clearpage\n".join(rf"\input{{{path.stem}}}" for path in names if path.suffix == ".tex")
    packages = r"\usepackage{booktabs,graphicx}"
    document = rf"\documentclass{{article}}{packages}\begin{{document}}{inputs}\end{{document}}"
    (tmp_path / "all.tex").write_text(document, encoding="ascii")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout


@given(st.text(st.sampled_from('aZ09 &%$#_{}~^\\<>|"–−±≈↓↑≠βγ×√²')))
def test_escape_leaves_no_special_character_bare(words: str) -> None:
    escaped = formats.escape(words)
    assert escaped.isascii()
    rest = re.sub(r"\$[^$]+\$|\\[a-z]+\{\}|\\[&%$#_{}]", "", escaped)  # a formula, a command, an escaped character
    assert not set(rest) & set('&%$#_{}~^\\<>|"')


def test_terminal_output_is_plain_and_whole_in_a_file(table: Table) -> None:
    file = io.StringIO()
    formats.show(table, file)
    said = file.getvalue()
    assert "\x1b" not in said and max(map(len, said.splitlines())) <= 200
    for panel in table.panels:
        for cell in panel.cells():
            if cell.kind in ("error", "gain", "difference") and not panel.apart:
                assert cell.paper is None or formats.paper_text(cell) in said
                assert cell.mean is None or formats.text(cell.mean, cell.kind) in said
    assert " ".join(table.caption.split()) in " ".join(said.split())


def test_narrow_terminal_folds_the_columns(miniature: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    table = tables.build("2", miniature)
    formats.show(table, file)
    said = re.sub(r"\x1b\[[\d;]*m", "", file.getvalue())
    assert max(map(len, said.splitlines())) <= 60
    for cell in table.cells():
        assert formats.paper_text(cell) in said
        assert cell.mean is None or formats.text(cell.mean, cell.kind) in said
