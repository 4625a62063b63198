"""The paper's numbers as DataFrames, read from results/paper (its README.md describes each file).

Settings have the names and types of runs.csv (`records.COLUMNS`), so that the two merge on them: `loss` is softmax,
sigmoid or focal, `gamma` is empty but for focal, `beta` is 0 without class balancing. Errors are in percent.
"""

from pathlib import Path

import pandas as pd

from cbl import records
from cbl.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "results" / "paper"
IMBALANCE_FACTORS = (200, 100, 50, 20, 10, 1)  # as the tables' columns run; the grids end at 10
BETAS = (0.0, 0.9, 0.99, 0.999, 0.9999)
LOSSES = (("softmax", None), ("sigmoid", None), ("focal", 0.5), ("focal", 1.0), ("focal", 2.0))  # kind, gamma
_PLAIN = {f"{loss}_g{gamma:g}" if gamma else loss: (loss, gamma) for loss, gamma in LOSSES}
# What runs.csv does not have.
_TYPES = {"classes": "Int64", "largest_class": "Int64", "smallest_class": "Int64", "ratio": "Float64"} | {
    "image_size": "Int64",
    "error": "Float64",
}


def table1() -> pd.DataFrame:
    """Table 1 and the counts behind it: one row per data set and imbalance factor, 20 in all."""
    return _read("table1")


def table2() -> pd.DataFrame:
    """The 72 cells of Table 2, each with its settings: dataset, imbalance_factor, row, loss, gamma, beta, error.

    `row` is one of `cbl.report.tables.LABELS`. The class-balanced row takes its settings from `table2_best`.
    """
    cells = _read("table2")
    best = table2_best().assign(row="class_balanced")
    plain = [
        {"dataset": d, "imbalance_factor": f, "row": row, "loss": loss, "gamma": gamma, "beta": 0.0}
        for d, f in zip(best["dataset"], best["imbalance_factor"], strict=True)
        for row, (loss, gamma) in _PLAIN.items()
    ]
    settings = pd.concat([_typed(pd.DataFrame(plain)), best])
    cells = cells.merge(settings, on=["dataset", "imbalance_factor", "row"], how="left", validate="one_to_one")
    return cells[["dataset", "imbalance_factor", "row", "loss", "gamma", "beta", "error"]]


def table2_best() -> pd.DataFrame:
    """What stands behind Table 2's class-balanced row, a row per column: dataset, imbalance_factor, loss, gamma, beta.

    At imbalance factor 1 all weights are 1 and the cell is the sigmoid run, beta 0.
    """
    return _read("table2_best")


def grids() -> pd.DataFrame:
    """Figs 8 to 10, 375 cells: dataset, imbalance_factor, loss, gamma, beta, error."""
    return _read("grids")


def table3() -> pd.DataFrame:
    """Table 3, 54 figures: network, loss, gamma, beta, image_size, dataset, metric (top1 or top5), error."""
    return _read("table3")


def cross_checks() -> pd.DataFrame:
    """What others report for the same settings; `independent` says whether they ran it (yes) or copied it (no)."""
    return _read("cross_checks")


def _read(name: str) -> pd.DataFrame:
    path = FOLDER / f"{name}.csv"
    try:
        return _typed(pd.read_csv(path, dtype="str", keep_default_na=False))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run from a checkout of the project, which has it.") from None


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    types = {name: kind for name, (kind, _) in records.COLUMNS.items()} | _TYPES
    types = {name: types.get(name, "str") for name in frame}
    numbers = [name for name, kind in types.items() if kind != "str"]
    return frame.assign(**{name: pd.to_numeric(frame[name]) for name in numbers}).astype(types)
