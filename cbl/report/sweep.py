"""What the runs of a sweep come to, in lines for the terminal: the error of every setting, and what balancing gains."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cbl import config, records
from cbl.report.formats import signed
from cbl.report.verdict import Row, bootstrap, interval_name, pairs


def lines(ended: Sequence[Row]) -> list[str]:
    """Of every `cell` the mean error over its runs, and the gain over the same loss at beta 0 on pairs of runs.

    ended: records as `resident.train` returns them; only runs that are done count. Where the test set is so skewed
    that it matters, the same of the mean error over the classes. [] where no cell has a second run or a baseline: then
    the runs' own lines say it all.
    """
    cells: dict[str, list[Row]] = {}
    for record in ended:
        if record["status"] == "done":
            cells.setdefault(record["cell"], []).append(record)
    baselines = {cell: _baseline(rows[0]) for cell, rows in cells.items() if rows[0]["beta"]}
    if all(len(rows) == 1 for rows in cells.values()) and not cells.keys() & set(baselines.values()):
        return []
    said = _measured("Test error after the last step, %", "error_last", cells, baselines)
    means: dict[str, list[Row]] = {
        cell: [{**row, "class_mean": records.class_mean(row)} for row in rows] for cell, rows in cells.items()
    }
    if any(abs(row["class_mean"] - row["error_last"]) > 0.005 for rows in means.values() for row in rows):
        said += _measured("The same as a mean over the classes, %", "class_mean", means, baselines)
    return said


def _baseline(record: Row) -> str:
    run = config.from_mapping(record["config"])
    return config.cell(dataclasses.replace(run, loss=dataclasses.replace(run.loss, beta=0.0)))


def _measured(title: str, column: str, cells: dict[str, list[Row]], baselines: dict[str, str]) -> list[str]:
    rows, counts = [], []
    for cell, runs in cells.items():
        values = [run[column] for run in runs]
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        gain = ""
        both = pairs(cells.get(baselines.get(cell, ""), []), runs)
        if mean := bootstrap([base[column] - run[column] for base, run in both]):
            interval = f" [{signed(mean.interval[0])}, {signed(mean.interval[1])}]" if mean.interval else ""
            gain = f"{signed(mean.mean)}{interval} ({mean.n})"
            counts.append(mean.n)
        rows.append((cell, f"{np.mean(values):.2f}{spread} ({len(values)})", gain))
    what = ": mean ± standard deviation (runs)"
    if counts:
        interval = f" [{interval_name(*counts)}]" if max(counts) > 1 else ""
        what += f"; by how much it is lower than at beta 0 with the same seed{interval} (pairs)"
    wide = [max(len(row[at]) for row in rows) for at in (0, 1)]
    return [f"{title}{what}", *(f"  {c:<{wide[0]}}  {e:<{wide[1]}}  {g}".rstrip() for c, e, g in rows)]
