"""What the published runs say, in sentences made from data: the README's results block, and the head of the page.

The block stands in README.md between two markers; a test fails when it is not what results/ gives.
"""

import statistics
from collections import Counter
from collections.abc import Mapping

import pandas as pd

from cbl import store
from cbl.errors import UserError
from cbl.report import tables
from cbl.report.formats import ours_text, panel_markdown, paper_text, signed
from cbl.report.tables import BOLD, LABELS, TITLES, Cell, Panel, Setting, Table, plural
from cbl.report.verdict import bootstrap, interval_name, verdict

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
STACKED = "Ours above, the paper below."
NAMED = 3  # cells named in a sentence; the others are counted


def block(runs: pd.DataFrame, built: Mapping[str, Table] | None = None) -> str:
    """The results block from rows of runs.csv, markers included. built: all tables of them, where they are at hand."""
    built = built or {name: tables.build(name, runs) for name in tables.NAMES}
    lines = [BEGIN, "<!-- Made by `make tables` from results/runs.csv. -->", "", " ".join(what_was_run(runs)), ""]
    for name, legend_of_bold, written in (("digits", BOLD, panel_markdown), ("2", STACKED, _stacked)):
        table = built[name]
        if any(cell.values for cell in table.cells()):
            legend = table.legend.replace(BOLD, legend_of_bold)
            lines += [f"### {table.title}", "", f"{table.caption} {legend}", ""]
            for panel in table.panels[:2]:
                lines += [f"**{panel.title}**", "", *written(panel), ""]
    if said := findings(built, runs):
        lines += ["### What agrees, and what does not", "", *(f"- {sentence}" for sentence in said), ""]
    lines += ["### What was not run", "", *(f"- {sentence}" for sentence in not_run(built)), ""]
    lines += ["### Which command gives what", "", *_commands(built), "", END]
    return "\n".join(lines)


