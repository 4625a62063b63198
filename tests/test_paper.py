"""The paper's numbers: complete, and consistent with one another where the paper gives one number twice."""

import pandas as pd
import pytest

from cbl import config, longtail, records
from cbl.errors import UserError
from cbl.report import paper, tables

CELL = ["dataset", "imbalance_factor"]
SETTING = [*CELL, "loss", "gamma", "beta"]
IMAGES = {"cifar10_lt": (10, 5000), "cifar20_lt": (20, 2500), "cifar100_lt": (100, 500)}  # classes, of the largest


def test_every_figure_is_there_once():
    grids, table2, table3 = paper.grids(), paper.table2(), paper.table3()
    assert len(grids) == 375 and not grids.duplicated(SETTING).any()
    assert grids.groupby(CELL).size().tolist() == [25] * 15
    assert set(grids["dataset"]) == set(IMAGES) and set(grids["beta"]) == set(paper.BETAS)
    assert set(grids["imbalance_factor"]) == set(paper.IMBALANCE_FACTORS) - {1}
    settings = {(row.loss, None if pd.isna(row.gamma) else row.gamma) for row in grids.itertuples()}
    assert settings == set(paper.LOSSES)
    assert len(table2) == 72 and not table2.duplicated([*CELL, "row"]).any()
    assert set(table2["row"]) == set(tables.LABELS)
    assert len(table3) == 54 and not table3.duplicated(["network", "loss", "image_size", "dataset", "metric"]).any()
    assert len(paper.table2_best()) == 12 and len(paper.table1()) == 20 and len(paper.cross_checks()) == 45


@pytest.mark.parametrize("read", [paper.grids, paper.table2, paper.table2_best, paper.table3, paper.cross_checks])
def test_types_are_those_of_runs_csv(read):
    frame = read()
    for name in set(frame) & set(records.COLUMNS):
        expected = pd.Series(dtype=records.COLUMNS[name][0]).dtype
        assert frame[name].dtype == expected, name


@pytest.mark.parametrize("read", [paper.grids, paper.table2, paper.table2_best, paper.table3])
def test_focal_alone_has_a_gamma(read):
    frame = read()
    assert (frame["gamma"].notna() == (frame["loss"] == "focal")).all()
    assert frame["beta"].notna().all()


def test_plain_rows_are_the_grids_at_beta_0():
    plain = paper.table2().query("row != 'class_balanced' and imbalance_factor > 1")
    both = plain.merge(paper.grids(), on=SETTING, suffixes=("", "_grid"), validate="one_to_one")
    assert len(both) == 50
    assert (both["error"] == both["error_grid"]).all()


def test_class_balanced_row_is_the_column_minimum_and_best_names_where():
    grids = paper.grids().query("dataset != 'cifar20_lt'")
    minimum = grids.loc[grids.groupby(CELL)["error"].idxmin()]
    assert not grids.merge(minimum[[*CELL, "error"]], on=[*CELL, "error"]).duplicated(CELL).any(), "a tie"
    balanced = paper.table2().query("row == 'class_balanced' and imbalance_factor > 1")
    both = balanced.merge(minimum, on=SETTING, suffixes=("", "_grid"), validate="one_to_one")
    assert len(both) == 10
    assert (both["error"] == both["error_grid"]).all()
    assert (both["beta"] > 0).all()


def test_balanced_data_sets_take_the_sigmoid_run():
    table = paper.table2().query("imbalance_factor == 1").set_index(["dataset", "row"])
    for dataset in ("cifar10_lt", "cifar100_lt"):
        balanced = table.loc[(dataset, "class_balanced")]
        assert balanced["error"] == table.loc[(dataset, "sigmoid"), "error"]
        assert balanced["loss"] == "sigmoid" and balanced["beta"] == 0 and pd.isna(balanced["gamma"])


@pytest.mark.parametrize(
    ("dataset", "factor", "loss", "gamma", "beta", "error"),
    [
        ("cifar10_lt", 200, "softmax", None, 0.9999, 31.11),
        ("cifar10_lt", 100, "focal", 1.0, 0.9999, 25.43),
        ("cifar20_lt", 100, "sigmoid", None, 0.999, 48.52),
        ("cifar100_lt", 10, "focal", 2.0, 0.0, 45.00),
        ("cifar100_lt", 200, "sigmoid", None, 0.9999, 76.82),
    ],
)
def test_cells_of_the_grids(dataset, factor, loss, gamma, beta, error):
    grids = paper.grids()
    same_gamma = grids["gamma"].isna() if gamma is None else grids["gamma"] == gamma
    row = grids[same_gamma & (grids[[*CELL, "loss", "beta"]] == [dataset, factor, loss, beta]).all(axis=1)]
    assert row["error"].tolist() == [error]


def test_cells_of_tables_2_and_3():
    table2 = paper.table2().set_index([*CELL, "row"])["error"]
    assert table2["cifar10_lt", 50, "focal_g0.5"] == 23.28
    assert table2["cifar100_lt", 1, "focal_g2"] == 28.52
    assert table2["cifar10_lt", 10, "class_balanced"] == 12.51
    table3 = paper.table3().set_index(["network", "loss", "image_size", "dataset", "metric"])["error"]
    assert table3["resnet50", "softmax", 224, "inaturalist2017", "top1"] == 45.38
    assert table3["resnet152", "focal", 320, "imagenet", "top5"] == 4.97
    assert table3["resnet101", "focal", 224, "inaturalist2018", "top1"] == 36.12


def test_table_1_has_the_counts_of_the_official_code():
    table = paper.table1()
    assert table.query("source == 'paper'")["n_train"].tolist() == [579184, 437513, 1281167]
    for row in table.query("source != 'paper'").to_dict("records"):
        classes, n_max = IMAGES[row["dataset"]]
        counts = longtail.class_counts(classes, row["imbalance_factor"], n_max)
        ends = row["classes"], row["largest_class"], row["smallest_class"]
        assert ends == (classes, counts[0], counts[-1])
        assert row["n_train"] == counts.sum()
        assert row["ratio"] == pytest.approx(counts[0] / counts[-1], abs=1e-4)


def test_copies_equal_the_paper_and_runs_of_others_do_not():
    checks = paper.cross_checks()
    known = pd.concat([paper.grids(), paper.table3().query("metric == 'top1'").assign(imbalance_factor=500.0)])
    known = {(row.dataset, row.loss, row.error) for row in known.itertuples()}
    same = [(row.dataset, row.loss, row.error) in known for row in checks.itertuples()]
    assert same == (checks["independent"] == "no").tolist()


def test_settings_are_those_of_runs():
    """A run of every cell of Table 2 would be found under its setting: the names are the ones that runs have."""
    for cell in paper.table2().to_dict("records"):
        loss = {"kind": cell["loss"], "beta": cell["beta"]}
        if not pd.isna(cell["gamma"]):
            loss["gamma"] = cell["gamma"]
        dataset = {"name": cell["dataset"], "imbalance_factor": cell["imbalance_factor"]}
        record = records.new_record(config.from_mapping({"dataset": dataset, "loss": loss}))
        gamma = None if pd.isna(cell["gamma"]) else cell["gamma"]
        assert [record[key] for key in SETTING] == [cell[key] for key in [*CELL, "loss"]] + [gamma, cell["beta"]]


def test_missing_file_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "FOLDER", tmp_path)
    with pytest.raises(UserError, match=r"grids\.csv is missing"):
        paper.grids()
