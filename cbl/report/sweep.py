"""What the runs of a sweep come to, in lines for the terminal: the error of every setting, and what balancing gains."""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cbl import config, records
from cbl.report.formats import signed
from cbl.report.verdict import Row, bootstrap, interval_name, pairs


def lines(ended: Sequence[Row]) -> list[str]:
    """Of every `cell` the mean error over its runs, and the gain over the same loss at beta 0 on pairs of runs.

    ended: records as `resident.train` returns them; only runs that are done count. Where the test set is so skewed
    that it matters, the same of the mean error over the classes. Of own images under several beta, that the best was
    chosen on the test set. [] where no cell has a second run or a baseline: then the runs' own lines say it all.
    """
    cells: dict[str, list[Row]] = {}
    for record in ended:
        if record["status"] == "done":
            cells.setdefault(record["cell"], []).append(record)
    paired = {cell: pairs(cells.get(_baseline(rows[0]), []), rows) for cell, rows in cells.items() if rows[0]["beta"]}
    counts = [len(both) for both in paired.values() if both]
    if all(len(rows) == 1 for rows in cells.values()) and not counts:
        return []
    said = ["Test error after the last step, %: mean ± standard deviation (runs)"]
    if counts:
        interval = f" [{interval_name(*(n for n in counts if n > 1))}]" if max(counts) > 1 else ""
        said[0] += f"; how much lower than at beta 0 with the same seed{interval} (pairs)"
    said += _measured(operator.itemgetter("error_last"), cells, paired)
    if any(records.is_skewed(row) for rows in cells.values() for row in rows):
        said += ["Mean over the classes, %, likewise", *_measured(records.class_mean, cells, paired)]
    if len({row["beta"] for rows in cells.values() for row in rows if row["dataset"] == "folder"} - {0.0}) > 1:
        said.append(
            "The lowest error of several β is low by chance too: to know it, measure that β on images that no β was "
            "chosen on."
        )
    return said


def _baseline(record: Row) -> str:
    run = config.from_mapping(record["config"])
    return config.cell(dataclasses.replace(run, loss=dataclasses.replace(run.loss, beta=0.0)))


def _measured(
    error: Callable[[Row], float], cells: Mapping[str, list[Row]], paired: Mapping[str, list[tuple[Row, Row]]]
) -> list[str]:
    rows = []
    for cell, runs in cells.items():
        values = [error(run) for run in runs]
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        words = ""
        if gain := bootstrap([error(base) - error(run) for base, run in paired.get(cell, [])]):
            interval = f" [{signed(gain.interval[0])}, {signed(gain.interval[1])}]" if gain.interval else ""
            words = f"{signed(gain.mean)}{interval} ({gain.n})"
        rows.append((cell, f"{np.mean(values):.2f}{spread} ({len(values)})", words))
    wide = [max(len(row[at]) for row in rows) for at in (0, 1)]
    return [f"  {cell:<{wide[0]}}  {mean:<{wide[1]}}  {gain}".rstrip() for cell, mean, gain in rows]