def replace_block(readme: str, new: str) -> str:
    """The README with `new` for its results block; raises `UserError` unless both markers are there, once each."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise UserError(f"The README has no one place for results: it needs a line {BEGIN} and below it a line {END}.")
    return readme[: readme.index(BEGIN)] + new + readme[readme.index(END) + len(END) :]


# -- sentences ---------------------------------------------------------------------------------------------------------


def what_was_run(runs: pd.DataFrame) -> list[str]:
    """How many runs, of what, with which seeds, in which arithmetic, on what, from which code; plainly when none."""
    done = runs[(runs["status"] == "done") & runs["error_last"].notna()]
    failed = int((runs["status"] == "failed").sum())
    said = []
    if done.empty:
        said.append("Nothing was run yet: no result of ours is published, and every table is a gap.")
    else:
        sets = ", ".join(f"{TITLES.get(name, name)} ({n:,})" for name, n in Counter(done["dataset"]).items())
        hours = (done["seconds"].astype("float") / done["lanes"].astype("float").fillna(1)).sum() / 3600
        said += [
            f"{plural(len(done), 'run')} of {plural(done['cell'].nunique(), 'setting')}: {sets}.",
            f"Seeds {_numbers(done['seed'])}, subset seeds {_numbers(done['subset_seed'])}; {_counted(done['dtype'])}.",
            f"{hours:,.1f} hours on {_counted(done['device'])}; code at {_counted(done['commit'], most=3)}.",
        ]
    return [*said, f"{plural(failed, 'run')} failed and left no number."] if failed else said


def findings(built: Mapping[str, Table], runs: pd.DataFrame) -> list[str]:
    """What the tables say about the paper: agreement cell by cell, gains of class balancing, details that matter.

    Last, what another arithmetic than fp32 does to the error.
    """
    said = []
    compared: dict[str, str] = {}  # run id -> the first table that compared it with the paper
    for table in built.values():
        if sentences := _agreement(table) + _gains(table) + _changes(table) + _moved(table):
            mine = {run_id for cell in table.cells() if cell.paper is not None for run_id in cell.run_ids}
            before = {compared[run_id] for run_id in mine if run_id in compared}
            known = f" (runs of {' and '.join(sorted(before))})" if before and mine <= compared.keys() else ""
            said.append(f"{table.short}{known}: {' '.join(sentences)}")
            compared = {**dict.fromkeys(mine, table.short), **compared}
    return said + _dtypes(runs)


def not_run(built: Mapping[str, Table]) -> list[str]:
    """Per table how many of its cells are gaps."""
    said = []
    for table in built.values():
        cells = _asked(table)
        gaps = sum(not cell.values for cell in cells)
        if gaps:
            said.append(f"{table.short}: {'all' if gaps == len(cells) else gaps} of {len(cells)} cells.")
    return said or ["Nothing: every cell of every table has a run."]


def _asked(table: Table) -> list[Cell]:
    """The cells that runs of their own fill."""
    kinds = ("error", "difference", "count")
    return [cell for panel in table.panels if not panel.apart for cell in panel.cells() if cell.kind in kinds]


def _agreement(table: Table) -> list[str]:
    # by setting: at imbalance factor 1 of Table 2 two cells are one run; with top-1 and top-5 one run is two numbers
    run = {(cell.setting, cell.paper): cell for cell in table.cells() if cell.values and cell.paper is not None}
    if not run:
        return []
    count = Counter(cell.verdict for cell in run.values())
    mean = sum(cell.difference or 0.0 for cell in run.values()) / len(run)
    said = [
        f"{plural(len(run), 'number')} compared, {count['agrees']} within two standard errors of the paper, "
        f"{count['better']} better, {count['worse']} worse, {signed(mean)} points on average."
    ]
    # of those that the paper has with and without balancing, how many could be either
    gains = {cell.setting: cell.paper for panel in table.panels for cell in panel.cells() if cell.kind == "gain"}
    balanced = [(cell, gains[cell.setting]) for cell in run.values() if gains.get(cell.setting) is not None]
    either = sum(verdict((cell.paper or 0.0) + (gain or 0.0), cell.values) == "agrees" for cell, gain in balanced)
    if either:
        said.append(
            f"The band is wide: of our {len(balanced)} class-balanced numbers {either} would also agree with what the "
            "paper reports without balancing."
        )
    for judged in ("better", "worse"):
        apart = [cell for cell in run.values() if cell.verdict == judged]
        if apart:
            apart.sort(key=lambda cell: -abs(cell.difference or 0.0))
            said.append(f"{judged.capitalize()}: {_listed(apart, [cell.difference or 0.0 for cell in apart])}.")
    return said


def _gains(table: Table) -> list[str]:
    headline = [cell for panel in table.panels if not panel.apart for cell in panel.cells()]
    gains = [cell for cell in headline if cell.kind == "gain" and cell.values]
    if not gains:
        return []
    paired = [cell for cell in gains if cell.interval]
    positive = sum((cell.mean or 0.0) > 0 for cell in gains)
    surely = sum(cell.interval[0] > 0 for cell in paired)
    harmful = sum(cell.interval[1] < 0 for cell in paired)
    better = (
        f"Class balancing has a lower error than the same loss without it in {positive} of "
        f"{plural(len(gains), 'setting')}"
    )
    if not paired:
        return [f"{better}, from one pair of runs each, which gives no interval."]
    interval = interval_name(*(len(cell.values) for cell in paired))
    which = f"; of the {len(paired)} with more than one pair of runs the" if len(paired) < len(gains) else "; the"
    return [f"{better}{which} {interval} is above zero in {surely} and below zero in {harmful}."]


def _changes(table: Table) -> list[str]:
    by_panel = [(panel.apart, cell) for panel in table.panels for cell in panel.cells() if cell.kind == "difference"]
    changes = [cell for apart, cell in by_panel if cell.values and not apart]
    fewest = {cell.setting: cell.mean for apart, cell in by_panel if apart}
    if not changes:
        return []
    changes.sort(key=lambda cell: -abs(cell.mean or 0.0))
    paired = [cell for cell in changes if cell.interval]
    lone = [cell for cell in changes if not cell.interval]
    clear = [cell for cell in paired if cell.interval[0] > 0 or cell.interval[1] < 0]
    said = []
    if paired:
        interval = interval_name(*(len(cell.values) for cell in paired))
        leaves = f"in {len(clear)} of them the {interval} leaves out zero"
        said.append(f"{plural(len(paired), 'change')} tried; {leaves}{_named(clear, fewest)}.")
    if lone:
        named = _named(lone, fewest)
        said.append(f"{plural(len(lone), 'change')} tried with one pair of runs each, which gives no interval{named}.")
    return said


def _moved(table: Table) -> list[str]:
    """How far the error of one seed goes apart when only the epoch of the drop is another."""
    said = []
    for place, column in enumerate(table.panels[0].columns if table.name == "drop" else []):
        by_seed: dict[str, list[float]] = {}
        for _, cells in table.panels[0].rows:
            for seed, value in zip(cells[place].seeds, cells[place].values, strict=True):
                by_seed.setdefault(seed, []).append(value)
        for seed, values in by_seed.items():
            if len(values) >= 3:
                ends = f"{min(values):.2f} to {max(values):.2f} % over {len(values)} drops"
                said.append(f"{column}, seed {seed}: {ends}, standard deviation {statistics.stdev(values):.2f}.")
    return said


def _dtypes(runs: pd.DataFrame) -> list[str]:
    """Every dtype against fp32, by data set, on pairs of runs that are alike in all else, seeds included."""
    done = runs[(runs["status"] == "done") & runs["error_last"].notna()]
    alike = [*store.SETTING, "seed", "subset_seed"]
    paired = done.merge(done[done["dtype"] == "fp32"], on=alike, suffixes=("", "_fp32"))
    said = []
    for dtype, of_dtype in paired[paired["dtype"] != "fp32"].groupby("dtype"):
        sets = []
        for name, found in of_dtype.groupby("dataset", sort=False):
            gain = bootstrap((found["error_last"] - found["error_last_fp32"]).astype("float").tolist())
            interval = ""
            if gain.interval:
                interval = f" [{interval_name(gain.n)} {signed(gain.interval[0])}, {signed(gain.interval[1])}]"
            sets.append(f"{TITLES.get(name, name)} {signed(gain.mean)}{interval} ({plural(gain.n, 'pair')})")
        said.append(
            f"Arithmetic: the error in {dtype} minus that in fp32, in points, of runs that differ in dtype alone: "
            f"{', '.join(sets)}."
        )
    return said


def _named(cells: list[Cell], fewest: Mapping[Setting, float | None]) -> str:
    return f": {_listed(cells, [cell.mean or 0.0 for cell in cells], fewest)}" if cells else ""


def _listed(cells: list[Cell], points: list[float], fewest: Mapping[Setting, float | None] | None = None) -> str:
    """The first cells, each with its points and those of its classes with the fewest images, where they are known."""
    names = []
    for cell, value in list(zip(cells, points, strict=True))[:NAMED]:
        few = (fewest or {}).get(cell.setting)
        tail = "" if few is None else f", in {tables.FEWEST} {signed(few)}"
        names.append(f"{tables.full_label(cell.setting)} ({signed(value)}{tail})")
    more = f" and {len(cells) - NAMED} more" if len(cells) > NAMED else ""
    return "; ".join(names) + more


def _numbers(column: pd.Series) -> str:
    """`0, 1, 2`, and `0 to 19` when there are more than a few."""
    values = sorted(column.dropna().unique())
    if len(values) > 5 and values[-1] - values[0] == len(values) - 1:
        return f"{values[0]} to {values[-1]}"
    return ", ".join(map(str, values))


def _counted(column: pd.Series, most: int | None = None) -> str:
    """`fp32` when it is the same for all, else each, or the `most` frequent ones, with its number of runs."""
    count = Counter(value if isinstance(value, str) and value else "unknown" for value in column)
    if len(count) == 1:
        return next(iter(count))
    named = [f"{name} ({n:,})" for name, n in count.most_common(most)]
    more = len(count) - len(named)
    return ", ".join(named) + (f" and {more} more, in runs.csv" if more else "")


# -- Markdown ----------------------------------------------------------------------------------------------------------


def _stacked(panel: Panel) -> list[str]:
    """A panel as narrow as it can be: ours over the paper's number."""
    lines = [f"|  | {' | '.join(panel.columns)} |", f"|:--|{'--:|' * len(panel.columns)}"]
    for label, cells in panel.rows:
        words = ["" if cell is None else f"{ours_text(cell)}<br>{paper_text(cell)}" for cell in cells]
        lines.append(f"| {label} | {' | '.join(words)} |")
    return lines


def _commands(built: Mapping[str, Table]) -> list[str]:
    """One command per table, and per row of Table 2, each with seeds, dtype and images of the published runs."""

    def done(cells: list[Cell]) -> str:
        return f"{sum(bool(cell.values) for cell in cells)} of {len(cells)}"

    lines = ["| what | command | cells |", "|:--|:--|--:|"]
    for name, table in built.items():
        lines.append(f"| {table.title} | `{table.command}` | {done(_asked(table))} |")
        if name != "2":
            continue
        for loss, label in LABELS.items():
            command = f"python scripts/train.py -m sweep=imbalance dataset=cifar10_lt,cifar100_lt loss={loss}"
            if loss == "class_balanced":
                command = "python scripts/train.py -m 'experiment=glob(table2_*)'"
            command += f" seed={','.join(map(str, table.seeds or (0, 1, 2)))}"
            command = " ".join([command, *table.arithmetic_and_images])
            rows = [cells for panel in table.panels[:2] for words, cells in panel.rows if words == label]
            lines.append(f"| row {label} | `{command}` | {done([cell for row in rows for cell in row if cell])} |")
    return lines
